"""Lanes inside one process: for tests and notebooks. Nothing is mirrored, nothing survives."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from laneway.domain.spec import queue_of
from laneway.lanes.backend import BELL_STROKES, LONGEST_WAIT_SECONDS, Backlog, EndedRun, by_lane


class MemoryLanes:
    """LaneBackend over deques. Threads may share it; processes cannot."""

    def __init__(self, *, window: int = 10_000) -> None:
        self.window = window
        self._lanes: defaultdict[str, deque[str]] = defaultdict(deque)
        self._waiting: set[str] = set()
        self._refusals: Counter[str] = Counter()
        self._strokes: Counter[str] = Counter()
        self._changed = threading.Condition()

    def push(self, items: Sequence[tuple[str, str]]) -> int:
        taken = 0
        with self._changed:
            for lane, job_ids in by_lane(items).items():
                ids = self._lanes[lane]
                room = 0 if lane in self._waiting else max(0, self.window - len(ids))
                accepted, refused = job_ids[:room], job_ids[room:]
                ids.extend(accepted)
                if refused:
                    self._waiting.add(lane)
                    self._refusals[lane] += len(refused)
                self._ring(lane, len(accepted))
                taken += len(accepted)
        return taken

    def take(self, lanes: Sequence[str], count: int, *, worker_name: str) -> list[str]:
        taken: list[str] = []
        with self._changed:
            for lane in lanes:
                while self._lanes[lane] and len(taken) < count:
                    taken.append(self._lanes[lane].popleft())
        return taken

    def remove(self, lane: str, job_ids: Sequence[str]) -> int:
        unwanted = set(job_ids)
        with self._changed:
            before = self._lanes[lane]
            self._lanes[lane] = deque(job_id for job_id in before if job_id not in unwanted)
            return len(before) - len(self._lanes[lane])

    def purge(self, lane: str) -> int:
        with self._changed:
            return len(self._lanes.pop(lane, ()))

    def depths(self, lanes: Sequence[str]) -> dict[str, int]:
        with self._changed:
            return {lane: len(self._lanes[lane]) for lane in lanes}

    def contents(self, lane: str) -> list[str]:
        with self._changed:
            return list(self._lanes[lane])

    def backlog(self, lane: str) -> Backlog:
        with self._changed:
            return Backlog(lane in self._waiting, self._refusals[lane])

    def refill(
        self,
        lane: str,
        missing_head: Sequence[str],
        missing_tail: Sequence[str],
        *,
        complete: bool,
        refusals_seen: int,
    ) -> int:
        with self._changed:
            ids = self._lanes[lane]
            inside = set(ids)
            missing = list(dict.fromkeys(i for i in (*missing_head, *missing_tail) if i not in inside))
            added = missing[: max(0, self.window - len(ids))]
            heads = set(missing_head)
            ids.extendleft(job_id for job_id in reversed(added) if job_id in heads)
            ids.extend(job_id for job_id in added if job_id not in heads)
            self._ring(lane, len(added))
            if not complete or len(added) < len(missing):
                self._waiting.add(lane)
            elif self._refusals[lane] == refusals_seen:
                self._waiting.discard(lane)
            return len(added)

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

    def _ring(self, lane: str, news: int) -> None:
        queue = queue_of(lane)
        self._strokes[queue] = min(BELL_STROKES, self._strokes[queue] + news)
        self._changed.notify_all()
