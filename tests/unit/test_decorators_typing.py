"""What type checkers make of the decorators: signatures are kept, and wrong calls are found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from collections.abc import Sequence
from typing import Any

from laneway import JobContext, background_job, job_chain, retry_on_failure, scheduled_job

@background_job("t.add")
def add(a: int, b: int = 2) -> int:
    return a + b

@background_job()
async def later(job: JobContext, value: int) -> str:
    return str(value)

@scheduled_job(cron="0 9 * * *")
def nightly() -> None: ...

@job_chain(name="c")
def steps(n: int) -> list[dict[str, Any]]:
    return []

@job_chain(name="c")
async def later_steps(n: int) -> list[dict[str, Any]]:
    return []

@retry_on_failure(max_retries=1)
def call(url: str) -> bytes:
    return b""

reveal_type(add(1))                     # int
reveal_type(add.delay(1, b=3))          # str
reveal_type(add.options(title="t").delay(1))  # str
reveal_type(later(value=1))             # Coroutine[Any, Any, str]
reveal_type(later.delay(1))             # str
reveal_type(nightly.delay())            # str
reveal_type(nightly.job_type)           # str
reveal_type(steps(1))                   # str
reveal_type(later_steps(1))             # Coroutine[Any, Any, str]
reveal_type(call("u"))                  # bytes
add("a")                                # error: arg-type
add.delay()                             # error: call-arg
add.delay(1, c=3)                       # error: call-arg
add.options(title="t").delay("a")       # error: arg-type
later.delay(value="a")                  # error: arg-type
steps("a")                              # error: arg-type
call(1)                                 # error: arg-type
add.later(1)                            # error: attr-defined
"""


def test_mypy_knows_the_signatures(tmp_path: Path) -> None:
    """With what mypy has in its cache this takes two seconds, without it twenty."""
    root = Path(__file__).parents[2]
    program = tmp_path / "app.py"
    program.write_text(PROGRAM)
    settings = ["--config-file", root / "pyproject.toml", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, program],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    wanted, said = {}, {}
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        if found := re.search(r"#  ?(error: )?(\S.*)$", line):
            wanted[number] = found[2]
    for number, text in re.findall(r"app\.py:(\d+): (.*)", done.stdout):
        revealed = re.search(r'Revealed type is "(.*)"', text)
        code = re.search(r"\[([a-z-]+)\]$", text)
        if revealed:
            said[int(number)] = re.sub(r"\b(?:builtins|typing|collections\.abc)\.", "", revealed[1])
        elif code:
            said[int(number)] = code[1]
    assert len(wanted) == 18
    assert said == wanted, done.stdout + done.stderr
