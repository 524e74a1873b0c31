"""The store: rows, the engine's own moves on them, and what the network does to transactions.

`_compile` reads the SET and the guard of each move from `engine/transitions.py` and the table of rules from
`domain/states.py`, so the rows here obey the text that the real stores execute; `test_store.py` holds the
two against each other. A transaction is one call that happens at one instant. It may fail before it, or
after it: then it is committed and nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from laneway import models
from laneway.domain.events import EVENT_OF
from laneway.domain.states import ACTIVE, FINAL, RULES, Action, JobStatus
from laneway.engine.outcomes import Claimed, stops_instead
from laneway.engine.reaper import LIVING
from laneway.engine.transitions import (
    MOVES,
    Applied,
    BackOff,
    Claim,
    HeldMove,
    Move,
    NewJob,
    Outcome,
    Refused,
    Release,
)
from laneway.engine.upkeep import DUE_BY
from laneway.webhooks.retries import DeliveryStatus
from simulation.design import Design
from simulation.kernel import EPOCH, Kernel, Process
from simulation.scale import CRASH_LIMIT

T = TypeVar("T")
Row = dict[str, Any]

REAPER = "reaper"  # as an actor
LOST_CALLS = 0.004
LOST_ANSWERS = 0.01


class Down(Exception):
    """The store did not get it."""


class Unknown(Exception):
    """The store did it, and the answer was lost."""


@dataclass(frozen=True, slots=True)
class Event:
    """A row of `job_events`. `at` is the writer's clock, `true_at` the simulator's."""

    seq: int
    action: Action | None  # None: created
    status: JobStatus
    attempt: int
    at: datetime
    true_at: float
    actor: str


@dataclass(slots=True)
class WorkerRow:
    """A row of `workers`, and the process behind it, which nobody but the checkers may look at."""

    process: Process
    state: str = "active"
    beat: int = 0
    beat_at: datetime = EPOCH
    held: frozenset[str] = frozenset()
    true_beat_at: float = 0.0


@dataclass(slots=True)
class Delivery:
    """A message and its one delivery: the row's columns that couriers use."""

    job_id: str
    seq: int
    next_at: datetime
    status: DeliveryStatus = DeliveryStatus.PENDING
    attempt_count: int = 0
    owner: str | None = None
    lease_until: datetime | None = None
    received: int = 0  # how often the receiver saw it


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be. `invariant` is its number in research, or its name."""

    invariant: str
    detail: str
    at: float
    job_id: str | None = None


# The moves, compiled


def _coalesce(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


_WORDS = (
    (r"jobs\.queue NOT IN \(SELECT paused_queues\.queue FROM paused_queues\)", "True"),  # none is paused here
    (r"jobs\.tenant_id NOT IN \(SELECT tenants\.id FROM tenants WHERE [\w. ]+\)", "True"),  # or limited
    (r"\bIS NOT NULL\b", "is not None"),
    (r"\bIS NULL\b", "is None"),
    (r"\bNULL\b", "None"),
    (r"\bAND\b", "and"),
    (r"\bOR\b", "or"),
    (r"\bNOT\b", "not"),
    (r"\bfalse\b", "False"),
    (r"\btrue\b", "True"),
    (r"<>", "!="),
    (r"\bCOALESCE\(", "coalesce("),
    (r"\bjobs\.(\w+)", r"row['\1']"),
    (r":now\b", "now"),
)


def _python(sql: str) -> str:
    for pattern, word in _WORDS:
        sql = re.sub(pattern, word, sql)
    return sql


def _parts(sql: str) -> list[str]:
    """Split at the commas that stand in no parentheses."""
    return re.split(r",\s*(?![^()]*\))", sql)


@dataclass(frozen=True, slots=True)
class _Compiled:
    sets: Callable[[Row, Move, datetime], Row]
    guard: Callable[[Row, Move, datetime], bool]


def _compile(kind: type[Move]) -> _Compiled:
    """The move's `sets` and `guard` as functions. Raises SyntaxError for SQL that is not in `_WORDS`."""
    assignments = [part.partition(" = ") for part in _parts(kind.sets)]
    values = ", ".join(f"{name.strip()!r}: {_python(value)}" for name, _, value in assignments)
    scope = {"coalesce": _coalesce}
    return _Compiled(
        eval(f"lambda row, u, now: {{{values}}}", scope),
        eval(f"lambda row, u, now: {_python(kind.guard) or 'True'}", scope),
    )


_COMPILED = {kind: _compile(kind) for kind in MOVES}
_EMPTY: Row = {column.name: None for column in models.jobs.columns} | {
    "event_seq": 1,
    "attempt": 0,
    "retry_count": 0,
    "crash_count": 0,
    "progress": 0,
    "version": 1,
    "cancel_terminate": False,
    "webhook_delivered": False,
    "webhook_attempts": 0,
}


def new_row(job: NewJob) -> Row:
    """The row that `transitions.create` makes."""
    return (
        _EMPTY | {name: getattr(job, name) for name in NewJob.__slots__} | {"status": JobStatus(job.status)}
    )


def fits(move: Move, row: Row, *, now: datetime) -> bool:
    """Whether the move's WHERE matches the row, its fence left out."""
    try:
        return row["status"] in RULES[move.action].sources and bool(
            _COMPILED[type(move)].guard(row, move, now)
        )
    except TypeError:
        return False  # a comparison with NULL


def change(row: Row, move: Move, *, now: datetime) -> None:
    """Do what the move's SET says."""
    row |= _COMPILED[type(move)].sets(row, move, now)
    row["status"] = RULES[move.action].target
    row["event_seq"] += 1
    row["version"] += 1
    if row["status"] in FINAL:
        row["followed_seq"] = row["event_seq"]


class Store:
    """The tables, and the checks that go with every write."""

    def __init__(
        self, kernel: Kernel, design: Design, complain: Callable[[str, str, str | None], None]
    ) -> None:
        self._kernel = kernel
        self._design = design
        self._complain = complain
        self.clock = Process("store")
        self.jobs: dict[str, Row] = {}
        self.events: dict[str, list[Event]] = {}
        self.workers: dict[str, WorkerRow] = {}
        self.deliveries: dict[tuple[str, int], Delivery] = {}
        self.edited: set[str] = set()  # jobs that an operator changed by hand
        self.failures: dict[str, int] = {}  # by job: how often a handler truly failed
        self.faults = True
        self.down_since = 0.0
        self.down_until = 0.0
        self.on_event: Callable[[str, Event], None] = lambda _job_id, _event: None

    # Transactions

    def transaction(self, process: Process, work: Callable[[], T]) -> T:
        """Raises Down when nothing happened, Unknown when it did."""
        now = self._kernel.now
        if now < self.down_until or now < process.cut_until:
            raise Down
        chance = self._kernel.rng.random() if self.faults else 0.5
        if chance < LOST_CALLS:
            raise Down
        done = work()
        if chance > 1 - LOST_ANSWERS:
            raise Unknown
        return done

    # Jobs

    def create(self, jobs: Sequence[NewJob], *, now: datetime) -> list[str]:
        """Insert rows; the id of each, or of the active job that holds its unique key."""
        return [self._create(job, now) for job in jobs]

    def _create(self, job: NewJob, now: datetime) -> str:
        if self._design.unique_index and (holder := self.holder_of(job.unique_key)):
            return holder
        self.jobs[job.id] = new_row(job)
        self.events[job.id] = []
        self._note(job.id, None, now, "api")
        return job.id

    def holder_of(self, unique_key: str | None) -> str | None:
        """The active job with that key."""
        if unique_key is None:
            return None
        return next(
            (
                i
                for i, row in self.jobs.items()
                if row["unique_key"] == unique_key and row["status"] in ACTIVE
            ),
            None,
        )

    def carry_out(self, moves: Sequence[Move], *, now: datetime, actor: str) -> list[Outcome]:
        """Like `outcomes.carry_out`: the moves, the stops instead of what was refused, the messages."""
        outcomes: list[Outcome] = [self._apply(move, now, actor) for move in moves]
        for place, stop in stops_instead(outcomes).items():
            outcome = self._apply(stop, now, actor)
            if isinstance(outcome, Applied):
                outcomes[place] = outcome
        if self._design.message_with_end:
            self.tell(outcomes, now=now)
        return outcomes

    def tell(self, outcomes: Sequence[Outcome], *, now: datetime) -> None:
        """Write the webhook messages of the jobs that ended."""
        for outcome in outcomes:
            if isinstance(outcome, Applied) and outcome.status in EVENT_OF and outcome.row["webhook_url"]:
                key = (outcome.row["id"], outcome.row["event_seq"])
                self.deliveries.setdefault(key, Delivery(*key, next_at=now))

    def _apply(self, move: Move, now: datetime, actor: str) -> Outcome:
        row = self.jobs.get(move.job_id)
        if row is None:
            return Refused(move, None, None)
        if not self._allows(move, row, now, actor):
            return Refused(move, row["status"], row["attempt"])
        before = dict(row)
        change(row, move, now=now)
        self._note(row["id"], move.action, now, actor)
        self._check(move, before, row, now, actor)
        return Applied(move, dict(row))  # type: ignore[arg-type]  # a mapping like the store's

    def _allows(self, move: Move, row: Row, now: datetime, actor: str) -> bool:
        design = self._design
        if move.action is Action.CLAIM and not design.claim_guard:
            return True
        if move.action is Action.ENQUEUE and not design.promotion_lock:
            return True
        if actor == REAPER and not design.reaper_fence:
            return True
        if self._unguarded(move):
            allowed = row["status"] in RULES[move.action].sources
        else:
            allowed = fits(move, row, now=now)
        if isinstance(move, HeldMove):
            return allowed and self._is_held(row, move.attempt, move.lease_token)
        return allowed and (row["status"] in ACTIVE or self.holder_of(row["unique_key"]) is None)

    def _unguarded(self, move: Move) -> bool:
        if isinstance(move, Claim):
            return not self._design.wish_guard
        return isinstance(move, BackOff | Release) and not (
            self._design.wish_guard and self._design.wish_ending
        )

    def _is_held(self, row: Row, attempt: int, lease_token: str) -> bool:
        same_attempt = row["attempt"] == attempt or not self._design.attempt_fence
        return same_attempt and (row["lease_token"] == lease_token or not self._design.token_fence)

    def save_progress(self, job: Claimed, percent: int) -> None:
        """Like `progress.save`."""
        row = self.jobs[job.job_id]
        if row["status"] is not JobStatus.RUNNING:
            return
        if self._design.progress_fence and not (
            self._is_held(row, job.attempt, job.lease_token) and row["progress"] <= percent
        ):
            return
        self._need_lease(row, job.attempt, job.lease_token, "progress")
        if percent < row["progress"]:
            self._complain("I6 progress", f"{row['progress']} % -> {percent} %", job.job_id)
        row["progress"] = percent

    def wish(self, job_id: str, *, now: datetime) -> None:
        """Ask a running job to stop."""
        row = self.jobs[job_id]
        row["cancel_requested_at"] = row["cancel_requested_at"] or now

    def edit(self, job_id: str) -> None:
        """An operator puts a running job back by hand, without the attempt it was in."""
        row = self.jobs[job_id]
        row |= {
            "status": JobStatus.QUEUED,
            "attempt": row["attempt"] - 1,
            "lease_token": None,
            "worker_id": None,
            "progress": 0,
            "queued_at": EPOCH + timedelta(seconds=self._kernel.now),
        }
        self.edited.add(job_id)

    # Workers

    def beat(self, worker_id: str, held: frozenset[str]) -> list[tuple[str, str]] | None:
        """Like `leases.beat`: `(job id, lease token)` of the jobs that are to stop; None for the dead."""
        worker = self.workers[worker_id]
        if worker.state not in LIVING:
            return None
        worker.beat += 1
        worker.beat_at = self._kernel.clock(self.clock)
        worker.true_beat_at = self._kernel.now
        worker.held = held if self._design.held_tokens else frozenset()
        return [
            (row["id"], row["lease_token"])
            for row in self.jobs.values()
            if row["worker_id"] == worker_id and row["cancel_requested_at"] is not None
        ]

    # What must hold whenever a row changes

    def _note(self, job_id: str, action: Action | None, now: datetime, actor: str) -> None:
        row = self.jobs[job_id]
        event = Event(row["event_seq"], action, row["status"], row["attempt"], now, self._kernel.now, actor)
        self.events[job_id].append(event)
        self.on_event(job_id, event)

    def _check(self, move: Move, before: Row, row: Row, now: datetime, actor: str) -> None:
        job_id, complain = row["id"], self._complain
        if row["crash_count"] > CRASH_LIMIT:
            complain("I16 poison", f"killed its process {row['crash_count']} times", job_id)
        blamed = row["crash_count"] > before["crash_count"] and actor == REAPER
        worker = self.workers.get(before["worker_id"])
        if blamed and (worker is None or not worker.process.troubled):
            complain("I16 poison", f"blamed for {before['worker_id']}, which nothing had befallen", job_id)
        if isinstance(move, HeldMove):
            self._need_lease(before, move.attempt, move.lease_token, move.action)
        if before["status"] in FINAL and move.action not in (
            Action.RETRY,
            Action.RETRY_LATER,
            Action.FORCE_COMPLETE,
        ):
            complain("I4 final", f"{move.action} led from {before['status']} to {row['status']}", job_id)
        if row["attempt"] != before["attempt"] + (move.action is Action.CLAIM):
            complain("I5 attempt", f"{before['attempt']} -> {row['attempt']} by {move.action}", job_id)
        due = DUE_BY.get(before["status"])
        if move.action is Action.ENQUEUE and due and before[due] > now:
            complain("I7 early", f"queued at {now}, due at {before[due]}", job_id)
        if isinstance(move, BackOff) and move.charge:
            wait = 0.5 * min(
                before["retry_delay_seconds"] * before["retry_backoff"] ** before["retry_count"],
                before["retry_max_delay_seconds"],
            )
            if (move.next_retry_at - now).total_seconds() < wait - 0.001:
                complain("I8 retries", f"the next attempt is due {move.next_retry_at - now} later", job_id)
        if row["retry_count"] > min(self.failures.get(job_id, 0), row["max_retries"]):
            said = f"{row['retry_count']} retries charged, {self.failures.get(job_id, 0)} failures"
            complain("I8 retries", said, job_id)
        if (row["status"] is JobStatus.RUNNING) != (row["lease_token"] is not None):
            complain("I3 fence", "running without a lease, or a lease without running", job_id)
        if (row["status"] in FINAL) != (row["finished_at"] is not None):
            complain("I4 final", "final without an end, or an end without being final", job_id)

    def _need_lease(self, row: Row, attempt: int, lease_token: str, what: str) -> None:
        if (row["status"], row["attempt"], row["lease_token"]) != (JobStatus.RUNNING, attempt, lease_token):
            said = f"{what} of attempt {attempt} on {row['status']}, attempt {row['attempt']}"
            self._complain("I3 fence", said, row["id"])
