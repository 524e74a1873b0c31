"""What a lane backend promises: lists of job ids, a bell for each queue, a mirror for RQ's own tools.

A lane is a doorbell, never the record. An id that is lost, pushed twice, or left behind by a job that
ended long ago is harmless, since a worker must claim the row before it runs anything. So every method
may be called again after a failure, and nobody waits for one: `LanesUnavailable` means "go on without".

A lane holds at most `window` ids; the rest of the queued rows wait in the database. Once a push has
been refused, the lane's backlog flag makes all later pushes wait too, until the reconciler has moved
the rows that came first into the lane. That keeps a lane first in, first out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from laneway.domain.states import JobStatus
from laneway.errors import LanewayError

BELL_STROKES = 64
"""How many workers may find a queue's bell rung without having been there."""

LONGEST_WAIT_SECONDS = 10.0


class LanesUnavailable(LanewayError):
    """The lanes cannot be reached now. Nothing is lost: the rows are in the database."""

    code, status, title = "lanes_unavailable", 503, "The lanes cannot be reached"


@dataclass(frozen=True, slots=True)
class Backlog:
    """`waiting`: rows wait outside the lane. `refusals` counts the ids ever refused; it never falls."""

    waiting: bool
    refusals: int


@dataclass(frozen=True, slots=True)
class EndedRun:
    """A job that left `running`, or left waiting for good: `status` is what its row says now.

    `due_at` belongs to a job that runs again later. `error` is shown to whoever looks with RQ's tools.
    """

    lane: str
    job_id: str
    status: JobStatus
    due_at: datetime | None = None
    error: str = ""


class LaneBackend(Protocol):
    """Safe to share between threads. Everything here raises LanesUnavailable when the lanes are away."""

    window: int

    def push(self, items: Sequence[tuple[str, str]]) -> int:
        """How many of the `(lane, job id)` pairs were taken; the others wait in the database.

        Pairs keep their order within a lane. An id that is in the lane already is put in again.
        """
        ...

    def take(self, lanes: Sequence[str], count: int, *, worker_name: str) -> list[str]:
        """Up to `count` ids, off the lanes for good: all of the first lane before any of the second."""
        ...

    def remove(self, lane: str, job_ids: Sequence[str]) -> int:
        """How many entries left the lane: every occurrence of the given ids.

        What RQ's tools show of the jobs fades unless `push` or `mirror_ended` follows.
        """
        ...

    def purge(self, lane: str) -> int:
        """How many ids the lane has forgotten: all. The backlog flag stays as it is."""
        ...

    def depths(self, lanes: Sequence[str]) -> dict[str, int]:
        """How many ids each lane holds, which is not how many rows are queued."""
        ...

    def contents(self, lane: str) -> list[str]:
        """The lane's ids, next first."""
        ...

    def backlog(self, lane: str) -> Backlog:
        """Whether rows wait outside. Read it before the rows, and hand its `refusals` to `refill`."""
        ...

    def refill(
        self,
        lane: str,
        missing_head: Sequence[str],
        missing_tail: Sequence[str],
        *,
        complete: bool,
        refusals_seen: int,
    ) -> int:
        """How many ids went in: those that come before the lane's first, then those after its last.

        Both are in order, next first; what is in the lane already is left out, and what does not fit
        the window too. `complete` says that no queued row is missing beyond those given. The backlog
        flag falls when that is so, all of them fit, and nothing was refused since `refusals_seen`; it
        rises when rows stay outside. Redis does nothing else meanwhile: about 7 µs an id.
        """
        ...

    def workers(self) -> list[str]:
        """Names of the workers that are alive as far as the lanes know, sorted."""
        ...

    def wait(self, queues: Sequence[str], timeout_seconds: float) -> bool:
        """True as soon as something may have come for one of the queues, False when the time is over.

        Returns at once when that happened since the last call. May return early and may be wrong
        either way: poll too. No wait lasts longer than
        LONGEST_WAIT_SECONDS.
        """
        ...

    def mirror_running(
        self, items: Sequence[tuple[str, str]], *, worker_name: str, lease_seconds: float
    ) -> None:
        """Show the `(lane, job id)` pairs as running for `lease_seconds` more."""
        ...

    def mirror_ended(self, items: Sequence[EndedRun], *, worker_name: str = "") -> None:
        """Show that these runs are over. Only after the commit that ended them."""
        ...

    def close(self) -> None:
        """Give back the connections."""
        ...


def by_lane(items: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The ids of each lane, in order."""
    lanes: dict[str, list[str]] = {}
    for lane, job_id in items:
        lanes.setdefault(lane, []).append(job_id)
    return lanes
