"""One run: the parts, wired together, and what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from random import Random
from typing import Any

from laneway.domain.states import FINAL, JobStatus
from laneway.lanes.backend import LanesUnavailable
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.webhooks.retries import DeliveryStatus
from simulation import callers, checks, daemons, faults, workers
from simulation.design import design_of
from simulation.kernel import Kernel, Process
from simulation.scale import CALM_AT, JOBS, LANE_WINDOW, LAST_MOMENT, WORKERS
from simulation.store import LOST_ANSWERS, LOST_CALLS, Event, Store, Violation


class Lanes:
    """MemoryLanes behind a network that loses calls and answers, and may be away."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._lanes = MemoryLanes(window=LANE_WINDOW)
        self.faults = True
        self.down_until = 0.0

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What the backend's method `name` returns. Raises LanesUnavailable."""
        chance = self._kernel.rng.random() if self.faults else 0.5
        if self._kernel.now < self.down_until or chance < LOST_CALLS:
            raise LanesUnavailable("away")
        done = getattr(self._lanes, name)(*arguments, **options)
        if chance > 1 - LOST_ANSWERS:
            raise LanesUnavailable("the answer was lost")
        return done

    def push(self, items: Sequence[tuple[str, str]]) -> None:
        """Best effort; some arrive twice."""
        if items:
            try:
                self.call("push", items)
                if self.faults and self._kernel.rng.random() < 0.05:
                    self.call("push", items)
            except LanesUnavailable:
                pass

    def flush(self) -> None:
        self._lanes = MemoryLanes(window=LANE_WINDOW)

    def contents(self, lane: str) -> list[str]:
        return self._lanes.contents(lane)


class World:
    """A seed's run. `violations` is empty when every promise held."""

    def __init__(self, seed: int, *, mutant: str | None = None, trace: bool = False) -> None:
        self.seed = seed
        self.design = design_of(mutant)
        self.kernel = Kernel(seed)
        self.store = Store(self.kernel, self.design, self.complain)
        self.store.on_event = self._on_event
        self.lanes = Lanes(self.kernel)
        self.seen = checks.Seen()
        self.violations: list[Violation] = []
        self.trace: list[str] | None = [] if trace else None
        self.faults = 0
        self._numbers = count()
        self.weak_tokens = self.rng.random() < 0.25  # a broken source of ids: a job's attempts get the same
        self.apis: list[callers.Api] = []
        self.workers: list[workers.Worker] = []
        self.daemons: list[Process] = []

    @property
    def rng(self) -> Random:
        return self.kernel.rng

    def run(self) -> list[Violation]:
        """Play it to the end; what went wrong."""
        for number in range(2):
            callers.start_api(self, number)
            daemons.start_scheduler(self, number)
            daemons.start_courier(self, number)
        for number in range(WORKERS):
            workers.start_worker(self, f"w{number}")
        callers.start_clients(self, JOBS)
        faults.start(self)
        checks.start_observer(self)
        self.kernel.run(until=LAST_MOMENT)
        checks.at_the_end(self)
        return self.violations

    def next_number(self) -> int:
        """One that no other process has."""
        return next(self._numbers)

    def complain(self, invariant: str, detail: str, job_id: str | None = None) -> None:
        self.violations.append(Violation(invariant, detail, round(self.kernel.now, 3), job_id))
        self.note("VIOLATION", f"{invariant}: {detail}", job_id)

    def note(self, who: str, what: str, job_id: str | None = None) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.kernel.now:8.3f}  {who:<10} {job_id or '-':<5} {what}")

    def _on_event(self, job_id: str, event: Event) -> None:
        checks.on_event(self, job_id, event)
        self.note(
            event.actor, f"{event.action or 'create'} -> {event.status} (attempt {event.attempt})", job_id
        )

    def finished(self) -> bool:
        """Whether nothing is left to happen."""
        return (
            self.kernel.now > CALM_AT
            and not self.seen.waiting_clients
            and all(row["status"] in FINAL for row in self.store.jobs.values())
            and all(
                d.status in (DeliveryStatus.DELIVERED, DeliveryStatus.DEAD)
                for d in self.store.deliveries.values()
            )
        )


def counts(world: World) -> dict[JobStatus, int]:
    """How many jobs ended how."""
    rows = [row["status"] for row in world.store.jobs.values()]
    return {status: rows.count(status) for status in JobStatus if status in rows}
