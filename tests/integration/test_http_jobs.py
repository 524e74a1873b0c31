"""The handler of HTTP jobs against a real receiver: what is sent, and what each answer means."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from laneway.clock import new_id
from laneway.domain.http_target import HTTP_REQUEST, MASK, HttpTarget
from laneway.engine.access.job_tokens import JobTokens
from laneway.engine.context import Progress
from laneway.engine.endings import Cancelled, Ending, HandedOver, Raised, Returned
from laneway.engine.http_jobs import parameters_of
from laneway.engine.registry import load
from laneway.engine.running import Runner
from laneway.handlers.http_request import MAX_BODY_SHOWN, UNEQUIPPED_SECONDS
from laneway.settings import get_settings
from laneway.webhooks.call import MAX_BODY_BYTES
from laneway.webhooks.guard import Policy
from laneway.webhooks.retries import MAX_RETRY_AFTER_SECONDS
from laneway.webhooks.secrets import SecretBox, new_webhook_secret, tenant_context
from laneway.webhooks.signing import verify_webhook
from laneway.worker.alarm import Alarm
from webhook_receiver import (
    Exchange,
    Mode,
    Receiver,
    drip_body,
    drip_headers,
    endless_body,
    hang,
    nonsense,
    ok,
    reset,
)

HUSH = "Bearer hush-7f3a"
RUNNER = Runner(Alarm())  # one, as in a child: each keeps an event loop


class Line:
    """How the handler's process reaches its pool: here, nobody."""

    def __init__(self, *, cancelled: Callable[[], bool] = lambda: False) -> None:
        self.cancelled = cancelled

    def report(self, progress: Progress) -> None:
        raise AssertionError(progress)


class Caller:
    """Runs HTTP jobs of one tenant, as a child does with what its pool hands it."""

    def __init__(self) -> None:
        self.settings = get_settings()
        self.box = SecretBox.from_settings(self.settings)
        self.tenant_id, self.job_id = new_id(), new_id()
        self.secret = new_webhook_secret()

    def parameters(self, url: str, *, traceparent: str | None = None, **target: Any) -> dict[str, Any]:
        wanted = HttpTarget.model_validate({"url": url, **target})
        made = parameters_of(
            wanted,
            tenant_id=self.tenant_id,
            traceparent=traceparent,
            policy=Policy.from_settings(self.settings),
            box=self.box,
        )
        sealed = self.box.seal(self.secret, tenant_context(self.tenant_id))
        return made | {"sender": {"tenant_id": self.tenant_id, "secrets": [sealed]}}

    def run(self, parameters: dict[str, Any], *, line: Line | None = None) -> Ending | HandedOver:
        return RUNNER.run(
            load([]).need(HTTP_REQUEST),
            job_id=self.job_id,
            attempt=2,
            parameters=json.dumps(parameters),
            timeout_seconds=30,
            line=line or Line(),
        )

    def call(self, url: str, **target: Any) -> Ending | HandedOver:
        return self.run(self.parameters(url, **target))

    def result(self, url: str, **target: Any) -> dict[str, Any]:
        ending = self.call(url, **target)
        assert isinstance(ending, Returned), ending
        return dict(json.loads(ending.result or ""))

    def failure(self, url: str, **target: Any) -> Raised:
        ending = self.call(url, **target)
        assert isinstance(ending, Raised), ending
        return ending


@pytest.fixture
def caller(monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.setenv("LANEWAY_ENCRYPTION_KEYS", f"k1:{base64.b64encode(os.urandom(32)).decode()}")
    monkeypatch.setenv("LANEWAY_WEBHOOK_ALLOW_HTTP", "1")
    monkeypatch.setenv("LANEWAY_WEBHOOK_ALLOWED_CIDRS", "127.0.0.0/8")
    monkeypatch.setenv("LANEWAY_WEBHOOK_ALLOWED_HOSTS", "localhost,internal.test")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not to be used
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    get_settings.cache_clear()
    return Caller()


@pytest.fixture
def target() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def answering(status: int, body: bytes = b"", **headers: str) -> Mode:
    return lambda exchange: exchange.answer(status, body=body, **headers)


# What is sent


def test_the_call_is_signed_and_says_which_attempt_of_which_job_it_is(
    caller: Caller, target: Receiver
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    parameters = caller.parameters(
        target.url("/do?x=1"),
        method="PUT",
        headers={"Authorization": HUSH, "X-Own": "1"},
        body={"grüße": [1, None]},
        traceparent=trace,
    )
    assert isinstance(caller.run(parameters), Returned)
    [request] = target.requests
    assert request.line == "PUT /do?x=1 HTTP/1.1"
    assert json.loads(request.body) == {"grüße": [1, None]}
    sent = request.headers
    assert (sent["authorization"], sent["x-own"], sent["content-type"]) == (HUSH, "1", "application/json")
    assert (sent["laneway-job-id"], sent["laneway-attempt"]) == (caller.job_id, "2")
    assert sent["webhook-id"] == f"{caller.job_id}-2"
    assert sent["traceparent"] == trace
    assert verify_webhook(request.body, sent, caller.secret) == {"grüße": [1, None]}
    reporter = JobTokens(caller.box).read(sent["laneway-job-token"])
    assert (reporter.tenant_id, reporter.job_id, reporter.attempt) == (caller.tenant_id, caller.job_id, 2)


def test_what_is_kept_of_the_headers_does_not_tell_them(caller: Caller, target: Receiver) -> None:
    parameters = caller.parameters(target.url(), headers={"Authorization": HUSH})
    assert parameters["headers"] == {"Authorization": MASK}
    assert HUSH not in json.dumps(parameters)


@pytest.mark.parametrize(
    ("how", "body", "content_type"),
    [
        ({"body": "plain text"}, b"plain text", "text/plain; charset=utf-8"),
        ({"body": "<a/>", "headers": {"content-type": "text/xml"}}, b"<a/>", "text/xml"),
        ({"body": 0}, b"0", "application/json"),
        ({}, b"", None),
        ({"method": "DELETE"}, b"", None),
        ({"method": "GET"}, b"", None),
    ],
)
def test_a_body_travels_as_it_was_given(
    caller: Caller, target: Receiver, how: dict[str, Any], body: bytes, content_type: str | None
) -> None:
    caller.result(target.url(), **how)
    [request] = target.requests
    assert (request.body, request.headers.get("content-type")) == (body, content_type)


# What an answer means


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b'{"id":7}', "application/json", {"id": 7}),
        (b'{"id":7}', "application/problem+json; charset=utf-8", {"id": 7}),
        (b'{"id":7}', "text/plain", '{"id":7}'),
        (b"{broken", "application/json", "{broken"),
        (b"NaN", "application/json", "NaN"),
        (b"[" * 40 + b"]" * 40, "application/json", "[" * 40 + "]" * 40),  # deeper than is kept
        (b"[" * 60_000, "application/json", "[" * 60_000),
        (b'"\\ud800"', "application/json", '"\\ud800"'),
        (b"a\0\xff", "text/plain", "a\ufffd\ufffd"),
        (b"", "application/json", None),
    ],
)
def test_the_body_of_the_answer_is_the_result(
    caller: Caller, target: Receiver, body: bytes, content_type: str, expected: Any
) -> None:
    target.mode = answering(201, body, Content_Type=content_type, Set_Cookie="a=b", ETag='"1"')
    result = caller.result(target.url())
    assert result["status_code"] == 201
    assert result["headers"] == {"content-type": content_type, "etag": '"1"'}
    assert (result["body"], result["truncated"]) == (expected, False)


@pytest.mark.parametrize("size", [MAX_BODY_BYTES, MAX_BODY_BYTES + 1])
def test_64_kib_of_an_answer_are_kept(caller: Caller, target: Receiver, size: int) -> None:
    target.mode = answering(200, b"x" * size)
    result = caller.result(target.url())
    assert (len(result["body"]), result["truncated"]) == (MAX_BODY_BYTES, size > MAX_BODY_BYTES)


def test_an_endless_answer_is_cut(caller: Caller, target: Receiver) -> None:
    target.mode = endless_body
    assert caller.result(target.url())["truncated"] is True


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503, 599])
def test_what_may_pass_is_tried_again(caller: Caller, target: Receiver, status: int) -> None:
    target.mode = answering(status, b"not now " * 200)
    failure = caller.failure(target.url())
    assert (failure.type, failure.permanent, failure.in_seconds) == ("TargetFailed", False, None)
    assert failure.message == f"the target answered {status}: {'not now ' * 200}"[: len(failure.message)]
    assert len(failure.message) <= MAX_BODY_SHOWN + 40


@pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 422])
def test_a_refusal_is_for_good(caller: Caller, target: Receiver, status: int) -> None:
    target.mode = answering(status, b"no")
    failure = caller.failure(target.url())
    assert (failure.type, failure.permanent) == ("TargetRefused", True)
    assert failure.message == f"the target answered {status}: no"


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        ("in_an_hour", 3500, 3600),
        ("99999999999", MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
    ],
)
def test_a_retry_after_is_honoured(
    caller: Caller, target: Receiver, asked: str, least: int, most: int
) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    target.mode = answering(503, Retry_After=in_an_hour if asked == "in_an_hour" else asked)
    failure = caller.failure(target.url())
    assert (failure.type, failure.permanent, failure.charged) == ("TargetBusy", False, True)
    assert failure.in_seconds is not None
    assert least <= failure.in_seconds <= most


@pytest.mark.parametrize("nonsense_asked", ["soon", "0", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_retry_after_that_asks_for_nothing_is_the_job_s_own_wait(
    caller: Caller, target: Receiver, nonsense_asked: str
) -> None:
    target.mode = answering(503, Retry_After=nonsense_asked)
    failure = caller.failure(target.url())
    assert (failure.type, failure.in_seconds) == ("TargetFailed", None)


def test_a_redirect_is_not_followed(caller: Caller, target: Receiver) -> None:
    target.mode = answering(307, Location=target.url("/elsewhere"))
    failure = caller.failure(target.url())
    assert failure.permanent
    assert [request.path for request in target.requests] == ["/hook"]


@pytest.mark.parametrize("mode", [reset, nonsense, drip_headers, drip_body, hang])
def test_what_is_no_answer_is_tried_again(caller: Caller, target: Receiver, mode: Mode) -> None:
    target.mode = mode
    failure = caller.failure(target.url(), timeout_seconds=0.3)
    assert (failure.type, failure.permanent) == ("TargetFailed", False)
    assert "127.0.0.1" not in failure.message


def test_an_address_that_is_not_allowed_is_not_dialled(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LANEWAY_WEBHOOK_ALLOWED_CIDRS")
    get_settings.cache_clear()
    with Receiver() as receiver:
        parameters = Caller().parameters(receiver.url(host="localhost"))  # the name is allowed
        caller.settings = get_settings()
        ending = caller.run(
            parameters | {"sender": caller.parameters(receiver.url(host="localhost"))["sender"]}
        )
        assert receiver.connections == 0
    assert isinstance(ending, Raised)
    assert (ending.type, ending.permanent) == ("TargetRefused", True)
    assert "ssrf_blocked" in ending.message


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "http://127.0.0.1:6379/"])
def test_a_url_that_got_past_the_first_check_is_judged_again(caller: Caller, url: str) -> None:
    parameters = caller.parameters("http://internal.test:8080/") | {"url": url}
    ending = caller.run(parameters)
    assert isinstance(ending, Raised)
    assert (ending.type, ending.permanent) == ("TargetRefused", True)


def test_no_cookie_is_kept(caller: Caller, target: Receiver) -> None:
    target.mode = answering(200, Set_Cookie="session=1")
    for _ in range(2):
        caller.result(target.url())
    assert all("cookie" not in request.headers for request in target.requests)


# 202


def test_a_202_leaves_the_job_to_the_target(caller: Caller, target: Receiver) -> None:
    target.mode = answering(202)
    assert caller.call(target.url()) == HandedOver()
    assert caller.result(target.url(), success=[202])["status_code"] == 202


# What is not the target's doing


def test_a_cancel_ends_the_call(caller: Caller, target: Receiver) -> None:
    target.mode = hang
    asked: list[Exchange] = []
    target.mode = lambda exchange: (asked.append(exchange), hang(exchange))[1]
    line = Line(cancelled=lambda: bool(asked))
    assert caller.run(caller.parameters(target.url()), line=line) == Cancelled()


def test_without_the_secrets_that_sign_it_the_call_waits(caller: Caller, target: Receiver) -> None:
    ending = caller.run(caller.parameters(target.url()) | {"sender": None})
    assert isinstance(ending, Raised)
    assert (ending.type, ending.charged, ending.in_seconds) == ("Snooze", False, UNEQUIPPED_SECONDS)
    assert target.requests == []


def test_nothing_leaves_unsigned(caller: Caller, target: Receiver) -> None:
    parameters = caller.parameters(target.url())
    ending = caller.run(parameters | {"sender": parameters["sender"] | {"secrets": []}})
    assert isinstance(ending, Raised)
    assert (ending.type, ending.permanent) == ("TargetRefused", True)
    assert target.requests == []


def test_what_cannot_be_opened_is_not_called_and_not_told(
    caller: Caller, target: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = caller.parameters(target.url(), headers={"Authorization": HUSH})
    other = parameters | {"sender": parameters["sender"] | {"tenant_id": new_id()}}
    monkeypatch.setenv("LANEWAY_ENCRYPTION_KEYS", f"k2:{base64.b64encode(os.urandom(32)).decode()}")
    without_key = caller.run(other)
    get_settings.cache_clear()
    for ending in (without_key, caller.run(parameters)):
        assert isinstance(ending, Raised)
        assert (ending.type, ending.permanent) == ("TargetRefused", True)
        assert HUSH not in repr(ending)
        assert caller.secret not in repr(ending)
    assert target.requests == []


def test_a_failure_tells_no_secret(caller: Caller, target: Receiver) -> None:
    for mode in (answering(500), answering(404), reset, nonsense, ok):
        target.mode = mode
        ending = caller.call(target.url(), headers={"Authorization": HUSH}, timeout_seconds=5)
        for secret in (HUSH, caller.secret, "lwj_", target.requests[-1].headers["laneway-job-token"]):
            assert secret not in repr(ending)
