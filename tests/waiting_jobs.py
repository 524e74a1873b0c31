"""Jobs that wait, made past the API: for what is refused when too many do.

A module of its own, since a process that a test spawns must be able to import what it is to run.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from factories import TENANT
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.engine.access.callers import Caller, Role
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.errors import LanewayError
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings
from servers import wait_until

OPERATOR = Caller(TENANT, "olga", Role.OPERATOR)
OTHER = Caller(new_id(), "otto", Role.OPERATOR)


def service_on(database: Database, clock: FrozenClock | None = None, **limits: int) -> JobService:
    return JobService(database, MemoryLanes(), Settings(**limits), load([]), clock=clock)  # type: ignore[arg-type]


def ask(service: JobService, *priorities: str, caller: Caller = OPERATOR) -> list[str]:
    """`ok`, or the code of the error, for a job of each priority; asked for together."""
    specs = [JobSpec(job_type="demo.noop", priority=priority) for priority in priorities]  # type: ignore[arg-type]
    answers = service.enqueue([service.prepare(spec, caller) for spec in specs])
    return [answer.code if isinstance(answer, LanewayError) else "ok" for answer in answers]


def fill(url: str, quota: int, folder: Path) -> int:
    """Four threads ask until each is refused; how many jobs they made. Runs in a process of its own."""
    service = service_on(Database(url), FrozenClock(), waiting_per_tenant=quota)  # no second passes
    ask(service, "low", caller=OTHER)
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) == 2, what="the other process is ready", seconds=90)
    made: list[int] = []

    def ask_on() -> None:
        refusals = 0
        while refusals < 5:
            answer = ask(service, "low")
            made.append(answer == ["ok"])
            refusals += answer == ["quota_queued"]

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(made)
