"""The handler of HTTP jobs: it calls the job's target, and says what the answer means.

It runs in a child, which opens what is sealed with the encryption keys of its worker; no connection to the
database is needed. The part that dials is loaded at the first call, since most processes that know this
job type never make one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from laneway.clock import SystemClock
from laneway.domain.http_target import HTTP_REQUEST, HttpTarget, Meaning, meaning
from laneway.domain.payload import check_storable
from laneway.engine.access.job_tokens import JobTokens
from laneway.engine.context import JobContext
from laneway.engine.endings import GoesOnElsewhere
from laneway.engine.registry import JobType, registry
from laneway.errors import (
    FieldError,
    InvalidParameters,
    LanewayError,
    PermanentError,
    Retry,
    Snooze,
    TransientError,
)
from laneway.settings import get_settings
from laneway.webhooks.guard import Policy
from laneway.webhooks.retries import ErrorClass, retry_after_seconds
from laneway.webhooks.secrets import SecretBox, target_headers_context, tenant_context
from laneway.webhooks.signing import sign, signature_headers

if TYPE_CHECKING:
    from laneway.webhooks.call import Reply

KEPT_HEADERS = ("content-type", "date", "etag", "last-modified", "location", "retry-after", "server")
MAX_HEADER_CHARACTERS = 256
MAX_BODY_SHOWN = 500  # characters of an answer in the error of a failed attempt
UNEQUIPPED_SECONDS = 5.0
LOOK_SECONDS = 0.25  # between two looks for a cancel while the target works


class TargetFailed(TransientError):
    """The target failed in a way that may pass."""


class TargetBusy(Retry):
    """The target failed, and said when to come back."""


class TargetRefused(PermanentError):
    """The target refused the request, or may not be called."""


class HttpJobType(JobType):
    """The job type whose parameters are made of a `target` alone."""

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the target."""
        return HttpTarget.model_json_schema()

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Raise InvalidParameters: a target is judged and sealed when its job is made, and then stays."""
        detail = "jobs of this type are made with `target`, which cannot be changed"
        error = FieldError("/parameters", detail, "target_needed")
        raise InvalidParameters(f"{self.name}: {detail}", errors=(error,))


async def http_request(
    job: JobContext,
    url: str,
    method: str,
    headers: dict[str, str],
    success: tuple[int | str, ...],
    timeout_seconds: float,
    private: dict[str, str],
    sender: dict[str, Any] | None = None,
    body: Any = None,
) -> dict[str, Any]:
    """Call a URL. Jobs of this type are made with a `target`: see `POST /jobs`.

    The result has the `status_code`, some `headers` and the `body` of the answer, as JSON if it is, else as
    text, and whether it was `truncated`. A 202 leaves the job to the target, which reports its end.
    """
    if sender is None:  # the store did not answer its worker
        raise Snooze(UNEQUIPPED_SECONDS, "the secrets that sign the call could not be read")
    if not sender["secrets"]:  # nothing leaves unsigned
        raise TargetRefused("there is no such tenant any more")
    settings = get_settings()
    papers = _Papers(SecretBox.from_settings(settings), sender["tenant_id"])
    content, content_type = _encoded(body)
    sent = {} if content_type is None else {"Content-Type": content_type}
    sent |= _ours(job, content or b"", private, papers, sender["secrets"])
    dial = import_module("laneway.webhooks.call")
    calling = asyncio.ensure_future(
        dial.call(
            method,
            url,
            headers=_joined(sent, papers.headers(private)),
            body=content,
            timeout_seconds=timeout_seconds,
            policy=Policy.from_settings(settings),
        )
    )
    while not calling.done():
        await asyncio.wait({calling}, timeout=LOOK_SECONDS)
        if job.cancelled and not calling.done():
            calling.cancel()
            job.check_cancelled()
    try:
        reply: Reply = calling.result()
    except dial.NoReply as error:
        kind = TargetRefused if error.kind is ErrorClass.SSRF_BLOCKED else TargetFailed
        raise kind(f"{error.kind}: {error}") from None
    return _judged(reply, success)


def _judged(reply: Reply, success: tuple[int | str, ...]) -> dict[str, Any]:
    """The result. Raises what else the answer means."""
    said = f"the target answered {reply.status}"
    if text := reply.body.decode("utf-8", "replace").replace("\0", "\ufffd").strip():
        said += f": {text[:MAX_BODY_SHOWN]}"
    match meaning(reply.status, success):
        case Meaning.GOES_ON:
            raise GoesOnElsewhere
        case Meaning.NEVER:
            raise TargetRefused(said)
        case Meaning.AGAIN:
            asked = retry_after_seconds(reply.headers.get("retry-after"), now=SystemClock().now())
            raise TargetBusy(asked, said) if asked else TargetFailed(said)
    return {
        "status_code": reply.status,
        "headers": {
            name: reply.headers[name][:MAX_HEADER_CHARACTERS]
            for name in KEPT_HEADERS
            if name in reply.headers
        },
        "body": _decoded(reply),
        "truncated": reply.truncated,
    }


def _decoded(reply: Reply) -> Any:
    """The body as JSON, where it says that it is and can be kept, else as text; None for none."""
    text = reply.body.decode("utf-8", "replace").replace("\0", "\ufffd")
    if "json" in reply.headers.get("content-type", "").lower() and not reply.truncated:
        try:
            value = json.loads(text)
            check_storable({"body": value}, what="result")
            return value
        except (ValueError, RecursionError, LanewayError):
            pass
    return text or None


def _encoded(body: Any) -> tuple[bytes | None, str | None]:
    """The bytes of a body and their media type."""
    if body is None:
        return None, None
    if isinstance(body, str):
        return body.encode(), "text/plain; charset=utf-8"
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(), "application/json"


@dataclass(frozen=True, slots=True)
class _Papers:
    """What of a tenant's is sealed, opened with the keys of this process."""

    box: SecretBox
    tenant_id: str

    def secret(self, sealed: str) -> str:
        return self._open(sealed, tenant_context(self.tenant_id))

    def headers(self, private: Mapping[str, str]) -> dict[str, str]:
        """The caller's own headers."""
        if "headers" not in private:
            return {}
        opened: dict[str, str] = json.loads(
            self._open(private["headers"], target_headers_context(self.tenant_id))
        )
        return opened

    def _open(self, sealed: str, context: str) -> str:
        try:
            return self.box.open(sealed, context)
        except ValueError as error:  # a key that is no longer there: no attempt would help
            raise TargetRefused(f"a secret of the call cannot be opened: {error}") from None


def _ours(
    job: JobContext, content: bytes, private: Mapping[str, str], papers: _Papers, sealed: Sequence[str]
) -> dict[str, str]:
    """The headers that Laneway sets: who calls, about which attempt, and the token to report with."""
    headers = {
        "Laneway-Job-Id": job.id,
        "Laneway-Attempt": str(job.attempt),
        "Laneway-Job-Token": JobTokens(papers.box).make(papers.tenant_id, job.id, job.attempt),
    }
    if "traceparent" in private:
        headers["traceparent"] = private["traceparent"]
    message_id, timestamp = f"{job.id}-{job.attempt}", int(SystemClock().now().timestamp())
    signatures = [sign(papers.secret(each), message_id, timestamp, content) for each in sealed]
    return headers | signature_headers(signatures, message_id=message_id, timestamp=timestamp)


def _joined(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """The caller's own headers beside ours; its `Content-Type` and `traceparent` in place of ours."""
    said = {name.lower() for name in theirs}
    return {name: value for name, value in ours.items() if name.lower() not in said} | dict(theirs)


registry.add(HttpJobType(HTTP_REQUEST, http_request))
