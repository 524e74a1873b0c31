"""What a running handler can reach: its job's id, progress, and whether somebody wants it to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from laneway.domain.payload import to_json
from laneway.errors import JobCancelled
from laneway.log import get_logger

MAX_MESSAGE = 500
MAX_DETAILS_BYTES = 8 * 1024

log = get_logger("job")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. `percent` from 0 to 100; `details` is JSON text."""

    percent: int
    message: str | None = None
    details: str | None = None


class Line(Protocol):
    """How a handler's process reaches whoever holds the job."""

    def report(self, progress: Progress) -> None: ...

    def cancelled(self) -> bool: ...


class JobContext:
    """The job that runs now. Handlers get it from `current_job()` or as their parameter `job`."""

    def __init__(
        self, *, job_id: str, job_type: str, attempt: int, line: Line, track_progress: bool = True
    ) -> None:
        self.id = job_id
        self.job_type = job_type
        self.attempt = attempt
        self._line = line
        self._track_progress = track_progress
        self._percent = 0

    def progress(
        self, percent: float, message: str | None = None, *, details: Mapping[str, Any] | None = None
    ) -> None:
        """Say how far the job is: `percent` from 0 to 100, which never falls within an attempt.

        Cheap enough for a tight loop: what comes faster than it can be shown is left out, the last is not.
        Of the message at most 500 characters are kept, and only what both stores can hold.
        Raises ValueError outside 0 to 100, and InvalidPayload for details that are no JSON.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"progress is a percentage from 0 to 100, not {percent!r}")
        self._percent = max(self._percent, int(percent))
        progress = Progress(
            self._percent,
            _storable(message[:MAX_MESSAGE]) if message is not None else None,
            to_json(dict(details), what="details", max_bytes=MAX_DETAILS_BYTES) if details else None,
        )
        if self._track_progress:
            self._line.report(progress)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked this job to stop."""
        return self._line.cancelled()

    def check_cancelled(self) -> None:
        """Raise JobCancelled if somebody asked this job to stop: call it where stopping is safe."""
        if self._line.cancelled():
            raise JobCancelled

    def log(self, event: str, **facts: Any) -> None:
        """Write a log line that names the job."""
        log.info(event, job_id=self.id, job_type=self.job_type, attempt=self.attempt, **facts)

    @property
    def progress_callback(self) -> Callable[..., None]:
        """`progress` for functions that count from 0.0 to 1.0: `progress_callback(0.4, "Rendering")`."""

        def report(
            fraction: float, message: str | None = None, details: Mapping[str, Any] | None = None
        ) -> None:
            self.progress(round(fraction * 100, 6), message, details=details)  # 0.29 is 29 %

        return report


def _storable(text: str) -> str:
    """`text` without what PostgreSQL refuses: one bad message would fail every job it is written with."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


_current: ContextVar[JobContext | None] = ContextVar("laneway_current_job", default=None)


def current_job() -> JobContext:
    """The job this code runs in. Raises RuntimeError outside of one."""
    job = running_job()
    if job is None:
        raise RuntimeError("current_job() was called outside of a job")
    return job


def running_job() -> JobContext | None:
    """The job this code runs in, None outside of one."""
    return _current.get()


def enter(job: JobContext | None) -> None:
    """Make `job` the current one in this context; None ends it."""
    _current.set(job)


@contextmanager
def entered(job: JobContext) -> Iterator[None]:
    """Make `job` the current one for the block."""
    token = _current.set(job)
    try:
        yield
    finally:
        _current.reset(token)
