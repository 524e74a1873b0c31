"""What the client sends, how it reads answers, and what it tries again: without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any

import httpx
import pytest

from laneway import errors
from laneway.clock import new_id
from laneway.domain.http_target import HttpTarget
from laneway.domain.spec import JobSpec, Priority
from laneway.domain.states import JobStatus
from laneway.sdk import calls, operations
from laneway.sdk.calls import EventReader, Tries
from laneway.sdk.client import RECONNECTS, AsyncLanewayClient, LanewayClient
from laneway.sdk.operations import JobOptions, Target

URL = "http://laneway.test"
Answer = httpx.Response | Exception


def job(status: str = "queued", **fields: Any) -> dict[str, Any]:
    """A job as the API answers it."""
    names = (
        *(
            "status_reason",
            "progress_message",
            "progress_details",
            "next_retry_at",
            "queued_at",
            "started_at",
        ),
        *("finished_at", "title", "description", "scheduled_for", "expires_at", "unique_key", "result"),
        *("error", "worker", "dead_letter_reason", "cancelled_at", "cancelled_by", "webhook_url"),
        "webhook_events",
    )
    return {
        **dict.fromkeys(names),
        "id": new_id(),
        "status": status,
        "cancelling": False,
        "progress": 0,
        "attempt": 0,
        "retry_count": 0,
        "created_at": "2026-11-22T10:00:00.000001Z",
        "updated_at": "2026-11-22T10:00:00.000001Z",
        "tenant_id": new_id(),
        "created_by": "alice",
        "job_type": "demo.echo",
        "parameters": {"a": [1]},
        "queue": "default",
        "priority": "high",
        "tags": ["x"],
        "metadata": {},
        "timeout_seconds": 60,
        "max_retries": 3,
        "retry_delay_seconds": 120.0,
        "retry_backoff": 2.0,
        "retry_max_delay_seconds": 1800.0,
        "retry_jitter": True,
        "webhook_delivered": False,
        "webhook_attempts": 0,
        "a_field_of_a_later_release": 1,
        **fields,
    }


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    content = {"status": status, "code": code, "detail": f"it is {code}", "request_id": "r-1"}
    return httpx.Response(status, json=content, headers={n.replace("_", "-"): v for n, v in headers.items()})


class Server:
    """Answers requests with what it was told, in order, and remembers them."""

    def __init__(self, *answers: Answer | Callable[[httpx.Request], Answer]) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def keys(self) -> set[str]:
        return {request.headers.get("idempotency-key", "") for request in self.requests}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the client would have made."""
    pauses: list[float] = []

    async def pause(_: AsyncLanewayClient, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(LanewayClient, "_pause", lambda _, seconds: pauses.append(seconds))
    monkeypatch.setattr(AsyncLanewayClient, "_pause", pause)
    return pauses


def ask(server: Server, what: Callable[[Any], Any], *, awaited: bool = False, **options: Any) -> Any:
    """What a client says: the blocking one, or the one that is awaited."""
    if not awaited:
        with LanewayClient(URL, "key", transport=httpx.MockTransport(server), **options) as client:
            found = what(client)
            return list(found) if isinstance(found, Iterator) else found

    async def work() -> Any:
        transport = httpx.MockTransport(server)
        async with AsyncLanewayClient(URL, "key", transport=transport, **options) as client:
            found = what(client)
            return [each async for each in found] if hasattr(found, "__aiter__") else await found

    return asyncio.run(work())


both = pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])


@both
def test_a_job_is_asked_for_and_read(awaited: bool) -> None:
    server = Server(httpx.Response(202, json=job()))
    moment = datetime(2026, 11, 22, 12, tzinfo=timezone(timedelta(hours=2)))
    made = ask(
        server,
        lambda client: client.enqueue(
            "demo.echo", {"a": [1]}, priority=Priority.HIGH, tags=("x",), scheduled_for=moment, wait_seconds=5
        ),
        awaited=awaited,
    )
    [request] = server.requests
    assert (request.method, str(request.url)) == ("POST", f"{URL}/api/v1/jobs")
    assert json.loads(request.content) == {
        "job_type": "demo.echo",
        "parameters": {"a": [1]},
        "priority": "high",
        "tags": ["x"],
        "scheduled_for": "2026-11-22T10:00:00Z",
    }
    assert request.headers["authorization"] == "Bearer key"
    assert request.headers["prefer"] == "wait=5"
    assert request.headers["idempotency-key"]
    assert (made.status, made.priority, made.tags) == (JobStatus.QUEUED, Priority.HIGH, ("x",))
    assert made.created_at == datetime(2026, 11, 22, 10, 0, 0, 1, tzinfo=UTC)
    assert not made.ended


def test_every_option_of_a_job_is_one_that_the_api_takes() -> None:
    assert set(JobOptions.__annotations__) <= set(JobSpec.model_fields)
    said = {"job_type", "parameters", "target"}  # as arguments of their own
    assert set(JobSpec.model_fields) - set(JobOptions.__annotations__) == said
    assert set(Target.__annotations__) == set(HttpTarget.model_fields)


@both
def test_a_job_is_asked_for_with_a_type_or_a_target(awaited: bool) -> None:
    target: Target = {"url": "https://api.example.com/do", "body": {"a": 1}}
    server = Server(httpx.Response(202, json=job()))
    ask(server, lambda client: client.enqueue(target=target, priority="high"), awaited=awaited)
    assert json.loads(server.requests[0].content) == {"target": target, "priority": "high"}
    for wrong in ({}, {"job_type": "demo.echo", "target": target}, {"parameters": {}, "target": target}):
        with pytest.raises(TypeError, match="or a target"):
            operations.enqueue(**wrong)  # type: ignore[arg-type]


@both
def test_what_fails_for_the_moment_is_sent_again_with_the_same_key(
    awaited: bool, no_pauses: list[float]
) -> None:
    server = Server(
        httpx.ReadTimeout("slow"),
        problem(503, "storage_unavailable", retry_after="7"),
        problem(429, "rate_limited", retry_after="3"),
        problem(409, "idempotency_in_progress"),
        httpx.Response(202, json=job()),
    )
    ask(server, lambda client: client.enqueue("demo.echo"), awaited=awaited)
    assert len(server.requests) == 5
    assert len(server.keys) == 1
    assert "" not in server.keys
    first, second, third, fourth = no_pauses
    assert 0.25 <= first <= 0.5
    assert (second, third) == (7, 3)
    assert 2 <= fourth <= 4


def test_a_key_of_the_callers_own_is_sent() -> None:
    server = Server(httpx.Response(202, json=job()))
    ask(server, lambda client: client.enqueue("demo.echo", idempotency_key="order-7"))
    assert server.keys == {"order-7"}


@both
def test_after_the_last_try_the_error_is_raised(awaited: bool, no_pauses: list[float]) -> None:
    server = Server(*[problem(503, "storage_unavailable", retry_after="1")] * 3)
    with pytest.raises(errors.StorageUnavailable) as caught:
        ask(server, lambda client: client.enqueue("demo.echo"), awaited=awaited, retries=2)
    assert len(server.requests) == 3
    assert caught.value.retry_after_seconds == 1
    assert caught.value.facts["request_id"] == "r-1"


NOT_AGAIN: list[tuple[str, Callable[[LanewayClient], Any], Answer]] = [
    (
        "a request that makes something without a key",
        lambda c: c.create_endpoint("u", event_types=["*"]),
        problem(503, "storage_unavailable", retry_after="1"),
    ),
    ("one whose answer was lost", lambda c: c.request("POST", "/x"), httpx.ReadTimeout("slow")),
    ("a refusal", lambda c: c.get("x"), problem(422, "invalid_request")),
    ("a crash", lambda c: c.get("x"), problem(500, "internal_error")),
    ("another conflict", lambda c: c.enqueue("x"), problem(409, "unique_key_taken")),
    (
        "one who shall wait for an hour",
        lambda c: c.get("x"),
        problem(429, "rate_limited", retry_after="3600"),
    ),
    ("a limit that never ends", lambda c: c.get("x"), problem(429, "rate_limited")),
]


@pytest.mark.parametrize(("what", "answer"), [case[1:] for case in NOT_AGAIN], ids=[c[0] for c in NOT_AGAIN])
def test_what_would_not_help_or_might_do_it_twice_is_not_sent_again(
    what: Callable[[LanewayClient], Any], answer: Answer, no_pauses: list[float]
) -> None:
    server = Server(answer)
    with pytest.raises(errors.LanewayError):
        ask(server, what)
    assert no_pauses == []


def test_a_request_that_never_left_is_sent_again_whatever_it_is(no_pauses: list[float]) -> None:
    server = Server(httpx.ConnectError("refused"), httpx.Response(201, json={"made": 1}))
    assert ask(server, lambda client: client.request("POST", "/x", body={})) == {"made": 1}


def test_every_problem_is_raised_as_the_error_it_was() -> None:
    for kind in calls._kinds().values():
        with pytest.raises(kind) as caught:
            ask(Server(problem(kind.status, kind.code)), lambda client: client.get("x"), retries=0)
        assert type(caught.value) is kind
        assert str(caught.value) == f"it is {kind.code}"


def test_a_problem_of_a_later_release_is_raised_by_its_status() -> None:
    with pytest.raises(errors.Conflict) as caught:
        ask(Server(problem(409, "something_new")), lambda client: client.get("x"))
    assert caught.value.facts["code"] == "something_new"


def test_the_wrong_fields_are_named() -> None:
    content = {
        "status": 422,
        "code": "invalid_request",
        "detail": "no",
        "request_id": "r",
        "errors": [{"pointer": "/a", "detail": "too small", "code": "c"}],
    }
    with pytest.raises(errors.Unprocessable, match="/a: too small") as caught:
        ask(Server(httpx.Response(422, json=content)), lambda client: client.get("x"))
    assert caught.value.errors == (errors.FieldError("/a", "too small", "c"),)


def test_what_is_not_laneway_is_said_to_be_something_else(no_pauses: list[float]) -> None:
    for answer in (httpx.Response(404, text="<html>"), httpx.Response(404, json=[]), httpx.Response(301)):
        with pytest.raises(errors.Unavailable, match="check the base URL"):
            ask(Server(answer), lambda client: client.get("x"))


def test_an_api_that_cannot_be_reached_is_named(no_pauses: list[float]) -> None:
    with pytest.raises(errors.Unavailable, match=r"cannot reach http://laneway\.test"):
        ask(Server(*[httpx.ConnectError("no")] * 5), lambda client: client.get("x"))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "x" * 3])
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(errors.Unprocessable):
        LanewayClient(url, "key")


@both
def test_a_list_is_read_page_by_page(awaited: bool) -> None:
    pages = [
        {"data": [job(), job()], "next_cursor": "c1", "has_more": True},
        {"data": [], "next_cursor": "c2", "has_more": True},
        {"data": [job()], "next_cursor": None, "has_more": False},
    ]
    server = Server(*[httpx.Response(200, json=page) for page in pages])
    found = ask(server, lambda client: client.jobs(status=["queued", JobStatus.RUNNING]), awaited=awaited)
    assert [each.id for each in found] == [each["id"] for page in pages for each in page["data"]]
    queries = [request.url.params.multi_items() for request in server.requests]
    base = [("status", "queued"), ("status", "running"), ("limit", "200")]
    assert queries == [base, [*base, ("cursor", "c1")], [*base, ("cursor", "c2")]]


def test_a_list_reads_no_page_before_it_is_needed() -> None:
    page = {"data": [job(), job()], "next_cursor": "c1", "has_more": True}
    server = Server(httpx.Response(200, json=page))
    with LanewayClient(URL, "key", transport=httpx.MockTransport(server)) as client:
        entries = client.jobs()
        assert server.requests == []
        next(entries)
        next(entries)
        assert len(server.requests) == 1


@both
def test_waiting_asks_until_the_job_has_ended(awaited: bool) -> None:
    server = Server(*[httpx.Response(200, json=job(status)) for status in ("queued", "running", "failed")])
    ended = ask(server, lambda client: client.wait("x"), awaited=awaited)
    assert (ended.status, ended.ended) == (JobStatus.FAILED, True)
    assert {request.headers["prefer"] for request in server.requests} == {"wait=30"}


@both
def test_waiting_ends_after_its_time(awaited: bool) -> None:
    with pytest.raises(TimeoutError, match="is queued after 0 s"):
        ask(
            Server(httpx.Response(200, json=job())),
            lambda client: client.wait("x", timeout_seconds=0),
            awaited=awaited,
        )


# Following


def frame(event_id: str, name: str, **data: Any) -> str:
    return f"id: {event_id}\nevent: {name}\ndata: {json.dumps(data)}\n\n"


def stream(*frames: str, broken: bool = False) -> httpx.Response:
    class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield ("retry: 2000\n\n" + "".join(frames)).encode()
            if broken:
                raise httpx.ReadError("cut")

        async def __aiter__(self) -> Any:
            for part in self:
                yield part

    return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=Body())


@both
def test_a_stream_that_breaks_off_is_taken_up_where_it_was(awaited: bool, no_pauses: list[float]) -> None:
    server = Server(
        stream(frame("1", "job.queued"), frame("2", "job.running", progress=0), broken=True),
        httpx.ConnectError("gone"),
        problem(503, "unavailable", retry_after="9"),
        stream(": ping\n\n"),
        stream(frame("2.40", "job.progress", progress=40), frame("3", "job.completed", finished_at="now")),
    )
    events = ask(server, lambda client: client.watch("x"), awaited=awaited)
    assert [event.name for event in events] == [
        *("job.queued", "job.running", "job.progress", "job.completed")
    ]
    assert [event.progress for event in events] == [0, 0, 40, 0]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, *["2"] * 4]
    assert no_pauses == [1, 1, 9, 9]


@both
def test_a_stream_of_which_all_was_heard_has_ended(awaited: bool, no_pauses: list[float]) -> None:
    server = Server(stream(frame("1", "job.queued")), httpx.Response(204))
    assert len(ask(server, lambda client: client.watch("x"), awaited=awaited)) == 1


@both
def test_a_stream_that_never_was_is_an_error_at_once(awaited: bool, no_pauses: list[float]) -> None:
    for answer, kind in (
        (httpx.ConnectError("no"), errors.Unavailable),
        (problem(404, "job_not_found"), errors.JobNotFound),
        (problem(429, "concurrent_requests", retry_after="5"), errors.LanewayError),
    ):
        with pytest.raises(kind):
            ask(Server(answer), lambda client: client.watch("x"), awaited=awaited)


@both
def test_a_stream_is_given_up_after_ten_failures_in_a_row(awaited: bool, no_pauses: list[float]) -> None:
    gone = [httpx.ConnectError("gone")] * (RECONNECTS + 1)
    server = Server(stream(frame("1", "job.queued"), broken=True), *gone)
    with pytest.raises(errors.Unavailable):
        ask(server, lambda client: client.watch("x"), awaited=awaited)
    assert len(server.requests) == RECONNECTS + 1


def test_events_are_read_as_the_standard_says() -> None:
    reader = EventReader()
    lines = ["id: 7", "event: a", 'data: {"x":', "data:  1}", ": comment", "", "", 'data: {"y": 2}', ""]
    events = [event for line in lines if (event := reader.feed(line)) is not None]
    assert [(event.id, event.data) for event in events] == [("7", {"x": 1}), ("7", {"y": 2})]


def test_pauses_grow_and_are_spread() -> None:
    tries = Tries(operations.get("x"), retries=9, rng=Random(7))
    pauses = [tries.after(httpx.ConnectError("no")) for _ in range(10)]
    assert pauses.pop() is None
    for number, pause in enumerate(pauses):
        longest = min(0.5 * 2**number, 30)
        assert pause is not None
        assert longest / 2 <= pause <= longest


def test_both_clients_can_do_the_same() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert names(LanewayClient) == names(AsyncLanewayClient)
