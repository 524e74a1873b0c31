"""What RQ's own classes, commands and dashboard see of our lanes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import rq
import rq_dashboard.web
from flask.testing import FlaskClient
from rq.job import Job
from rq.job import JobStatus as RqStatus
from rq.registry import (
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq_dashboard.cli import make_flask_app

from laneway.clock import SystemClock, new_id
from laneway.domain.states import JobStatus
from laneway.lanes.backend import EndedRun
from laneway.lanes.rq_lanes import RqLanes
from servers import RedisServer

REGISTRIES = (FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry, ScheduledJobRegistry)


@pytest.fixture
def lanes(redis_url: str) -> Iterator[RqLanes]:
    backend = RqLanes(redis_url, clock=SystemClock(), window=50)
    yield backend
    backend.close()


@pytest.fixture
def worker(redis: redis_py.Redis) -> rq.Worker:
    """A worker that RQ itself has registered; it runs nothing."""
    worker = rq.Worker(["high", "normal"], connection=redis, name="w1")
    worker.register_birth()
    return worker


@pytest.fixture
def dashboard(redis_server: RedisServer, redis: redis_py.Redis) -> FlaskClient:
    app = make_flask_app(None, None, None, "")
    app.config["RQ_DASHBOARD_REDIS_URL"] = redis_server.url
    rq_dashboard.web.setup_rq_connection(app)
    return app.test_client()


def started(redis: redis_py.Redis, lane: str) -> list[str]:
    return list(StartedJobRegistry(lane, connection=redis).get_job_ids(cleanup=False))


def shown(redis: redis_py.Redis, lane: str) -> dict[str, list[str]]:
    """The ids in each registry of a lane that has any."""
    registries = {kind.key_template.split(":")[1]: kind(lane, connection=redis) for kind in REGISTRIES}
    return {
        name: ids for name, registry in registries.items() if (ids := registry.get_job_ids(cleanup=False))
    }


def rq_info(url: str, *options: str) -> str:
    """What the stock command prints."""
    command = [Path(sys.executable).parent / "rq", "info", "--url", url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def get(dashboard: FlaskClient, path: str) -> Any:
    answer = dashboard.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json


def test_a_pushed_job_is_a_real_rq_job(lanes: RqLanes, redis: redis_py.Redis) -> None:
    first, second = new_id(), new_id()
    lanes.push([("high", first), ("emails-high", second), ("high", "short_id-1")])
    assert redis.llen("rq:queue:high") == 2
    assert redis.smembers("rq:queues") == {b"rq:queue:high", b"rq:queue:emails-high"}
    assert rq.Queue("high", connection=redis).job_ids == [first, "short_id-1"]
    job = Job.fetch(second, connection=redis)
    assert (job.func_name, job.args, job.kwargs) == ("laneway.worker.entry.run", (second,), {})
    assert (job.get_status(), job.origin, job.timeout) == (RqStatus.QUEUED, "emails-high", -1)
    assert (job.result_ttl, job.failure_ttl) == (500, 7 * 86400)
    assert abs(job.created_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert redis.ttl(job.key) == -1, "what waits does not fade"
    assert Job.fetch("short_id-1", connection=redis).args == ("short_id-1",)


def test_the_hash_has_only_fields_that_rq_writes_and_its_turn(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a")])
    lanes.take(["high"], 1, worker_name="w1")
    lanes.mirror_running([("high", "a")], worker_name="w1", lease_seconds=30)
    lanes.mirror_ended([EndedRun("high", "a", JobStatus.COMPLETED)], worker_name="w1")
    stock = rq.Queue("other", connection=redis).enqueue("os.getpid", result_ttl=5, failure_ttl=5)
    names = set(stock.to_dict()) | {"status", "turn"}
    assert {field.decode() for field in redis.hkeys("rq:job:a")} <= names


def test_a_taken_job_is_started_by_its_worker(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a"), ("high", "b")])
    assert lanes.take(["high"], 1, worker_name="w1") == ["a"]
    job = Job.fetch("a", connection=redis)
    assert (job.get_status(), job.worker_name) == (RqStatus.STARTED, "w1")
    assert job.started_at is not None
    assert 0 < redis.ttl(job.key) <= 86400, "what a worker never speaks of again fades"
    assert Job.fetch("b", connection=redis).get_status() is RqStatus.QUEUED


def test_a_stale_id_changes_nothing_that_is_shown(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a"), ("high", "a")])
    lanes.take(["high"], 1, worker_name="w1")
    lanes.mirror_ended([EndedRun("high", "a", JobStatus.COMPLETED)])
    assert lanes.take(["high"], 1, worker_name="w2") == ["a"]
    assert Job.fetch("a", connection=redis).get_status() is RqStatus.FINISHED
    redis.rpush("rq:queue:high", "forged")
    assert lanes.take(["high"], 1, worker_name="w2") == ["forged"]
    assert not redis.exists("rq:job:forged")


def test_running_jobs_are_in_the_registries_until_they_end(
    lanes: RqLanes, redis: redis_py.Redis, worker: rq.Worker
) -> None:
    lanes.push([("high", "a"), ("high", "b"), ("normal", "c")])
    lanes.take(["high", "normal"], 3, worker_name="w1")
    assert started(redis, "high") == [], "a job that ends before the first tick costs nothing"
    for _tick in range(2):
        lanes.mirror_running(
            [("high", "a"), ("high", "b"), ("normal", "c")], worker_name="w1", lease_seconds=30.5
        )
    assert started(redis, "high") == ["a", "b"]
    assert started(redis, "normal") == ["c"]
    (execution,) = Job.fetch("a", connection=redis).get_executions()
    assert (execution.job_id, execution.worker_name) == ("a", "w1")
    seen = rq.Worker.all(connection=redis)[0]
    assert {execution.job_id for execution in seen.get_current_executions()} == {"a", "b", "c"}

    ended = [
        ("high", "a", JobStatus.COMPLETED),
        ("high", "b", JobStatus.TIMEOUT),
        ("normal", "c", JobStatus.QUEUED),
    ]
    lanes.mirror_ended([EndedRun(*run) for run in ended], worker_name="w1")
    assert started(redis, "high") == started(redis, "normal") == []
    assert redis.keys("rq:execution*") == []
    assert redis.smembers("rq:worker:w1:executions") == set()
    assert shown(redis, "high") == {"finished": ["a"], "failed": ["b"]}
    seen = rq.Worker.all(connection=redis)[0]
    assert (seen.successful_job_count, seen.failed_job_count) == (1, 1)


@pytest.mark.parametrize(
    ("status", "seen", "seconds"),
    [
        (JobStatus.COMPLETED, RqStatus.FINISHED, 500),
        (JobStatus.FAILED, RqStatus.FAILED, 7 * 86400),
        (JobStatus.TIMEOUT, RqStatus.FAILED, 7 * 86400),
        (JobStatus.CANCELLED, RqStatus.CANCELED, 500),
        (JobStatus.EXPIRED, RqStatus.CANCELED, 500),
        (JobStatus.RETRYING, RqStatus.SCHEDULED, 600),
    ],
)
def test_an_ended_run_moves_to_the_registry_of_its_status(
    lanes: RqLanes, redis: redis_py.Redis, status: JobStatus, seen: RqStatus, seconds: int
) -> None:
    lanes.push([("high", "a")])
    lanes.take(["high"], 1, worker_name="w1")
    due = datetime.now(UTC) + timedelta(seconds=100) if status is JobStatus.RETRYING else None
    lanes.mirror_ended([EndedRun("high", "a", status, due_at=due)])
    job = Job.fetch("a", connection=redis)
    assert job.get_status() is seen
    assert job.ended_at is not None
    assert shown(redis, "high") == {seen.value: ["a"]}
    assert seconds - 60 < redis.ttl(job.key) <= seconds


def test_every_status_but_running_can_be_mirrored(lanes: RqLanes) -> None:
    for status in set(JobStatus) - {JobStatus.RUNNING}:
        lanes.mirror_ended([EndedRun("high", "a", status)])
    with pytest.raises(KeyError):
        lanes.mirror_ended([EndedRun("high", "a", JobStatus.RUNNING)])


def test_a_failed_job_shows_its_error(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a")])
    lanes.mirror_ended([EndedRun("high", "a", JobStatus.FAILED, error="ValueError: größer als 3")])
    result = Job.fetch("a", connection=redis).latest_result()
    assert (result.type, result.exc_string) == (Result.Type.FAILED, "ValueError: größer als 3")
    assert 0 < redis.ttl("rq:results:a") <= 7 * 86400


def test_a_job_that_is_pushed_again_starts_afresh(lanes: RqLanes, redis: redis_py.Redis) -> None:
    for status in (JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.RETRYING):
        lanes.push([("high", "a")])
        lanes.take(["high"], 1, worker_name="w1")
        lanes.mirror_ended([EndedRun("high", "a", status)])
    lanes.push([("low", "a")])
    assert shown(redis, "high") == {}
    job = Job.fetch("a", connection=redis)
    assert (job.get_status(), job.origin, job.worker_name) == (RqStatus.QUEUED, "low", None)
    assert job.ended_at is None
    assert redis.ttl(job.key) == -1


def test_a_job_is_in_one_registry_at_a_time(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a")])
    for status in (JobStatus.RETRYING, JobStatus.CANCELLED, JobStatus.FAILED, JobStatus.COMPLETED):
        lanes.mirror_ended([EndedRun("high", "a", status)])
        assert len(shown(redis, "high")) == 1, status


def test_a_job_taken_from_the_database_is_shown_once_it_runs(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.mirror_running([("high", "a")], worker_name="w1", lease_seconds=30)
    assert started(redis, "high") == ["a"]
    assert Job.fetch("a", connection=redis).args == ("a",)
    lanes.mirror_ended(
        [EndedRun("high", "a", JobStatus.COMPLETED), EndedRun("high", "quick", JobStatus.COMPLETED)]
    )
    assert shown(redis, "high") == {"finished": ["a"]}
    assert not redis.exists("rq:job:quick"), "no half hash for a job that no lane ever knew"


def test_a_dead_workers_runs_fade(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a")])
    lanes.mirror_running([("high", "a")], worker_name="w1", lease_seconds=30)
    keys = ["rq:job:a", "rq:execution:a:laneway", "rq:executions:a", "rq:worker:w1:executions"]
    assert [redis.ttl(key) > 0 for key in keys] == [True] * 4
    redis.zadd("rq:wip:high", {"gone:laneway": 1})
    lanes.mirror_running([("high", "a")], worker_name="w1", lease_seconds=30)
    assert started(redis, "high") == ["a"]


def test_a_released_job_that_is_pushed_again_is_not_running(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a")])
    lanes.mirror_running([("high", "a")], worker_name="w1", lease_seconds=30)
    lanes.push([("high", "a")])
    assert started(redis, "high") == []


@pytest.mark.parametrize(
    "status", [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.RETRYING]
)
def test_a_registry_holds_the_window_and_not_one_more(
    lanes: RqLanes, redis: redis_py.Redis, status: JobStatus
) -> None:
    """Redis' memory must have a bound at any rate of jobs: the oldest make room, hash and all."""
    ids = [f"job-{number:03}" for number in range(lanes.window + 1)]
    for number, job_id in enumerate(ids):
        lanes.push([("high", job_id)])
        lanes.take(["high"], 1, worker_name="w1")
        due = datetime.now(UTC) + timedelta(seconds=100 + number)
        lanes.mirror_ended([EndedRun("high", job_id, status, due_at=due, error="no")])
    (kept,) = shown(redis, "high").values()
    assert sorted(kept) == ids[1:]
    assert not redis.exists("rq:job:job-000", "rq:results:job-000")
    assert redis.exists("rq:job:job-001") == 1


def test_removed_and_purged_jobs_leave_no_hash_for_ever(lanes: RqLanes, redis: redis_py.Redis) -> None:
    lanes.push([("high", "a"), ("low", "b")])
    lanes.remove("high", ["a"])
    lanes.purge("low")
    assert 0 < redis.ttl("rq:job:a") <= 500
    assert not redis.exists("rq:job:b")
    lanes.mirror_ended([EndedRun("high", "a", JobStatus.CANCELLED)])
    assert shown(redis, "high") == {"canceled": ["a"]}


def test_a_batch_over_many_lanes_is_one_round_trip(lanes: RqLanes, redis: redis_py.Redis) -> None:
    items = [
        (lane, f"{lane}-{number}") for number in range(16) for lane in ("critical", "high", "emails", "low")
    ]

    def scripts(call: Callable[[], object]) -> int:
        call()  # the first one loads the script
        redis.config_resetstat()
        call()
        stats = redis.info("commandstats")
        assert set(stats) >= {"cmdstat_evalsha"}
        return int(stats["cmdstat_evalsha"]["calls"])

    ended = [EndedRun(lane, job_id, JobStatus.COMPLETED) for lane, job_id in items]
    assert scripts(lambda: lanes.push(items)) == 1
    assert scripts(lambda: lanes.take(["critical", "high", "emails", "low"], 64, worker_name="w1")) == 1
    assert scripts(lambda: lanes.mirror_running(items, worker_name="w1", lease_seconds=30)) == 1
    assert scripts(lambda: lanes.mirror_ended(ended, worker_name="w1")) == 1


def test_workers_are_those_whose_key_is_alive(
    lanes: RqLanes, redis: redis_py.Redis, worker: rq.Worker
) -> None:
    redis.sadd("rq:workers", "rq:worker:killed")
    assert lanes.workers() == ["w1"]


def test_rq_info_shows_the_right_numbers(
    lanes: RqLanes, redis: redis_py.Redis, redis_url: str, worker: rq.Worker
) -> None:
    lanes.push([("high", name) for name in "abcdef"] + [("normal", "z")])
    lanes.take(["high"], 4, worker_name="w1")
    lanes.mirror_running([("high", name) for name in "abcd"], worker_name="w1", lease_seconds=30)
    lanes.mirror_ended(
        [EndedRun("high", "a", JobStatus.COMPLETED), EndedRun("high", "b", JobStatus.FAILED)],
        worker_name="w1",
    )
    printed = rq_info(redis_url, "--raw")
    assert "queue high 2, 2 executing, 1 finished, 1 failed" in printed
    assert "queue normal 1, 0 executing, 0 finished, 0 failed" in printed
    assert re.search(r"worker w1 .* high, normal\. jobs: 1 finished, 1 failed", printed), printed
    assert "2 queues, 3 jobs total" in rq_info(redis_url)
    assert started(redis, "high") == ["c", "d"], "rq info also cleans; what is alive stays"


def test_rq_dashboard_shows_the_right_numbers(
    lanes: RqLanes, redis: redis_py.Redis, worker: rq.Worker, dashboard: FlaskClient
) -> None:
    lanes.push([("high", name) for name in "abcdef"])
    lanes.take(["high"], 4, worker_name="w1")
    lanes.mirror_running([("high", name) for name in "abcd"], worker_name="w1", lease_seconds=30)
    ended = [
        EndedRun("high", "a", JobStatus.COMPLETED),
        EndedRun("high", "b", JobStatus.FAILED, error="no such file"),
    ]
    lanes.mirror_ended([*ended, EndedRun("high", "c", JobStatus.RETRYING)], worker_name="w1")
    (queue,) = get(dashboard, "/0/data/queues.json")["queues"]
    counts = {
        name.removesuffix("_job_registry_count"): number for name, number in queue.items() if "count" in name
    }
    assert counts == {
        "count": 2,
        "started": 1,
        "finished": 1,
        "failed": 1,
        "scheduled": 1,
        "canceled": 0,
        "deferred": 0,
    }
    waiting = get(dashboard, "/0/data/jobs/high/queued/8/asc/1.json")["jobs"]
    assert [job["id"] for job in waiting] == ["e", "f"]
    (failed,) = get(dashboard, "/0/data/jobs/high/failed/8/asc/1.json")["jobs"]
    assert (failed["id"], failed["exc_info"]) == ("b", "no such file")
    assert get(dashboard, "/0/data/job/a.json")["status"] == "finished"
    (busy,) = get(dashboard, "/0/data/workers.json")["workers"]
    assert busy["name"] == "w1"
    assert busy["current_job"]["job_id"] == "d"
