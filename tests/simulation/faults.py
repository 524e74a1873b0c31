"""What goes wrong: the menu, and the process that orders from it until calm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from laneway.domain.states import JobStatus
from laneway.engine.reaper import LIVING
from simulation import callers, daemons, workers
from simulation.kernel import Process, Thread
from simulation.scale import BEAT_SECONDS, CALM_AT, LEASE_SECONDS

if TYPE_CHECKING:
    from simulation.world import World


def start(world: World) -> None:
    world.kernel.start(Process("chaos"), _chaos(world))


def _chaos(world: World) -> Thread:
    faults, weights = list(MENU), list(MENU.values())
    while world.kernel.now < CALM_AT:
        yield world.rng.uniform(0.5, 4)
        fault = world.rng.choices(faults, weights)[0]
        world.note("chaos", fault.__name__.strip("_"))
        fault(world)
        world.faults += 1
    world.note("chaos", "calm")
    world.store.faults = world.lanes.faults = False
    for process in _processes(world):
        process.clock_error = 0.0
    world.store.clock.clock_error = 0.0


def _processes(world: World) -> list[Process]:
    return [p for p in _all_processes(world) if p.alive]


def _all_processes(world: World) -> list[Process]:
    return [*world.daemons, *(w.process for w in world.workers), *(a.process for a in world.apis)]


def _kill_worker(world: World) -> None:
    worker = world.rng.choice(world.workers)
    if worker.process.alive:
        world.kernel.kill(worker.process)
        workers.start_worker(world, worker.process.name, after=world.rng.uniform(1, 4))


def _kill_api(world: World) -> None:
    api = world.rng.choice(world.apis)
    world.kernel.kill(api.process)
    callers.start_api(world, int(api.process.name[-1]), after=world.rng.uniform(0, 2))


def _kill_daemon(world: World) -> None:
    daemon = world.rng.choice(world.daemons)
    world.kernel.kill(daemon)
    again = daemons.start_scheduler if daemon.name.startswith("scheduler") else daemons.start_courier
    again(world, int(daemon.name[-1]), after=world.rng.uniform(0, 4))


def _stop_a_process(world: World) -> None:
    process = world.rng.choice(_processes(world))
    world.kernel.stop(process, world.rng.choice((1.0, 5.0, 2 * LEASE_SECONDS)))


def _cut_a_process_off(world: World) -> None:
    process = world.rng.choice(_processes(world))
    world.kernel.cut(process, world.rng.uniform(1, 2 * LEASE_SECONDS))


def _cut_the_workers_off(world: World) -> None:
    now = world.kernel.now
    if all(
        now - w.true_beat_at < 2 * BEAT_SECONDS for w in world.store.workers.values() if w.state in LIVING
    ):
        world.seen.mass_cut_at = now
    for worker in world.workers:
        world.kernel.cut(worker.process, LEASE_SECONDS * 1.4)


def _drain_a_worker(world: World) -> None:
    worker = world.rng.choice(world.workers)
    if worker.process.alive and not worker.draining:
        worker.draining = True
        workers.start_worker(world, worker.process.name, after=1.0)


def _stop_the_store(world: World) -> None:
    now = world.kernel.now
    if now > world.store.down_until:
        world.store.down_since = now
    world.store.down_until = max(
        world.store.down_until, now + world.rng.choice((0.5, 4.0, 1.5 * LEASE_SECONDS))
    )


def _stop_redis(world: World) -> None:
    seconds = world.rng.choice((1.0, 8.0, 40.0))
    world.lanes.down_until = max(world.lanes.down_until, world.kernel.now + seconds)


def _flush_redis(world: World) -> None:
    world.lanes.flush()


def _ring_wrongly(world: World) -> None:
    """Stale ids, duplicates, and what is no id."""
    ids = [row["id"] for row in world.store.jobs.values() if world.rng.random() < 0.2]
    world.lanes.push([("normal", job_id) for job_id in (*ids, "ghost")])


def _jump_a_clock(world: World) -> None:
    process = world.rng.choice([*_processes(world), world.store.clock])
    process.clock_error = world.rng.uniform(-40, 40)
    process.healthy_since = world.kernel.now


def _edit_a_row(world: World) -> None:
    if world.weak_tokens:
        return  # both at once would defeat both fences: neither alone may
    rows = world.store.jobs.values()
    running = [r for r in rows if r["status"] is JobStatus.RUNNING and r["cancel_requested_at"] is None]
    if running:
        job_id = world.rng.choice(running)["id"]
        world.store.edit(job_id)
        world.note("operator", "put it back by hand", job_id)


MENU: dict[Callable[[World], None], int] = {
    _kill_worker: 14,
    _kill_api: 6,
    _kill_daemon: 10,
    _stop_a_process: 18,
    _cut_a_process_off: 8,
    _cut_the_workers_off: 2,
    _drain_a_worker: 8,
    _stop_the_store: 8,
    _stop_redis: 6,
    _flush_redis: 6,
    _ring_wrongly: 4,
    _jump_a_clock: 6,
    _edit_a_row: 4,
}
