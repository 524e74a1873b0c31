"""How an attempt ended, what that makes of the job, and what follows in the same transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

import sqlalchemy as sa

from laneway.domain.retry import Category, DeadLetterReason, RetryPolicy, crash_delay
from laneway.domain.spec import MAX_SECONDS
from laneway.domain.states import JobStatus
from laneway.engine import concurrency, transitions
from laneway.engine.endings import (
    MAX_ERROR_MESSAGE,
    MAX_TRACEBACK,
    Cancelled,
    Crashed,
    Death,
    Ending,
    Raised,
    Returned,
    TimedOut,
    Unfinished,
)
from laneway.engine.flow import Followed, follow
from laneway.engine.schedule_ends import count_ends
from laneway.engine.telling import tell
from laneway.engine.transitions import Applied, BackOff, HeldMove, Move, Outcome, Release, Stop
from laneway.lanes.backend import Due


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job this process holds, with what deciding its fate needs. `parameters` is JSON text."""

    job_id: str
    attempt: int
    lease_token: str
    tenant_id: str
    lane: str
    job_type: str
    parameters: str
    timeout_seconds: int
    retry_count: int
    crash_count: int
    retry_policy: RetryPolicy

    @property
    def suspect(self) -> bool:
        """Whether an earlier attempt ended without a charge: its worker may have died of it."""
        return self.attempt > self.retry_count + 1

    @classmethod
    def of(cls, row: Any, lease_token: str) -> Claimed:
        """From a row with the columns of `transitions.CLAIMED`."""
        return cls(
            row["id"],
            row["attempt"],
            lease_token,
            row["tenant_id"],
            row["lane"],
            row["job_type"],
            row["parameters"],
            row["timeout_seconds"],
            row["retry_count"],
            row["crash_count"],
            RetryPolicy(
                row["max_retries"],
                row["retry_delay_seconds"],
                row["retry_backoff"],
                row["retry_max_delay_seconds"],
                bool(row["retry_jitter"]),
            ),
        )


def error_record(
    type_: str, message: str, *, category: str, traceback: str = "", death: Death | None = None
) -> str:
    """The `error` of a job as JSON text, cut to its limits; what is no Unicode becomes `?`."""
    record: dict[str, Any] = {
        "type": _sound(type_[:200]),
        "message": _sound(message[:MAX_ERROR_MESSAGE]),
        "category": category,
        "traceback": _sound(traceback[-MAX_TRACEBACK:]) or None,
    }
    if death is not None:
        record["process"] = asdict(death)
    return json.dumps(record, ensure_ascii=True)


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def decide(  # noqa: PLR0911 - one return an ending
    job: Claimed, ending: Ending, *, now: datetime, rng: Random, crash_limit: int
) -> HeldMove:
    """The move that an attempt's ending makes. Pure: the same for pool, stock worker and reaper."""
    hold = (job.job_id, job.attempt, job.lease_token)
    more = job.retry_count < job.retry_policy.max_retries
    match ending:
        case Returned(result):
            return transitions.Complete(*hold, result=result)
        case Cancelled():
            return transitions.Stop(*hold)
        case Unfinished():
            return transitions.Release(*hold)
        case Crashed(how, death):
            error = error_record("ProcessDied", how, category=Category.CRASH, death=death)
            if job.crash_count + 1 >= crash_limit:
                return transitions.Fail(*hold, error=error, reason=DeadLetterReason.POISON, crash=1)
            wait = timedelta(seconds=crash_delay(job.crash_count + 1))
            return transitions.BackOff(*hold, next_retry_at=now + wait, charge=0, crash=1, error=error)
        case TimedOut(limit, traceback):
            message = f"the job ran longer than its timeout of {limit} s"
            error = error_record("JobTimeout", message, category=Category.TIMEOUT, traceback=traceback)
            if not more:
                return transitions.TimeOut(*hold, error=error)
            wait = timedelta(seconds=job.retry_policy.delay(job.retry_count, rng=rng))
            return transitions.BackOff(*hold, next_retry_at=now + wait, error=error)
        case Raised(type_, message, traceback, permanent, in_seconds, charged):
            charging = Category.TRANSIENT if charged else Category.SNOOZE
            category = Category.PERMANENT if permanent else charging
            error = error_record(type_, message, category=category, traceback=traceback)
            if permanent:
                return transitions.Fail(*hold, error=error, reason=DeadLetterReason.PERMANENT)
            if charged and not more:
                return transitions.Fail(*hold, error=error, reason=DeadLetterReason.EXHAUSTED)
            if in_seconds is None:
                seconds = job.retry_policy.delay(job.retry_count, rng=rng)
            else:  # a handler may ask for infinity, or for what is not a number
                seconds = in_seconds if 0 <= in_seconds <= MAX_SECONDS else float(MAX_SECONDS)
            due = now + timedelta(seconds=seconds)
            return transitions.BackOff(*hold, next_retry_at=due, charge=int(charged), error=error)


def carry_out(
    connection: sa.Connection,
    moves: Sequence[Move],
    *,
    now: datetime,
    actor: str,
    job_types: Sequence[str] | None = None,
    slots: bool = True,
) -> list[Outcome]:
    """Apply moves and write what follows from them: whoever changes a job's status calls this.

    A job that somebody asked to stop gets no other attempt: where it would have gone back to waiting it
    ends `cancelled`, and the outcome's move is the `Stop` that was made instead. A job that needs a slot
    is claimed or blocked (engine/concurrency.py); without `slots`, for `write_once`, its claim is refused.
    """
    outcomes = transitions.apply(connection, moves, now=now, actor=actor, job_types=job_types)
    _stop_instead(connection, outcomes, now=now, actor=actor)
    applied = [o for o in outcomes if isinstance(o, Applied)]
    linked = [o for o in applied if o.row["linked"]]
    followed = follow(connection, linked, now=now) if linked else Followed()
    told = tell(connection, [*applied, *followed.moves], now=now)
    count_ends(connection, [*applied, *followed.moves])
    if followed.told or not told.isdisjoint(a.row["id"] for a in followed.moves):
        told.add(linked[0].row["id"])
    due = {linked[0].row["id"]: tuple(followed.due)} if followed.due else {}
    if slots:
        woken = concurrency.take_turns(connection, outcomes, now=now, actor=actor, job_types=job_types)
        if woken:
            outcomes[0] = replace(outcomes[0], next=tuple(woken))
    return [
        replace(o, told=o.row["id"] in told, due=due.get(o.row["id"], ()))
        if isinstance(o, Applied) and (o.row["id"] in told or o.row["id"] in due)
        else o
        for o in outcomes
    ]


def due_of(outcomes: Sequence[Outcome | Exception]) -> list[Due]:
    """The jobs that may start since these moves were made, to be rung after the commit."""
    due = [pair for o in outcomes if isinstance(o, Applied) for pair in o.due]
    return due + next_of(outcomes)


def next_of(outcomes: Sequence[Outcome | Exception]) -> list[Due]:
    """Those of them whose slot came free: they have waited longer than the others of their lanes."""
    return [pair for o in outcomes if not isinstance(o, Exception) for pair in o.next]


def stops_instead(outcomes: Sequence[Outcome]) -> dict[int, Stop]:
    """By place: the end of each job that was refused its way back to waiting, since it is to stop. Pure."""
    return {
        place: Stop(o.move.job_id, o.move.attempt, o.move.lease_token)
        for place, o in enumerate(outcomes)
        if isinstance(o.move, BackOff | Release)
        and not isinstance(o, Applied)
        and (o.status, o.attempt) == (JobStatus.RUNNING, o.move.attempt)
    }


def _stop_instead(connection: sa.Connection, outcomes: list[Outcome], *, now: datetime, actor: str) -> None:
    stops = stops_instead(outcomes)
    if stops:
        made = transitions.apply(connection, list(stops.values()), now=now, actor=actor)
        for place, outcome in zip(stops, made, strict=True):
            if isinstance(outcome, Applied):
                outcomes[place] = outcome
