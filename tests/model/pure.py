"""What rows, events and messages must be: `docs/reference/states.md` written down again, over plain dicts.

Nothing here calls the engine. Its moves and endings are taken as the values they are; what they do is said
here a second time, one job at a time, without SQL. A divergence is a bug on one of the two sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from laneway.engine.context import Progress
from laneway.engine.endings import Cancelled, Crashed, Ending, Raised, Returned, TimedOut, Unfinished
from laneway.engine.outcomes import Claimed
from laneway.engine.transitions import (
    BackOff,
    Block,
    Cancel,
    Claim,
    Complete,
    Enqueue,
    Expire,
    Fail,
    ForceComplete,
    HeldMove,
    Move,
    NewJob,
    Release,
    Retry,
    RetryLater,
    Stop,
    TimeOut,
)

Row = dict[str, Any]

FINAL = frozenset({"completed", "failed", "timeout", "cancelled", "expired"})
UNSTARTED = frozenset({"scheduled", "blocked", "queued"})
RUNNING = frozenset({"running"})

# docs/reference/states.md, "Actions": action, from, to.
TABLE: dict[type[Move], tuple[str, frozenset[str], str]] = {
    Enqueue: ("enqueue", frozenset({"scheduled", "blocked", "retrying"}), "queued"),
    Claim: ("claim", frozenset({"queued"}), "running"),
    Block: ("block", frozenset({"queued"}), "blocked"),
    Complete: ("complete", RUNNING, "completed"),
    BackOff: ("back_off", RUNNING, "retrying"),
    Fail: ("fail", RUNNING, "failed"),
    TimeOut: ("time_out", RUNNING, "timeout"),
    Release: ("release", RUNNING, "queued"),
    Stop: ("stop", RUNNING, "cancelled"),
    Cancel: ("cancel", UNSTARTED | {"retrying"}, "cancelled"),
    Expire: ("expire", UNSTARTED, "expired"),
    Retry: ("retry", FINAL - {"completed"}, "queued"),
    RetryLater: ("retry_later", FINAL - {"completed"}, "retrying"),
    ForceComplete: (
        "force_complete",
        UNSTARTED | RUNNING | {"retrying"} | FINAL - {"completed"},
        "completed",
    ),
}

JITTER_SHARE = 0.75  # what a `Steady` source of randomness makes of "50 to 100 %"
LET_GO = {"lease_token": None, "worker_id": None}
NO_PROGRESS = {"progress": 0, "progress_message": None, "progress_details": None}
UNWISHED = {
    "cancel_requested_at": None,
    "cancel_terminate": False,
    "cancel_grace_seconds": None,
    "cancel_reason": None,
    "cancelled_by": None,
}
ANEW = (
    NO_PROGRESS
    | UNWISHED
    | {
        "finished_at": None,
        "status_reason": None,
        "result": None,
        "error": None,
        "dead_letter_reason": None,
        "retry_count": 0,
        "crash_count": 0,
        "expires_at": None,
        "webhook_delivered": False,
    }
)


_FRESH = (
    LET_GO
    | ANEW
    | {
        "version": 1,
        "event_seq": 1,
        "created_at": None,
        "updated_at": None,
        "attempt": 0,
        "next_retry_at": None,
        "started_at": None,
        "webhook_attempts": 0,
    }
)


class KeyHeld(Exception):
    """An ended job cannot wait again while an active one holds its unique key; nothing is written."""


class AtLeast(dict[str, Any]):
    """Equal to every mapping that has these entries, whatever else it has."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and all(k in other and other[k] == v for k, v in self.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


@dataclass(frozen=True, slots=True)
class Made:
    """The model's `Applied`."""

    move: Move
    status: str
    seq: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Denied:
    """The model's `Refused`."""

    move: Move
    status: str | None
    attempt: int | None


@dataclass(slots=True)
class World:
    """Every job's row, events in order, and what webhooks were promised: `(job id, seq, event type)`."""

    jobs: dict[str, Row] = field(default_factory=dict)
    events: dict[str, list[Row]] = field(default_factory=dict)
    messages: set[tuple[str, int, str]] = field(default_factory=set)

    @staticmethod
    def columns() -> set[str]:
        """The columns of `jobs` that the model knows."""
        return {*NewJob.__slots__, *_FRESH}

    def tells(self, job_id: str, status: str) -> bool:
        """Whether somebody is sent a webhook about a job that came to `status`."""
        row = self.jobs[job_id]
        listed = row["webhook_events"] is None or f"job.{status}" in row["webhook_events"]
        return status in FINAL and row["webhook_url"] is not None and listed

    # Making jobs

    def create(self, new: NewJob, *, now: datetime) -> bool:
        """False when an active job of the tenant holds the unique key."""
        if new.unique_key is not None and self.holder(new.tenant_id, new.unique_key):
            return False
        texts = ("parameters", "tags", "metadata", "webhook_events")
        row: Row = _FRESH | {name: getattr(new, name) for name in NewJob.__slots__}
        row |= {name: None if row[name] is None else json.loads(row[name]) for name in texts}
        row |= {"created_at": now, "updated_at": now}
        self.jobs[new.id] = row
        self.events[new.id] = []
        self._tell(row, "create", now=now, actor=new.created_by)
        return True

    def holder(self, tenant_id: str, key: str) -> Row | None:
        for row in self.jobs.values():
            if (row["tenant_id"], row["unique_key"]) == (tenant_id, key) and row["finished_at"] is None:
                return row
        return None

    # Moves

    def apply(
        self,
        moves: Sequence[Move],
        *,
        now: datetime,
        actor: str,
        job_types: Sequence[str] | None = None,
    ) -> list[Made | Denied]:
        """All moves of the first move's kind, then those of the next kind.

        Of one kind a job counts once, and once an attempt where it is held.
        """
        made: dict[int, Made] = {}
        kinds: dict[type[Move], dict[tuple[str, int | None], int]] = {}
        for place, move in enumerate(moves):
            if _is_id(move.job_id):
                attempt = move.attempt if isinstance(move, HeldMove) else None
                kinds.setdefault(type(move), {}).setdefault((move.job_id, attempt), place)
        for places in kinds.values():
            for (job_id, _), place in places.items():
                if job_id in self.jobs and self.legal(moves[place], now=now, job_types=job_types):
                    made[place] = self.make(moves[place], now=now, actor=actor)
        return [made.get(place) or self._denied(move) for place, move in enumerate(moves)]

    def _denied(self, move: Move) -> Denied:
        row = self.jobs.get(move.job_id)
        return Denied(move, None, None) if row is None else Denied(move, row["status"], row["attempt"])

    def legal(self, move: Move, *, now: datetime, job_types: Sequence[str] | None = None) -> bool:
        row = self.jobs[move.job_id]
        wished = row["cancel_requested_at"] is not None
        if row["status"] not in TABLE[type(move)][1]:
            return False
        if isinstance(move, HeldMove) and (row["attempt"], row["lease_token"]) != (
            move.attempt,
            move.lease_token,
        ):
            return False
        match move:
            case Claim():
                late = row["expires_at"] is not None and row["expires_at"] <= now
                return not late and not wished and (job_types is None or row["job_type"] in job_types)
            case BackOff() | Release():
                return not wished
            case Expire():
                return row["expires_at"] is not None and row["expires_at"] <= now
        return True

    def make(self, move: Move, *, now: datetime, actor: str) -> Made:
        """What a legal move does to the row, with its event and its message."""
        action, _, target = TABLE[type(move)]
        row = self.jobs[move.job_id]
        revived = row["status"] in FINAL and target not in FINAL
        if revived and row["unique_key"] and self.holder(row["tenant_id"], row["unique_key"]):
            raise KeyHeld
        row |= _effects(row, move, now)
        row |= {
            "status": target,
            "version": row["version"] + 1,
            "event_seq": row["event_seq"] + 1,
            "updated_at": now,
        }
        error = getattr(move, "error", None)
        self._tell(
            row,
            action,
            now=now,
            actor=move.by if isinstance(move, Cancel) else actor,
            reason=getattr(move, "reason", None),
            error=error and _parsed(error),
        )
        if target in FINAL and row["webhook_url"] is not None:
            event_type = f"job.{target}"
            if row["webhook_events"] is None or event_type in row["webhook_events"]:
                self.messages.add((row["id"], row["event_seq"], event_type))
        return Made(move, target, row["event_seq"], row["attempt"])

    def carry_out(
        self,
        moves: Sequence[Move],
        *,
        now: datetime,
        actor: str,
        job_types: Sequence[str] | None = None,
    ) -> list[Made | Denied]:
        """`apply`; what would have waited again, of a job that was asked to stop, ends cancelled instead."""
        outcomes = self.apply(moves, now=now, actor=actor, job_types=job_types)
        stops = {
            place: Stop(outcome.move.job_id, outcome.move.attempt, outcome.move.lease_token)
            for place, outcome in enumerate(outcomes)
            if isinstance(outcome, Denied)
            and isinstance(outcome.move, BackOff | Release)
            and self.jobs.get(outcome.move.job_id, UNWISHED)["cancel_requested_at"] is not None
        }
        stopped = self.apply(list(stops.values()), now=now, actor=actor)
        made = {place: e for place, e in zip(stops, stopped, strict=True) if isinstance(e, Made)}
        return [made.get(place, outcome) for place, outcome in enumerate(outcomes)]

    # Wishes and news

    def wish(
        self, job_id: str, *, by: str, reason: str | None, terminate: bool, grace: float | None, now: datetime
    ) -> None:
        """Somebody asks a running job to stop: the first moment stays, the last words count."""
        row = self.jobs[job_id]
        row |= {
            "cancel_requested_at": row["cancel_requested_at"] or now,
            "cancel_terminate": row["cancel_terminate"] or terminate,
            "cancel_grace_seconds": grace,
            "cancel_reason": reason,
            "cancelled_by": by,
            "version": row["version"] + 1,
            "updated_at": now,
        }

    def progress(self, job: Claimed, news: Progress, *, now: datetime) -> None:
        """Only the holder's news counts, and only forwards."""
        row = self.jobs.get(job.job_id)
        if row is None or row["status"] != "running":
            return
        held = (row["attempt"], row["lease_token"]) == (job.attempt, job.lease_token)
        if held and row["progress"] <= news.percent:
            row |= {
                "progress": news.percent,
                "progress_message": news.message,
                "progress_details": None if news.details is None else json.loads(news.details),
                "version": row["version"] + 1,
                "updated_at": now,
            }

    # Looking

    def where(self, status: str, *, lane: str | None = None) -> list[Row]:
        return [r for r in self.jobs.values() if r["status"] == status and lane in {None, r["lane"]}]

    def due(self, now: datetime) -> list[str]:
        """Ids that a promotion makes wait in a lane, in its order."""
        waiting = [(r["scheduled_for"], r["id"]) for r in self.where("scheduled")]
        waiting += [(r["next_retry_at"], r["id"]) for r in self.where("retrying")]
        return [job_id for moment, job_id in sorted(waiting) if moment <= now]

    def late(self, now: datetime) -> list[str]:
        return [
            r["id"]
            for r in self.jobs.values()
            if r["status"] in UNSTARTED and r["expires_at"] is not None and r["expires_at"] <= now
        ]

    def queued(self, lanes: Iterable[str], job_types: Sequence[str], *, before: datetime) -> list[str]:
        """Ids in the order workers shall have them."""
        return [
            job_id
            for lane in lanes
            for queued_at, job_id in sorted(
                (r["queued_at"], r["id"])
                for r in self.where("queued", lane=lane)
                if r["job_type"] in job_types
            )
            if queued_at <= before
        ]

    def _tell(
        self,
        row: Row,
        action: str,
        *,
        now: datetime,
        actor: str,
        reason: str | None = None,
        error: Any = None,
    ) -> None:
        self.events[row["id"]].append(
            {
                "job_id": row["id"],
                "seq": row["event_seq"],
                "tenant_id": row["tenant_id"],
                "action": action,
                "status": row["status"],
                "attempt": row["attempt"],
                "at": now,
                "actor": actor,
                "reason": reason,
                "error": error,
            }
        )


def _is_id(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def _effects(row: Row, move: Move, now: datetime) -> Row:
    match move:
        case Enqueue():
            return {"queued_at": move.queued_at or now, "next_retry_at": None, "status_reason": None}
        case Block():
            return {"status_reason": move.reason}
        case Claim():
            return NO_PROGRESS | {
                "attempt": row["attempt"] + 1,
                "lease_token": move.lease_token,
                "worker_id": move.worker_id,
                "started_at": move.at,
            }
        case Complete():
            return LET_GO | {
                "progress": 100,
                "result": _parsed(move.result),
                "error": None,
                "finished_at": now,
            }
        case BackOff():
            return LET_GO | {
                "next_retry_at": move.next_retry_at,
                "retry_count": row["retry_count"] + move.charge,
                "crash_count": row["crash_count"] + move.crash,
                "error": _parsed(move.error),
            }
        case Fail():
            return LET_GO | {
                "error": _parsed(move.error),
                "dead_letter_reason": move.reason,
                "crash_count": row["crash_count"] + move.crash,
                "finished_at": now,
            }
        case TimeOut():
            return LET_GO | {
                "error": _parsed(move.error),
                "dead_letter_reason": move.reason,
                "finished_at": now,
            }
        case Release():
            return LET_GO | {"crash_count": row["crash_count"] + move.crash, "progress": 0}
        case Stop():
            return LET_GO | {"finished_at": now}
        case Cancel():
            return {
                "cancel_requested_at": now,
                "cancelled_by": move.by,
                "cancel_reason": move.reason,
                "next_retry_at": None,
                "finished_at": now,
            }
        case Expire():
            return {"finished_at": now}
        case Retry():
            own = row["parameters"] if move.parameters is None else json.loads(move.parameters)
            return ANEW | {"queued_at": now, "parameters": own}
        case RetryLater():
            return ANEW | {"next_retry_at": move.next_retry_at}
        case ForceComplete():
            return LET_GO | {
                "progress": 100,
                "result": _parsed(move.result),
                "error": None,
                "dead_letter_reason": None,
                "next_retry_at": None,
                "finished_at": now,
            }
    raise AssertionError(f"the model knows no {move}")


class Record(str):
    """JSON text of an error of which the model knows these entries and no more."""

    __slots__ = ()


def _parsed(text: str | None) -> Any:
    if text is None:
        return None
    value = json.loads(text)
    return AtLeast(value) if isinstance(text, Record) else value


def _category(raised: Raised) -> str:
    if raised.permanent:
        return "permanent"
    return "transient" if raised.charged else "snooze"


def error_text(type_: str, category: str) -> str:
    return Record(json.dumps({"type": type_, "category": category}))


def ending_move(job: Claimed, ending: Ending, *, now: datetime, crash_limit: int) -> HeldMove:
    """The move that an ending makes, from `docs/reference/http.md` and the docstrings of `endings`."""
    hold = (job.job_id, job.attempt, job.lease_token)
    policy = job.retry_policy
    wait = min(policy.delay_seconds * policy.backoff**job.retry_count, policy.max_delay_seconds)
    wait *= JITTER_SHARE if policy.jitter else 1.0
    more = job.retry_count < policy.max_retries
    match ending:
        case Returned(result):
            return Complete(*hold, result=result)
        case Cancelled():
            return Stop(*hold)
        case Unfinished():
            return Release(*hold)
        case Crashed():
            error = error_text("ProcessDied", "crash")
            if job.crash_count + 1 >= crash_limit:
                return Fail(*hold, error=error, reason="poison", crash=1)
            wait = min(5.0 * 2**job.crash_count, 300.0)
            return BackOff(*hold, now + timedelta(seconds=wait), charge=0, crash=1, error=error)
        case TimedOut():
            error = error_text("JobTimeout", "timeout")
            if not more:
                return TimeOut(*hold, error=error)
            return BackOff(*hold, now + timedelta(seconds=wait), error=error)
        case Raised():
            error = error_text(ending.type, _category(ending))
            if ending.permanent:
                return Fail(*hold, error=error, reason="permanent")
            if ending.charged and not more:
                return Fail(*hold, error=error, reason="exhausted")
            if ending.in_seconds is not None:
                wait = ending.in_seconds
            return BackOff(
                *hold, now + timedelta(seconds=wait), charge=1 if ending.charged else 0, error=error
            )
