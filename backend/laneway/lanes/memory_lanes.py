"""Lanes inside one process: for tests and notebooks. Nothing is mirrored, nothing survives."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from laneway.domain.spec import queue_of
from laneway.lanes.backend import (
    BELL_STROKES,
    LONGEST_WAIT_SECONDS,
    Backlog,
    Due,
    EndedRun,
    Lack,
    by_tenant,
)
from laneway.lanes.turns import Entered, Turns


class MemoryLanes:
    """LaneBackend over lists. Threads may share it; processes cannot."""

    def __init__(self, *, window: int = 10_000) -> None:
        self.window = window
        self._weights: dict[str, int] = {}
        self._lanes: defaultdict[str, Turns] = defaultdict(lambda: Turns(self._weights))
        self._outside: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._refusals: Counter[str] = Counter()
        self._strokes: Counter[str] = Counter()
        self._changed = threading.Condition()

    def push(self, items: Sequence[Due]) -> int:
        taken = 0
        with self._changed:
            for (lane, tenant_id), job_ids in by_tenant(items).items():
                room = 0
                if tenant_id not in self._outside[lane]:
                    done = self._lanes[lane].push(tenant_id, job_ids, window=self.window)
                    self._refuse(lane, done.outside)
                    self._ring(lane, done.count)
                    room = done.count
                if room < len(job_ids):
                    self._refuse(lane, [tenant_id] * (len(job_ids) - room))
                taken += room
        return taken

    def push_first(self, items: Sequence[Due]) -> int:
        taken = 0
        with self._changed:
            for (lane, tenant_id), job_ids in by_tenant(items).items():
                room = max(0, min(len(job_ids), self.window - len(self._lanes[lane].ids)))
                self._lanes[lane].put_first(tenant_id, job_ids[:room])
                self._refuse(lane, [tenant_id] * (len(job_ids) - room))
                self._ring(lane, room)
                taken += room
        return taken

    def take(self, lanes: Sequence[str], count: int, *, worker_name: str) -> list[str]:
        taken: list[str] = []
        with self._changed:
            for lane in lanes:
                taken += self._lanes[lane].take(max(0, count - len(taken)))
        return taken

    def remove(self, lane: str, job_ids: Sequence[str]) -> int:
        with self._changed:
            return self._lanes[lane].remove(job_ids)

    def purge(self, lane: str) -> int:
        with self._changed:
            return self._lanes[lane].clear()

    def depths(self, lanes: Sequence[str]) -> dict[str, int]:
        with self._changed:
            return {lane: len(self._lanes[lane].ids) for lane in lanes}

    def contents(self, lane: str) -> list[str]:
        with self._changed:
            return list(self._lanes[lane].ids)

    def backlog(self, lane: str) -> Backlog:
        with self._changed:
            return Backlog(self._refusals[lane], frozenset(self._outside[lane]))

    def refill(self, lane: str, lacks: Sequence[Lack], *, refusals_seen: int) -> int:
        with self._changed:
            inside = set(self._lanes[lane].ids)
            parts = []
            for lack in lacks:
                head = list(dict.fromkeys(i for i in lack.head if i not in inside))
                inside.update(head)
                tail = list(dict.fromkeys(i for i in lack.tail if i not in inside))
                inside.update(tail)
                parts.append((lack.tenant_id, head, tail))
            done = Entered(0)
            if lacking := [part for part in parts if part[1] or part[2]]:
                done = self._lanes[lane].refill(lacking, window=self.window)
                self._refuse(lane, done.outside)
                self._ring(lane, done.count)
            outside = self._outside[lane]
            for lack in lacks:
                if not lack.complete or lack.tenant_id in done.unfit:
                    outside.setdefault(lack.tenant_id, self._refusals[lane])
                elif outside.get(lack.tenant_id, refusals_seen + 1) <= refusals_seen:
                    del outside[lack.tenant_id]
            return done.count

    def weigh(self, weights: Mapping[str, int]) -> None:
        with self._changed:
            self._weights.clear()
            self._weights.update(weights)

    def workers(self) -> list[str]:
        return []

    def wait(self, queues: Sequence[str], timeout_seconds: float) -> bool:
        with self._changed:
            heard = self._changed.wait_for(
                lambda: any(self._strokes[queue] for queue in queues),
                timeout=min(timeout_seconds, LONGEST_WAIT_SECONDS),
            )
            if heard:
                self._strokes[next(queue for queue in queues if self._strokes[queue])] -= 1
            return heard

    def mirror_running(
        self, items: Sequence[tuple[str, str]], *, worker_name: str, lease_seconds: float
    ) -> None:
        pass

    def mirror_ended(self, items: Sequence[EndedRun], *, worker_name: str = "") -> None:
        pass

    def close(self) -> None:
        pass

    def _refuse(self, lane: str, tenants: Sequence[str]) -> None:
        self._refusals[lane] += len(tenants)
        self._outside[lane] |= dict.fromkeys(tenants, self._refusals[lane])

    def _ring(self, lane: str, news: int) -> None:
        queue = queue_of(lane)
        self._strokes[queue] = min(BELL_STROKES, self._strokes[queue] + news)
        self._changed.notify_all()
