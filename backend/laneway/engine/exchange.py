"""What a worker asks of the engine: settle what ended and claim what was taken, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random

from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import progress
from laneway.engine.context import Progress
from laneway.engine.endings import Ending
from laneway.engine.group_commit import commit_each
from laneway.engine.outcomes import Claimed, carry_out, decide
from laneway.engine.transitions import Applied, Claim, HeldMove, Move
from laneway.engine.transitions import Outcome as MoveOutcome
from laneway.errors import StorageUnavailable

Ended = tuple[Claimed, Ending]
News = Mapping[str, tuple[Claimed, Progress]]


@dataclass(frozen=True, slots=True)
class Settled:
    """A job that left the worker: where it is now, and whether a courier has something to do.

    `due` are `(lane, id)` of jobs that may start since.
    """

    job: Claimed
    status: JobStatus
    next_retry_at: datetime | None
    webhook: bool
    due: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Exchanged:
    """What came of it. `stale` attempts had been taken away; `refused` endings the store would not keep."""

    claimed: list[Claimed] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    stale: list[Claimed] = field(default_factory=list)
    refused: list[tuple[Claimed, Exception]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker, as far as its claims and endings need it."""

    worker_id: str
    job_types: Sequence[str]
    crash_limit: int
    rng: Random


def exchange(
    database: Database,
    holder: Holder,
    *,
    ended: Sequence[Ended],
    wanted: Sequence[tuple[str, str]],
    news: News,
    now: datetime,
) -> Exchanged:
    """Settle `ended` and claim `wanted` (`(job id, lease token)` pairs, most urgent first).

    The newest progress of an ended job is written before its end. One bad ending never fails its
    neighbours. Raises StorageUnavailable when nothing was written, or nobody knows.
    """
    moves: list[HeldMove] = [
        decide(job, ending, now=now, rng=holder.rng, crash_limit=holder.crash_limit) for job, ending in ended
    ]
    claims = [
        Claim(job_id, token, holder.worker_id, now + timedelta(microseconds=place))
        for place, (job_id, token) in enumerate(wanted)
    ]

    def commit(batch: Sequence[Move]) -> list[MoveOutcome]:
        only_claims = not any(isinstance(move, HeldMove) for move in batch)
        with database.write_once() if only_claims else database.write() as connection:
            progress.save(connection, [news[m.job_id] for m in batch if m.job_id in news], now=now)
            return carry_out(
                connection,
                batch,
                now=now,
                actor=f"worker:{holder.worker_id}",
                job_types=holder.job_types,
            )

    outcomes = commit_each(commit, [*moves, *claims])
    done = Exchanged()
    for outcome in outcomes:
        if isinstance(outcome, StorageUnavailable):
            raise outcome
    for (job, _), move, outcome in zip(ended, moves, outcomes, strict=False):
        if isinstance(outcome, Exception):
            done.refused.append((job, outcome))
        elif isinstance(outcome, Applied):
            due = getattr(move, "next_retry_at", None)
            done.settled.append(Settled(job, outcome.status, due, outcome.told, outcome.due))
        else:
            done.stale.append(job)
    for claim, outcome in zip(claims, outcomes[len(moves) :], strict=True):
        if isinstance(outcome, Applied):
            done.claimed.append(Claimed.of(outcome.row, claim.lease_token))
    return done
