"""The HTTP API as values: what to send, how to read the answer, and when to send it again.

Nothing here does I/O. `client.py` carries the calls out, blocking or awaited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from random import Random
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter

from laneway import errors
from laneway.clock import new_id
from laneway.sdk.answers import (
    JobEvent,
)

BASE = "/api/v1"
LONGEST_WAIT_SECONDS = 30  # the API's own for `Prefer: wait`
LONGEST_RETRY_AFTER_SECONDS = 60  # one who is told to wait longer is told so
BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
PAGE = 200  # entries, the most the API gives at once

T = TypeVar("T")
Json = Any


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. `again` says whether it may be sent twice: the second time does nothing new."""

    method: str
    path: str
    read: Callable[[Json], T]
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Json = None
    headers: Mapping[str, str] = field(default_factory=dict)
    again: bool = True
    also_good: tuple[int, ...] = ()  # statuses that are answers here, and problems elsewhere

    @property
    def url(self) -> str:
        return BASE + self.path

    @property
    def how(self) -> dict[str, Any]:
        """What goes along: the arguments of an httpx client's `request`."""
        body = {} if self.body is None else {"json": self.body}
        return {"params": self.query, "headers": self.headers, **body}

    def answer(self, response: httpx.Response) -> T:
        """What the response says. Raises the LanewayError that its problem is."""
        content = _json_of(response)
        if response.is_success or (response.status_code in self.also_good and not _is_problem(content)):
            return self.read(content)
        raise error_of(response, content)


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A list that comes in pages."""

    path: str
    read: Callable[[Json], T]
    query: Mapping[str, Any]

    def page(self, cursor: str | None) -> Call[tuple[list[T], str | None]]:
        """The page at a cursor, and the cursor of the next one."""
        query = {**self.query, "limit": PAGE, "cursor": cursor}
        return Call("GET", self.path, self._page, query=said(query))

    def _page(self, content: Json) -> tuple[list[T], str | None]:
        return [self.read(entry) for entry in content["data"]], content.get("next_cursor")


class Tries:
    """The tries of one call: after each, how long to wait for the next, or that there is none."""

    def __init__(self, call: Call[Any], *, retries: int, rng: Random) -> None:
        self._call = call
        self._left = retries
        self._rng = rng
        self._pause = BACKOFF_SECONDS

    def after(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds to wait before the same again; None: take the outcome as it is."""
        if not self._left or not self._is_worth_it(outcome):
            return None
        self._left -= 1
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_BACKOFF_SECONDS)
        pause *= 0.5 + self._rng.random() / 2
        asked = _retry_after(outcome) if isinstance(outcome, httpx.Response) else None
        if asked is None:
            return pause
        return max(asked, pause) if asked <= LONGEST_RETRY_AFTER_SECONDS else None

    def _is_worth_it(self, outcome: httpx.Response | httpx.TransportError) -> bool:
        if isinstance(outcome, httpx.Response):
            status = outcome.status_code
            if status == 429:  # nothing was done; without a time to come back it would never be
                return "retry-after" in outcome.headers
            if status == 409:
                content = _json_of(outcome)
                return _is_problem(content) and content["code"] == errors.IdempotencyInProgress.code
            if status in self._call.also_good:
                return self._call.again and _is_problem(_json_of(outcome))
            return status in (502, 503, 504) and self._call.again
        return self._call.again or isinstance(outcome, (httpx.ConnectError, httpx.ConnectTimeout))


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() else None


def error_of(response: httpx.Response, content: Json = None) -> errors.LanewayError:
    """A problem+json answer as the error that it was; its facts also hold `status`, `code`, `request_id`."""
    status = response.status_code
    if not _is_problem(content):
        return errors.Unavailable(
            f"{response.url.host} answers {status}, and not as Laneway does; check the base URL",
            status=status,
        )
    found = content.get("errors") or []
    text = "; ".join(f"{each['pointer'] or 'the body'}: {each['detail']}" for each in found)
    after = _retry_after(response)
    kind = _kinds().get(content["code"]) or _BY_STATUS.get(status, errors.LanewayError)
    return kind(
        text or str(content.get("detail")),
        errors=tuple(errors.FieldError(e["pointer"], e["detail"], e["code"]) for e in found),
        retry_after_seconds=None if after is None else int(after),
        **{
            **(content.get("facts") or {}),
            "status": status,
            "code": content["code"],
            "request_id": content.get("request_id"),
        },
    )


def problem_of(response: httpx.Response) -> errors.LanewayError:
    """A response that is no success, as the error that it was."""
    return error_of(response, _json_of(response))


def unreachable(base_url: str, error: httpx.HTTPError) -> errors.Unavailable:
    """What a failure of the network means to the caller."""
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return errors.Unavailable(f"cannot reach {base_url}: is the API running there?")
    return errors.Unavailable(f"{base_url} did not answer ({type(error).__name__})")


_BY_STATUS: dict[int, type[errors.LanewayError]] = {
    400: errors.BadRequest,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.PreconditionFailed,
    413: errors.PayloadTooLarge,
    422: errors.Unprocessable,
    429: errors.RateLimited,
    503: errors.Unavailable,
}


@cache
def _kinds() -> dict[str, type[errors.LanewayError]]:
    kinds = [errors.LanewayError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.code: kind for kind in kinds if kind.__module__ == errors.__name__}


def _json_of(response: httpx.Response) -> Json:
    try:
        return response.json() if response.content else None
    except ValueError:
        return None


def _is_problem(content: Json) -> bool:
    return isinstance(content, dict) and "code" in content and "status" in content


class EventReader:
    """Reads an SSE stream (WHATWG HTML, 9.2.6) line by line, as far as the API uses it."""

    def __init__(self) -> None:
        self._id = self._name = ""
        self._data: list[str] = []

    def feed(self, line: str) -> JobEvent | None:
        """The event that the line ends, if it ends one."""
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            self._id = value
        elif name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)
        elif not line and self._data:
            text, self._data = "\n".join(self._data), []
            return JobEvent(id=self._id, name=self._name, data=json.loads(text))
        return None


def events_path(job_id: str) -> str:
    return f"{BASE}{at('jobs', job_id)}/events"


def work(
    path: str,
    read: Callable[[Json], T],
    body: Mapping[str, Any] | None,
    idempotency_key: str | None,
    *,
    headers: Mapping[str, str] | None = None,
) -> Call[T]:
    """A POST that makes work: with its key it may be sent again."""
    sent = {"Idempotency-Key": idempotency_key or new_id(), **(headers or {})}
    return Call("POST", path, read, body=None if body is None else plain(body), headers=sent)


@cache
def as_value(kind: type[T]) -> Callable[[Json], T]:
    """Reads an answer as one of the values of `answers.py`."""
    if kind not in _READERS:
        _READERS[kind] = TypeAdapter(kind).validate_python
    return _READERS[kind]


_READERS: dict[type[Any], Callable[[Json], Any]] = {}


def nothing(_: Json) -> None:
    """Reads an answer that says nothing."""


def at(noun: str, name: str) -> str:
    """The path of one of many, whatever stands in its name."""
    return f"/{noun}/{quote(name, safe='')}"


def said(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not None, as JSON and queries know them."""
    return {name: plain(value) for name, value in values.items() if value is not None}


def plain(value: Any) -> Any:
    """The value as JSON and queries know it."""
    match value:
        case datetime():
            if value.tzinfo is None:
                raise ValueError("a moment needs a time zone")
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case Enum():
            return value.value
        case Mapping():
            return {name: plain(item) for name, item in value.items()}
        case str() | bytes():
            return value
        case Iterable():
            return [plain(item) for item in value]
        case _:
            return value
