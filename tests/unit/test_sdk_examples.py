"""What the documentation of the Python API shows, done on the memory backend by a clock that is moved."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI

import laneway
from laneway import (
    Job,
    JobCancelled,
    JobContext,
    JobManager,
    JobQueue,
    JobResult,
    JobStatus,
    PermanentError,
    Retry,
    Snooze,
    TransientError,
    background_job,
    cancel,
    current_job,
    enqueue,
    enqueue_delayed,
    get_job_manager,
    get_queue,
    job_chain,
    models,
    poll,
    register_job_function,
    scheduled_job,
    testing,
)
from laneway.clock import FrozenClock
from laneway.domain.spec import JobSpec
from laneway.engine import registry as registry_module
from laneway.engine.access.callers import Caller, Role, ensure_tenant
from laneway.engine.registry import Registry
from laneway.errors import InvalidPayload, StorageUnavailable
from laneway.sdk.backend import connect, current_backend, use
from laneway.sdk.local import LocalBackend
from laneway.sdk.memory import Endless, MemoryBackend
from laneway.settings import Settings
from laneway.testing import LanewayJobs, WebhookReceiver

assert_enqueued = testing.assert_enqueued
clock = testing.clock
laneway_jobs = testing.laneway_jobs
run_all = testing.run_all
webhook_receiver = testing.webhook_receiver

Run = Callable[[], list[JobResult]]


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry of the test's own; what it declares is in no other's."""
    registry_module.load(())
    fresh = Registry()
    monkeypatch.setattr(registry_module, "registry", fresh)
    yield fresh
    use(None)


# In a handler


@pytest.mark.parametrize(
    ("error", "after", "seconds"),
    [
        (PermanentError("no such account"), "failed", None),
        (TransientError("upstream 503"), "retrying", 120),
        (Retry(in_seconds=30), "retrying", 30),
        (Snooze(in_seconds=300), "retrying", 300),
        (JobCancelled(), "cancelled", None),
        (ValueError("anything"), "retrying", 120),
    ],
)
def test_what_a_handler_raises_decides(
    laneway_jobs: LanewayJobs, run_all: Run, error: BaseException, after: str, seconds: int | None
) -> None:
    raised: list[BaseException] = [error]

    @background_job("t.raises", retry_jitter=False)
    def raises() -> str:
        if raised:
            raise raised.pop()
        return "at last"

    job_id = raises.delay()
    assert [each.status for each in run_all()] == [after]
    if seconds is not None:
        laneway_jobs.clock.advance(seconds=seconds - 1)
        assert run_all() == []
        laneway_jobs.clock.advance(seconds=1)
        assert [each.result for each in run_all()] == ["at last"]
        charged = laneway_jobs.backend.get(job_id)["retry_count"]
        assert charged == (0 if isinstance(error, Snooze) else 1)


def test_a_handler_tells_of_itself(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    seen: list[JobResult] = []

    @background_job("t.render")
    def render(progress_callback: Any) -> None:
        job = current_job()
        job.progress(40, "Rendering", details={"page": 4})
        seen.append(poll(job.id))
        progress_callback(0.6, "Binding")
        job.log("fetched", rows=120)
        job.check_cancelled()

    done = [render.delay(), *[each.id for each in run_all()]]
    assert len(set(done)) == 1
    assert (seen[0].status, seen[0].progress, seen[0].progress_details) == (
        JobStatus.RUNNING,
        40,
        {"page": 4},
    )
    assert poll(done[0]).progress_message == "Binding"


def test_a_running_handler_learns_of_its_cancel(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    @background_job("t.stop")
    def stop(job: JobContext) -> None:
        assert not job.cancelled
        cancel(job.id)
        assert job.cancelled
        job.check_cancelled()

    stop.delay()
    assert [each.status for each in run_all()] == ["cancelled"]


@pytest.mark.parametrize("error", [Snooze(300), Retry(30), TransientError("503"), SystemExit(3)])
def test_a_direct_call_has_one_attempt(laneway_jobs: LanewayJobs, run_all: Run, error: BaseException) -> None:
    @background_job("t.raises")
    def raises() -> None:
        raise error

    with pytest.raises(type(error)):
        raises()
    laneway_jobs.clock.advance(days=1)
    assert run_all() == []
    [job] = laneway_jobs.jobs
    assert (job.status, job.attempt) == (JobStatus.FAILED, 1)


def test_a_result_that_is_not_json_fails_the_call(laneway_jobs: LanewayJobs) -> None:
    @background_job("t.object")
    def make() -> object:
        return object()

    with pytest.raises(InvalidPayload):
        make()
    assert [job.status for job in laneway_jobs.jobs] == ["failed"]


def test_an_awaited_call_that_is_cancelled_leaves_a_cancelled_job(laneway_jobs: LanewayJobs) -> None:
    @background_job("t.forever")
    async def forever() -> None:
        await asyncio.Event().wait()

    async def call() -> None:
        calling = asyncio.create_task(forever())
        while not laneway_jobs.jobs:
            await asyncio.sleep(0.01)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling

    asyncio.run(call())
    assert [job.status for job in laneway_jobs.jobs] == ["cancelled"]


def test_jobs_of_a_job_belong_to_its_tenant(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    register_job_function("t.child", lambda: None)

    @background_job("t.parent")
    def parent() -> str:
        return enqueue("t.child")

    service, box = laneway_jobs.backend.service, laneway_jobs.backend.box
    stranger = Caller(ensure_tenant(service.database, box, "other"), "bob", Role.USER)
    service.enqueue([service.prepare(JobSpec(job_type="t.parent"), stranger)])
    parent.delay()
    rows = {each.id: each for each in run_all()}
    owners = {}
    with service.database.read() as connection:
        for row in connection.execute(sa.select(models.jobs)).mappings():
            owners.setdefault(row["job_type"], []).append((row["tenant_id"], row["created_by"]))
    assert len(rows) == 4
    assert sorted(owners["t.child"]) == sorted(owners["t.parent"])
    assert (stranger.tenant_id, "bob") in owners["t.child"]


# The manager, the functions


def test_levels_of_use(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    done: list[str] = []

    def send(to: str) -> None:
        done.append(to)

    register_job_function("emails.send", send)

    async def application() -> None:
        jobs = await get_job_manager()
        await jobs.enqueue("emails.send", to="now")
        await jobs.enqueue_delayed("emails.send", delay=timedelta(days=7), to="in a week")
        await jobs.schedule("emails.send", cron="0 9 * * *", name="daily", to="daily")
        batch = await jobs.enqueue_batch("emails.send", items=[{"to": f"{n}"} for n in range(3)])
        assert (batch.total, batch.enqueued) == (3, 3)
        await jobs.chain([("emails.send", (), {"to": "first"}), ("emails.send", ("second",), {})])

    asyncio.run(application())
    run_all()
    assert done == ["now", "0", "1", "2", "first", "second"]
    laneway_jobs.clock.advance(days=7)
    run_all()
    assert sorted(done[6:]) == ["daily", "in a week"]


def test_urgent_jobs_run_first(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    register_job_function("t.any", lambda: None)
    for priority in ("low", "normal", 10, "high"):
        enqueue("t.any", priority=priority)
    ran = [laneway_jobs.backend.get(each.id)["priority"] for each in run_all()]
    assert ran == ["critical", "high", "normal", "low"]


def test_a_chain_that_stops_on_failure(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    @background_job("t.step", max_retries=0)
    def step(number: int) -> int:
        if number == 1:
            raise ValueError("no")
        return number

    @job_chain(name="Data pipeline", execution_mode="sequential", stop_on_failure=True, timeout_seconds=7200)
    async def pipeline() -> list[dict[str, Any]]:
        """ETL."""
        return [{"job_type": "t.step", "parameters": {"number": n}} for n in range(3)]

    chain_id = asyncio.run(pipeline())
    assert chain_id
    assert [each.status for each in run_all()] == ["completed", "failed"]


def test_a_scheduled_function_runs_by_the_clock(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    @scheduled_job(interval_seconds=3600, name="Hourly sync", max_concurrent_runs=1)
    async def sync() -> str:
        return "synced"

    laneway_jobs.keep_schedules()
    laneway_jobs.keep_schedules()  # once is enough
    [schedule] = asyncio.run(JobManager().list_scheduled())
    assert (schedule.name, schedule.schedule) == ("Hourly sync", "every 3600 s")
    assert run_all() == []
    for _ in range(3):
        laneway_jobs.clock.advance(hours=1)
        assert [each.result for each in run_all()] == ["synced"]


def test_the_synchronous_form(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    @background_job("t.work")
    def work(a: int, b: int = 1) -> int:
        return a * b

    first = enqueue(Job(name="Work", function=work, args=(2,), kwargs={"b": 3}))
    second = enqueue(Job(function="t.work", args=[4], depends_on=[first]))
    assert [poll(job_id).status for job_id in (first, second)] == ["queued", "blocked"]
    assert [(each.id, each.result) for each in run_all()] == [(first, 6), (second, 4)]
    with pytest.raises(TypeError, match="says everything"):
        enqueue(Job(function=work), a=1)
    with pytest.raises(ValueError, match="cron_expression"):
        enqueue(Job(function=work, args=(1,), cron_expression="* * * * *", depends_on=[first]))
    with pytest.raises(TypeError, match="by name"):
        enqueue(Job(function="t.unknown", args=(1,)))


def test_routes_are_handed_the_manager_and_the_queues(laneway_jobs: LanewayJobs, run_all: Run) -> None:
    register_job_function("t.any", lambda user_id: user_id)
    app = FastAPI()

    @app.post("/signup")
    async def signup(user_id: int, jobs: JobManager = Depends(get_job_manager)) -> dict[str, str]:  # noqa: B008
        return {"job_id": await jobs.enqueue("t.any", user_id=user_id)}

    @app.get("/stats")
    async def stats(queue: JobQueue = Depends(get_queue)) -> dict[str, int]:  # noqa: B008
        return {"pending": await queue.queue_length("default")}

    async def call() -> tuple[Any, Any]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app.test") as client:
            made = (await client.post("/signup", params={"user_id": 7})).json()
            return made, (await client.get("/stats")).json()

    made, counted = asyncio.run(call())
    assert counted == {"pending": 1}
    assert [(each.id, each.result) for each in run_all()] == [(made["job_id"], 7)]


# The test kit


def test_what_was_enqueued_is_found_or_listed(
    laneway_jobs: LanewayJobs, assert_enqueued: Callable[..., JobResult]
) -> None:
    register_job_function("t.any", lambda a, b=0: None)
    job_id = enqueue("t.any", priority="high", a=1, b=2)
    assert assert_enqueued("t.any").id == job_id
    assert assert_enqueued("t.any", parameters={"a": 1}, priority="high").id == job_id
    for wrong in ({"parameters": {"a": 2}}, {"parameters": {"c": 1}}, {"priority": "low"}):
        with pytest.raises(AssertionError, match=r"there is:\n  t.any {'a': 1, 'b': 2}"):
            assert_enqueued("t.any", **wrong)
    with pytest.raises(AssertionError, match=r"no t\.other was enqueued"):
        assert_enqueued("t.other")


def test_the_clock_moves_only_when_told(laneway_jobs: LanewayJobs, clock: FrozenClock, run_all: Run) -> None:
    register_job_function("t.any", lambda: None)
    job_id = enqueue_delayed("t.any", timedelta(minutes=5))
    assert run_all() == []
    before = clock.now()
    clock.advance(minutes=5)
    [done] = run_all()
    assert done.id == job_id
    assert done.finished_at == before + timedelta(minutes=5)
    assert [job.id for job in laneway_jobs.jobs] == [job_id]


def test_webhooks_arrive_and_are_tried_again(
    laneway_jobs: LanewayJobs, webhook_receiver: WebhookReceiver, run_all: Run
) -> None:
    register_job_function("t.any", lambda: {"rows": 3})
    webhook_receiver.answers = [503]
    request = {"job_type": "t.any", "webhook_url": webhook_receiver.url}
    [job] = laneway_jobs.backend.enqueue([request])
    run_all()
    assert webhook_receiver.received == []
    laneway_jobs.clock.advance(minutes=30)
    run_all()
    [came] = webhook_receiver.received
    assert (came.type, came.data["job_id"], came.data["result"]) == ("job.completed", job["id"], {"rows": 3})
    assert webhook_receiver.refused == []


def test_a_receiver_refuses_what_it_cannot_verify() -> None:
    with WebhookReceiver("whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw") as receiver:
        assert httpx.post(receiver.url, content=b"{}").status_code == 401
    assert (receiver.received, len(receiver.refused)) == ([], 1)


def test_jobs_that_come_to_no_end_are_noticed(
    laneway_jobs: LanewayJobs, run_all: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laneway.sdk.memory.MAX_RUNS", 5)

    @background_job("t.again")
    def again() -> None:
        again.delay()

    again.delay()
    with pytest.raises(Endless, match="5 jobs ran"):
        run_all()


# Backends


def test_the_settings_name_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANEWAY_BACKEND", "memory")
    use(None)
    backend = current_backend()
    assert isinstance(backend, MemoryBackend)
    assert current_backend() is backend
    backend.close()
    with pytest.raises(laneway.errors.Unauthenticated, match="LANEWAY_URL"):
        connect(Settings(backend="http"))


def test_a_database_that_is_away_is_said_to_be() -> None:
    register_job_function("t.any", lambda: None)
    backend = LocalBackend.connect(
        Settings(database_url="postgresql://nobody@/none?host=/nowhere", redis_url="unix:///nowhere")
    )
    use(backend)
    job = background_job("t.direct")(lambda: None)
    for ask in (lambda: enqueue("t.any"), lambda: poll("x"), lambda: cancel("x"), job.delay, job):
        with pytest.raises(StorageUnavailable):
            ask()
    backend.close()


def test_importing_the_library_loads_no_server() -> None:
    """All its names, with a decorated function: neither FastAPI, aiohttp, RQ nor a driver."""
    program = (
        "import sys, laneway\n"
        "for name in laneway.__all__: getattr(laneway, name)\n"
        "laneway.background_job('t.t')(lambda: None)\n"
        "heavy = {'fastapi', 'starlette', 'uvicorn', 'aiohttp', 'rq', 'psycopg', 'alembic', 'pytest'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    backend = Path(laneway.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=backend, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[]\n"


PLUGGED = """
from laneway import background_job

@background_job("shop.welcome")
def welcome(to: str) -> str:
    return f"Hello, {to}"

def sign_up(to: str) -> None:
    welcome.options(delay_seconds=300).delay(to)

def test_a_customer_is_welcomed(laneway_jobs, assert_enqueued, run_all, clock, webhook_receiver):
    sign_up("ada@example.org")
    assert_enqueued("shop.welcome", parameters={"to": "ada@example.org"})
    assert run_all() == []
    clock.advance(minutes=5)
    assert [job.result for job in run_all()] == ["Hello, ada@example.org"]

def test_the_next_test_begins_with_nothing(laneway_jobs):
    assert laneway_jobs.jobs == []
"""


def test_it_is_a_pytest_plugin(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["laneway.testing"]\n')
    (tmp_path / "test_shop.py").write_text(PLUGGED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        cwd=Path(laneway.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
