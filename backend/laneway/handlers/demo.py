"""Job types for trying things out: nothing, an echo, a slow bar, and every way to fail."""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated, Any, Literal

from pydantic import Field

from laneway.engine.context import JobContext
from laneway.errors import PermanentError, TransientError
from laneway.sdk.decorators import background_job

_never = threading.Event()


@background_job("demo.noop")
def noop() -> None:
    """Do nothing."""


@background_job("demo.echo")
def echo(**parameters: Any) -> dict[str, Any]:
    """Return the parameters."""
    return parameters


@background_job("demo.sleep")
def sleep(
    job: JobContext,
    seconds: Annotated[float, Field(ge=0, le=86400)] = 1.0,
    steps: Annotated[int, Field(ge=1, le=10_000)] = 10,
) -> dict[str, Any]:
    """Sleep for `seconds`, in `steps` equal steps with a progress report after each."""
    for step in range(1, steps + 1):
        job.check_cancelled()
        _never.wait(seconds / steps)
        job.progress(100 * step / steps, f"step {step} of {steps}")
    return {"slept_seconds": seconds, "steps": steps}


@background_job("demo.fail")
def fail(
    job: JobContext,
    times: Annotated[int, Field(ge=0)] = 1,
    kind: Literal["transient", "permanent", "crash", "exit", "hang"] = "transient",
) -> dict[str, Any]:
    """Fail in the given way on the first `times` attempts, then return the attempt that made it.

    `crash` dies by SIGKILL, `exit` leaves with status 3, `hang` swallows exceptions for ever.
    """
    if job.attempt > times:
        return {"attempt": job.attempt}
    match kind:
        case "transient":
            raise TransientError(f"attempt {job.attempt} fails as asked")
        case "permanent":
            raise PermanentError(f"attempt {job.attempt} fails as asked, for good")
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            _hang()
    raise AssertionError("unreachable")


def _hang() -> None:
    while True:
        try:
            _never.wait(0.05)
        except Exception:  # noqa: S112, BLE001, RUF100 - what this job is for
            continue
