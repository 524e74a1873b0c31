"""Workers: take ids, claim rows, run handlers in children, settle what came of them; and beat meanwhile.

A turn of `_pool` is a turn of `worker/pool.py`. Handlers run on while their worker is stopped, and die
with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from laneway.domain.spec import lanes_of
from laneway.domain.states import JobStatus
from laneway.engine.endings import Cancelled, Crashed, Ending, Raised, Returned, TimedOut, Unfinished
from laneway.engine.outcomes import Claimed, decide
from laneway.engine.transitions import Applied, Claim, HeldMove, Outcome
from laneway.lanes.backend import LanesUnavailable
from simulation import checks
from simulation.checks import Execution
from simulation.kernel import Process, Thread
from simulation.scale import (
    BEAT_SECONDS,
    CANCEL_GRACE_SECONDS,
    CHILDREN,
    CRASH_LIMIT,
    DRAIN_SECONDS,
    LEASE_SECONDS,
    OWN_LOOK_SECONDS,
    POLL_SECONDS,
)
from simulation.store import Down, Unknown, WorkerRow

if TYPE_CHECKING:
    from simulation.world import World

LANES = lanes_of(("default",))


@dataclass(eq=False, slots=True)
class Run:
    """A job in a child, and what it will come to."""

    job: Claimed
    execution: Execution
    ending: Ending
    kills_worker: bool = False
    cancel_at: float = math.inf


class Worker:
    """One worker process. It may live several lives, each under an id of its own."""

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.process = process
        self.lives = 0
        self.worker_id = ""
        self.held: dict[str, Claimed] = {}
        self.runs: list[Run] = []
        self.ended: list[tuple[Claimed, Ending]] = []
        self.lost = True
        self.draining = False
        self.stop_at = math.inf
        self.beaten_at = 0.0
        self.own_look_at = 0.0
        self.idle_since = math.inf
        self.store_away = False
        process.on_death = self._die

    def _die(self) -> None:
        for run in self.runs:
            run.execution.over = True
        self.runs.clear()

    # The lease

    def beats(self) -> Thread:
        patience = LEASE_SECONDS - 2 * BEAT_SECONDS
        store, kernel = self.world.store, self.world.kernel
        while True:
            yield BEAT_SECONDS
            if self.lost:
                continue
            beat = partial(store.beat, self.worker_id, frozenset(self.held))
            try:
                wishes = store.transaction(self.process, beat)
            except (Down, Unknown):
                self.lost = self.world.design.self_fence and kernel.now - self.beaten_at > patience
                continue
            if wishes is None:
                self.lost = self.world.design.self_fence
                continue
            self.beaten_at = kernel.now
            for run in self.runs:
                if (run.job.job_id, run.job.lease_token) in wishes:
                    self._ask_to_stop(run)

    def _ask_to_stop(self, run: Run) -> None:
        if run.cancel_at < math.inf:
            return
        run.cancel_at = self.world.kernel.now + CANCEL_GRACE_SECONDS
        if run.job.job_id[-1] in "02468":  # a handler that listens
            run.execution.ends_at = min(run.execution.ends_at, self.world.kernel.now)
            run.ending = Cancelled()

    def _start_anew(self) -> bool:
        """Stop everything, and register under a new id; whether that went well."""
        self._die()
        self.held.clear()
        self.ended.clear()
        store, process = self.world.store, self.process
        worker_id = f"{process.name}.{self.lives}"
        self.lives += 1

        def register() -> None:
            store.workers[worker_id] = WorkerRow(process, true_beat_at=self.world.kernel.now)
            if self.worker_id:
                self._leave("gone")

        try:
            store.transaction(process, register)
        except (Down, Unknown):
            return False
        self.worker_id = worker_id
        self.beaten_at = self.world.kernel.now
        self.lost = False
        return True

    def _leave(self, state: str) -> None:
        row = self.world.store.workers[self.worker_id]
        if row.state in ("active", "draining"):
            row.state = state

    # The pool

    def pool(self) -> Thread:
        kernel = self.world.kernel
        while True:
            if self.lost:
                if self.draining and self.worker_id:
                    break
                if not self._start_anew():
                    yield POLL_SECONDS
                    continue
            yield POLL_SECONDS
            if self.lost:
                continue
            self._hear()
            if not self.process.alive:
                return
            if self.draining and self._drained():
                break
            ids = self._take()
            if ids:
                yield 0.01
                if self.lost:
                    continue
            if ids or self.ended:
                settled = self._commit(ids)
                if settled and not self.world.design.message_with_end:
                    yield 0.02
                    self._tell_late(settled)
            idle = not self.draining and len(self.runs) < CHILDREN
            self.idle_since = min(self.idle_since, kernel.now) if idle else math.inf
        try:
            self.world.store.transaction(self.process, lambda: self._leave("gone"))
        except (Down, Unknown):
            self.process.troubled = True  # it could not say that it goes
        self.process.alive = False
        self._die()

    def _hear(self) -> None:
        """Endings, progress, and children that must be killed."""
        kernel, store = self.world.kernel, self.world.store
        now = kernel.now
        news: list[tuple[Claimed, int]] = []
        for run in list(self.runs):
            started_at, ends_at = run.execution.started_at, run.execution.ends_at
            late_at = started_at + run.job.timeout_seconds
            if ends_at <= min(now, late_at, run.cancel_at):
                if run.kills_worker:
                    self.world.note(self.process.name, "is killed by its job", run.job.job_id)
                    kernel.kill(self.process)
                    start_worker(self.world, self.process.name, after=2.0)
                    return
                self._end(run, run.ending)
            elif now >= run.cancel_at:
                self._end(run, Cancelled())
            elif now >= late_at:
                self._end(run, TimedOut(run.job.timeout_seconds))
            elif ends_at < math.inf:
                news.append((run.job, int(99 * (now - started_at) / (ends_at - started_at))))
        if news:
            try:
                store.transaction(self.process, lambda: [store.save_progress(*each) for each in news])
            except (Down, Unknown):
                pass

    def _end(self, run: Run, ending: Ending) -> None:
        self.runs.remove(run)
        run.execution.over = True
        run.execution.returned = isinstance(ending, Returned)
        if isinstance(ending, TimedOut) or (isinstance(ending, Raised) and ending.charged):
            failures = self.world.store.failures
            failures[run.job.job_id] = failures.get(run.job.job_id, 0) + 1
        self.ended.append((run.job, ending))

    def _drained(self) -> bool:
        """After SIGTERM: wait, then kill and release. Whether nothing is left."""
        now = self.world.kernel.now
        if self.stop_at == math.inf:
            self.stop_at = now + DRAIN_SECONDS
            try:
                self.world.store.transaction(self.process, lambda: self._leave("draining"))
            except (Down, Unknown):
                pass
        if now >= self.stop_at:
            for run in list(self.runs):
                self._end(run, Unfinished())
        return not self.held

    def _take(self) -> list[str]:
        """Ids to claim: from the lanes, else from the store."""
        world = self.world
        idle = CHILDREN - len(self.runs)
        if self.draining or idle <= 0:
            return []
        now = world.kernel.now
        if self.store_away:
            found = self._find(idle, queued_for_seconds=0.0)
            self.store_away = found is None
            return found or []
        try:
            ids: list[str] = world.lanes.call("take", LANES, idle, worker_name=self.process.name)
        except LanesUnavailable:
            return self._find(idle, queued_for_seconds=0.0) or []
        if not ids and now >= self.own_look_at:
            self.own_look_at = now + OWN_LOOK_SECONDS
            return self._find(idle, queued_for_seconds=OWN_LOOK_SECONDS) or []
        return ids

    def _find(self, count: int, *, queued_for_seconds: float) -> list[str] | None:
        """Like `Ledger.find`."""
        if not self.world.design.own_look:
            return []
        store = self.world.store
        before = self.world.kernel.clock(self.process) - timedelta(seconds=queued_for_seconds)

        def look() -> list[str]:
            rows = [
                (LANES.index(row["lane"]), row["queued_at"], row["id"])
                for row in store.jobs.values()
                if row["status"] is JobStatus.QUEUED and row["queued_at"] <= before
            ]
            return [job_id for _, _, job_id in sorted(rows)[:count]]

        try:
            return store.transaction(self.process, look)
        except (Down, Unknown):
            return None

    def _commit(self, ids: list[str]) -> list[Outcome]:
        """Settle what ended and claim the ids, in one transaction; like `engine/exchange.py`."""
        world = self.world
        store = world.store
        now = world.kernel.clock(self.process)
        ended, self.ended = self.ended, []
        moves: list[HeldMove] = [self._decide(job, ending) for job, ending in ended]
        claims = [Claim(i, self._token(i), self.worker_id, now) for i in dict.fromkeys(ids)]
        try:
            outcomes = store.transaction(
                self.process, lambda: store.carry_out([*moves, *claims], now=now, actor=self.worker_id)
            )
        except (Down, Unknown):
            self.ended = ended + self.ended
            self.store_away = True
            return []
        for job, _ in ended:
            self.held.pop(job.lease_token, None)
        for claim, outcome in zip(claims, outcomes[len(moves) :], strict=True):
            if isinstance(outcome, Applied):
                job = Claimed.of(outcome.row, claim.lease_token)
                self.held[claim.lease_token] = job
                self.runs.append(self._run(job))
        return outcomes

    def _decide(self, job: Claimed, ending: Ending) -> HeldMove:
        world, design = self.world, self.world.design
        if isinstance(ending, Unfinished) and not design.free_release:
            ending = Raised("Unfinished", "")
        move = decide(
            job,
            ending,
            now=world.kernel.clock(self.process),
            rng=world.rng,
            crash_limit=CRASH_LIMIT if design.crash_limit else 1_000,
        )
        if hasattr(move, "next_retry_at") and not design.backoff:
            object.__setattr__(move, "next_retry_at", world.kernel.clock(self.process))
        return move

    def _token(self, job_id: str) -> str:
        source = self.world.rng.getrandbits(48)
        return f"{job_id}/{0 if self.world.weak_tokens else source}"

    def _tell_late(self, settled: list[Outcome]) -> None:
        """A mutant's webhook messages: in a transaction of their own."""
        store = self.world.store
        now = self.world.kernel.clock(self.process)
        try:
            store.transaction(self.process, lambda: store.tell(settled, now=now))
        except (Down, Unknown):
            pass

    def _run(self, job: Claimed) -> Run:
        now, rng = self.world.kernel.now, self.world.rng
        failed = self.world.store.failures.get(job.job_id, 0)
        started = len(self.world.seen.executions.get(job.job_id, ()))
        ends_at = now + rng.uniform(0.1, 4)
        ending: Ending = Returned()
        match job.job_type:
            case "slow":
                ends_at = now + 3 * LEASE_SECONDS
            case "flaky" if not failed:
                ending = Raised("Error", "")
            case "fails":
                ending = Raised("Error", "")
            case "permanent":
                ending = Raised("PermanentError", "", permanent=True)
            case "snoozes" if started < 2:
                ending = Raised("Snooze", "", in_seconds=3, charged=False)
            case "hangs":
                ends_at = math.inf
            case "crashes":
                ending = Crashed("killed by signal 9")
        execution = Execution(job.job_id, job.attempt, self.process, now, ends_at)
        checks.on_start(self.world, execution)
        return Run(job, execution, ending, kills_worker=job.job_type == "bombs")


def start_worker(world: World, name: str, *, after: float = 0.0) -> None:
    """A new process on the host, as its supervisor starts it."""
    generation = name.partition("-")[0]
    process = Process(f"{generation}-{world.next_number()}", healthy_since=world.kernel.now + after)
    worker = Worker(world, process)
    world.workers = [w for w in world.workers if w.process.alive] + [worker]
    world.kernel.start(process, worker.pool(), after=after)
    world.kernel.start(process, worker.beats(), after=after)
