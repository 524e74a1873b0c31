"""The promises, held against what callers, handlers and receivers saw. Numbers are those of the research."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from laneway.domain.events import EVENT_OF
from laneway.domain.states import ACTIVE, FINAL, Action, JobStatus
from laneway.engine.reaper import MASS_WORKERS, Verdict, WorkerSeen
from laneway.webhooks.retries import QUICK_SECONDS, DeliveryStatus
from simulation.kernel import EPOCH, Process, Thread
from simulation.scale import LANE_WINDOW, LEASE_SECONDS, STALL_SECONDS, UNHEARD_SECONDS
from simulation.store import Event, Row, WorkerRow

if TYPE_CHECKING:
    from simulation.world import World


@dataclass(eq=False, slots=True)
class Execution:
    """What the world outside sees of a handler."""

    job_id: str
    attempt: int
    process: Process
    started_at: float
    ends_at: float
    over: bool = False
    returned: bool = False


@dataclass(slots=True)
class Seen:
    """What was seen from outside."""

    answered: dict[str, float] = field(default_factory=dict)  # job → when it was answered 202
    cancelled: dict[str, float] = field(default_factory=dict)  # job → when its cancel was answered
    executions: dict[str, list[Execution]] = field(default_factory=dict)
    waiting_clients: int = 0
    absent_since: dict[str, float] = field(default_factory=dict)  # job → since when its lane lacks it
    mass_cut_at: float = -1000.0  # when all workers were cut off at once, and none was silent before


# When something happens


def on_event(world: World, job_id: str, event: Event) -> None:
    """A job changed its status."""
    seen = world.seen
    row = world.store.jobs[job_id]
    match event.action:
        case Action.CLAIM if job_id in seen.cancelled:
            world.complain("I18 cancel", f"begun after its cancel was answered ({event.actor})", job_id)
        case Action.COMPLETE:
            runs = seen.executions.get(job_id, ())
            if not any(run.attempt == event.attempt and run.returned for run in runs):
                world.complain("I2 at least once", f"attempt {event.attempt} never returned", job_id)
        case Action.RETRY:
            seen.cancelled.pop(job_id, None)
    key = row["unique_key"]
    if key is not None and event.action in (None, Action.RETRY):
        holders = [
            r["id"] for r in world.store.jobs.values() if r["unique_key"] == key and r["status"] in ACTIVE
        ]
        if len(holders) > 1:
            world.complain("I13 unique key", f"{key} is held by {', '.join(holders)}", job_id)


def on_start(world: World, run: Execution) -> None:
    """A handler begins. Another of the job may run on only where its worker was stopped, and did not know."""
    runs = world.seen.executions.setdefault(run.job_id, [])
    if not world.weak_tokens and run.job_id not in world.store.edited:
        for other in runs:
            if other.attempt == run.attempt:
                world.complain("I5 attempt", f"attempt {run.attempt} begins a second time", run.job_id)
            going_on = other.process.alive and not other.over and other.ends_at > world.kernel.now
            if going_on and not other.process.was_stopped:
                said = f"attempt {run.attempt} begins while {other.attempt} goes on on {other.process.name}"
                world.complain("one at a time", said, run.job_id)
    runs.append(run)


def on_declared_dead(world: World, worker_id: str, worker: WorkerRow) -> None:
    """A reaper gives a worker up."""
    silent = world.kernel.now - worker.true_beat_at
    world.note("reaper", f"declares {worker_id} dead, silent for {silent:.1f} s")
    if silent < LEASE_SECONDS:
        world.complain("lease", f"{worker_id} was declared dead {silent:.1f} s after a beat")


def on_verdict(world: World, workers: Sequence[WorkerSeen], verdict: Verdict) -> None:
    """A reaper has looked. Shortly after all workers were cut off at once, it gives none of them up."""
    if not verdict.dead or world.kernel.now > world.seen.mass_cut_at + 1.5 * LEASE_SECONDS:
        return
    silences = [world.kernel.now - world.store.workers[seen.id].true_beat_at for seen in workers]
    quiet = sum(silence > 0.9 * LEASE_SECONDS for silence in silences)
    if len(workers) >= MASS_WORKERS and quiet > len(workers) / 2:
        world.complain(
            "mass silence", f"{len(verdict.dead)} dead, while {quiet} of {len(workers)} are cut off"
        )


# While it goes on


def start_observer(world: World) -> None:
    world.kernel.start(Process("observer"), _observe(world))


def _observe(world: World) -> Thread:
    """I22: nothing waits that could begin, and nothing that is queued is unheard of."""
    while True:
        yield 1.0
        world.kernel.finished = world.finished()
        now, store = world.kernel.now, world.store
        queued = [r for r in store.jobs.values() if r["status"] is JobStatus.QUEUED]
        if not queued:
            world.seen.absent_since.clear()
            continue
        slack = _clock_errors(world)
        if now - store.down_until > STALL_SECONDS and _an_idle_worker(world):
            for row in queued:
                if _waited(world, row) > STALL_SECONDS + slack and _may_begin(row):
                    world.complain("I22 stall", f"queued for {_waited(world, row):.0f} s", row["id"])
        _listen(world, queued, slack)


def _clock_errors(world: World) -> float:
    processes = [*world.daemons, *(w.process for w in world.workers), *(a.process for a in world.apis)]
    return 2 * max(abs(process.clock_error) for process in processes)


def _an_idle_worker(world: World) -> bool:
    return any(
        world.kernel.now - worker.idle_since > STALL_SECONDS
        and world.kernel.healthy_for(worker.process) > STALL_SECONDS
        and not worker.lost
        for worker in world.workers
    )


def _waited(world: World, row: Row) -> float:
    queued_at = max(world.store.events[row["id"]][-1].true_at, (row["queued_at"] - EPOCH).total_seconds())
    return world.kernel.now - queued_at


def _may_begin(row: Row) -> bool:
    return row["cancel_requested_at"] is None and row["expires_at"] is None


def _listen(world: World, queued: list[Row], slack: float) -> None:
    now, absent = world.kernel.now, world.seen.absent_since
    healthy = (
        now - world.store.down_until > UNHEARD_SECONDS
        and now - world.lanes.down_until > UNHEARD_SECONDS
        and any(
            d.name.startswith("scheduler") and world.kernel.healthy_for(d) > UNHEARD_SECONDS
            for d in world.daemons
        )
    )
    missing: dict[str, float] = {}
    for lane in {row["lane"]: None for row in queued}:
        inside = world.lanes.contents(lane)
        if not healthy or len(inside) >= LANE_WINDOW:
            continue
        rows = sorted((row for row in queued if row["lane"] == lane), key=lambda r: (r["queued_at"], r["id"]))
        for row in rows[:LANE_WINDOW]:
            if row["id"] not in inside and _waited(world, row) > UNHEARD_SECONDS / 2 + slack:
                missing[row["id"]] = since = absent.get(row["id"], now)
                if now - since > UNHEARD_SECONDS:
                    world.complain("I22 unheard", f"not in its lane for {now - since:.0f} s", row["id"])
    world.seen.absent_since = missing


# When all is over


def at_the_end(world: World) -> None:
    """Everything has ended, and everybody was told."""
    for job_id, row in world.store.jobs.items():
        if row["status"] not in FINAL:
            answered = "answered 202, " if job_id in world.seen.answered else ""
            world.complain("I1 durable", f"{answered}but still {row['status']} ({row['job_type']})", job_id)
        _messages(world, job_id, row)
    for job_id in world.seen.answered:
        if job_id not in world.store.jobs:
            world.complain("I1 durable", "answered 202 and not in the store", job_id)


def _messages(world: World, job_id: str, row: Row) -> None:
    if row["webhook_url"] is None:
        return
    ends = {event.seq for event in world.store.events[job_id] if event.status in EVENT_OF}
    deliveries = {seq: d for (owner, seq), d in world.store.deliveries.items() if owner == job_id}
    if ends != deliveries.keys():
        said = f"ends at {sorted(ends)}, messages for {sorted(deliveries)}"
        world.complain("I9 message", said, job_id)
    for seq, delivery in deliveries.items():
        match delivery.status:
            case DeliveryStatus.DELIVERED if not delivery.received:
                world.complain("I9 message", f"of event {seq}: delivered, and never received", job_id)
            case DeliveryStatus.DEAD if delivery.attempt_count <= len(QUICK_SECONDS):
                said = f"of event {seq}: given up after {delivery.attempt_count} attempts"
                world.complain("I9 message", said, job_id)
            case DeliveryStatus.DELIVERED | DeliveryStatus.DEAD:
                pass
            case status:
                world.complain("I9 message", f"of event {seq}: still {status}", job_id)
