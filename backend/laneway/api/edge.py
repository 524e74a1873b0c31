"""The outermost layer: what every response has, whatever happened inside.

It stands outside of FastAPI, because middleware added to the app does not see the answer to an
unhandled exception.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from laneway.api.problems import problem
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
    """Adds the request id, the limiter's headers and the security headers; answers crashes as problems."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id()
        scope["laneway.request_id"] = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
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
        except Exception:
            log.exception("request_crashed", request_id=request_id, method=scope["method"])
            if started:
                raise
            response = problem(
                scope,
                status=500,
                code="internal_error",
                title="Internal error",
                detail="Something went wrong here; the request id finds it in the log.",
            )
            await response(scope, receive, send_with_headers)
