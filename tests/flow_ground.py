"""A service and a worker of one's own, step by step: for what follows from jobs' ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import sqlalchemy as sa

from factories import TENANT
from laneway import models
from laneway.clock import Clock, FrozenClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import JobStatus
from laneway.engine import flow_upkeep
from laneway.engine.access.callers import Caller, Role
from laneway.engine.endings import Ending, Raised, Returned
from laneway.engine.exchange import Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import JobService
from laneway.lanes.backend import Due
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ALICE = Caller(TENANT, "alice", Role.USER)
OLGA = Caller(TENANT, "olga", Role.OPERATOR)
FAILS = Raised("Broken", "it broke", permanent=True)

j = models.jobs.c


def step(**anything: Any) -> Any:
    return anything


def count(number: int) -> int:
    return number


def returned(value: Any) -> Returned:
    return Returned(json.dumps(value))


class Ground:
    """Jobs of type `t.step` take any parameters, those of type `t.count` a whole `number`.

    `log` has what its worker did, in order: `("start" | "end", job id)`.
    """

    def __init__(
        self, database: Database, *, clock: Clock | None = None, rng: Random | None = None, **limits: int
    ) -> None:
        registry = Registry()
        registry.add(JobType("t.step", step))
        registry.add(JobType("t.count", count))
        self.database = database
        self.clock = clock or FrozenClock()
        self.lanes = MemoryLanes()
        settings = Settings(**limits)  # type: ignore[arg-type]
        self.service = JobService(database, self.lanes, settings, registry, clock=self.clock)
        self.rng = rng or Random(0)
        self.log: list[tuple[str, str]] = []
        self.running: list[Claimed] = []
        self._holder = Holder(new_id(), ("t.step", "t.count"), 3, self.rng)

    def enqueue(self, *, caller: Caller = ALICE, **fields: Any) -> dict[str, Any]:
        """A new job, as its caller is answered."""
        spec = JobSpec.model_validate({"job_type": "t.step"} | fields)
        [answer] = self.service.enqueue([self.service.prepare(spec, caller)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def start(self, *job_ids: str) -> list[Claimed]:
        """Claim these jobs; those that this worker holds now."""
        wanted = [(job_id, new_id()) for job_id in job_ids]
        done = exchange(self.database, self._holder, ended=(), wanted=wanted, news={}, now=self.clock.now())
        self.log += [("start", job.job_id) for job in done.claimed]
        self.running += done.claimed
        return done.claimed

    def end(self, *ends: tuple[Claimed, Ending]) -> list[Due]:
        """Settle these jobs in one transaction; what is to be rung since."""
        for job, _ in ends:
            self.running.remove(job)
        self.log += [("end", job.job_id) for job, _ in ends]
        done = exchange(self.database, self._holder, ended=ends, wanted=(), news={}, now=self.clock.now())
        assert not done.refused
        return [pair for settled in done.settled for pair in settled.due]

    def run(self, job_id: str, ending: Ending | None = None) -> list[Due]:
        """Start a job and end it, well unless said otherwise; what is to be rung since."""
        [job] = self.start(job_id)
        return self.end((job, ending or Returned(None)))

    def queued(self) -> list[str]:
        with self.database.read() as connection:
            found = sa.select(j.id).where(j.status == JobStatus.QUEUED).order_by(j.id)
            return list(connection.execute(found).scalars())

    def drain(self, how: Callable[[Claimed], Ending], *, at_most: int = 5) -> None:
        """Start and end whatever is queued, in an order drawn, until nothing is."""
        while (queued := self.queued()) or self.running:
            if queued and (not self.running or self.rng.random() < 0.6):
                self.start(*self.rng.sample(queued, min(len(queued), self.rng.randint(1, at_most))))
            elif self.running:
                some = self.rng.sample(self.running, self.rng.randint(1, len(self.running)))
                self.end(*((job, how(job)) for job in some))

    def sweep(self) -> list[Due]:
        return flow_upkeep.sweep(self.database, now=self.clock.now())

    def unfollowed(self) -> Sequence[str]:
        """Ended jobs from which something is still to follow."""
        with self.database.read() as connection:
            return connection.execute(sa.select(j.id).where(models.unfollowed)).scalars().all()

    def messages(self, *event_types: str) -> list[tuple[str, dict[str, Any]]]:
        """What endpoints are told of: the events and their data."""
        m = models.webhook_messages.c
        with self.database.read() as connection:
            rows = connection.execute(sa.select(m.event_type, m.payload).order_by(m.created_at, m.id)).all()
        return [(kind, json.loads(payload)["data"]) for kind, payload in rows if kind in event_types]
