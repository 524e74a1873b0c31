"""What every answer has, whatever was asked, and what the edge does before anybody looks at a request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from api_client import LocalApi
from laneway.api.edge import MAX_HEAD_BYTES, Edge
from laneway.api.problems import of_http
from laneway.clock import new_id
from laneway.settings import Settings

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CLOSED = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": CLOSED,
}


def assert_guarded(response: httpx.Response) -> None:
    for name, value in SECURITY.items():
        assert response.headers.get_list(name) == [value], (response.request.url, name)
    assert len(response.headers.get_list("x-request-id")) == 1
    assert len(response.headers.get_list("cache-control")) == 1
    assert "server" not in response.headers


def test_every_kind_of_answer_has_the_security_headers(api: LocalApi) -> None:
    job = api.make()["id"]
    answers = [
        api.get("//livez"),
        api.send("GET", "/openapi.json"),
        api.get(f"/jobs/{job}"),
        api.get(f"/jobs/{job}", headers={"If-None-Match": "*"}),
        api.post("/jobs", json={"job_type": "demo.echo"}),
        api.get("/nothing"),
        api.send("PATCH", "/livez"),
        api.get("/jobs", key=None),
        api.get("/workers"),
        api.post("/jobs", content=b"{", headers={"Content-Type": "application/json"}),
        api.get(f"/jobs/{new_id()}"),
    ]
    for response in answers:
        assert_guarded(response)
    assert [response.status_code for response in answers] == [
        *(200, 200, 200, 304, 202, 404, 405, 401, 403, 400, 404)
    ]
    assert all("strict-transport-security" not in response.headers for response in answers)


def test_the_pages_to_try_the_api_may_load_their_script_and_nothing_else(api: LocalApi) -> None:
    policy = api.send("GET", "/docs").headers["content-security-policy"]
    assert "script-src https://cdn.jsdelivr.net 'unsafe-inline'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "default-src 'none'" in policy


def test_an_api_whose_clients_come_by_https_tells_them_to_stay_there(local: Callable[..., LocalApi]) -> None:
    api = local(public_url="https://jobs.example.com", allowed_hosts="laneway.test")
    assert api.get("//livez").headers["strict-transport-security"] == "max-age=31536000"
    assert "strict-transport-security" in api.get("/nothing").headers
    plain = local(public_url="http://jobs.example.com")
    assert "strict-transport-security" not in plain.get("//livez").headers


def test_head_is_get_without_the_body(api: LocalApi) -> None:
    job = api.make()["id"]
    for path in ("/livez", "/openapi.json", f"/api/v1/jobs/{job}", "/api/v1/jobs"):
        get = api.send("GET", path, headers=api.headers())
        head = api.send("HEAD", path, headers=api.headers())
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length", "etag"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)
        assert_guarded(head)
    refused = api.send("HEAD", "/api/v1/jobs")
    assert (refused.status_code, refused.content) == (401, b"")


def test_head_of_a_stream_ends_at_once(api: LocalApi) -> None:
    job = api.make(delay_seconds=3600)["id"]
    for _ in range(12):  # more than the streams that one caller may hold open
        response = api.send("HEAD", f"/api/v1/jobs/{job}/events", headers=api.headers())
        assert response.status_code == 200, response.headers
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.content == b""


def test_a_head_of_a_request_has_at_most_32_kib(api: LocalApi) -> None:
    def ask(size: int, **how: Any) -> httpx.Response:
        """A request whose path, query and headers have `size` bytes."""
        bare = {"host": "laneway.test", "x-fill": ""}
        taken = sum(len(name) + len(value) + 4 for name, value in bare.items()) + len("/livez")
        request = httpx.Request(
            "GET",
            "http://laneway.test/livez",
            headers=[("host", "laneway.test"), ("x-fill", "x" * (size - taken))],
        )
        return api.portal.call(lambda: api._client.send(request, **how))

    assert ask(MAX_HEAD_BYTES).status_code == 200
    response = ask(MAX_HEAD_BYTES + 1)
    assert (response.status_code, response.json()["code"]) == (431, "headers_too_large")
    assert_guarded(response)
    long = api.send("GET", "/api/v1/jobs?q=" + "x" * MAX_HEAD_BYTES, headers=api.headers())
    assert long.status_code == 431


@pytest.mark.parametrize(
    "bent",
    [
        TRACE + "-00",
        TRACE.replace("00-", "01-", 1),
        TRACE.upper(),
        TRACE[:-1],
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "x",
    ],
)
def test_a_bent_traceparent_is_no_trace(api: LocalApi, bent: str) -> None:
    response = api.post("/jobs", json={"job_type": "demo.echo"}, headers={"traceparent": bent})
    assert response.json()["metadata"] == {}


def test_the_callers_trace_travels_into_the_job(each_api: LocalApi) -> None:
    body = {"job_type": "demo.echo", "metadata": {"order": 7}}
    job = each_api.post("/jobs", json=body, headers={"traceparent": TRACE}).json()
    assert job["metadata"] == {"order": 7, "traceparent": TRACE}
    assert each_api.get(f"/jobs/{job['id']}").json()["metadata"] == job["metadata"]
    own = body | {"metadata": {"traceparent": "mine"}}
    assert (
        each_api.post("/jobs", json=own, headers={"traceparent": TRACE}).json()["metadata"] == own["metadata"]
    )


def test_the_same_request_of_another_trace_is_the_same_request(each_api: LocalApi) -> None:
    key = new_id()
    made = [
        each_api.post(
            "/jobs",
            json={"job_type": "demo.echo"},
            headers={"traceparent": TRACE[:-4] + end, "Idempotency-Key": key},
        ).json()["id"]
        for end in ("1-00", "2-00")
    ]
    assert len(set(made)) == 1


# Without an application of ours inside


class Inside:
    """An ASGI application that does as a test says."""

    def __init__(self) -> None:
        self.does: Callable[[Scope, Receive, Send], Any] = PlainTextResponse("ok")
        self.clients: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clients.append(scope["client"])
        await self.does(scope, receive, send)


class Bare:
    """An edge around it, and a client."""

    def __init__(self, portal: Any, *, peer: str = "127.0.0.1", **settings: Any) -> None:
        self.inside = Inside()
        self.edge = Edge(self.inside, Settings(**settings))
        self.portal = portal
        self._peer = peer

    def ask(self, method: str = "GET", **how: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.edge, raise_app_exceptions=False, client=(self._peer, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://edge.test") as client:
                return await client.request(method, "/", **how)

        response: httpx.Response = self.portal.call(ask)
        return response


@pytest.fixture
def bare() -> Iterator[Callable[..., Bare]]:
    with start_blocking_portal() as portal:
        yield lambda **how: Bare(portal, **how)


def test_a_crash_outside_of_the_application_is_a_problem_too(bare: Callable[..., Bare]) -> None:
    edge = bare()

    async def crash(*_: Any) -> None:
        raise RuntimeError("secret")

    edge.inside.does = crash
    response = edge.ask(headers={"X-Request-Id": "mine"})
    assert (response.status_code, response.json()["code"]) == (500, "internal_error")
    assert response.json()["request_id"] == "mine"
    assert "secret" not in response.text
    assert_guarded(response)


def test_a_body_that_comes_too_slowly_is_given_up(bare: Callable[..., Bare]) -> None:
    edge = bare()
    edge.edge.body_seconds = 0.05

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await Request(scope, receive).body()
        except HTTPException as error:
            await of_http(scope, error)(scope, receive, send)

    async def drip() -> Any:
        yield b"{"
        await forever()
        yield b"}"

    edge.inside.does = read
    response = edge.ask("POST", content=drip())
    assert (response.status_code, response.json()["code"]) == (408, "request_timeout")
    assert response.headers["connection"] == "close"
    assert_guarded(response)


async def forever() -> None:
    await anyio.sleep_forever()


def test_a_body_that_comes_fast_enough_is_waited_for(bare: Callable[..., Bare]) -> None:
    """4 KiB buy another second: a body that stops for longer than it had at first is read all the same."""
    edge = bare()
    edge.edge.body_seconds = 0.05

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        size = len(await Request(scope, receive).body())
        await PlainTextResponse(str(size))(scope, receive, send)

    async def parts() -> Any:
        yield b"x" * 1024 * 1024
        await anyio.sleep(0.1)
        yield b"x"

    edge.inside.does = read
    assert edge.ask("POST", content=parts()).text == str(1024 * 1024 + 1)


def test_a_client_that_never_ends_its_body_does_not_keep_a_stream_open(bare: Callable[..., Bare]) -> None:
    edge = bare()
    edge.edge.body_seconds = 0.05

    async def frames() -> Any:
        yield b"one"
        await forever()

    async def receive() -> Message:
        await forever()
        raise AssertionError("it came")

    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    async def ask() -> None:
        scope = {"type": "http", "method": "GET", "headers": [], "query_string": b"", "path": "/"}
        await edge.edge({**scope, "asgi": {"version": "3.0"}, "client": None}, receive, send)

    edge.inside.does = StreamingResponse(frames())
    edge.portal.call(ask)
    assert [message.get("body") for message in said] == [None, b"one"]


def test_who_asks_is_told_by_trusted_proxies_only(bare: Callable[..., Bare]) -> None:
    forwarded = {"X-Forwarded-For": "203.0.113.9, 192.0.2.1", "X-Forwarded-Proto": "https"}
    trusting = bare(peer="10.0.0.1", trusted_proxies="10.0.0.0/8")
    trusting.ask(headers=forwarded)
    assert trusting.inside.clients == [("192.0.2.1", 1)]
    for other in (bare(peer="10.0.0.1"), bare(peer="203.0.113.77", trusted_proxies="10.0.0.0/8")):
        other.ask(headers=forwarded)
        assert other.inside.clients == [(other._peer, 1)]


# Metrics


def test_metrics_count_requests_and_show_how_things_stand(each_api: LocalApi) -> None:
    before = metrics(each_api)
    each_api.make()
    each_api.make(delay_seconds=60)
    each_api.get("/nothing")
    now = metrics(each_api)

    def grew(name: str) -> float:
        return now[name] - before.get(name, 0)

    assert grew('laneway_http_requests_total{operation="createJob",status="2xx"}') == 2
    assert grew('laneway_http_requests_total{operation="none",status="4xx"}') == 1
    assert grew('laneway_http_request_seconds_total{operation="createJob"}') > 0
    assert now['laneway_jobs{status="queued"}'] == now['laneway_jobs{status="scheduled"}'] == 1
    assert now["laneway_database_up"] == now["laneway_lanes_up"] == 1
    assert now["laneway_limiter_degraded"] == now["laneway_webhooks_waiting"] == 0
    assert now['laneway_workers{state="active"}'] == 0


def metrics(api: LocalApi) -> dict[str, float]:
    response = api.get("//metrics", key=None)
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = response.text.splitlines()
    assert all(
        re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{(\w+=\"[^\"]*\",?)+\})? [-+.e\d]+", x) for x in lines
    )
    return {
        name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))
    }


def test_metrics_name_nothing_that_a_tenant_named(api: LocalApi) -> None:
    canary = "canary"
    key = api.key(tenant=canary, subject=f"{canary}_subject")
    api.make(key=key, queue=f"{canary}_queue", title=canary, tags=[canary])
    api.get(f"/job-types/{canary}")
    api.get(f"/{canary}?{canary}={canary}")
    assert canary not in api.get("//metrics", key=None).text


def test_metrics_are_for_the_networks_of_the_setting(local: Callable[..., LocalApi]) -> None:
    elsewhere = local(metrics_networks="192.0.2.0/24")
    response = elsewhere.get("//metrics", key=None)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert "LANEWAY_METRICS_NETWORKS" in response.json()["detail"]
    here = local()
    assert here.get("//metrics", key=None).status_code == 200
    hidden = here.get("//metrics", key=None, headers={"X-Forwarded-For": "203.0.113.9"})
    assert hidden.status_code == 403, "a proxy on this machine that nobody trusts"
    behind = local(trusted_proxies="127.0.0.1")
    for client, status in (("203.0.113.9", 403), ("127.0.0.2", 200)):
        asked = behind.get("//metrics", key=None, headers={"X-Forwarded-For": client})
        assert asked.status_code == status, client


def test_a_problem_is_json_that_any_client_reads(api: LocalApi) -> None:
    response = api.get("/nothing%00%F0%9F%98%80%ff")
    assert json.loads(response.content)["status"] == 404
