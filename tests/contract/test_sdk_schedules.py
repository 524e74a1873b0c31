"""Schedules that stand in the code, brought into the store by whoever starts as a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from factories import at_once, rows_of
from laneway import background_job, models, scheduled_job
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.engine import registry as registry_module
from laneway.engine.access.callers import ensure_tenant
from laneway.engine.registry import Registry
from laneway.engine.service import JobService
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.scheduler.ticker import Ticker
from laneway.sdk.declared import Declared
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of the test's own in the place of the process's."""
    fresh = Registry()
    monkeypatch.setattr(registry_module, "registry", fresh)
    return fresh


@pytest.fixture
def service(database: Database, registry: Registry, clock: FrozenClock) -> JobService:
    return JobService(database, MemoryLanes(), Settings(), registry, clock=clock)


def make_tenant(database: Database) -> None:
    ensure_tenant(database, SecretBox({"k": bytes(32)}), "default")


def declare(name: str = "Nightly", **how: Any) -> Callable[[], str]:
    @scheduled_job(**({"cron": "0 2 * * *", "name": name} | how))
    @background_job("t.nightly", queue="slow", max_retries=1)
    def nightly() -> str:
        """What is due."""
        return "done"

    return nightly


def test_a_declared_schedule_is_made_once_and_brought_up_to_date(
    service: JobService, database: Database
) -> None:
    make_tenant(database)
    declare(timezone="Europe/Berlin", overlap="allow", max_concurrent_runs=2)
    assert (Declared(service).keep(), Declared(service).keep()) == (1, 1)
    [made] = rows_of(database, models.schedules)
    assert (made["name"], made["cron_expression"], made["timezone"]) == (
        "Nightly",
        "0 2 * * *",
        "Europe/Berlin",
    )
    assert (made["queue"], made["max_retries"], made["overlap"]) == ("slow", 1, "allow")
    declare(interval_seconds=600, cron=None)
    Declared(service).keep()
    [changed] = rows_of(database, models.schedules)
    assert (changed["id"], changed["cron_expression"], changed["interval_seconds"]) == (made["id"], None, 600)


def test_a_scheduler_keeps_them_once_there_is_a_tenant(
    service: JobService, database: Database, clock: FrozenClock
) -> None:
    declare()
    declared = Declared(service)
    ticker = Ticker(database, service.lanes, Settings(), clock=clock, declared=declared)
    assert ticker.tick()
    assert rows_of(database, models.schedules) == []
    make_tenant(database)
    assert ticker.tick()
    assert [row["name"] for row in rows_of(database, models.schedules)] == ["Nightly"]
    assert declared.keep() == 0


def test_a_wrong_one_does_not_keep_the_others(service: JobService, database: Database) -> None:
    make_tenant(database)
    declare("Wrong", overlap="sideways")
    declare("Right")
    declared = Declared(service)
    assert (declared.keep(), declared.keep()) == (1, 0)
    assert [row["name"] for row in rows_of(database, models.schedules)] == ["Right"]


def test_two_schedulers_that_start_together_make_one(service: JobService, database: Database) -> None:
    make_tenant(database)
    declare()
    several = [Declared(service) for _ in range(4)]
    answers = at_once([each.keep for each in several])
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    assert len(rows_of(database, models.schedules)) == 1
