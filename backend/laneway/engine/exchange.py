"""What a worker asks of the engine: settle what ended and claim what was taken, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from random import Random

import sqlalchemy as sa

from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import http_jobs, progress
from laneway.engine.concurrency import take_turns, wants_slot
from laneway.engine.context import Progress
from laneway.engine.endings import Ending, HandedOver
from laneway.engine.group_commit import commit_each
from laneway.engine.outcomes import Claimed, carry_out, decide, next_of
from laneway.engine.transitions import Applied, Claim, HeldMove, Move
from laneway.engine.transitions import Outcome as MoveOutcome
from laneway.errors import StorageUnavailable
from laneway.lanes.backend import Due
from laneway.log import get_logger

log = get_logger("exchange")

Ended = tuple[Claimed, Ending | HandedOver]
News = Mapping[str, tuple[Claimed, Progress]]


@dataclass(frozen=True, slots=True)
class Settled:
    """A job that left the worker: where it is now, and whether a courier has something to do.

    `due` are jobs that may start since.
    """

    job: Claimed
    status: JobStatus
    next_retry_at: datetime | None
    webhook: bool
    due: tuple[Due, ...] = ()


@dataclass(slots=True)
class Exchanged:
    """What came of it. `stale` attempts had been taken away; `refused` endings the store would not keep.

    `next` are jobs whose slot came free: to be rung at the head of their lanes.
    """

    claimed: list[Claimed] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    stale: list[Claimed] = field(default_factory=list)
    refused: list[tuple[Claimed, Exception]] = field(default_factory=list)
    next: list[Due] = field(default_factory=list)


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
    done = Exchanged()
    over: list[tuple[Claimed, Ending]] = []
    handed: list[Claimed] = []
    for job, ending in ended:
        if isinstance(ending, HandedOver):
            handed.append(job)
        else:
            over.append((job, ending))
    if handed:
        _hand_over(database, handed, done, now=now)
    moves: list[HeldMove] = [
        decide(job, ending, now=now, rng=holder.rng, crash_limit=holder.crash_limit) for job, ending in over
    ]
    claims = [
        Claim(job_id, token, holder.worker_id, now + timedelta(microseconds=place))
        for place, (job_id, token) in enumerate(wanted)
    ]

    actor = f"worker:{holder.worker_id}"

    def commit(batch: Sequence[Move]) -> list[MoveOutcome]:
        only_claims = not any(isinstance(move, HeldMove) for move in batch)
        with database.write_once() if only_claims else database.write() as connection:
            progress.save(connection, [news[m.job_id] for m in batch if m.job_id in news], now=now)
            outcomes = carry_out(
                connection,
                batch,
                now=now,
                actor=actor,
                job_types=holder.job_types,
                slots=not only_claims,
            )
        if only_claims and any(wants_slot(outcome) for outcome in outcomes):
            return claim_slots(outcomes)
        return outcomes

    def claim_slots(outcomes: list[MoveOutcome]) -> list[MoveOutcome]:
        """The others are claimed already, whatever becomes of these: a sweep finds them again."""
        made = list(outcomes)
        try:
            with database.write() as connection:
                woken = take_turns(connection, made, now=now, actor=actor, job_types=holder.job_types)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("slots_not_taken", error=type(error).__name__)
            return outcomes
        return [replace(made[0], next=tuple(woken)), *made[1:]]

    outcomes = commit_each(commit, [*moves, *claims])
    done.next = next_of(outcomes)
    for outcome in outcomes:
        if isinstance(outcome, StorageUnavailable):
            raise outcome
    for (job, _), move, outcome in zip(over, moves, outcomes, strict=False):
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
    done.claimed = http_jobs.equip(database, done.claimed, now=now)
    return done


def _hand_over(database: Database, held: Sequence[Claimed], done: Exchanged, *, now: datetime) -> None:
    """Leave jobs to their targets. To do so twice is harmless: what follows may fail, and all comes again."""

    def commit(batch: Sequence[Claimed]) -> list[bool]:
        with database.write() as connection:
            return http_jobs.hand_over(connection, batch, now=now)

    for job, outcome in zip(held, commit_each(commit, held), strict=True):
        if isinstance(outcome, StorageUnavailable):
            raise outcome
        if isinstance(outcome, Exception):
            done.refused.append((job, outcome))
        elif not outcome:  # the target has reported already, or the attempt was taken away
            done.stale.append(job)
