"""HTTP jobs: a URL that is called in place of a handler, and what its answers mean. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from http import HTTPStatus
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from laneway.domain.headers import HOP_HEADERS, MAX_HEADERS, check_headers

HTTP_REQUEST = "http.request"
"""The job type of every HTTP job."""

REMOTE_WORKER = "00000000-0000-0000-0000-000000000001"
"""Stands in `jobs.worker_id` while the work goes on at the target: no row of `workers` has this id."""

WAITS_FOR_REPORT = "waits_for_report"
"""The `status_reason` of such a job."""

MASK = "***"
MAX_SUCCESS = 20
MAX_CALL_SECONDS = 300.0
MAX_URL = 2048

_SUCCESS = re.compile(r"[2-5](xx|[0-9]{2}(-[2-5][0-9]{2})?)")
_WITHOUT_BODY = ("GET", "HEAD")
_KEPT_FROM_CALLERS = ("private", "sender")
_TRANSIENT = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


def _headers(value: dict[str, str]) -> dict[str, str]:
    check_headers(value, reserved=HOP_HEADERS, prefixes=("webhook-", "laneway-"))
    return value


def _success(value: int | str) -> int | str:
    """A status from 200 to 599, as a number; a class or a range of them as text."""
    text = str(value)
    if not _SUCCESS.fullmatch(text):
        raise ValueError("a success is a status from 200 to 599, 2xx, or a range like 200-204")
    return int(text) if text.isdigit() else text


class HttpTarget(BaseModel):
    """A URL to be called in place of a handler. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL)] = Field(
        description="Judged like a `webhook_url`.", examples=["https://api.example.com/invoices"]
    )
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    headers: Annotated[dict[str, str], Field(max_length=MAX_HEADERS), AfterValidator(_headers)] = Field(
        default_factory=dict, repr=False, description="Kept encrypted, and never shown again."
    )
    body: Any = Field(None, description="Text is sent as it is, anything else as JSON, null not at all.")
    success: Annotated[
        tuple[Annotated[int | str, AfterValidator(_success)], ...],
        Field(min_length=1, max_length=MAX_SUCCESS),
    ] = Field(
        ("2xx",),
        description="The statuses that complete the job: `204`, `2xx`, `200-299`. 202 does so only where it "
        "is named by its number; else the job waits for a report.",
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=MAX_CALL_SECONDS, allow_inf_nan=False)] = Field(
        30.0, description="Of the call. That of the job includes what the target does after a 202."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.body is not None and self.method in _WITHOUT_BODY:
            raise ValueError(f"a {self.method} has no body")
        return self


class Meaning(Enum):
    """What the status of an answer means for the attempt."""

    DONE = auto()
    GOES_ON = auto()  # the target reports later
    AGAIN = auto()
    NEVER = auto()  # no further attempt would help


def meaning(status: int, success: tuple[int | str, ...]) -> Meaning:
    """What an answer of this status means where `success` completes the job."""
    if status == HTTPStatus.ACCEPTED:
        return Meaning.DONE if status in success else Meaning.GOES_ON
    if any(_covers(each, status) for each in success):
        return Meaning.DONE
    return Meaning.AGAIN if status >= 500 or status in _TRANSIENT else Meaning.NEVER


def _covers(wanted: int | str, status: int) -> bool:
    if isinstance(wanted, int):
        return status == wanted
    first, _, last = wanted.replace("xx", "00").partition("-")
    return int(first) <= status <= (int(last) if last else int(first) + 99)


def shown(parameters: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The parameters of an HTTP job as its caller may see them."""
    if parameters is None:
        return None
    return {name: value for name, value in parameters.items() if name not in _KEPT_FROM_CALLERS}
