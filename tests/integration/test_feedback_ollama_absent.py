"""The example without a model server, each time in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys

from feedback_summaries import store


def test_loading_the_job_type_loads_neither_a_web_framework_nor_an_http_client() -> None:
    script = (
        "import sys, feedback_summaries\n"
        "from laneway.engine.registry import registry\n"
        "heavy = {'httpx', 'fastapi', 'aiohttp', 'uvicorn'}\n"
        "print('feedback.summary' in registry, *heavy & set(sys.modules))\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]


def test_another_process_with_another_hash_seed_picks_the_same() -> None:
    script = (
        "from feedback_summaries import store\n"
        "from feedback_summaries.summariser import Extractive\n"
        "for e in store.evaluations():\n"
        "    comments = [c.text for c in e.students[0].comments]\n"
        "    print(ascii(Extractive().summarise(comments, progress=lambda f, m: None)))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("Summary(") == len(store.evaluations())
