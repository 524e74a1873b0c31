"""From a function's signature to what may be passed to it."""

from __future__ import annotations

import inspect
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from laneway.domain.spec import JobSpec, Priority
from laneway.engine import registry as registry_module
from laneway.engine.context import JobContext
from laneway.engine.registry import JobType, Registry, load
from laneway.errors import InvalidParameters, JobTypeNotFound
from laneway.sdk.decorators import background_job


class Page(BaseModel):
    number: int


def report(
    job: JobContext,
    title: str,
    pages: list[Page],
    depth: Annotated[int, Field(ge=1, le=9)] = 3,
    style: Literal["plain", "rich"] = "plain",
    due: datetime | None = None,
) -> str:
    """A handler with a bit of everything."""
    return title


def anything(progress_callback: Any, **rest: Any) -> None: ...


def untyped(a, b=2): ...  # type: ignore[no-untyped-def]


def awkward(copy: bool, schema: str, json: int, _private: int = 1, model_config: str = "") -> None:
    """Names that a pydantic model uses itself."""


def leading(a: int, /, b: int) -> None: ...


def many(*items: int, flag: bool = False) -> None: ...


async def later(seconds: float) -> None: ...


REPORT = JobType("demo.report", report)


def refused(job_type: JobType, parameters: dict[str, Any]) -> list[tuple[str, str]]:
    """(pointer, code) of each wrong field."""
    with pytest.raises(InvalidParameters) as caught:
        job_type.check(parameters)
    return [(error.pointer, error.code) for error in caught.value.errors]


def test_the_schema_is_the_signature_without_what_is_injected() -> None:
    schema = REPORT.schema
    assert list(schema["properties"]) == ["title", "pages", "depth", "style", "due"]
    assert schema["required"] == ["title", "pages"]
    assert schema["properties"]["depth"] | {"title": ""} == {
        "default": 3,
        "maximum": 9,
        "minimum": 1,
        "title": "",
        "type": "integer",
    }
    assert schema["additionalProperties"] is False
    assert REPORT.injected == ("job",)


def test_arguments_come_typed_and_with_their_defaults() -> None:
    text = '{"title":"t","pages":[{"number":1}],"due":"2026-01-01T12:00:00Z"}'
    arguments = REPORT.arguments(text)
    assert arguments["pages"] == [Page(number=1)]
    assert arguments["due"].year == 2026
    assert (arguments["depth"], arguments["style"]) == (3, "plain")
    assert report(None, **arguments) == "t"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "errors"),
    [
        ({}, [("/parameters/title", "missing"), ("/parameters/pages", "missing")]),
        ({"title": 1, "pages": []}, [("/parameters/title", "string_type")]),
        (
            {"title": "t", "pages": [{"number": 1}, {"number": "x"}]},
            [("/parameters/pages/1/number", "int_parsing")],
        ),
        ({"title": "t", "pages": [], "depth": 10}, [("/parameters/depth", "less_than_equal")]),
        ({"title": "t", "pages": [], "nobody": 1}, [("/parameters/nobody", "extra_forbidden")]),
        ({"title": "t", "pages": [], "job": {}}, [("/parameters/job", "extra_forbidden")]),
    ],
)
def test_each_wrong_field_is_pointed_at(parameters: dict[str, Any], errors: list[tuple[str, str]]) -> None:
    assert refused(REPORT, parameters) == errors


def test_the_value_of_a_wrong_field_is_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidParameters) as caught:
        REPORT.check({"title": ["my secret"], "pages": []})
    assert "my secret" not in f"{caught.value}{caught.value.errors}{caught.value.facts}"


def test_stored_parameters_that_no_longer_fit_are_refused() -> None:
    with pytest.raises(InvalidParameters):
        REPORT.arguments('{"title":"t"}')
    with pytest.raises(InvalidParameters):
        REPORT.arguments("[1]")


def test_open_keywords_take_anything_but_what_is_injected() -> None:
    job_type = JobType("demo.anything", anything)
    assert job_type.injected == ("progress_callback",)
    assert job_type.arguments('{"a":1,"b":{"c":[null]}}') == {"a": 1, "b": {"c": [None]}}
    assert job_type.schema["additionalProperties"] is True


def test_a_function_without_types_takes_any_value_for_its_names() -> None:
    job_type = JobType("demo.untyped", untyped)
    assert job_type.arguments('{"a":[1]}') == {"a": [1], "b": 2}
    assert refused(job_type, {"b": 1}) == [("/parameters/a", "missing")]


def test_names_that_a_model_uses_itself_are_parameters_like_others() -> None:
    job_type = JobType("demo.awkward", awkward)
    assert list(job_type.schema["properties"]) == ["copy", "schema", "json", "_private", "model_config"]
    assert job_type.arguments('{"copy":true,"schema":"s","json":1}') == {
        "copy": True,
        "schema": "s",
        "json": 1,
        "_private": 1,
        "model_config": "",
    }
    assert refused(job_type, {"copy": True, "schema": "s", "json": "x"}) == [
        ("/parameters/json", "int_parsing")
    ]


def test_a_default_that_is_a_pydantic_field_keeps_its_limits() -> None:
    def bounded(n: int = Field(3, ge=1)) -> None: ...

    job_type = JobType("demo.bounded", bounded)
    assert job_type.arguments("{}") == {"n": 3}
    assert refused(job_type, {"n": 0}) == [("/parameters/n", "greater_than_equal")]


def test_star_arguments_cannot_be_passed_and_are_left_out() -> None:
    assert list(JobType("demo.many", many).schema["properties"]) == ["flag"]


def test_a_positional_only_parameter_is_refused_when_the_function_is_registered() -> None:
    with pytest.raises(ValueError, match=r"'a'.*by name"):
        Registry().add(JobType("demo.leading", leading))


def test_async_functions_are_known_as_such() -> None:
    assert JobType("demo.later", later).is_async
    assert not REPORT.is_async


# The registry


@pytest.mark.parametrize("kinds", [ValueError, [ValueError], ("ValueError",), (ValueError(),), (int,)])
@pytest.mark.parametrize("option", ["retry_on", "no_retry_on"])
def test_lists_of_exceptions_that_are_none_are_refused_at_once(option: str, kinds: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a tuple of exception types"):
        Registry().add(JobType("demo.report", report, **{option: kinds}))


def test_the_decorator_keeps_its_lists_of_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "registry", Registry())
    background_job("demo.report", retry_on=(OSError,), no_retry_on=(FileNotFoundError,))(report)
    known = registry_module.registry.need("demo.report")
    assert (known.retry_on, known.no_retry_on) == ((OSError,), (FileNotFoundError,))


@pytest.mark.parametrize(
    "name", ["", "A", "demo.", ".demo", "demo report", "demo\n", "a" * 101, "0demo", "démo"]
)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a job type name"):
        Registry().add(JobType(name, report))


@pytest.mark.parametrize("name", ["a", "a" * 100, "demo.report", "a.b.c", "a_1.0"])
def test_a_good_name_is_taken_and_one_that_a_request_may_say(name: str) -> None:
    registry = Registry()
    registry.add(JobType(name, report))
    assert registry.need(name).function is report
    assert JobSpec(job_type=name).job_type == name


def test_one_name_is_one_function() -> None:
    registry = Registry()
    registry.add(REPORT)
    registry.add(JobType("demo.report", report, max_retries=7))  # its module was imported again
    assert registry.need("demo.report").max_retries == 7
    with pytest.raises(ValueError, match=r"registered twice.*report.*anything"):
        registry.add(JobType("demo.report", anything))


def test_what_is_registered_is_listed_by_name() -> None:
    registry = Registry()
    for name in ("b.b", "a.a"):
        registry.add(JobType(name, report))
    assert registry.names == tuple(job_type.name for job_type in registry) == ("a.a", "b.b")
    assert "a.a" in registry
    assert registry.get("c.c") is None
    with pytest.raises(JobTypeNotFound):
        registry.need("c.c")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of the test's own in the place of the process's."""
    registry_module.load(())  # the shipped modules register once a process: in the process's own
    fresh = Registry()
    monkeypatch.setattr(registry_module, "registry", fresh)
    return fresh


def test_a_decorated_function_keeps_its_signature_and_is_a_job_type(registry: Registry) -> None:
    @background_job(
        queue="mail", priority="high", max_retries=1, exponential_backoff=False, timeout_seconds=5
    )
    def SendMail(to: str) -> str:  # noqa: N802 - names are lowered
        return to

    assert list(inspect.signature(SendMail).parameters) == ["to"]
    assert SendMail.job_type == "test_registry.sendmail"
    [job_type] = registry
    assert job_type == JobType(
        "test_registry.sendmail",
        inspect.unwrap(SendMail),
        queue="mail",
        priority=Priority.HIGH,
        max_retries=1,
        retry_backoff=1.0,
        timeout_seconds=5,
    )


def test_a_type_differs_where_it_sets_a_default_otherwise() -> None:
    job_type = JobType("a.a", report, max_retries=0)
    assert [name for name in JobType.DEFAULTED if job_type.differs(name)] == ["max_retries"]


def test_a_types_own_defaults_are_those_of_a_request() -> None:
    plain, spec = JobType("a.a", report), JobSpec(job_type="a.a")
    for name in JobType.DEFAULTED:
        assert getattr(plain, name) == getattr(spec, name), name


def test_an_unknown_priority_is_refused_when_the_module_is_imported() -> None:
    with pytest.raises(ValueError, match="urgent"):
        background_job(priority="urgent")(report)


def test_modules_are_loaded_with_what_ships(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "from laneway import background_job\n@background_job('extra.one')\ndef one() -> None: ...\n"
    (tmp_path / "extra_tasks.py").write_text(source)
    for module in ("extra_tasks", *registry_module.SHIPPED):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert "extra.one" in load(["extra_tasks"])
    assert "demo.echo" in registry


def test_a_broken_module_says_what_is_wrong_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_tasks.py").write_text("raise RuntimeError('no licence')\n")
    with pytest.raises(RuntimeError, match="no licence"):
        load(["broken_tasks"])
    with pytest.raises(ModuleNotFoundError, match="missing_tasks"):
        load(["missing_tasks"])
