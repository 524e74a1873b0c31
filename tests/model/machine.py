"""The engine against the model, one random step at a time: a Hypothesis state machine over a real store.

Every rule asks the engine and the model for the same thing and compares the answers; after each step the
whole store is read back: every column of every row, every event, every promised message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from factories import NOW, OTHER_TENANT, TENANT, new_job
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec, Priority, lane_of
from laneway.domain.states import JobStatus
from laneway.engine import leases, progress, queries, reaper, upkeep
from laneway.engine.access.callers import Caller, Role
from laneway.engine.context import Progress
from laneway.engine.endings import Cancelled, Crashed, Ending, Raised, Returned, TimedOut, Unfinished
from laneway.engine.exchange import Holder, exchange
from laneway.engine.leases import Wish
from laneway.engine.outcomes import Claimed, carry_out
from laneway.engine.queries import JobFilter, Scope
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import JobService
from laneway.engine.transitions import (
    MOVES,
    RETURNED,
    Applied,
    BackOff,
    Block,
    Cancel,
    Claim,
    Complete,
    Enqueue,
    Expire,
    Fail,
    ForceComplete,
    Move,
    Outcome,
    Release,
    Retry,
    RetryLater,
    Stop,
    TimeOut,
    create,
)
from laneway.errors import IllegalTransition, JobNotFound, UniqueKeyTaken
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings
from model.pure import FINAL, TABLE, Denied, KeyHeld, Made, World, ending_move, error_text

LEASE_SECONDS = 30.0
CRASH_LIMIT = 3
MAX_JOBS = 6
LANES = tuple(lane_of("default", priority) for priority in Priority)
JOB_TYPES = ("demo.echo", "demo.sleep")  # what the workers know; "somebody.elses" is the third
ERROR = '{"type":"E","message":"m"}'

CALLERS = (
    Caller(TENANT, "alice", Role.USER),
    Caller(TENANT, "bob", Role.USER),
    Caller(TENANT, "olga", Role.OPERATOR),
    Caller(OTHER_TENANT, "alice", Role.ADMIN),
)
ENDINGS: tuple[Ending, ...] = (
    Returned(),
    Returned('{"n":[1,2.5,"\\u00e9"]}'),
    Raised("ValueError", "no"),
    Raised("Gone", "for good", permanent=True),
    Raised("Retry", "soon", in_seconds=7.5),
    Raised("Snooze", "later", in_seconds=60.0, charged=False),
    TimedOut(60),
    Crashed("killed by signal 9"),
    Cancelled(),
    Unfinished(),
)
TABLES = (
    models.webhook_attempts,
    models.webhook_deliveries,
    models.webhook_messages,
    models.job_events,
    models.jobs,
    models.workers,
)

FOREIGN = frozenset(
    {
        "batch_id",
        "chain_id",
        "chain_run_id",
        "chain_step",
        "concurrency_key",
        "concurrency_limit",
        "dependencies_left",
        "depends_on",
        "followed_seq",
        "gated",
        "linked",
        "on_dependency_failure",
        "scheduled_job_id",
    }
)
"""Columns of `jobs` that the model leaves out: nothing that a step does may touch them."""

ALL_ROWS = sa.select(models.jobs)
ALL_EVENTS = sa.select(models.job_events).order_by("job_id", "seq")
ALL_MESSAGES = sa.select(
    models.webhook_messages.c.job_id, models.webhook_messages.c.job_seq, models.webhook_messages.c.event_type
)

picks = st.integers(0, 11)  # a job, an unknown id, or what is no id: see `_target`
Shape = tuple[str, str, str, str | None, int | None, str | None, int, bool]
shape = st.tuples(
    st.sampled_from(("queued", "queued", "scheduled", "blocked")),
    st.sampled_from(LANES),
    st.sampled_from((*JOB_TYPES, *JOB_TYPES, "somebody.elses")),
    st.sampled_from((None, None, "key-1", "key-2")),
    st.sampled_from((None, 5, 30)),  # seconds until it is late
    st.sampled_from((None, "all", '["job.failed","job.cancelled"]')),
    st.integers(0, 2),  # max_retries
    st.booleans(),  # jitter
)
begun = st.sampled_from(("unsaid", "none", "first", "all"))  # what of its jobs a beat says has begun
twists = st.integers(0, 7)  # the true hold, or what a ghost would name: see `_hold`


class Steady(Random):
    """Randomness that always answers the middle of what it may."""

    def random(self) -> float:
        return 0.5

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class Hands:
    """A wall clock that may go anywhere, and a monotonic one that may not."""

    def __init__(self) -> None:
        self.wall = NOW
        self.ticks = 0.0

    def now(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.ticks


def empty(database: Database) -> None:
    """Take every job and worker out of the store."""
    with database.write() as connection:
        for table in TABLES:
            connection.execute(sa.delete(table))


class Conformance(RuleBasedStateMachine):
    """The rules, over the store of a subclass, which it empties."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.clock = Hands()
        self.lanes = MemoryLanes()
        registry = Registry()
        for name in (*JOB_TYPES, "somebody.elses"):
            registry.add(JobType(name, _anything))
        self.service = JobService(self.database, self.lanes, Settings(), registry, clock=self.clock)
        self.ids: list[str] = []
        self.claims: list[Claimed] = []
        self.workers = [new_id() for _ in range(3)]
        self.states: dict[str, str] = {}  # of the workers that have a row
        self.begun: dict[str, list[str] | None] = {}  # by worker: what its last beat said had begun

    @initialize(shapes=st.lists(shape, min_size=2, max_size=4))
    def begin(self, shapes: list[Shape]) -> None:
        empty(self.database)
        self._create(shapes)
        for worker in self.workers[:2]:
            self._register(worker)

    @property
    def now(self) -> datetime:
        return self.clock.wall

    # Making jobs

    @precondition(lambda self: len(self.ids) < MAX_JOBS)
    @rule(shapes=st.lists(shape, min_size=1, max_size=3))
    def make(self, shapes: list[Shape]) -> None:
        """A batch of rows, some with the same unique key."""
        self._create(shapes)

    def _create(self, shapes: list[Shape]) -> None:
        rows = [
            new_job(
                created_by="bob" if jitter else "alice",
                job_type=job_type,
                status=status,
                lane=lane,
                priority=lane,
                unique_key=key,
                queued_at=self.now if status == "queued" else None,
                scheduled_for=self.now + timedelta(minutes=2) if status == "scheduled" else None,
                expires_at=None if late is None else self.now + timedelta(seconds=late),
                webhook_url=webhooks and "https://example.com/hook",
                webhook_events=None if webhooks in {None, "all"} else webhooks,
                max_retries=retries,
                retry_jitter=jitter,
            )
            for status, lane, job_type, key, late, webhooks, retries, jitter in shapes
        ]
        with self.database.write_once() as connection:
            made = create(connection, rows, now=self.now)
        expected = [row.id if self.world.create(row, now=self.now) else None for row in rows]
        assert made == expected
        self.ids += [job_id for job_id in made if job_id]

    @precondition(lambda self: len(self.ids) < MAX_JOBS)
    @rule(
        caller=st.sampled_from(CALLERS),
        priority=st.sampled_from(list(Priority)),
        key=st.sampled_from((None, "key-1", "key-2")),
        delay=st.sampled_from((None, 5, 600)),
        reject=st.booleans(),
    )
    def ask(
        self, caller: Caller, priority: Priority, key: str | None, delay: float | None, reject: bool
    ) -> None:
        """A caller asks for a job; or is told of the active one that holds the unique key."""
        spec = JobSpec(
            job_type="demo.echo",
            priority=priority,
            unique_key=key,
            delay_seconds=delay,
            on_conflict="reject" if reject else "return_existing",
        )
        prepared = self.service.prepare(spec, caller)
        [answer] = self.service.enqueue([prepared])
        if self.world.create(prepared.row, now=self.now):
            assert isinstance(answer, dict)
            assert (answer["id"], answer["attempt"]) == (prepared.row.id, 0)
            assert answer["status"] == ("queued" if delay is None else "scheduled")
            self.ids.append(prepared.row.id)
            return
        holder = self.world.holder(caller.tenant_id, key or "")
        assert holder is not None
        if reject or not _sees(caller, holder):
            assert isinstance(answer, UniqueKeyTaken)
            assert ("job_id" in answer.facts) == _sees(caller, holder)
        else:
            assert isinstance(answer, dict)
            assert (answer["id"], answer["status"]) == (holder["id"], holder["status"])

    # Moves, raw

    @rule(
        wanted=st.lists(st.tuples(st.integers(0, 4 * len(MOVES) - 1), picks, twists), min_size=2, max_size=6)
    )
    def move(self, wanted: list[tuple[int, int, int]]) -> None:
        """A batch of any moves, of one kind a job."""
        kind_of: dict[str, type[Move]] = {}
        moves = [
            self._move(kind_of.setdefault(job_id, kind), job_id, twist)
            for job_id, kind, twist in (self._aimed(*want) for want in wanted)
        ]
        before = deepcopy(self.world)
        try:
            expected = self.world.carry_out(moves, now=self.now, actor="tester")
        except KeyHeld:
            self.world = before
            with pytest.raises(sa.exc.IntegrityError), self.database.write() as connection:
                carry_out(connection, moves, now=self.now, actor="tester")
            return
        with self.database.write() as connection:
            outcomes = carry_out(connection, moves, now=self.now, actor="tester")
        _same_outcomes(outcomes, expected)

    def _aimed(self, choice: int, pick: int, twist: int) -> tuple[str, type[Move], int]:
        """A job and a move for it: three times in four one that its status allows."""
        job_id = self._target(pick)
        row = self.world.jobs.get(job_id)
        kinds = [kind for kind in MOVES if row is not None and row["status"] in TABLE[kind][1]]
        if choice < len(MOVES) or not kinds:
            kinds = list(MOVES)
        if twist and ForceComplete in kinds:  # nothing leads on from there
            kinds.remove(ForceComplete)
        return job_id, kinds[choice % len(kinds)], twist

    def _move(self, kind: type[Move], job_id: str, twist: int) -> Move:
        hold = self._hold(job_id, twist)
        soon = self.now + timedelta(seconds=30)
        odd = twist % 2
        moves: dict[type[Move], Callable[[], Move]] = {
            Enqueue: lambda: Enqueue(job_id, NOW if odd else None),
            Block: lambda: Block(job_id, reason="concurrency_key" if odd else "tenant_limit"),
            Claim: lambda: Claim(job_id, new_id(), self.workers[twist % 3], self.now),
            Complete: lambda: Complete(*hold, result='{"a":1}'),
            BackOff: lambda: BackOff(*hold, soon, charge=odd, crash=1 - odd, error=ERROR),
            Fail: lambda: Fail(*hold, error=ERROR, reason="poison", crash=1),
            TimeOut: lambda: TimeOut(*hold, error=ERROR),
            Release: lambda: Release(*hold, crash=odd, error=ERROR if odd else None),
            Stop: lambda: Stop(*hold),
            Cancel: lambda: Cancel(job_id, by="carol", reason="no more"),
            Expire: lambda: Expire(job_id),
            Retry: lambda: Retry(job_id, parameters='{"x":2}' if odd else None, reason="once more"),
            RetryLater: lambda: RetryLater(job_id, soon),
            ForceComplete: lambda: ForceComplete(job_id, result="7", reason="by hand"),
        }
        return moves[kind]()

    def _target(self, pick: int) -> str:
        if pick == 9 or not self.ids:
            return new_id()
        if pick == 10:
            return "no-id-at-all"
        if pick == 11:
            return self.ids[0].upper()
        return self.ids[pick % len(self.ids)]

    def _hold(self, job_id: str, twist: int) -> tuple[str, int, str]:
        row = self.world.jobs.get(job_id, {"attempt": 1, "lease_token": None})
        token = row["lease_token"] or new_id()
        if twist == 5:
            return job_id, row["attempt"], new_id()
        if twist == 6:
            return job_id, row["attempt"] - 1, token
        if twist == 7:
            old = [(c.attempt, c.lease_token) for c in self.claims if c.job_id == job_id]
            return (job_id, *old[0]) if old else (job_id, row["attempt"], token)
        return job_id, row["attempt"], token

    # Workers

    @rule(
        slot=st.integers(0, 2),
        ended=st.lists(
            st.tuples(st.integers(0, 9), st.sampled_from(ENDINGS), twists), min_size=1, max_size=4
        ),
        wanted=st.lists(picks, min_size=2, max_size=6),
        taken=st.integers(0, 3),
        percent=st.integers(0, 100),
    )
    def work(
        self,
        slot: int,
        ended: list[tuple[int, Ending, int]],
        wanted: list[int],
        taken: int,
        percent: int,
    ) -> None:
        """A worker settles what ended, true holds and ghosts, and claims ids: from lanes, made up, twice."""
        held = [(self._claimed(pick, twist), ending) for pick, ending, twist in ended if self.claims]
        ids = self.lanes.take(LANES, taken, worker_name="w") + [self._target(pick) for pick in wanted]
        claims = [(job_id, new_id()) for job_id in ids]
        news = {job.job_id: (job, Progress(percent, "so far", '{"row":1}')) for job, _ in held[:1]}
        worker = self.workers[slot]
        done = exchange(
            self.database,
            Holder(worker, JOB_TYPES, CRASH_LIMIT, Steady()),
            ended=held,
            wanted=claims,
            news=news,
            now=self.now,
        )
        moves: list[Move] = [
            ending_move(job, ending, now=self.now, crash_limit=CRASH_LIMIT) for job, ending in held
        ]
        moves += [
            Claim(job_id, token, worker, self.now + timedelta(microseconds=place))
            for place, (job_id, token) in enumerate(claims)
        ]
        for job, said in news.values():
            self.world.progress(job, said, now=self.now)
        expected = self.world.carry_out(moves, now=self.now, actor=f"worker:{worker}", job_types=JOB_TYPES)
        settled = list(zip(held, expected, strict=False))
        assert done.refused == []
        assert done.stale == [job for (job, _), e in settled if isinstance(e, Denied)]
        assert [(s.job, s.status, s.webhook) for s in done.settled] == [
            (job, e.status, self.world.tells(job.job_id, e.status))
            for (job, _), e in settled
            if isinstance(e, Made)
        ]
        made = [e for e in expected[len(held) :] if isinstance(e, Made)]
        assert [(c.job_id, c.attempt) for c in done.claimed] == [(e.move.job_id, e.attempt) for e in made]
        for claimed in done.claimed:
            self._same_claim(claimed)
        self.claims += done.claimed

    def _claimed(self, pick: int, twist: int) -> Claimed:
        jobs = self.world.jobs
        holding = [c for c in self.claims if jobs[c.job_id]["lease_token"] == c.lease_token]
        if pick < 8 and holding:
            claimed = holding[pick % len(holding)]
        else:
            claimed = self.claims[pick % len(self.claims)]
        if twist == 5:
            return replace(claimed, lease_token=new_id())
        if twist == 6:
            return replace(claimed, attempt=claimed.attempt + 1)
        return claimed

    def _same_claim(self, claimed: Claimed) -> None:
        row = self.world.jobs[claimed.job_id]
        for name in ("attempt", "lease_token", "tenant_id", "lane", "job_type", "retry_count", "crash_count"):
            assert getattr(claimed, name) == row[name], name
        policy = claimed.retry_policy
        assert (policy.max_retries, policy.jitter) == (row["max_retries"], row["retry_jitter"])

    @precondition(lambda self: self.claims)
    @rule(
        news=st.lists(
            st.tuples(st.integers(0, 9), twists, st.integers(0, 100)),
            min_size=1,
            max_size=3,
            unique_by=lambda n: n[0],
        )
    )
    def report(self, news: list[tuple[int, int, int]]) -> None:
        """Progress of held jobs and of ghosts, forwards and back."""
        said = {
            c.job_id: (c, Progress(p, f"at {p}")) for c, p in ((self._claimed(k, t), p) for k, t, p in news)
        }
        with self.database.write() as connection:
            progress.save(connection, list(said.values()), now=self.now)
        for job, how_far in said.values():
            self.world.progress(job, how_far, now=self.now)

    @rule(
        slot=st.integers(0, 2),
        state=st.sampled_from(("active", "draining", "gone", "forgotten", "replaced")),
        begun=begun,
    )
    def staff(self, slot: int, state: str, begun: str) -> None:
        """A worker registers, drains, leaves, or starts again under a new id, with or without a word."""
        worker = self.workers[slot]
        living = self.states.get(worker) in reaper.LIVING
        if state == "forgotten":
            self.workers[slot] = new_id()
        elif state == "replaced":
            self.workers[slot] = new_id()
            self._register(self.workers[slot], replaces=worker)
            if living:
                self.states[worker] = "gone"
        elif state != "active":
            leases.leave(self.database, worker_id=worker, state=state)
            if living:
                self.states[worker] = state
        elif worker not in self.states:
            self._register(worker)
        self._same_wishes(worker, self._beat(worker, [], begun))

    def _register(self, worker: str, *, replaces: str | None = None) -> None:
        leases.register(self.database, worker_id=worker, name="w", lanes=LANES, replaces=replaces)
        self.states[worker], self.begun[worker] = "active", None

    @rule(
        beats=st.tuples(*[st.sampled_from(("silent", "last", "all", "none"))] * 3),
        begun=st.tuples(begun, begun, begun),
    )
    def watch(self, beats: tuple[str, ...], begun: tuple[str, ...]) -> None:
        """A reaper watches for a lease: who is silent dies, what nobody has or names waits again."""
        watcher = reaper.Reaper(
            self.database, self.clock, lease_seconds=LEASE_SECONDS, crash_limit=CRASH_LIMIT
        )
        living = {w for w, state in self.states.items() if state in reaper.LIVING}
        saying = dict(zip(self.workers, beats, strict=True))
        rung: list[tuple[str, str]] = []
        self.clock.ticks += 1000
        for turn in range(5):
            for worker, how_begun in zip(self.workers, begun, strict=True):
                if saying[worker] in {"all", "none"} or (saying[worker], turn) == ("last", 0):
                    held = [] if saying[worker] == "none" else self._tokens_of(worker)
                    wishes = self._beat(worker, held, how_begun)
                    if turn == 0:  # no job was taken back yet
                        self._same_wishes(worker, wishes)
            rung += watcher.sweep()
            self.clock.ticks += LEASE_SECONDS / 4
        silent = {worker for worker in living if saying.get(worker) not in {"all", "none"}}
        believed = len(living) < reaper.MASS_WORKERS or len(silent) <= len(living) / 2
        if believed:
            self.states |= dict.fromkeys(silent, "dead")
        expected: list[tuple[str, str]] = []
        for row in [*self.world.where("running")]:
            worker = row["worker_id"]
            if self.states.get(worker) in reaper.LIVING and saying.get(worker) != "none":
                continue
            said = self.begun.get(worker)
            died = self.states.get(worker) == "dead" and (said is None or row["lease_token"] in said)
            [made] = self.world.carry_out([_taken_back(row, died)], now=self.now, actor="scheduler")
            if isinstance(made, Made) and made.status == "queued":
                expected.append((row["lane"], row["id"]))
        assert sorted((due[0], due[1]) for due in rung) == sorted(expected)

    def _tokens_of(self, worker: str) -> list[str]:
        return [r["lease_token"] for r in self.world.where("running") if r["worker_id"] == worker]

    def _beat(self, worker: str, held: Sequence[str], how_begun: str) -> list[Wish] | None:
        tokens = sorted(self._tokens_of(worker))
        begun = None if how_begun == "unsaid" else tokens[: {"none": 0, "first": 1, "all": None}[how_begun]]
        wishes = leases.beat(self.database, worker_id=worker, held=held, begun=begun)
        assert (wishes is not None) == (self.states.get(worker) in reaper.LIVING)
        if wishes is not None:
            self.begun[worker] = begun
        return wishes

    def _same_wishes(self, worker: str, wishes: Sequence[Wish] | None) -> None:
        """A beat hears what was wished of the worker's jobs."""
        wished = [
            r
            for r in self.world.where("running")
            if wishes is not None and r["worker_id"] == worker and r["cancel_requested_at"] is not None
        ]
        assert sorted((w.job_id, w.lease_token, w.terminate) for w in wishes or ()) == sorted(
            (r["id"], r["lease_token"], r["cancel_terminate"]) for r in wished
        )

    # Callers

    @rule(
        caller=st.sampled_from(CALLERS),
        pick=st.integers(0, 9),
        terminate=st.booleans(),
        grace=st.sampled_from((None, 0.0, 5.5)),
    )
    def cancel(self, caller: Caller, pick: int, terminate: bool, grace: float | None) -> None:
        job_id = self._target(pick)
        row = self.world.jobs.get(job_id)
        try:
            answer = self.service.cancel(
                job_id, caller, reason="enough", terminate=terminate, grace_seconds=grace
            )
        except JobNotFound:
            assert row is None or not _sees(caller, row)
            return
        except IllegalTransition as error:
            refused = error
            answer = None
        assert row is not None
        assert _sees(caller, row)
        if answer is None:
            assert refused.facts["current_status"] == row["status"]
            assert row["status"] in FINAL - {"cancelled"}
            return
        if row["status"] == "running":
            self.world.wish(
                job_id, by=caller.subject, reason="enough", terminate=terminate, grace=grace, now=self.now
            )
        else:
            move = Cancel(job_id, by=caller.subject, reason="enough")
            self.world.carry_out([move], now=self.now, actor=caller.subject)
        assert answer.done == (row["status"] == "cancelled")
        assert answer.job["status"] == row["status"]
        assert answer.job["cancelling"] == (row["status"] == "running")

    @rule(
        caller=st.sampled_from(CALLERS),
        statuses=st.lists(st.sampled_from(list(JobStatus)), max_size=3, unique=True),
        pick=st.integers(0, 9),
        mine=st.booleans(),
    )
    def look(self, caller: Caller, statuses: list[JobStatus], pick: int, mine: bool) -> None:
        """Pages, one job, the slow path and the counts tell what the model knows."""
        scope = Scope(caller.tenant_id, caller.subject if mine else None)
        wanted = JobFilter(statuses=tuple(statuses))
        seen = [
            r["id"]
            for r in self.world.jobs.values()
            if r["tenant_id"] == caller.tenant_id
            and (not mine or r["created_by"] == caller.subject)
            and (not statuses or r["status"] in statuses)
        ]
        with self.database.read() as connection:
            rows, more = queries.page_of_jobs(connection, scope, wanted, limit=3, before=None)
            found = leases.find_queued(connection, LANES, JOB_TYPES, limit=4, before=self.now)
            counts = queries.status_counts(connection, caller.tenant_id)
            states = queries.lane_state(connection, LANES, now=self.now)
        assert ([r["id"] for r in rows], more) == (sorted(seen, reverse=True)[:3], len(seen) > 3)
        assert found == self.world.queued(LANES, JOB_TYPES, before=self.now)[:4]
        for status, count in counts.items():
            assert count == sum(r["tenant_id"] == caller.tenant_id for r in self.world.where(status))
        assert {lane: s["queued"] for lane, s in states.items()} == {
            lane: len(self.world.where("queued", lane=lane)) for lane in LANES
        }
        job_id = self._target(pick)
        row = self.world.jobs.get(job_id)
        try:
            job = self.service.get(job_id, caller)
        except JobNotFound:
            assert row is None or not _sees(caller, row)
        else:
            assert row is not None
            assert (job["status"], job["attempt"], job["error"]) == (
                row["status"],
                row["attempt"],
                row["error"] if row["error"] is None else job["error"],
            )

    # Time

    @rule(
        seconds=st.sampled_from((0, 5, 30, 130, 700, 0.000001, -1, -3600)),
        sweeps=st.permutations(("promote", "expire", "reconcile")),
        count=st.sampled_from((0, 0, 1, 3)),
    )
    def tick(self, seconds: float, sweeps: Sequence[str], count: int) -> None:
        """The wall clock moves, also backwards; then a scheduler sweeps."""
        self.clock.wall += timedelta(seconds=seconds)
        for sweep in sweeps[:count]:
            getattr(self, f"_{sweep}")()

    def _promote(self) -> None:
        due = self.world.due(self.now)
        moments = [r["scheduled_for"] for r in self.world.where("scheduled")]
        moments += [r["next_retry_at"] for r in self.world.where("retrying")]
        assert upkeep.next_due(self.database) == min(moments, default=None)
        rung = upkeep.promote(self.database, now=self.now)
        assert [tuple(each[:2]) for each in rung] == [(self.world.jobs[i]["lane"], i) for i in due]
        self.world.carry_out([Enqueue(job_id) for job_id in due], now=self.now, actor="scheduler")
        self.service.ring(rung)

    def _expire(self) -> None:
        late = self.world.late(self.now)
        assert upkeep.expire(self.database, now=self.now) == len(late)
        self.world.carry_out([Expire(job_id) for job_id in late], now=self.now, actor="scheduler")

    def _reconcile(self) -> None:
        """Once no row is young, every queued row's id is in its lane."""
        later = max([self.now, *(r["queued_at"] for r in self.world.where("queued"))]) + timedelta(seconds=3)
        upkeep.reconcile(self.database, self.lanes, window=self.lanes.window, now=later)
        for lane in LANES:
            assert {r["id"] for r in self.world.where("queued", lane=lane)} <= set(self.lanes.contents(lane))

    # What must hold after each step

    @invariant()
    def agree(self) -> None:
        """The store is what the model says: rows whole, events in order, messages."""
        self._stepped()
        with self.database.read() as connection:
            rows = connection.execute(ALL_ROWS).mappings().all()
            events = connection.execute(ALL_EVENTS).mappings().all()
            messages = connection.execute(ALL_MESSAGES).all()
        compare_rows(self.world, rows)
        compare_events(self.world, events)
        assert {tuple(message) for message in messages} == self.world.messages

    def teardown(self) -> None:
        self._lived(self.world)

    def _stepped(self) -> None:
        """A step was made and compared."""

    def _lived(self, world: World) -> None:
        """A life is over."""


def compare_rows(world: World, rows: Sequence[sa.RowMapping]) -> None:
    """Every row is known, and every column that the model knows is as it says."""
    assert sorted(row["id"] for row in rows) == sorted(world.jobs)
    for row in rows:
        expected = world.jobs[row["id"]]
        wrong = {
            name: {"store": row[name], "model": value}
            for name, value in expected.items()
            if value != row[name]
        }
        assert not wrong, (row["id"], wrong)


def compare_events(world: World, events: Sequence[sa.RowMapping]) -> None:
    """The events, by job and `seq`, are those of the model, one for each."""
    told = [event for job_id in sorted(world.events) for event in world.events[job_id]]
    assert [(e["job_id"], e["seq"], e["action"]) for e in events] == [
        (e["job_id"], e["seq"], e["action"]) for e in told
    ]
    for event, expected in zip(events, told, strict=True):
        wrong = {k: {"store": event[k], "model": v} for k, v in expected.items() if v != event[k]}
        assert not wrong, (event["job_id"], event["seq"], wrong)


def _same_outcomes(outcomes: Sequence[Outcome], expected: Sequence[Made | Denied]) -> None:
    assert len(outcomes) == len(expected)
    for outcome, told in zip(outcomes, expected, strict=True):
        assert isinstance(outcome, Applied) == isinstance(told, Made), (outcome, told)
        assert (outcome.move, outcome.status) == (told.move, told.status)
        if isinstance(outcome, Applied) and isinstance(told, Made):
            assert (outcome.row["event_seq"], outcome.row["attempt"]) == (told.seq, told.attempt)
            assert set(RETURNED) <= set(outcome.row)
        elif isinstance(told, Denied):
            assert outcome.attempt == told.attempt  # type: ignore[union-attr]  # a Refused


def _taken_back(row: dict[str, Any], died: bool) -> Move:
    """What becomes of a job whose worker died, or left, or never knew of it."""
    hold = (row["id"], row["attempt"], row["lease_token"])
    if row["cancel_requested_at"] is not None:
        return Stop(*hold)
    if not died:
        return Release(*hold)
    error = error_text("WorkerLost", "crash")
    if row["crash_count"] + 1 >= CRASH_LIMIT:
        return Fail(*hold, error=error, reason="poison", crash=1)
    return Release(*hold, crash=1, error=error)


def _sees(caller: Caller, row: dict[str, Any]) -> bool:
    own = caller.role is not Role.USER or row["created_by"] == caller.subject
    return bool(own and row["tenant_id"] == caller.tenant_id)


def _anything(**parameters: Any) -> None:
    """A job type's handler, which nobody calls."""
