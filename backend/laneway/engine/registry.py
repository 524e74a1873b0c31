"""Job types: a name from a request, the function it stands for, and what may be passed to it.

A request names a type; only what was registered in this process can be found. Modules register their
types when they are imported (`LANEWAY_TASKS`, or the entry-point group `laneway.tasks`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from string import Formatter
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from laneway.domain.retry import Exceptions
from laneway.domain.spec import DEFAULT_QUEUE, JOB_TYPE_PATTERN, MAX_CONCURRENCY, Priority
from laneway.errors import FieldError, InvalidParameters, JobTypeNotFound

INJECTED = ("job", "progress_callback")
"""Parameters a function may declare to be handed them; they are no parameters of the job."""

SHIPPED = ("laneway.handlers.demo", "laneway.handlers.http_request")

MAX_KEY = 200


class Isolation(StrEnum):
    """Which process of a worker runs a job."""

    CHILD = "child"  # one of its children, which has run other jobs and will run more
    FORK = "fork"  # one forked for this job, which ends with it


@dataclass(frozen=True)
class JobType:
    """One registered function, with the defaults of the jobs that run it."""

    name: str
    function: Callable[..., Any]
    queue: str = DEFAULT_QUEUE
    priority: Priority = Priority.NORMAL
    max_retries: int = 3
    retry_delay_seconds: float = 120.0
    retry_backoff: float = 2.0
    retry_jitter: bool = True
    timeout_seconds: int | None = None
    retry_on: Exceptions = ()
    no_retry_on: Exceptions = ()
    tags: tuple[str, ...] = ()
    unique_key: str | None = None
    """May name parameters in braces: `invoice-{number}`."""
    concurrency_key: str | None = None  # likewise
    concurrency_limit: int | None = None
    track_progress: bool = True
    isolation: Isolation = Isolation.CHILD

    DEFAULTED: ClassVar[tuple[str, ...]] = (
        "queue",
        "priority",
        "max_retries",
        "retry_delay_seconds",
        "retry_backoff",
        "retry_jitter",
        "timeout_seconds",
        "tags",
        "unique_key",
        "concurrency_key",
        "concurrency_limit",
    )

    def differs(self, default: str) -> bool:
        """Whether this type sets that default otherwise than a job would on its own."""
        return bool(getattr(self, default) != _OWN_DEFAULTS[default])

    @cached_property
    def own_defaults(self) -> dict[str, Any]:
        """What a job of this type has where its request says nothing, and other jobs have not."""
        return {name: getattr(self, name) for name in self.DEFAULTED if self.differs(name)}

    def fill_in(self, template: str, parameters: Mapping[str, Any]) -> str:
        """A key with its names in braces replaced by parameters. Raises InvalidParameters."""
        try:
            key = template.format_map({**self._parameter_defaults, **parameters})
        except KeyError as missing:
            detail = f"needed for the key {template!r}"
            error = FieldError(f"/parameters/{missing.args[0]}", detail, "missing")
            raise InvalidParameters(f"{self.name}: {error.pointer}: {detail}", errors=(error,)) from None
        if not 1 <= len(key) <= MAX_KEY:
            detail = f"the key {template!r} comes to {len(key)} characters; 1 to {MAX_KEY} are taken"
            raise InvalidParameters(
                f"{self.name}: {detail}", errors=(FieldError("/parameters", detail, "key_length"),)
            )
        return key

    @cached_property
    def _parameter_defaults(self) -> dict[str, Any]:
        known = inspect.signature(self.function).parameters.values()
        return {each.name: each.default for each in known if each.default is not each.empty}

    @cached_property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(inspect.unwrap(self.function))

    @cached_property
    def injected(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.function).parameters
        return tuple(name for name in INJECTED if name in parameters)

    @cached_property
    def model(self) -> type[BaseModel]:
        """The function's parameters as a pydantic model: its JSON Schema, and its check of a call.

        Its fields have the parameters' names as aliases only: `json` or `_x` would be the model's own.
        """
        signature = inspect.signature(self.function)
        hints = get_type_hints(inspect.unwrap(self.function), include_extras=True)
        wanted: dict[str, Any] = {}
        extra: Any = "forbid"
        for name, parameter in signature.parameters.items():
            if name in INJECTED or parameter.kind is parameter.VAR_POSITIONAL:
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                extra = "allow"
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            wanted[f"p_{name}"] = (Annotated[hints.get(name, Any), Field(alias=name)], default)
        config = ConfigDict(extra=extra, arbitrary_types_allowed=True, protected_namespaces=())
        return create_model(f"{self.name} parameters", __config__=config, **wanted)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema (2020-12) of the parameters."""
        return self.model.model_json_schema()

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise InvalidParameters, with a pointer per wrong field, unless the function can be called so."""
        try:
            self.model.model_validate(parameters)
        except ValidationError as error:
            raise _invalid(self.name, error) from None

    def arguments(self, parameters: str) -> dict[str, Any]:
        """The keyword arguments for the function, from the stored JSON text. Raises InvalidParameters."""
        try:
            bound = self.model.model_validate_json(parameters)
        except ValidationError as error:
            raise _invalid(self.name, error) from None
        named = {field.alias or "": getattr(bound, name) for name, field in self.model.model_fields.items()}
        return named | (bound.model_extra or {})


_OWN_DEFAULTS = {field.name: field.default for field in fields(JobType) if field.default is not MISSING}


def _invalid(name: str, error: ValidationError) -> InvalidParameters:
    errors = tuple(
        FieldError("/".join(("/parameters", *map(str, item["loc"]))), item["msg"], item["type"])
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    )
    return InvalidParameters(f"{name}: {errors[0].pointer}: {errors[0].detail}", errors=errors)


class Registry:
    """The job types this process knows."""

    def __init__(self) -> None:
        self._types: dict[str, JobType] = {}
        self.schedules: dict[str, DeclaredSchedule] = {}

    def __iter__(self) -> Iterator[JobType]:
        return iter(sorted(self._types.values(), key=lambda known: known.name))

    def __contains__(self, name: object) -> bool:
        return name in self._types

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._types))

    @property
    def forked(self) -> tuple[str, ...]:
        """The names of those whose jobs get a process each."""
        return tuple(known.name for known in self if known.isolation == Isolation.FORK)

    def add(self, job_type: JobType) -> None:
        """Register a type.

        Raises ValueError for a bad name, for one that another function has, for a function that cannot be
        called with keywords alone, and where `retry_on` or `no_retry_on` is no tuple of exception types.
        """
        if not re.fullmatch(JOB_TYPE_PATTERN, job_type.name) or len(job_type.name) > 100:
            raise ValueError(f"{job_type.name!r} is not a job type name like 'reports.render'")
        parameters = inspect.signature(job_type.function).parameters
        for name, parameter in parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ValueError(f"job type {job_type.name!r}: {name!r} cannot be passed by name")
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            _check_keys(job_type, parameters)
        if job_type.concurrency_limit is not None:
            _check_limit(job_type)
        for option in ("retry_on", "no_retry_on"):
            kinds = getattr(job_type, option)
            if not isinstance(kinds, tuple) or not all(_is_exception(kind) for kind in kinds):
                raise ValueError(f"job type {job_type.name!r}: {option} must be a tuple of exception types")
        known = self._types.get(job_type.name)
        if known is not None and _origin(known.function) != _origin(job_type.function):
            raise ValueError(
                f"job type {job_type.name!r} is registered twice: "
                f"by {_origin(known.function)} and {_origin(job_type.function)}"
            )
        self._types[job_type.name] = job_type

    def declare(self, schedule: DeclaredSchedule) -> None:
        """Keep a schedule for the scheduler. Raises ValueError where another job type has its name."""
        known = self.schedules.get(schedule.name)
        if known is not None and known.job_type != schedule.job_type:
            raise ValueError(
                f"schedule {schedule.name!r} is declared twice: for {known.job_type} and {schedule.job_type}"
            )
        self.schedules[schedule.name] = schedule

    def type_of(self, function: Callable[..., Any]) -> JobType:
        """The type whose function this is, decorated or not. Raises JobTypeNotFound."""
        origin = _origin(function)
        for known in self._types.values():
            if _origin(known.function) == origin:
                return known
        raise JobTypeNotFound(f"{origin} is no job type: decorate it with @background_job")

    def get(self, name: str) -> JobType | None:
        return self._types.get(name)

    def need(self, name: str) -> JobType:
        """The type, or JobTypeNotFound."""
        known = self._types.get(name)
        if known is None:
            raise JobTypeNotFound(f"there is no job type {name!r}", job_type=name)
        return known


def _check_keys(job_type: JobType, parameters: Container[str]) -> None:
    for name in ("unique_key", "concurrency_key"):
        for _, field, _, _ in Formatter().parse(getattr(job_type, name) or ""):
            if field is not None and re.split(r"[.[]", field)[0] not in parameters:
                raise ValueError(f"job type {job_type.name!r}: {name}: no parameter is {field!r}")


def _check_limit(job_type: JobType) -> None:
    if job_type.concurrency_key is None:
        raise ValueError(f"job type {job_type.name!r}: concurrency_limit needs a concurrency_key")
    if not 1 <= (job_type.concurrency_limit or 0) <= MAX_CONCURRENCY:
        raise ValueError(f"job type {job_type.name!r}: concurrency_limit is 1 to {MAX_CONCURRENCY:,}")


def _is_exception(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


def _origin(function: Callable[..., Any]) -> str:
    function = inspect.unwrap(function)
    return f"{function.__module__}.{function.__qualname__}"


@dataclass(frozen=True, slots=True)
class DeclaredSchedule:
    """A schedule that stands in the code: made, or brought up to date by its name, when a scheduler starts.

    Exactly one of `cron` and `interval_seconds` is given.
    """

    name: str
    job_type: str
    cron: str | None
    interval_seconds: int | None
    timezone: str
    description: str | None
    max_concurrent_runs: int
    overlap: str
    misfire: str
    priority: str | None  # None: the job type's
    max_retries: int | None


registry = Registry()


def default_name(function: Callable[..., Any]) -> str:
    """What a function is called as a job type when nobody says otherwise: `module.function`."""
    module = function.__module__.rpartition(".")[2].strip("_")  # a notebook's is `__main__`
    return f"{module}.{function.__name__}".lower()


def register_job_function(name: str, function: Callable[..., Any], *, isolation: str = "child") -> None:
    """Make a function a job type, without decorating it: `background_job` does that, and takes defaults.

    With `isolation` "fork" each of its jobs gets a process of its own. Raises ValueError for a bad name, for
    one that another function has, and for any other isolation than "child" and "fork".
    """
    registry.add(JobType(name, function, isolation=Isolation(isolation)))


def load(modules: Iterable[str]) -> Registry:
    """The registry, once what ships, `modules` and every `laneway.tasks` entry point are imported.

    Raises what the import of a broken module raises.
    """
    for module in (*SHIPPED, *modules):
        import_module(module)
    for point in entry_points(group="laneway.tasks"):
        point.load()
    return registry
