"""The life of a job, as one table: which action leads from which status to which.

    scheduled ─┐                       ┌─► completed
    blocked  ──┼─► queued ─► running ──┼─► failed, timeout ──┐
    retrying ──┘     ▲ └─ block │      └─► cancelled         │
        ▲            └─ release ┤                            │
        └────────── back_off ───┘      retry ◄───────────────┘  (to queued; retry_later: to retrying)

A rule with `held` may be used only by the worker that holds the job: its write names the attempt and
the lease token, and changes nothing when either has moved on. All other rules are for callers and
sweeps. `engine/transitions.py` turns this table into guarded UPDATEs; the CHECK constraints, the API's
409 answers and `docs/reference/states.md` come from it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobStatus(StrEnum):
    """Where a job is."""

    SCHEDULED = "scheduled"  # waits for `scheduled_for`
    BLOCKED = "blocked"  # waits for another job or a free slot; `status_reason` says which
    QUEUED = "queued"  # due; its id is, or will be, in a lane
    RUNNING = "running"  # a worker holds it
    RETRYING = "retrying"  # waits for `next_retry_at`
    COMPLETED = "completed"  # its handler returned, or an admin said so
    FAILED = "failed"  # no attempt is left, or none would help
    TIMEOUT = "timeout"  # its last attempt ran out of time
    CANCELLED = "cancelled"  # somebody asked for it
    EXPIRED = "expired"  # did not start before `expires_at`


class Action(StrEnum):
    """What may be done to a job."""

    ENQUEUE = "enqueue"
    CLAIM = "claim"
    BLOCK = "block"
    COMPLETE = "complete"
    BACK_OFF = "back_off"
    FAIL = "fail"
    TIME_OUT = "time_out"
    RELEASE = "release"
    STOP = "stop"
    CANCEL = "cancel"
    EXPIRE = "expire"
    RETRY = "retry"
    RETRY_LATER = "retry_later"
    FORCE_COMPLETE = "force_complete"


FINAL = frozenset(
    {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.TIMEOUT, JobStatus.CANCELLED, JobStatus.EXPIRED}
)
ACTIVE = frozenset(JobStatus) - FINAL
WAITING = ACTIVE - {JobStatus.RUNNING}


@dataclass(frozen=True, slots=True)
class Rule:
    """`action` leads from any of `sources` to `target`; `held` rules are the lease holder's alone."""

    sources: frozenset[JobStatus]
    target: JobStatus
    held: bool = False


def _rule(*sources: JobStatus, to: JobStatus) -> Rule:
    return Rule(frozenset(sources), to)


def _held(to: JobStatus) -> Rule:
    return Rule(frozenset({JobStatus.RUNNING}), to, held=True)


S = JobStatus
RULES: dict[Action, Rule] = {
    Action.ENQUEUE: _rule(S.SCHEDULED, S.BLOCKED, S.RETRYING, to=S.QUEUED),  # it is due
    Action.CLAIM: _rule(S.QUEUED, to=S.RUNNING),  # attempt + 1, a new lease token
    Action.BLOCK: _rule(S.QUEUED, to=S.BLOCKED),  # instead of a claim: no slot is free
    Action.COMPLETE: _held(S.COMPLETED),
    Action.BACK_OFF: _held(S.RETRYING),  # failed, or asked for time; another attempt follows
    Action.FAIL: _held(S.FAILED),
    Action.TIME_OUT: _held(S.TIMEOUT),
    Action.RELEASE: _held(S.QUEUED),  # given back unfinished: drain, deploy, a lost worker
    Action.STOP: _held(S.CANCELLED),  # a running job's cancel, carried out
    Action.CANCEL: _rule(*WAITING, to=S.CANCELLED),
    Action.EXPIRE: _rule(S.SCHEDULED, S.BLOCKED, S.QUEUED, to=S.EXPIRED),
    Action.RETRY: _rule(S.FAILED, S.TIMEOUT, S.CANCELLED, S.EXPIRED, to=S.QUEUED),  # by a caller
    Action.RETRY_LATER: _rule(S.FAILED, S.TIMEOUT, S.CANCELLED, S.EXPIRED, to=S.RETRYING),  # many, spread
    Action.FORCE_COMPLETE: _rule(*(frozenset(S) - {S.COMPLETED}), to=S.COMPLETED),  # by an admin
}
