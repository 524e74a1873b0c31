"""`laneway demo`, the first command of the README: it works, says so, and cleans up."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from laneway_process import Running, alive, family, laneway, member
from webhook_receiver import Receiver, in_turn

QUICK = {"FEEDBACK_SUMMARIES_PACE_SECONDS": 0}


def summed(out: str, pattern: str) -> list[int]:
    """The numbers in the one line of the report that fits."""
    found = re.search(pattern, out)
    assert found, out
    return [int(number) for number in found.groups()]


def test_every_summary_completes_and_every_webhook_is_verified(tmp_path: Path) -> None:
    ran = laneway("demo", **QUICK, TMPDIR=tmp_path, LANEWAY_REDIS_URL="redis://127.0.0.1:1/0")
    assert ran.returncode == 0, ran.stderr
    done, total = summed(ran.stdout, r"summaries: (\d+) of (\d+) completed")
    assert done == total >= 60
    verified = (
        r"(\d+) received, (\d+) verified by laneway and standardwebhooks, (\d+) duplicates, (\d+) refused"
    )
    received, good, duplicates, refused = summed(ran.stdout, verified)
    assert (received - duplicates, good, refused) == (total, total, 0)
    assert len(re.findall(r"^10\d +\d+ +\S", ran.stdout, re.MULTILINE)) == 12  # the table
    assert "\x1b" not in ran.stdout + ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_summaries_that_fail_are_counted_and_the_demo_has_failed(tmp_path: Path) -> None:
    with Receiver(in_turn(401)) as model:  # permanent: no attempt follows
        broken = {"FEEDBACK_SUMMARIES_URL": model.url("/v1"), "FEEDBACK_SUMMARIES_MODEL": "m"}
        ran = laneway("demo", **QUICK, **broken, TMPDIR=tmp_path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "summaries: 0 of 65 completed" in ran.stdout
    assert "laneway: 65 of 65 summaries were not completed: " in ran.stderr


def test_the_lanes_drain_by_priority_though_low_was_queued_first(tmp_path: Path) -> None:
    ran = laneway("demo", TMPDIR=tmp_path, FEEDBACK_SUMMARIES_PACE_SECONDS=0.2)
    assert ran.returncode == 0, ran.stderr
    order = re.search(r"started (.+)", ran.stdout)
    assert order, ran.stdout
    runs = [run.split(" ") for run in order[1].split(", ")]
    assert [name for _, name in runs[-3:]] == ["high", "normal", "low"], order[0]
    assert runs[0][1] == "low"  # what the children took before there was anything else


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_cleans_up(how: signal.Signals, tmp_path: Path) -> None:
    with Running(tmp_path / "said", "demo", TMPDIR=tmp_path) as demo:
        demo.says("65 summaries")
        everything = family(demo.process.pid)
        assert demo.stop(how) == 130, demo.evidence()
        assert alive(everything) == set()
        assert "Traceback" not in demo.err
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_a_process_that_dies_is_reported_with_the_end_of_the_log(tmp_path: Path) -> None:
    with Running(tmp_path / "said", "demo", TMPDIR=tmp_path) as demo:
        demo.says("65 summaries")
        os.kill(member(demo.process.pid, "worker"), signal.SIGKILL)
        assert demo.ended() == 1, demo.evidence()
        assert "the worker ended with exit code -9" in demo.err
        assert '"event": "worker_started"' in demo.err


def test_what_it_keeps_is_said(tmp_path: Path) -> None:
    ran = laneway("demo", "--keep", **QUICK, TMPDIR=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (kept,) = tmp_path.iterdir()
    assert f"kept: {kept}" in ran.stdout
    assert {"laneway.db", "processes.log", "admin.key"} <= {path.name for path in kept.iterdir()}


@pytest.mark.parametrize(("summaries", "code"), [(59, 2), (105, 2)])
def test_a_number_it_cannot_do_is_a_usage_error(summaries: int, code: int, tmp_path: Path) -> None:
    assert laneway("demo", "--summaries", summaries, TMPDIR=tmp_path).returncode == code
    assert list(tmp_path.iterdir()) == []
