"""The job types of the chaos suite. Each run leaves its lines in the execution ledger.

The nursery loads this module before it forks, so it is also where failpoints get into children.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from chaos import failpoints
from chaos.history import execution
from laneway.engine.context import JobContext
from laneway.errors import PermanentError, TransientError
from laneway.sdk.decorators import background_job

Seconds = Annotated[float, Field(ge=0, le=60)]
_never = threading.Event()

_folder = os.environ.get(failpoints.FOLDER_VARIABLE)
if _folder is not None and "nursery" in str(getattr(sys.modules["__main__"].__spec__, "name", "")):
    failpoints.install(failpoints.IN_CHILDREN, Path(_folder))


@background_job("chaos.ok")
def ok(job: JobContext, number: int, seconds: Seconds = 0.0) -> dict[str, Any]:
    """Take `seconds`, return the number."""
    with execution(job.id, job.attempt) as finished:
        _never.wait(seconds)
        return finished({"number": number})  # type: ignore[no-any-return]


@background_job("chaos.flaky")
def flaky(job: JobContext, times: int, number: int) -> dict[str, Any]:
    """Fail `times` attempts, then return."""
    with execution(job.id, job.attempt) as finished:
        if job.attempt <= times:
            raise TransientError(f"attempt {job.attempt} fails as planned")
        return finished({"number": number})  # type: ignore[no-any-return]


@background_job("chaos.long")
def long(job: JobContext, number: int, seconds: Seconds, busy: bool = False) -> dict[str, Any]:
    """Take `seconds`, sleeping or holding the GIL, with twenty progress reports; stops when asked to."""
    with execution(job.id, job.attempt) as finished:
        for step in range(1, 21):
            job.check_cancelled()
            if busy:
                _hold_gil(seconds / 20)
            else:
                _never.wait(seconds / 20)
            job.progress(5 * step, f"step {step}")
        return finished({"number": number})  # type: ignore[no-any-return]


def _hold_gil(seconds: float) -> None:
    """Busy without letting any other thread of this process run: PyDLL keeps the GIL through the call."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


@background_job("chaos.fail")
def fail(job: JobContext, number: int, permanent: bool = False) -> None:
    """Fail every attempt."""
    with execution(job.id, job.attempt):
        if permanent:
            raise PermanentError(f"job {number} fails for good")
        raise TransientError(f"job {number} fails again")


@background_job("chaos.deaf")
def deaf(job: JobContext, number: int, seconds: Seconds) -> dict[str, Any]:
    """Take `seconds` and hear no wish: a cancel has to kill it."""
    with execution(job.id, job.attempt) as finished:
        for _ in range(int(seconds * 20)):
            try:
                _never.wait(0.05)
            except Exception:  # noqa: S112, BLE001, RUF100 - what this job is for
                continue
        return finished({"number": number})  # type: ignore[no-any-return]


@background_job("chaos.poison")
def poison(
    job: JobContext,
    number: int,
    how: Literal["kill", "segv", "exit", "memory", "huge", "unstorable", "close", "grandchild", "hang"],
) -> Any:
    """Hurt the process that runs it, or hand back what no store can keep."""
    with execution(job.id, job.attempt) as finished:
        match how:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segv":
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                ctypes.string_at(0)
            case "exit":
                os._exit(137)
            case "memory":
                resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
                bytearray(1 << 31)
            case "huge":
                return finished("x" * (1 << 20))
            case "unstorable":
                return object()
            case "close":
                os.closerange(0, 256)
            case "grandchild":
                subprocess.Popen(["sleep", "600"])
                os._exit(1)
            case "hang":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
                _never.wait()
        return finished({"number": number})
