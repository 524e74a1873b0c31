"""The outermost layer: what every response has, whatever happened inside, and what no request may do.

It stands outside of FastAPI, because middleware added to the app does not see the answer to an
unhandled exception, which the app raises again once problems.py has answered it.
"""

from __future__ import annotations

import asyncio
import re
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laneway.api.client_address import client_address
from laneway.api.metrics import Requests
from laneway.api.problems import of_crash, of_http
from laneway.clock import new_id
from laneway.limits.headers import render
from laneway.log import get_logger
from laneway.settings import Settings

MAX_HEAD_BYTES = 32 * 1024  # path, query and headers of a request
BODY_SECONDS = 20.0  # for a request's body to come, and a second more
BODY_BYTES_PER_SECOND = 4 * 1024  # for each of these

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Version 00 of https://www.w3.org/TR/trace-context/#traceparent-header; ids of zeros are none.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_CLOSED = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_OF_DOCS = (  # Swagger UI, as FastAPI loads it
    b"default-src 'none'; script-src https://cdn.jsdelivr.net 'unsafe-inline'; "
    b"style-src https://cdn.jsdelivr.net 'unsafe-inline'; img-src https://fastapi.tiangolo.com data:; "
    b"connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_POLICIES = {"/docs": _OF_DOCS}
ALWAYS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
_HSTS = (b"strict-transport-security", b"max-age=31536000")

log = get_logger("api")


class Edge:
    """Adds the request id, the limiter's headers and the security headers; logs crashes with the id.

    Answers HEAD as GET without the body, refuses heads that are too large (431) and bodies that come too
    slowly (408), and finds out who is behind a trusted proxy.
    """

    def __init__(self, app: ASGIApp, settings: Settings | None = None) -> None:
        settings = settings or Settings.model_construct()
        self._app = app
        self._proxies = settings.proxy_networks
        self._requests = Requests()
        self.body_seconds = BODY_SECONDS
        self._fixed = [*ALWAYS, _HSTS] if settings.public_url.startswith("https://") else ALWAYS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        scope["laneway.request_id"] = request_id
        scope["laneway.traceparent"] = _traceparent(headers)
        scope["laneway.requests"] = self._requests
        if self._proxies and scope["client"]:
            peer, port = scope["client"]
            scope["client"] = (client_address(peer, scope["headers"], self._proxies), port)
        answer = _Answer(scope, send, request_id, self._fixed)
        began = time.monotonic()
        body = _Body(receive, answer, until=began + self.body_seconds)
        try:
            if _head_bytes(scope) > MAX_HEAD_BYTES:
                refusal = HTTPException(431, f"path and headers may have at most {MAX_HEAD_BYTES} bytes")
                await of_http(scope, refusal)(scope, receive, answer.send)
            else:
                await self._app(answer.asked, body.receive, answer.send)
                await answer.end()
        except ClientDisconnect:
            pass  # while it sent its body: nobody waits for an answer
        except Exception:
            log.exception("request_crashed", request_id=request_id, method=scope["method"])
            if not answer.started:
                await of_crash(scope)(scope, receive, answer.send)
            elif not answer.ended:
                raise  # in the middle of the answer: the server cuts the connection, so that it shows
        finally:
            operation = getattr(answer.asked.get("route"), "operation_id", None) or "none"
            self._requests.count(operation, status=answer.status, seconds=time.monotonic() - began)


class _Answer:
    """The answer to one request, on its way out."""

    def __init__(self, scope: Scope, send: Send, request_id: str, fixed: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self._fixed = fixed
        self._head = scope["method"] == "HEAD"
        self.asked = scope
        if (
            self._head
        ):  # GET without the body (RFC 9110, 9.3.2); of 2.3 a stream listens for its client's leaving
            self.asked = {**scope, "method": "GET", "asgi": {**scope["asgi"], "spec_version": "2.3"}}
        self._enough = asyncio.Event() if self._head else None
        self.status = 499  # as nginx calls it: the client left before there was any
        self.started = self.ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            if self._enough is not None:
                self._enough.set()
            await self._send({**message, "headers": self._complete(message["headers"])})
            return
        self.ended = not message.get("more_body", False)
        if not self._head:
            await self._send(message)
        elif self.ended:
            await self._send({"type": "http.response.body"})

    async def end(self) -> None:
        """End the answer to a HEAD whose body would have been a stream: the app saw its client leave."""
        if self._head and self.started and not self.ended:
            await self.send({"type": "http.response.body"})

    async def leaving(self, receive: Receive) -> Message:
        """Wait for the client to leave: as the server hears of it, or, of a HEAD, once all is said."""
        if self._enough is None:
            return await receive()
        await self._enough.wait()
        return {"type": "http.disconnect"}

    def _complete(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        names = {name for name, _ in headers}
        headers = [*headers, (b"x-request-id", self._request_id), *self._fixed]
        if b"cache-control" not in names:
            headers.append((b"cache-control", b"no-store"))
        if b"content-security-policy" not in names:
            headers.append((b"content-security-policy", _POLICIES.get(self.asked["path"], _CLOSED)))
        decision = self.asked.get("laneway.decision")
        if decision is not None:
            headers += [header for header in render(decision) if header[0] not in names]
        return headers


class _Body:
    """The body of one request, on its way in: cut once it comes too slowly."""

    def __init__(self, receive: Receive, answer: _Answer, *, until: float) -> None:
        self._receive = receive
        self._answer = answer
        self._until = until
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._answer.leaving(self._receive)
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            if self._answer.started:
                return {"type": "http.disconnect"}
            raise HTTPException(408, "the body came too slowly", headers={"Connection": "close"}) from None
        self._whole = not message.get("more_body", False)
        self._until += len(message.get("body", b"")) / BODY_BYTES_PER_SECOND
        return message


def _traceparent(headers: Headers) -> str | None:
    """The caller's place in its trace, None when it names none or a bent one."""
    given = headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None


def _head_bytes(scope: Scope) -> int:
    lines = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return lines + len(scope.get("raw_path") or b"") + len(scope["query_string"])
