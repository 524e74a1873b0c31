"""What a lane backend promises: lists of job ids, a bell for each queue, a mirror for RQ's own tools.

A lane is a doorbell, never the record. An id that is lost, pushed twice, or left behind by a job that
ended long ago is harmless, since a worker must claim the row before it runs anything. So every method
may be called again after a failure, and nobody waits for one: `LanesUnavailable` means "go on without".

Inside a lane tenants take turns by their weights, and each tenant's own ids stay first in, first out. An id
gets its turn when it enters (`turns.py` has the rule); the order of the list is the order of the turns.

A lane holds at most `window` ids; the rest of the queued rows wait in the database. An id whose turn is
among the first `window` gets in even when the lane is full: the last one goes out again. A tenant with rows
outside is marked: its later pushes wait too, until the reconciler has moved what came first into the lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

from laneway.domain.states import JobStatus
from laneway.errors import LanewayError

BELL_STROKES = 64
"""How many workers may find a queue's bell rung without having been there."""

LONGEST_WAIT_SECONDS = 10.0


class LanesUnavailable(LanewayError):
    """The lanes cannot be reached now. Nothing is lost: the rows are in the database."""

    code, status, title = "lanes_unavailable", 503, "The lanes cannot be reached"


class Due(NamedTuple):
    """A job that may run, to be rung in its lane. Those without a tenant count as one tenant's."""

    lane: str
    job_id: str
    tenant_id: str = ""


@dataclass(frozen=True, slots=True)
class Backlog:
    """`tenants` have rows outside the lane. `refusals` counts the ids ever refused; it never falls."""

    refusals: int
    tenants: frozenset[str] = frozenset()

    @property
    def waiting(self) -> bool:
        return bool(self.tenants)


@dataclass(frozen=True, slots=True)
class Lack:
    """Queued rows of a tenant that a lane lacks: those before its first id there, those after its last.

    In order, next first. `complete` says that no queued row of it is missing beyond these.
    """

    tenant_id: str
    head: Sequence[str]
    tail: Sequence[str]
    complete: bool


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

    def push(self, items: Sequence[Due]) -> int:
        """How many were taken; the others wait in the database, and so may ids they have put out of turn.

        A tenant's keep their order within a lane. An id that is in the lane already is put in again.
        """
        ...

    def push_first(self, items: Sequence[Due]) -> int:
        """Like `push`, but at the head of the lanes: for jobs that had their turns and could not run."""
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
        """How many ids the lane has forgotten: all. Who has rows outside stays marked."""
        ...

    def depths(self, lanes: Sequence[str]) -> dict[str, int]:
        """How many ids each lane holds, which is not how many rows are queued."""
        ...

    def contents(self, lane: str) -> list[str]:
        """The lane's ids, next first."""
        ...

    def backlog(self, lane: str) -> Backlog:
        """Whose rows wait outside. Read it before the rows, and hand its `refusals` to `refill`."""
        ...

    def refill(self, lane: str, lacks: Sequence[Lack], *, refusals_seen: int) -> int:
        """How many of the ids went in; what is in the lane already is left out, and what does not fit too.

        A tenant's ids that come before its first in the lane make it line up anew: it keeps its order, and
        all it has there takes turns with the others from now on. A tenant's mark falls when it is
        `complete`, all fit, and nothing of it was refused since `refusals_seen`; it rises when rows stay
        outside. Redis does nothing else meanwhile: about 10 µs an id, and 2 µs for each that is there.
        """
        ...

    def weigh(self, weights: Mapping[str, int]) -> None:
        """From now on these tenants have these weights, and all others 1. What is in a lane stays put."""
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


def by_tenant(items: Iterable[Due]) -> dict[tuple[str, str], list[str]]:
    """The ids of each lane and tenant, in order."""
    parts: dict[tuple[str, str], list[str]] = {}
    for item in items:
        lane, job_id, tenant_id = Due(*item)
        parts.setdefault((lane, tenant_id), []).append(job_id)
    return parts
