"""Clients that hold connections for nothing: what they get, and that they go."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from laneway.api.connections import Connection
from laneway.api.edge import MAX_HEAD_BYTES, Edge
from laneway.api.problems import of_http
from servers import wait_until

OK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def refuse(request: Request) -> PlainTextResponse:
    return PlainTextResponse("no", 413)


class Served:
    """A small application behind the edge, served by uvicorn with our connections, in a thread."""

    def __init__(self, *, max_connections: int = 50, head_seconds: float = 60.0) -> None:
        routes = [Route("/", read, methods=["GET", "POST"]), Route("/refuse", refuse, methods=["POST"])]
        app = Starlette(
            routes=routes,
            exception_handlers={408: lambda request, error: of_http(request.scope, error)},  # type: ignore[dict-item, arg-type]
        )
        self.edge = Edge(app)
        self._listener = socket.create_server(("127.0.0.1", 0))
        kind = Connection.of(max_connections=max_connections, head_seconds=head_seconds)
        config = uvicorn.Config(self.edge, http=kind, ws="none", lifespan="off", log_config=None)
        self.server = uvicorn.Server(config)
        self.server.capture_signals = ExitStack  # type: ignore[method-assign]  # it is not the main thread
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],))

    def __enter__(self) -> Served:
        self._thread.start()
        wait_until(lambda: self.server.started, what="it serves", seconds=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(60)
        self._listener.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self._listener.getsockname()[:2], timeout=60)

    def say(self, *parts: bytes) -> Answer:
        """What is answered until the server closes, to one who stays silent after the last part."""
        with self.connect() as client:
            for part in parts:
                client.sendall(part)
            return Answer(everything(client))


class Answer:
    """One HTTP answer, or that there was none."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1]) if first else None
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    @property
    def problem(self) -> dict[str, Any]:
        """The problem that it is, complete and with the headers of every answer."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["x-content-type-options"] == "nosniff"
        assert self.headers["connection"] == "close"
        found = dict(json.loads(self.body))
        assert (found["status"], found["request_id"]) == (self.status, self.headers["x-request-id"])
        return found


def everything(client: socket.socket) -> bytes:
    got = b""
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            return got
        if not part:
            return got
        got += part


def one(client: socket.socket) -> Answer:
    """The next answer on a connection that stays open."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += client.recv(4096)
    length = int(Answer(got).headers["content-length"])
    while len(Answer(got).body) < length:
        got += client.recv(4096)
    return Answer(got)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    with ExitStack() as stack:
        yield lambda **how: stack.enter_context(Served(**how))


def test_one_who_says_nothing_is_closed_without_a_word(serve: Callable[..., Served]) -> None:
    assert serve(head_seconds=0.1).say().status is None


@pytest.mark.parametrize(
    "begun", [b"G", b"GET / HTTP/1.1\r\n", OK[:-2], b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"y" * 1000]
)
def test_a_head_that_comes_too_slowly_is_given_up(serve: Callable[..., Served], begun: bytes) -> None:
    answer = serve(head_seconds=0.1).say(begun)
    assert (answer.status, answer.problem["code"]) == (408, "request_timeout")


def test_the_second_request_of_a_connection_has_its_time_too(serve: Callable[..., Served]) -> None:
    served = serve(head_seconds=0.2)
    with served.connect() as client:
        client.sendall(OK)
        assert one(client).status == 200
        client.sendall(OK[:10])
        assert Answer(everything(client)).problem["code"] == "request_timeout"


@pytest.mark.parametrize("junk", [b"\r\n", b"\n"])
def test_line_ends_between_requests_do_not_keep_a_connection(
    serve: Callable[..., Served], junk: bytes
) -> None:
    served = serve(head_seconds=0.1)
    with served.connect() as client:
        client.sendall(OK)
        assert one(client).status == 200
        client.sendall(junk)
        assert everything(client) == b""


def test_a_body_that_was_refused_already_is_not_waited_for(serve: Callable[..., Served]) -> None:
    served = serve(head_seconds=0.1)
    with served.connect() as client:
        client.sendall(b"POST /refuse HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx")
        assert one(client).status == 413
        client.sendall(b"x")
        assert everything(client) == b""


def test_a_body_that_comes_too_slowly_is_answered_408_and_closed(serve: Callable[..., Served]) -> None:
    served = serve()
    served.edge.body_seconds = 0.1
    for body in (b"Content-Length: 10\r\n\r\n12345", b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n"):
        answer = served.say(b"POST / HTTP/1.1\r\nHost: x\r\n" + body)
        assert (answer.status, answer.problem["code"]) == (408, "request_timeout")


def test_a_head_that_never_ends_is_cut_at_32_kib(serve: Callable[..., Served]) -> None:
    served = serve()
    start = b"GET / HTTP/1.1\r\nHost: x\r\n"
    for fill in (b"X-Fill: " + b"y" * MAX_HEAD_BYTES, b"a: b\r\n" * (MAX_HEAD_BYTES // 6 + 1)):
        answer = served.say(start + fill)
        assert (answer.status, answer.problem["code"]) == (431, "headers_too_large")


def test_a_head_that_came_at_once_may_have_32_kib_too(serve: Callable[..., Served]) -> None:
    served = serve()
    with served.connect() as client:
        fill = b"y" * (MAX_HEAD_BYTES - len(b"/host") - len(b"x") - 4 - len(b"x-fill") - 4)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Fill: " + fill + b"\r\n\r\n")
        assert one(client).status == 200
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Fill: y" + fill + b"\r\n\r\n")
        assert one(client).status == 431


NO_HTTP = {
    "words": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length and chunks": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "a bent length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "a bent chunk": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n: z\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: x\0y\r\n\r\n",
    "another protocol": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "a request to connect": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
}


def test_what_is_no_http_is_a_problem_too(serve: Callable[..., Served]) -> None:
    served = serve()
    for name, said in NO_HTTP.items():
        answer = served.say(said)
        assert (answer.status, answer.problem["code"]) == (400, "bad_request"), name
    assert served.say(OK[:-4] + b"\r\nConnection: close\r\n\r\n").status == 200


def test_a_body_longer_than_it_was_said_to_be_ends_the_connection(serve: Callable[..., Served]) -> None:
    """The rest would be another request, and is none. An answer to it would be taken for the first's."""
    served = serve()
    with served.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcdefg\r\n\r\n")
        assert everything(client) == b""


def test_so_many_connections_are_open_at_once_and_no_more(serve: Callable[..., Served]) -> None:
    served = serve(max_connections=3)
    held = [served.connect() for _ in range(3)]
    wait_until(lambda: len(served.server.server_state.connections) == 3, what="they are open")
    answer = served.say()
    assert (answer.status, answer.problem["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    held.pop().close()
    wait_until(lambda: len(served.server.server_state.connections) == 2, what="one has gone")
    assert served.say(OK[:-4] + b"\r\nConnection: close\r\n\r\n").status == 200
    for client in held:
        client.sendall(OK)
        assert one(client).status == 200, "who was there before is served"
        client.close()
