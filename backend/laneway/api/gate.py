"""Who may pass: every route names its rate class and role, and both are checked before the body is read.

    @router.post("/jobs")
    @access(RateClass.QUEUE)
    async def create_job(...)

A request without a valid key is counted per client address in this process and answered 401. Fails
closed when the key cannot be checked (503), to the in-process limiter when Redis is away.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message

from laneway.api.runtime import Runtime, in_thread, runtime_of
from laneway.engine.callers import Caller, Role
from laneway.errors import Forbidden, RateLimited, Unauthenticated
from laneway.limits.decision import Decision
from laneway.limits.rules import RateClass

F = TypeVar("F", bound=Callable[..., Any])

_JSON = re.compile(r"application/([^/]+\+)?json")


Direct = Callable[[Request, Runtime, Caller], Coroutine[Any, Any, Response]]


@dataclass(frozen=True, slots=True)
class Access:
    """What a route costs and whom it serves; `role` None serves everybody, without a key."""

    rate: RateClass
    role: Role | None
    direct: Direct | None


def access(
    rate: RateClass, role: Role | None = Role.USER, *, direct: Direct | None = None
) -> Callable[[F], F]:
    """Declare a route's rate class and the least role it needs.

    `direct` reads the request and calls the endpoint itself, in place of FastAPI: for the hot route,
    where FastAPI's reading costs more than all that Laneway does. The endpoint's signature documents
    the route either way.
    """

    def declare(endpoint: F) -> F:
        endpoint.__laneway_access__ = Access(rate, role, direct)  # type: ignore[attr-defined]
        return endpoint

    return declare


class GatedRoute(APIRoute):
    """A route that cannot exist without `@access`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()
        declared: Access | None = getattr(self.endpoint, "__laneway_access__", None)
        if declared is None:
            raise TypeError(f"{self.methods} {self.path} declares no @access")
        rate, role, direct = declared.rate, declared.role, declared.direct
        if role is None:
            return inner

        async def handle(request: Request) -> Response:
            runtime = runtime_of(request)
            caller = await _authenticate(request, runtime)
            decision = await runtime.limiter.hit(rate, tenant_id=caller.tenant_id, subject=caller.subject)
            request.scope["laneway.decision"] = decision
            if decision.impossible:
                raise Forbidden("a rate limit of 0 blocks this operation for this caller")
            if not decision.allowed:
                raise _refused(decision, "this caller")
            caller.need(role)
            request.scope["laneway.caller"] = caller
            _check_media_type(request)
            bounded = _bounded(request, runtime.settings.max_body_bytes)
            return await (inner(bounded) if direct is None else direct(bounded, runtime, caller))

        return handle


async def _authenticate(request: Request, runtime: Runtime) -> Caller:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = request.headers.get("x-api-key", "")
    try:
        if not key:
            raise Unauthenticated("send an API key: Authorization: Bearer <key>")
        known = runtime.callers.remembered(key.strip())
        if known is not None:
            return known
        return await in_thread(runtime.callers.authenticate, key.strip())
    except Unauthenticated:
        decision = runtime.anonymous.hit(request.client.host if request.client else None)
        request.scope["laneway.decision"] = decision
        if not decision.allowed:
            raise _refused(decision, "this address") from None
        raise


def _refused(decision: Decision, whom: str) -> RateLimited:
    violated = [rule for rule in decision.rules if rule.retry_us != 0]
    rule = max(violated, key=lambda r: r.retry_us)
    wait = decision.retry_after_seconds
    return RateLimited(
        f'policy "{rule.name}" allows {rule.quota} requests per {rule.window_seconds} s for {whom}'
        + (f"; try again in {wait} s" if wait else ""),
        retry_after_seconds=wait,
        violated_policies=[r.name for r in violated],
    )


def _check_media_type(request: Request) -> None:
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return  # no body
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method in {"POST", "PUT", "PATCH"} and not _JSON.fullmatch(media_type):
        raise HTTPException(415, "send the body as application/json")


def _bounded(request: Request, limit: int) -> Request:
    """The request, whose body ends in a 413 once it is longer than `limit` bytes, said or sent."""
    too_long = HTTPException(413, f"the body may have at most {limit} bytes")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > limit:
        raise too_long
    left = limit

    async def receive() -> Message:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise too_long
        return message

    return Request(request.scope, receive)
