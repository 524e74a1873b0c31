"""Virtual time: processes that can be killed, stopped and cut off, and the queue of who goes on next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from random import Random

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)

Thread = Iterator[float]
"""Yields how many seconds it sleeps."""


@dataclass(eq=False, slots=True)
class Process:
    """What faults befall. Its threads share its fate."""

    name: str
    alive: bool = True
    stopped_until: float = 0.0
    cut_until: float = 0.0  # from the store
    clock_error: float = 0.0  # seconds its wall clock is ahead
    troubled: bool = False  # was ever killed, stopped or cut off
    was_stopped: bool = False
    healthy_since: float = 0.0
    on_death: Callable[[], None] = field(default=lambda: None)


class Kernel:
    """One run's time and chance."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.finished = False
        self._queue: list[tuple[float, float, Process, Thread]] = []

    def start(self, process: Process, thread: Thread, *, after: float = 0.0) -> None:
        heappush(self._queue, (self.now + after, self.rng.random(), process, thread))

    def run(self, *, until: float) -> None:
        """Let everybody go on until `finished` is set, or it is too late."""
        queue, random = self._queue, self.rng.random
        while queue and not self.finished:
            at, _, process, thread = heappop(queue)
            if at > until:
                return
            self.now = at
            if not process.alive:
                continue
            if process.stopped_until > at:
                heappush(queue, (process.stopped_until, random(), process, thread))
                continue
            for seconds in thread:
                heappush(queue, (at + seconds * (1 + 0.25 * random()), random(), process, thread))
                break

    def clock(self, process: Process) -> datetime:
        """What the process takes for the time of day."""
        return EPOCH + timedelta(seconds=self.now + process.clock_error)

    def kill(self, process: Process) -> None:
        process.alive = False
        process.troubled = True
        process.on_death()

    def stop(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long."""
        process.stopped_until = process.healthy_since = self.now + seconds
        process.troubled = process.was_stopped = True

    def cut(self, process: Process, seconds: float) -> None:
        """Its packets to the store are dropped."""
        process.cut_until = process.healthy_since = self.now + seconds
        process.troubled = True

    def healthy_for(self, process: Process) -> float:
        """Seconds since the process could last not do what it wanted."""
        return self.now - process.healthy_since if process.alive else 0.0
