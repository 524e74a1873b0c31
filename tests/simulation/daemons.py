"""Schedulers and couriers. Two of each; any of them may be killed, stopped, or see another time of day."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from laneway.domain.states import RULES, Action, JobStatus
from laneway.engine.reaper import LIVING, Orphan, Verdict, Watch, WorkerSeen, take_back
from laneway.engine.transitions import Applied, Enqueue, Expire, Outcome
from laneway.engine.upkeep import DUE_BY, missing
from laneway.lanes.backend import LanesUnavailable
from laneway.webhooks.retries import (
    QUICK_SECONDS,
    Answer,
    DeliveryStatus,
    ErrorClass,
    Timings,
    judge,
)
from simulation import checks
from simulation.kernel import Process, Thread
from simulation.scale import COURIER_LEASE_SECONDS, CRASH_LIMIT, LANE_WINDOW, LEASE_SECONDS, TICK_SECONDS
from simulation.store import REAPER, Delivery, Down, Row, Unknown

if TYPE_CHECKING:
    from simulation.world import World

T = TypeVar("T")

SHORT = 0.02
LONG = 0.3


def start_scheduler(world: World, number: int, *, after: float = 0.0) -> None:
    process = Process(f"scheduler{number}", healthy_since=world.kernel.now + after)
    world.daemons = [d for d in world.daemons if d.alive] + [process]
    world.kernel.start(process, Scheduler(world, process).run(), after=after)


class Scheduler:
    """Like `scheduler/ticker.py`, sweep by sweep."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process
        self._watch = Watch(LEASE_SECONDS)

    def run(self) -> Thread:
        while True:
            yield TICK_SECONDS
            for sweep in (self._promote, self._expire, self._reap, self._reconcile):
                try:
                    yield from sweep()
                except (Down, Unknown, LanesUnavailable):
                    yield SHORT

    def _store(self, work: Callable[[], T]) -> T:
        return self._world.store.transaction(self._process, work)

    def _rows(self, matches: Callable[[Row], bool]) -> list[Row]:
        return [row for row in self._world.store.jobs.values() if matches(row)]

    def _promote(self) -> Thread:
        store = self._world.store
        now = self._world.kernel.clock(self._process)

        def due() -> list[Enqueue]:
            found = [
                row
                for row in store.jobs.values()
                if (column := DUE_BY.get(row["status"])) and row[column] <= now
            ]
            return [Enqueue(row["id"]) for row in found]

        if self._world.design.promotion_lock:
            outcomes = self._store(lambda: store.carry_out(due(), now=now, actor="promoter"))
        else:
            moves = self._store(due)
            yield LONG
            outcomes = self._store(lambda: store.carry_out(moves, now=now, actor="promoter"))
        yield SHORT
        self._ring(outcomes)

    def _expire(self) -> Thread:
        store = self._world.store
        now = self._world.kernel.clock(self._process)
        sources = RULES[Action.EXPIRE].sources
        late = self._store(
            lambda: self._rows(
                lambda row: (
                    row["expires_at"] is not None and row["expires_at"] <= now and row["status"] in sources
                )
            )
        )
        if late:
            yield SHORT
            moves = [Expire(row["id"]) for row in late]
            self._store(lambda: store.carry_out(moves, now=now, actor="expirer"))

    def _reap(self) -> Thread:
        world = self._world
        store, design = world.store, world.design
        seen = self._store(self._look)
        verdict = self._judge(seen)
        checks.on_verdict(world, seen, verdict)
        for worker in verdict.dead:
            yield SHORT
            self._store(partial(self._declare_dead, *worker))
        yield SHORT
        orphans = self._store(
            lambda: self._orphans(verdict.lost_claims if design.held_tokens else frozenset())
        )
        if not orphans:
            return
        yield LONG  # READ COMMITTED: what was read may have changed
        limit = CRASH_LIMIT if design.crash_limit else 1_000
        moves = [take_back(orphan, crash_limit=limit) for orphan in orphans]
        now = world.kernel.clock(self._process)
        outcomes = self._store(lambda: store.carry_out(moves, now=now, actor=REAPER))
        yield SHORT
        self._ring(outcomes)

    def _look(self) -> list[WorkerSeen]:
        store = self._world.store
        tokens: dict[str, set[str]] = {}
        for row in store.jobs.values():
            if row["status"] is JobStatus.RUNNING:
                tokens.setdefault(row["worker_id"], set()).add(row["lease_token"])
        return [
            WorkerSeen(name, worker.beat, worker.held, frozenset(tokens.get(name, ())))
            for name, worker in store.workers.items()
            if worker.state in LIVING
        ]

    def _judge(self, seen: list[WorkerSeen]) -> Verdict:
        world, watch = self._world, self._watch
        now = world.kernel.now
        if not world.design.fresh_watch and watch._looked_at is not None:
            watch._looked_at = now
        if not world.design.mass_guard:
            watch._patience = -1.0
        verdict = watch.look(seen, at=now)
        if world.design.monotonic_lease:
            return verdict
        oldest = world.kernel.clock(self._process) - timedelta(seconds=LEASE_SECONDS)
        dead = [(s.id, s.beat) for s in seen if world.store.workers[s.id].beat_at < oldest]
        return Verdict(tuple(dead), verdict.lost_claims)

    def _declare_dead(self, worker_id: str, beat: int) -> None:
        worker = self._world.store.workers[worker_id]
        if worker.beat == beat and worker.state in LIVING:
            worker.state = "dead"
            checks.on_declared_dead(self._world, worker_id, worker)

    def _orphans(self, lost: frozenset[str]) -> list[Orphan]:
        workers = self._world.store.workers
        found = []
        for row in self._world.store.jobs.values():
            if row["status"] is JobStatus.RUNNING:
                worker = workers.get(row["worker_id"])
                if worker is None or worker.state not in LIVING or row["lease_token"] in lost:
                    found.append(
                        Orphan(
                            row["id"],
                            row["attempt"],
                            row["lease_token"],
                            row["crash_count"],
                            row["cancel_requested_at"],
                            worker is not None and worker.state == "dead",
                        )
                    )
        return found

    def _reconcile(self) -> Thread:
        world = self._world
        if not world.design.reconciler:
            return
        names = self._store(
            lambda: sorted({row["lane"] for row in self._rows(lambda r: r["status"] is JobStatus.QUEUED)})
        )
        for lane in names:
            yield from self._refill(lane)

    def _refill(self, lane: str) -> Thread:
        lanes = self._world.lanes
        now = self._world.kernel.clock(self._process)
        backlog = lanes.call("backlog", lane)
        yield SHORT
        rows = self._store(
            lambda: sorted(
                (row["queued_at"], row["id"])
                for row in self._rows(lambda r: r["lane"] == lane and r["status"] is JobStatus.QUEUED)
            )
        )
        yield SHORT
        present = set(lanes.call("contents", lane))
        queued = [(job_id, at) for at, job_id in rows]
        lacks = missing(queued, present, tenant_id="", window=LANE_WINDOW, refused=backlog.waiting, now=now)
        if lacks.head or lacks.tail or (backlog.waiting and lacks.complete):
            yield SHORT
            lanes.call("refill", lane, [lacks], refusals_seen=backlog.refusals)

    def _ring(self, outcomes: list[Outcome]) -> None:
        self._world.lanes.push(
            [
                (o.row["lane"], o.row["id"])
                for o in outcomes
                if isinstance(o, Applied) and o.status is JobStatus.QUEUED
            ]
        )


def start_courier(world: World, number: int, *, after: float = 0.0) -> None:
    process = Process(f"courier{number}", healthy_since=world.kernel.now + after)
    world.daemons = [d for d in world.daemons if d.alive] + [process]
    world.kernel.start(process, Courier(world, process).run(), after=after)


class Courier:
    """Like `webhooks/courier.py`, one message at a time."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process
        self._id = f"{process.name}.{world.next_number()}"

    def run(self) -> Thread:
        store, kernel = self._world.store, self._world.kernel
        while True:
            yield 1.0
            try:
                due = store.transaction(self._process, self._claim)
            except (Down, Unknown):
                continue
            for delivery in due:
                early = not self._world.design.settle_after_send
                if early:
                    yield from self._settle(delivery, Answer(kernel.clock(self._process), Timings(1), 200))
                yield 0.1
                answer = self._send(delivery)
                if not early:
                    yield 0.05
                    yield from self._settle(delivery, answer)

    def _claim(self) -> list[Delivery]:
        """Take back what couriers died with; lease what is due."""
        now = self._world.kernel.clock(self._process)
        due = []
        for delivery in self._world.store.deliveries.values():
            lease = delivery.lease_until
            if lease is not None and lease < now and self._world.design.courier_lease:
                delivery.status, delivery.owner, delivery.lease_until = DeliveryStatus.RETRYING, None, None
            waits = delivery.status in (DeliveryStatus.PENDING, DeliveryStatus.RETRYING)
            if waits and delivery.next_at <= now and len(due) < 4:
                delivery.status = DeliveryStatus.SENDING
                delivery.attempt_count += 1
                delivery.owner = self._id
                delivery.lease_until = now + timedelta(seconds=COURIER_LEASE_SECONDS)
                due.append(delivery)
        return due

    def _send(self, delivery: Delivery) -> Answer:
        now = self._world.kernel.clock(self._process)
        if self._world.store.faults and self._world.rng.random() < 0.1:
            return Answer(now, Timings(1), 500, ErrorClass.HTTP_5XX)
        delivery.received += 1
        self._world.note("receiver", f"hears of the end {delivery.seq}", delivery.job_id)
        return Answer(now, Timings(1), 200)

    def _settle(self, delivery: Delivery, answer: Answer) -> Thread:
        now = self._world.kernel.clock(self._process)
        attempt = delivery.attempt_count
        verdict = judge(
            answer,
            attempt=attempt,
            max_attempts=len(QUICK_SECONDS) + 1,
            schedule=QUICK_SECONDS,
            give_up_at=None,
            now=now,
            rng=self._world.rng,
        )

        def settle() -> None:
            if delivery.owner == self._id:
                delivery.status, delivery.owner, delivery.lease_until = verdict.status, None, None
                delivery.next_at = verdict.next_at or delivery.next_at

        while True:
            try:
                self._world.store.transaction(self._process, settle)
                return
            except (Down, Unknown):
                yield 1.0
