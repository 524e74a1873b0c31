"""Memory, descriptors and connections of everything that runs, every two seconds."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Self

import redis

from chaos.ground import WORKERS, Ground, Member
from chaos.history import Series
from laneway.db import POOL_SIZE

EVERY_SECONDS = 2.0
WARM_UP_SECONDS = 60.0
MOST_BYTES = 600 << 20  # of one member with all that it started
MOST_DESCRIPTORS = 600
MOST_REDIS_BYTES = 64 << 20
SLACK = 8.0  # descriptors or connections, of ten minutes; one lost for each job would be thousands
MOST_CONNECTIONS = 2 * POOL_SIZE + 3 * WORKERS + 2 * 2 + 2 * POOL_SIZE + 10


class Sampler:
    """Samples between `with` and its end."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def series(self, grown_percent_per_hour: float | None) -> list[Series]:
        """What was sampled. A judgement of growth leaves out how things were while they warmed up.

        It is not made of Redis, which keeps what it shows of ended jobs for ten minutes: it has its bound.
        """
        bounds = {"rss": MOST_BYTES, "fds": MOST_DESCRIPTORS, "used_memory": MOST_REDIS_BYTES}
        found = []
        for name, points in sorted(self._points.items()):
            most = float(bounds.get(name.split()[1], MOST_CONNECTIONS))
            if grown_percent_per_hour is None or name.startswith("redis"):
                found.append(Series(name, points, most))
            else:
                warm = [(at, value) for at, value in points if at >= WARM_UP_SECONDS]
                slack = 0.0 if name.endswith("bytes") else SLACK
                found.append(Series(name, warm, most, grown_percent_per_hour, slack))
        return found

    def _run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            at = time.monotonic() - self._began
            for member in self._ground.members:
                rss, descriptors = _weigh(self._ground, member)
                if rss:
                    self._points[f"{member.name} rss bytes"].append((at, rss))
                    self._points[f"{member.name} fds"].append((at, descriptors))
            try:
                with self._ground.redis_client() as client:
                    used = float(client.info("memory")["used_memory"])
            except (redis.RedisError, OSError):
                continue
            self._points["redis used_memory bytes"].append((at, used))
            if self._ground.postgres is not None:
                count = float(sum(p.connections for n, p in self._ground.proxies.items() if n.endswith("pg")))
                self._points["database connections"].append((at, count))


def _weigh(ground: Ground, member: Member) -> tuple[float, float]:
    """Resident bytes and open descriptors of a member and what it started."""
    pids = [member.pid]
    if member.role == "worker":
        pids += [*filter(None, [ground.nursery(member)]), *ground.children(member)]
    rss = descriptors = 0
    for pid in pids:
        try:
            rss += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            continue
    return float(rss), float(descriptors)
