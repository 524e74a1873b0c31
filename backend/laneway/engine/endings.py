"""How an attempt may end: plain values, known to the process that runs a handler and to the engine."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ERROR_MESSAGE = 2_000
MAX_TRACEBACK = 16_000


@dataclass(frozen=True, slots=True)
class Returned:
    """The handler returned; `result` is JSON text, None for nothing."""

    result: str | None = None


@dataclass(frozen=True, slots=True)
class Raised:
    """The handler raised. `permanent`: no further attempt would help. `in_seconds`: the wait it asked for."""

    type: str
    message: str
    traceback: str = ""
    permanent: bool = False
    in_seconds: float | None = None
    charged: bool = True


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The handler used up its `timeout_seconds`."""

    seconds: int
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a process that ran a handler: of `signal`, by its name, and `exit_status` one is None.

    `peak_memory_mib` is its largest resident set since it got the job, what it shares with its parent
    included. The progress is the last that was heard of the job.
    """

    signal: str | None
    exit_status: int | None
    peak_memory_mib: int
    progress_percent: int | None = None
    progress_message: str | None = None


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process that ran the handler died: `how` says by which signal or exit status."""

    how: str
    death: Death | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The handler stopped because it was asked to."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The attempt never ran to an end through no fault of the job: drain, deploy, handed back."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The target of an HTTP job took the work: the attempt goes on there, and nobody here holds it."""


class GoesOnElsewhere(Exception):
    """Raised by the handler of HTTP jobs once the target took the work."""


Ending = Returned | Raised | TimedOut | Crashed | Cancelled | Unfinished
"""How an attempt is over."""
