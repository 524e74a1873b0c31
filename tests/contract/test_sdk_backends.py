"""The Python API keeps the same promises on every backend.

`rq` is a database, a Redis, a worker and a scheduler, on each store; `http` is a server before the same;
`memory` is this process alone.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

import sdk_tasks
from api_client import Calls, ServedApi, WorkerProcess, environment
from laneway import (
    Job,
    JobCancelled,
    JobFailed,
    JobManager,
    JobResult,
    JobStatus,
    cancel,
    enqueue,
    enqueue_delayed,
    get_job_manager,
    get_queue,
    job_chain,
    poll,
)
from laneway.engine import chains, queues
from laneway.engine.access.callers import Caller, Role
from laneway.errors import (
    InvalidParameters,
    InvalidPayload,
    JobNotFound,
    JobTypeNotFound,
    LanewayError,
    UnknownJobType,
)
from laneway.sdk.backend import Backend, use
from laneway.sdk.client import LanewayClient
from laneway.sdk.local import LocalBackend
from laneway.sdk.memory import MemoryBackend
from laneway.sdk.remote import RemoteBackend
from laneway.settings import Settings
from process.stack import Process
from servers import PostgresServer, RedisServer, wait_until

pytestmark = [pytest.mark.xdist_group("sdk"), pytest.mark.servers]

TASKS = ("sdk_tasks",)
NOBODY = "01980000-0000-7000-8000-000000000000"
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A backend, and what it is called."""

    name: str
    backend: Backend

    @property
    def here(self) -> bool:
        """Whether a direct call runs in this process."""
        return self.name != "http"


class Processes:
    """What runs behind a backend: started once for all tests of this file."""

    def __init__(self, stack: ExitStack, folder: Path, database_url: str) -> None:
        self._stack = stack
        redis = stack.enter_context(RedisServer())
        self.settings = Settings(
            database_url=database_url,
            redis_url=redis.url,
            data_dir=folder / "data",
            tasks=TASKS,
            rate_limits="off",
            beat_seconds=0.5,
            tick_seconds=0.5,
        )
        key_maker = stack.enter_context(closing(Calls(self.settings)))  # makes the tenant, too
        self._key = key_maker.key(Role.OPERATOR)
        stack.enter_context(WorkerProcess(self.settings))
        command = [sys.executable, "-m", "laneway", "scheduler"]
        scheduler = Process(
            "scheduler", command, log=folder / "scheduler.log", env=environment(self.settings)
        )
        stack.callback(scheduler.kill)
        scheduler.wait_for("scheduler_started")

    def backend(self) -> LocalBackend:
        backend = LocalBackend.connect(self.settings)
        self._stack.callback(backend.close)
        return backend

    def remote(self) -> RemoteBackend:
        api = self._stack.enter_context(ServedApi(self.settings))
        transport = httpx.HTTPTransport(uds=str(api.socket))
        backend = RemoteBackend(LanewayClient("http://localhost", self._key, transport=transport))
        self._stack.callback(backend.close)
        return backend


@pytest.fixture(scope="module")
def worlds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _migrated_sqlite_file: Path
) -> Iterator[Callable[[str], World]]:
    """Each world, made when it is first asked for. `rq` on SQLite and `http` share their processes."""
    known: dict[str, World] = {}
    on_sqlite: list[Processes] = []
    with ExitStack() as stack:

        def make(name: str) -> World:
            if name not in known:
                folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
                if name == "memory":
                    memory = MemoryBackend.running(Settings(tasks=TASKS, concurrency=2))
                    stack.callback(memory.close)
                    known[name] = World(name, memory)
                    admin = Caller(memory.caller().tenant_id, "admin", Role.ADMIN)
                    queues.pause(memory.service, "parked", admin)  # as nobody drains it elsewhere
                elif name == "rq on postgresql":
                    server: PostgresServer = request.getfixturevalue("postgres_server")
                    processes = Processes(stack, folder, server.fresh())
                    known[name] = World(name, processes.backend())
                else:
                    if not on_sqlite:
                        url = f"sqlite:///{shutil.copy(_migrated_sqlite_file, folder / 'laneway.db')}"
                        on_sqlite.append(Processes(stack, folder, url))
                    [processes] = on_sqlite
                    http = name == "http"
                    known[name] = World(name, processes.remote() if http else processes.backend())
            return known[name]

        yield make


@pytest.fixture(params=["memory", "rq on sqlite", "http", "rq on postgresql"])
def world(request: pytest.FixtureRequest, worlds: Callable[[str], World]) -> Iterator[World]:
    """Each backend in turn, as the one this process uses."""
    found = worlds(request.param)
    before = use(found.backend)
    yield found
    use(before)


def awaited(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def finished(job_id: str) -> JobResult:
    return awaited(JobManager().wait_for(job_id, timeout=30))


def row(world: World, job_id: str) -> dict[str, Any]:
    return world.backend.get(job_id)


# Enqueueing


def test_a_job_is_enqueued_by_name_and_runs(world: World) -> None:
    async def use_the_manager() -> JobResult:
        jobs = await get_job_manager()
        job_id = await jobs.enqueue("sdk.add", a=1, b=4)
        return await jobs.wait_for(job_id, timeout=30)

    done = awaited(use_the_manager())
    assert (done.status, done.result) == (JobStatus.COMPLETED, {"sum": 5, "job_id": done.id})
    assert done.created_at <= done.started_at <= done.finished_at  # type: ignore[operator]
    assert (done.progress, done.attempt, done.error) == (100, 1, None)


def test_a_function_is_enqueued_with_its_own_signature(world: World) -> None:
    first, second = sdk_tasks.add.delay(1), sdk_tasks.double.delay(value=4)
    assert row(world, first)["priority"] == "high"
    assert finished(first).result["sum"] == 3
    done = finished(second)
    assert (done.result["double"], done.progress_message, done.progress_details) == (
        8,
        "Doubling",
        {"value": 4},
    )


def test_options_are_fields_of_the_request(world: World) -> None:
    job_id = sdk_tasks.add.options(priority="low", delay_seconds=3600, title="Sum", tags=["t"]).delay(1, b=1)
    job = row(world, job_id)
    assert (job["priority"], job["status"], job["title"], job["tags"]) == ("low", "scheduled", "Sum", ["t"])
    assert cancel(job_id)


def test_what_is_no_field_of_a_request_is_refused(world: World) -> None:
    with pytest.raises(LanewayError, match="colour"):
        sdk_tasks.add.options(colour="red").delay(1)


def test_a_delayed_job_waits_and_can_be_cancelled(world: World) -> None:
    by_function = enqueue_delayed("sdk.add", timedelta(hours=1), a=1)
    by_manager = awaited(JobManager().enqueue_delayed("sdk.add", timedelta(hours=1), priority=0, a=1))
    for job_id in (by_function, by_manager):
        assert poll(job_id).status is JobStatus.SCHEDULED
        assert cancel(job_id)
        assert poll(job_id).status is JobStatus.CANCELLED
    assert row(world, by_manager)["priority"] == "low"


def test_parameters_are_json_in_their_usual_form(world: World) -> None:
    assert finished(sdk_tasks.age.delay(datetime(1995, 6, 1, tzinfo=UTC))).result == 30


def test_a_wrong_call_is_refused_before_anything_is_written(world: World) -> None:
    with pytest.raises(UnknownJobType):
        enqueue("sdk.nothing", a=1)
    with pytest.raises(InvalidParameters) as refused:
        enqueue("sdk.add", a="many")
    assert refused.value.errors[0].pointer == "/parameters/a"
    with pytest.raises(InvalidPayload):
        enqueue("sdk.add", a=object())
    with pytest.raises(TypeError, match="'a'"):
        sdk_tasks.add.delay()  # type: ignore[call-arg]
    with pytest.raises(JobTypeNotFound):
        enqueue(awaited, a=1)


def test_a_key_of_the_job_type_makes_asking_twice_one_job(world: World) -> None:
    first = sdk_tasks.once.delay("x")
    assert sdk_tasks.once.delay("x") == first
    other = sdk_tasks.once.delay("y")
    assert other != first
    assert (row(world, first)["unique_key"], row(world, first)["tags"]) == ("once-x", ["one", "two"])
    assert cancel(first)
    assert cancel(other)


def test_of_a_concurrency_key_so_many_jobs_run_at_once_as_it_allows(world: World) -> None:
    ids = [sdk_tasks.one_at_a_time.delay(7) for _ in range(5)]
    assert row(world, ids[0])["concurrency_key"] == "shop-7"
    runs = sorted(finished(job_id).result for job_id in ids)
    assert all(before[1] <= after[0] for before, after in pairwise(runs)), runs


def test_a_job_may_have_a_process_of_its_own(world: World) -> None:
    first, second = (finished(sdk_tasks.alone.delay()).result for _ in range(2))
    assert (first == second) == (world.name == "memory")


def test_a_job_makes_jobs_and_calls_functions(world: World) -> None:
    done = finished(sdk_tasks.parent.delay(5)).result
    assert done["called"] == {"sum": 7, "job_id": done["self"]}
    child = finished(done["child"])
    assert child.result == {"sum": 7, "job_id": child.id}
    assert row(world, child.id)["created_by"] == row(world, done["self"])["created_by"]


def test_a_function_that_tries_again_by_itself_is_one_attempt(world: World) -> None:
    done = finished(sdk_tasks.shaky.delay(world.name))
    assert (done.result, done.attempt) == (3, 1)


# Ends


def test_a_job_that_fails_for_good_says_why(world: World) -> None:
    done = finished(sdk_tasks.fail.delay("permanent"))
    assert (done.status, done.attempt) == (JobStatus.FAILED, 1)
    assert done.error is not None
    assert (done.error["type"], done.error["message"]) == ("PermanentError", "no such account")


def test_a_job_is_tried_again(world: World) -> None:
    assert finished(sdk_tasks.fail.delay("once")).result == "attempt 2"
    done = finished(sdk_tasks.fail.delay("value"))
    assert (done.status, done.attempt) == (JobStatus.FAILED, 2)
    assert done.error is not None
    assert "ValueError: attempt 2" in done.error["traceback"]


def test_a_running_job_is_asked_to_stop(world: World) -> None:
    job_id = sdk_tasks.wait_for_cancel.delay()
    wait_until(lambda: poll(job_id).progress == 29, what="it runs and says so")
    assert poll(job_id).status is JobStatus.RUNNING
    assert awaited(JobManager().cancel(job_id))
    assert finished(job_id).status is JobStatus.CANCELLED
    assert awaited(JobManager().cancel(job_id))  # asking twice is no error


def test_a_job_that_outstays_its_timeout_is_stopped(world: World) -> None:
    assert finished(sdk_tasks.overtime.delay()).status is JobStatus.TIMEOUT


def test_what_has_ended_cannot_be_cancelled(world: World) -> None:
    job_id = finished(sdk_tasks.add.delay(1)).id
    assert cancel(job_id) is False
    assert poll(job_id).status is JobStatus.COMPLETED


def test_waiting_has_an_end(world: World) -> None:
    job_id = enqueue_delayed("sdk.add", 3600, a=1)
    with pytest.raises(TimeoutError, match="scheduled"):
        awaited(JobManager().wait_for(job_id, timeout=0.2))
    assert cancel(job_id)


def test_a_job_that_is_not_there_is_not_found(world: World) -> None:
    for ask in (poll, cancel):
        with pytest.raises(JobNotFound):
            ask(NOBODY)


# Direct calls


def test_a_direct_call_runs_now_and_leaves_a_row(world: World) -> None:
    for result in (sdk_tasks.add(1, b=1), awaited(sdk_tasks.double(value=1))):
        job = row(world, result["job_id"])
        assert (job["status"], job["result"], job["attempt"]) == ("completed", result, 1)
        assert job["created_at"] <= job["started_at"] <= job["finished_at"]


def test_a_direct_call_that_fails_raises_and_leaves_the_traceback(world: World) -> None:
    if world.here:
        before = {job["id"] for job in _failed(world)}
        with pytest.raises(ValueError, match="attempt 1"):
            sdk_tasks.fail("value")
        [job] = [job for job in _failed(world) if job["id"] not in before]
    else:
        with pytest.raises(JobFailed, match="ValueError: attempt 1") as raised:
            sdk_tasks.fail("value")
        job = row(world, raised.value.facts["job_id"])
    assert (job["status"], job["attempt"], job["max_retries"]) == ("failed", 1, 0)
    assert "ValueError: attempt 1" in job["error"]["traceback"]


def _failed(world: World) -> list[dict[str, Any]]:
    from laneway.engine.queries import JobFilter

    assert isinstance(world.backend, LocalBackend)
    wanted = JobFilter(statuses=(JobStatus.FAILED,), job_type="sdk.fail")
    service = world.backend.service
    return service.page(world.backend.caller(), wanted, limit=100, cursor=None, mine=False)[0]


def test_a_direct_call_can_be_cancelled(world: World) -> None:
    def call() -> None:
        with pytest.raises(JobCancelled):
            sdk_tasks.wait_for_cancel()

    async def call_and_cancel() -> None:
        calling = asyncio.create_task(asyncio.to_thread(call))
        job_id = await asyncio.to_thread(_running_call, world)
        assert await JobManager().cancel(job_id)
        await calling
        assert (await JobManager().get_status(job_id)).status is JobStatus.CANCELLED

    awaited(call_and_cancel())


def _running_call(world: World) -> str:
    def look() -> Any:
        if isinstance(world.backend, LocalBackend):
            from laneway.engine.queries import JobFilter

            wanted = JobFilter(statuses=(JobStatus.RUNNING,), job_type="sdk.wait_for_cancel")
            service = world.backend.service
            found, _ = service.page(world.backend.caller(), wanted, limit=1, cursor=None, mine=False)
        else:
            assert isinstance(world.backend, RemoteBackend)
            query = {"status": "running", "job_type": "sdk.wait_for_cancel"}
            found = world.backend._client.request("GET", "/jobs", query=query)["data"]
        return found[0]["id"] if found else None

    return str(wait_until(look, what="the call runs"))


# Queues


def test_a_queue_says_how_much_waits_and_is_purged(world: World) -> None:
    async def use_the_queue() -> None:
        queue, jobs = await get_queue(), JobManager()
        assert await queue.queue_length("parked") == 0
        ids = [sdk_tasks.once.delay(f"purged-{number}") for number in range(3)]
        assert await jobs.queue_length("parked") == 3
        assert await queue.purge_queue("parked") == 3
        assert await jobs.queue_length("parked") == 0
        assert await jobs.purge_queue("parked") == 0
        for job_id in ids:
            assert (await jobs.get_status(job_id)).status is JobStatus.CANCELLED

    awaited(use_the_queue())


# The synchronous form


def test_a_job_says_everything_itself(world: World) -> None:
    job_id = enqueue(
        Job(
            name="A sum",
            function=sdk_tasks.add,
            args=(1,),
            kwargs={"b": 3},
            priority="critical",
            max_retries=7,
            retry_delay=1.5,
            retry_backoff=3.0,
            retry_jitter=False,
            scheduled_at=datetime.now(UTC) + timedelta(hours=1),  # noqa: DTZ005, RUF100
        )
    )
    job = row(world, job_id)
    assert (job["title"], job["parameters"], job["status"]) == ("A sum", {"a": 1, "b": 3}, "scheduled")
    assert (job["max_retries"], job["retry_delay_seconds"], job["retry_backoff"]) == (7, 1.5, 3.0)
    assert (job["priority"], job["retry_jitter"]) == ("critical", False)
    assert cancel(job_id)


def test_a_job_waits_for_others(world: World) -> None:
    first = enqueue_delayed("sdk.add", 3600, a=1)
    second = enqueue(Job(function="sdk.add", kwargs={"a": 2}, depends_on=[first]))
    assert poll(second).status is JobStatus.BLOCKED
    assert cancel(first)
    assert finished(second).status is JobStatus.CANCELLED


# Many jobs, and those that follow each other


def test_a_batch_is_one_call(world: World) -> None:
    items = [{"a": number} for number in range(5)]
    done = awaited(JobManager().enqueue_batch("sdk.add", items=items, priority="low"))
    assert (done.total, done.enqueued) == (5, 5)
    assert done.batch_id
    with pytest.raises(LanewayError) as refused:
        awaited(JobManager().enqueue_batch("sdk.add", items=[{"a": 1}, {"a": "many"}]))
    assert refused.value.errors[0].pointer == "/items/1/a"


def test_a_chain_hands_results_on(world: World) -> None:
    by_manager = awaited(JobManager().chain([("sdk.add", (1,), {"b": 1}), (sdk_tasks.add, (), {"a": 5})]))
    by_function = sdk_tasks.sums(3)
    assert chain(world, by_manager)["results"]["step_1"]["sum"] == 7
    assert chain(world, by_function)["results"]["step_1"]["sum"] == 14
    wrongs: list[Any] = [[], "sdk.add", [{"parameters": {}}]]
    for wrong in wrongs:

        @job_chain(name="wrong")
        def steps(given: Any = wrong) -> Any:
            return given

        with pytest.raises(ValueError, match=r"chain|step"):
            steps()


def chain(world: World, chain_id: str) -> dict[str, Any]:
    def look() -> Any:
        if isinstance(world.backend, LocalBackend):
            found = chains.get(world.backend.service, chain_id, world.backend.caller())
        else:
            assert isinstance(world.backend, RemoteBackend)
            found = world.backend._client.request("GET", f"/chains/{chain_id}")
        return found if found["status"] == "completed" else None

    return dict(wait_until(look, what="the chain completes"))


# Schedules


def test_schedules_are_made_listed_and_deleted(world: World) -> None:
    async def use_the_manager() -> None:
        jobs = JobManager()
        cron = await jobs.schedule("sdk.add", cron="0 9 * * *", name="daily", timezone="Europe/Berlin", a=1)
        every = await jobs.schedule_interval(sdk_tasks.add, interval=timedelta(minutes=5), name="often", a=1)
        known = {each.id: each for each in await jobs.list_scheduled()}
        assert (known[cron].name, known[cron].schedule) == ("daily", "0 9 * * *")
        assert (known[every].schedule, known[every].job_type) == ("every 300 s", "sdk.add")
        assert known[every].next_run is not None
        assert known[every].is_active
        for schedule_id in (cron, every):
            await jobs.unschedule(schedule_id)
        assert not {cron, every} & {each.id for each in await jobs.list_scheduled()}
        with pytest.raises(LanewayError, match="schedule"):
            await jobs.unschedule(cron)

    awaited(use_the_manager())


def test_a_job_with_a_cron_expression_is_a_schedule(world: World) -> None:
    schedule_id = enqueue(
        Job(name="nightly", function="sdk.add", kwargs={"a": 1}, cron_expression="0 2 * * *")
    )
    known = {each.id: each for each in awaited(JobManager().list_scheduled())}
    assert (known[schedule_id].name, known[schedule_id].schedule) == ("nightly", "0 2 * * *")
    awaited(JobManager().unschedule(schedule_id))


def test_an_interval_runs(world: World) -> None:
    async def use_the_manager() -> None:
        jobs = JobManager()
        schedule_id = await jobs.schedule_interval("sdk.add", interval=1, name="tick", a=1)

        def has_run() -> bool:
            return any(each["total_runs"] for each in world.backend.list_schedules())

        await asyncio.to_thread(lambda: wait_until(has_run, what="the schedule made a job"))
        await jobs.unschedule(schedule_id)

    awaited(use_the_manager())
