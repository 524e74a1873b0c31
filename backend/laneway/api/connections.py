"""Connections that cannot be held for nothing: uvicorn's, with bounds for what comes before a request.

uvicorn waits without end for a request's head and keeps whatever has come of it, so that a client that
drips holds a connection for as long as it likes. Here a head must be there HEAD_SECONDS after its first
byte, or after the connection was made; it may have MAX_HEAD_BYTES; and so many connections are open at
once. What is refused before there is a request is answered as a problem too, and closed.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from laneway.api.edge import ALWAYS, MAX_HEAD_BYTES
from laneway.clock import new_id
from laneway.errors import try_again_seconds
from laneway.log import get_logger

HEAD_SECONDS = 10.0

log = get_logger("api")


class Connection(HttpToolsProtocol):
    """One connection. `max_connections` and `head_seconds` are set by `of`."""

    max_connections = 0
    head_seconds = HEAD_SECONDS

    @classmethod
    def of(cls, *, max_connections: int, head_seconds: float = HEAD_SECONDS) -> type[Connection]:
        """The class with its bounds, for `uvicorn.Config(http=…)`."""
        return type("Connection", (cls,), {"max_connections": max_connections, "head_seconds": head_seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = False
        self._head_bytes = 0
        self._until: asyncio.TimerHandle | None = None
        if len(self.connections) > self.max_connections:
            log.warning("connection_refused", open=self.max_connections)
            self._refuse(503, "unavailable", f"{self.max_connections} connections are open already")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # refused
        of_a_head = self._in_head or self._is_answered()  # and not the rest of a body
        super().data_received(data)
        if self._in_head and of_a_head:
            self._head_bytes += len(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(
                431, "headers_too_large", f"path and headers may have at most {MAX_HEAD_BYTES} bytes"
            )
        elif self._until is None and self._is_idle():
            self._await_head()  # the rest of a body that was answered already, or nothing that makes sense

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", "this is no HTTP request that can be understood")

    def _is_idle(self) -> bool:
        """Whether nothing is under way that would ever end this connection."""
        waits = self.timeout_keep_alive_task is not None
        return self._is_answered() and not waits and not self.transport.is_closing()

    def _is_answered(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _await_head(self) -> None:
        self._stop_waiting()
        self._head_bytes = 0
        self._until = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def _too_slow(self) -> None:
        if self._in_head:
            self._refuse(408, "request_timeout", f"the request's head took over {self.head_seconds:g} s")
        else:
            self.transport.close()  # nobody waits for an answer

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer in place of the application, and close.

        While it is at work on a request that came whole, or has begun to answer, nothing is said: whatever
        it were, the client would take it for that request's answer.
        """
        self._stop_waiting()
        if self._is_answered() or (self.cycle.more_body and not self.cycle.response_started):
            self.transport.write(answer(status, code=code, detail=detail))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def answer(status: int, *, code: str, detail: str) -> bytes:
    """A whole HTTP response that is a problem, with the headers that every answer has."""
    request_id = new_id()
    problem: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": _PHRASES[status],
        "status": status,
        "detail": detail,
        "instance": "",
        "code": code,
        "request_id": request_id,
    }
    body = json.dumps(problem).encode()
    headers = {
        "content-type": "application/problem+json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
        "cache-control": "no-store",
        **{name.decode(): value.decode() for name, value in ALWAYS},
        "connection": "close",
    }
    if status == 503:
        headers["retry-after"] = str(try_again_seconds())
    lines = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
