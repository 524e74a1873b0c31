"""Functions that are jobs: what they keep of themselves, and what stands above and below them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from laneway import JobContext, PermanentError, background_job, job_chain, retry_on_failure, scheduled_job
from laneway.engine import registry as registry_module
from laneway.engine.context import Progress, entered
from laneway.engine.registry import JobType, Registry, register_job_function
from laneway.errors import InvalidParameters, JobCancelled, JobTypeNotFound, Retry, Snooze
from laneway.sdk.decorators import bound


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of the test's own in the place of the process's."""
    fresh = Registry()
    monkeypatch.setattr(registry_module, "registry", fresh)
    return fresh


class Paper:
    """A line that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[Progress] = []
        self.stop = False

    def report(self, progress: Progress) -> None:
        self.said.append(progress)

    def cancelled(self) -> bool:
        return self.stop


def in_job(line: Paper | None = None) -> Any:
    """Code below runs in a job, where a direct call is a plain call."""
    return entered(JobContext(job_id="j", job_type="t.t", attempt=1, line=line or Paper()))


def shared_task(function: Callable[..., Any]) -> Any:
    """Like Celery's: an object in the place of the function, which knows it as `__wrapped__`."""

    class Task:
        __name__ = function.__name__
        __module__ = function.__module__
        __doc__ = function.__doc__
        __wrapped__ = staticmethod(function)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        def delay(self, *args: Any, **kwargs: Any) -> str:
            raise AssertionError("nobody asked Celery")

        def apply_async(self) -> str:
            return "celery's own"

    return Task()


# What a function keeps


def test_signature_name_and_docstring_stay(registry: Registry) -> None:
    @background_job()
    def render(job: JobContext, title: str, pages: int = 10) -> str:
        """Render a report."""
        return f"{job.id} {title} {pages}"

    assert str(inspect.signature(render, eval_str=True)).startswith("(job: laneway.engine.context.JobContext")
    assert (render.__name__, render.__doc__) == ("render", "Render a report.")  # type: ignore[attr-defined]
    assert render.job_type == "test_decorators.render"
    assert registry.need("test_decorators.render").function is inspect.unwrap(render)
    assert registry.type_of(render).name == registry.type_of(inspect.unwrap(render)).name == render.job_type
    assert not inspect.iscoroutinefunction(render)
    with in_job():
        assert render("t") == "j t 10"


def test_an_async_function_stays_one(registry: Registry) -> None:
    @background_job("t.later")
    async def later(value: int, progress_callback: Any) -> int:
        progress_callback(0.5)
        return value + 1

    assert inspect.iscoroutinefunction(later)
    assert registry.need("t.later").is_async
    line = Paper()

    async def call() -> int:
        with in_job(line):
            return await later(value=1)  # type: ignore[call-arg]

    assert asyncio.run(call()) == 2
    assert [each.percent for each in line.said] == [50]


def test_progress_that_is_not_tracked_is_not_told() -> None:
    line = Paper()
    job = JobContext(job_id="j", job_type="t.t", attempt=1, line=line, track_progress=False)
    job.progress(50, "half")
    with pytest.raises(ValueError, match="percentage"):
        job.progress(101)
    assert line.said == []


def test_a_notebooks_function_has_a_name_of_its_own() -> None:
    def work() -> None: ...

    work.__module__ = "__main__"
    assert background_job()(work).job_type == "main.work"


def test_arguments_are_bound_like_a_call() -> None:
    def many(job: JobContext, a: int, *rest: int, b: int = 1, **others: Any) -> None: ...

    job_type = JobType("t.many", many)
    assert bound(job_type, (1,), {"b": 2, "c": 3}) == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(TypeError, match="'a'"):
        bound(job_type, (), {})
    with pytest.raises(TypeError, match="by name"):
        bound(job_type, (1, 2), {})


def test_a_function_is_registered_without_decorating_it(registry: Registry) -> None:
    def plain(a: int) -> int:
        return a

    register_job_function("t.plain", plain)
    assert registry.need("t.plain").function is plain
    with pytest.raises(JobTypeNotFound, match="decorate"):
        registry.type_of(in_job)


# Keys


def test_a_key_names_parameters_and_their_defaults() -> None:
    def sync(account: str, year: int = 2026) -> None: ...

    job_type = JobType("t.sync", sync, unique_key="sync-{account}-{year}")
    assert job_type.fill_in("sync-{account}-{year}", {"account": "a"}) == "sync-a-2026"
    with pytest.raises(InvalidParameters) as refused:
        job_type.fill_in("sync-{account}", {})
    assert refused.value.errors[0].pointer == "/parameters/account"
    assert job_type.fill_in("{account}", {"account": "a" * 200}) == "a" * 200
    with pytest.raises(InvalidParameters, match="201 characters"):
        job_type.fill_in("{account}", {"account": "a" * 201})


def test_a_key_of_a_parameter_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no parameter is 'accout'"):

        @background_job(unique_key="{accout}")
        def sync(account: str) -> None: ...

    @background_job(unique_key="{anything}")
    def open_to_all(**anything: Any) -> None: ...


# Under, and on top of, another library's decorator


def test_on_top_of_a_shared_task(registry: Registry) -> None:
    @background_job("t.send")
    @shared_task
    def send(to: str, copies: int = 1) -> str:
        """Send it."""
        return f"{to} x {copies}"

    assert list(inspect.signature(send).parameters) == ["to", "copies"]
    assert registry.need("t.send").arguments('{"to":"a"}') == {"to": "a", "copies": 1}
    assert registry.need("t.send").function(to="a") == "a x 1"
    with in_job():
        assert send("a", copies=2) == "a x 2"


def test_below_a_shared_task(registry: Registry) -> None:
    @shared_task
    @background_job("t.send")
    async def send(to: str) -> str:
        return to

    assert send.apply_async() == "celery's own"
    assert registry.type_of(send).name == "t.send"
    assert registry.need("t.send").is_async

    async def call() -> Any:
        with in_job():
            return await send("a")

    assert asyncio.run(call()) == "a"


def test_every_decorator_stands_below_and_above_a_shared_task() -> None:
    for decorate in (
        retry_on_failure(max_retries=1, retry_delay_seconds=0),
        scheduled_job(cron="* * * * *", name="a"),
        job_chain(name="c"),
    ):

        def steps() -> list[dict[str, Any]]:
            return [{"job_type": "t.t"}]

        above = decorate(shared_task(steps))
        assert inspect.unwrap(above) is steps
        assert inspect.unwrap(shared_task(decorate(steps))) is steps


# Schedules


def test_a_scheduled_function_is_a_job_type_with_a_schedule(registry: Registry) -> None:
    @scheduled_job(cron="0 2 * * *", timezone="Europe/Berlin", priority="high", max_retries=1)
    async def nightly() -> None:
        """Invoices of the day."""

    @scheduled_job(interval_seconds=3600, name="Hourly", overlap="allow", max_concurrent_runs=2)
    @background_job("t.hourly", queue="slow")
    def hourly() -> None: ...

    assert registry.need("test_decorators.nightly").priority == "high"
    night, hour = registry.schedules["test_decorators.nightly"], registry.schedules["Hourly"]
    assert (night.cron, night.timezone, night.description) == (
        "0 2 * * *",
        "Europe/Berlin",
        "Invoices of the day.",
    )
    assert (hour.job_type, hour.interval_seconds, hour.overlap) == ("t.hourly", 3600, "allow")
    assert registry.need("t.hourly").queue == "slow"
    assert callable(nightly.delay)


@pytest.mark.parametrize("both", [{}, {"cron": "* * * * *", "interval_seconds": 60}])
def test_a_schedule_needs_cron_or_interval_when_the_module_is_imported(both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either cron or interval_seconds"):
        scheduled_job(**both)


def test_what_is_no_cron_expression_is_refused_when_the_module_is_imported() -> None:
    for wrong in ({"cron": "61 * * * *"}, {"cron": "0 9 * * *", "timezone": "Europe/Berlun"}):
        with pytest.raises(ValueError, match=r"61|Berlun"):
            scheduled_job(**wrong)  # type: ignore[arg-type]


def test_one_name_is_one_schedule() -> None:
    scheduled_job(cron="* * * * *", name="a")(steps_of_nothing)
    scheduled_job(cron="0 * * * *", name="a")(steps_of_nothing)  # its module was imported again
    with pytest.raises(ValueError, match="declared twice"):

        @scheduled_job(cron="* * * * *", name="a")
        def other() -> None: ...


def steps_of_nothing() -> None: ...


# Trying again


class Flaky:
    """Fails so often, then returns what it was given."""

    def __init__(self, times: int, error: type[BaseException] | BaseException = ConnectionError) -> None:
        self.times = times
        self.calls = 0
        self._error = error

    def __call__(self, value: int) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self._error
        return value


def tries(flaky: Flaky, **how: Any) -> Callable[[int], int]:
    @retry_on_failure(**({"retry_delay_seconds": 0} | how))
    @functools.wraps(flaky.__call__)
    def call(value: int) -> int:
        return flaky(value)

    return call


def test_a_call_is_made_again_until_it_works() -> None:
    flaky = Flaky(3)
    assert tries(flaky, max_retries=3)(7) == 7
    assert flaky.calls == 4


def test_the_last_failure_is_raised() -> None:
    flaky = Flaky(9)
    with pytest.raises(ConnectionError):
        tries(flaky, max_retries=3)(7)
    assert flaky.calls == 4
    none = Flaky(9)
    with pytest.raises(ConnectionError):
        tries(none, max_retries=0)(7)
    assert none.calls == 1


@pytest.mark.parametrize("error", [PermanentError("no"), Retry(1), Snooze(1), KeyError("k"), JobCancelled()])
def test_what_is_not_to_be_tried_again_passes(error: BaseException) -> None:
    flaky = Flaky(9, error)
    kinds = (ConnectionError,) if isinstance(error, KeyError) else (Exception,)
    with pytest.raises(type(error)):
        tries(flaky, retry_on=kinds)(7)
    assert flaky.calls == 1


def test_an_async_call_is_made_again() -> None:
    flaky = Flaky(2)

    @retry_on_failure(max_retries=2, retry_delay_seconds=0)
    async def call(value: int) -> int:
        return flaky(value)

    assert asyncio.run(call(7)) == 7
    assert inspect.iscoroutinefunction(call)


def test_waiting_ends_when_the_job_is_cancelled() -> None:
    line = Paper()
    line.stop = True
    flaky = Flaky(9)
    with in_job(line), pytest.raises(JobCancelled):
        tries(flaky, retry_delay_seconds=3600)(7)
    assert flaky.calls == 1
