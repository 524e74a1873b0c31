"""What the doctor asks of Redis, the lanes, the clocks and the settings of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import redis as redis_py

from factories import add_job, add_worker
from laneway.cli import doctor
from laneway.cli.doctor import Check
from laneway.clock import Clock, FrozenClock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine.doctor import CHECKS
from laneway.lanes.rq_lanes import RqLanes, queue_key
from laneway.settings import Settings
from servers import RedisServer


@pytest.fixture
def durable(own_redis_server: RedisServer) -> Iterator[redis_py.Redis]:
    """A client of a Redis as it should be."""
    with own_redis_server.client(decode_responses=True) as client:
        yield client


@pytest.fixture
def settings(database: Database, own_redis_server: RedisServer, tmp_path: Path) -> Settings:
    """A healthy installation: both stores, and a worker that is alive."""
    add_worker(database, beat_at=SystemClock().now() + timedelta(hours=1), held=["a token"])
    url = database.url.render_as_string(hide_password=False)
    return Settings(database_url=url, redis_url=own_redis_server.url, data_dir=tmp_path)


def examined(settings: Settings, *, clock: Clock | None = None) -> list[Check]:
    return list(doctor.examine(settings, clock=clock or SystemClock()))


def trouble(settings: Settings, *, clock: Clock | None = None) -> list[tuple[str, str]]:
    """Check and detail of what is not ok; each says what to do."""
    wrong = [check for check in examined(settings, clock=clock) if not check.ok]
    assert all(check.remedy for check in wrong)
    return [(check.check, check.detail) for check in wrong]


def test_a_healthy_installation_is_healthy_in_every_check(
    settings: Settings, durable: redis_py.Redis
) -> None:
    assert trouble(settings) == []
    names = {check.check for check in examined(settings)}
    assert names == {check.name for check in CHECKS} | {
        "settings",
        "production",
        "job_types",
        "database",
        "clocks",
        "workers",
        "redis",
        "lanes",
    }


def test_a_finding_names_the_ids(settings: Settings, database: Database) -> None:
    now = SystemClock().now()
    job_id = add_job(database, JobStatus.SCHEDULED, scheduled_for=now - timedelta(minutes=2))
    sentence = "a scheduled job is queued within a minute of its time"
    assert trouble(settings) == [("late_schedules", f"not so: {sentence} ({job_id})")]


def test_a_queue_that_nobody_drains_is_named(settings: Settings, database: Database) -> None:
    add_job(database, queue="emails", lane="emails", queued_at=SystemClock().now())
    assert trouble(settings) == [("workers", "queue emails: 0 alive, jobs wait")]


def test_a_task_module_that_cannot_be_imported_is_named(settings: Settings) -> None:
    broken = settings.model_copy(update={"tasks": ("no_such_module",)})
    [(check, detail)] = trouble(broken)
    assert (check, "no_such_module" in detail) == ("job_types", True)


def test_a_job_of_a_type_that_no_module_has_is_named(settings: Settings, database: Database) -> None:
    old = SystemClock().now() - timedelta(minutes=2)
    job_id = add_job(database, job_type="gone.away", lane="normal", queued_at=old)
    RqLanes(settings.redis_url, clock=SystemClock()).push([("normal", job_id)])
    assert trouble(settings) == [
        ("no_capable_worker", f"not so: a queued job's type is known to a worker of its lane ({job_id})"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "detail"),
    [
        ("maxmemory-policy", "allkeys-lru", "maxmemory-policy allkeys-lru"),
        ("appendonly", "no", "append-only file off"),
    ],
)
def test_a_redis_that_may_lose_keys_is_found(
    settings: Settings, durable: redis_py.Redis, name: str, value: str, detail: str
) -> None:
    durable.config_set(name, value)
    assert trouble(settings) == [("redis", detail)]


@pytest.mark.parametrize(("percent", "ok"), [(70, True), (90, False)])
def test_a_redis_that_is_nearly_full_is_found(
    settings: Settings, durable: redis_py.Redis, percent: int, ok: bool
) -> None:
    durable.setrange("ballast", 32 << 20, "x")  # so that connections weigh little
    durable.config_set("maxmemory", durable.info()["used_memory"] * 100 // percent)
    found = trouble(settings)
    assert [check for check, _ in found] == ([] if ok else ["redis"])
    assert all("of maxmemory" in detail for _, detail in found)


def test_each_bound_holds_at_it_and_not_past_it() -> None:
    assert [doctor._memory(used, 1000).ok for used in (800, 801)] == [True, False]
    assert doctor._memory(1 << 40, 0).ok
    assert [doctor._clock("Redis", ahead).ok for ahead in (1.0, -1.0, 1.01, -1.01)] == [
        True,
        True,
        False,
        False,
    ]


def test_clocks_that_are_a_minute_apart_are_found(settings: Settings) -> None:
    slow = FrozenClock(SystemClock().now() - timedelta(minutes=1))
    found = trouble(settings, clock=slow)
    assert [check for check, _ in found] == ["clocks", "clocks"]
    assert [detail.split(" is ")[0] for _, detail in found] == ["the database", "Redis"]
    assert all("ahead of this machine" in detail for _, detail in found)


def test_what_waits_and_is_in_no_lane_is_found(
    settings: Settings, database: Database, durable: redis_py.Redis
) -> None:
    old = SystemClock().now() - timedelta(minutes=2)
    lost, kept = (add_job(database, queued_at=old) for _ in range(2))
    durable.rpush(queue_key("normal"), kept)
    sentence = "a job that waits is in its lane within a minute"
    assert trouble(settings) == [("lanes", f"not so: {sentence} ({lost})")]


def test_what_has_ended_and_is_in_a_lane_is_found(
    settings: Settings, database: Database, durable: redis_py.Redis
) -> None:
    ended, nobody = add_job(database, JobStatus.CANCELLED), new_id()
    durable.rpush(queue_key("normal"), ended, nobody)
    durable.sadd("rq:queues", queue_key("normal"))
    sentence = "a lane holds no ids of jobs that have ended"
    assert trouble(settings) == [("lanes", f"not so: {sentence} ({', '.join(sorted((ended, nobody)))})")]


def test_what_is_only_on_its_way_is_no_finding(
    settings: Settings, database: Database, durable: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two looks a worker claims what it had taken off the lane."""
    job_id = add_job(database, queued_at=SystemClock().now() - timedelta(minutes=2))

    class Meanwhile:
        def wait(self, _seconds: float) -> None:
            durable.rpush(queue_key("normal"), job_id)

    monkeypatch.setattr("laneway.cli.doctor.threading.Event", Meanwhile)
    found = trouble(settings)
    assert durable.llen(queue_key("normal")) == 1  # there was a second look
    assert found == []


def test_without_a_database_redis_is_looked_at_all_the_same(settings: Settings, tmp_path: Path) -> None:
    nowhere = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/new.db"})
    assert trouble(nowhere) == [("database", "the database is not migrated")]
    assert {"redis", "clocks"} <= {check.check for check in examined(nowhere)}


def test_without_redis_the_rest_is_looked_at_all_the_same(
    settings: Settings, own_redis_server: RedisServer
) -> None:
    own_redis_server.stop()
    [(check, detail)] = trouble(settings)
    assert (check, detail.startswith("cannot be reached")) == ("redis", True)
