"""The outermost layer: what every response has, whatever happened inside.

It stands outside of FastAPI, because middleware added to the app does not see the answer to an
unhandled exception, which the app raises again once problems.py has answered it.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laneway.clock import new_id
from laneway.limits.headers import render
from laneway.log import get_logger

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FIXED = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]

log = get_logger("api")


class Edge:
    """Adds the request id, the limiter's headers and the security headers; logs crashes with the id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        scope["laneway.request_id"] = request_id
        answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                names = {name for name, _ in headers}
                headers.append((b"x-request-id", request_id.encode()))
                headers += _FIXED
                if b"cache-control" not in names:
                    headers.append((b"cache-control", b"no-store"))
                decision = scope.get("laneway.decision")
                if decision is not None:
                    headers += [header for header in render(decision) if header[0] not in names]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass  # while it sent its body: nobody waits for an answer
        except Exception:
            log.exception("request_crashed", request_id=request_id, method=scope["method"])
            if not answered:
                raise  # in the middle of the answer: the server cuts the connection, so that it shows
