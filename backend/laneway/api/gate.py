"""Who may pass: every route names its rate class and role, and both are checked before the body is read.

    @router.post("/jobs")
    @access(RateClass.QUEUE)
    async def create_job(...)

A request without a valid key is counted per client address in this process and answered 401. Fails
closed when the key cannot be checked (503), and as each limit says when Redis is away.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from laneway.api import body_gate
from laneway.api.authentication import authenticate, check_scope, credential_of, scope_of
from laneway.api.runtime import Runtime, runtime_of
from laneway.db import acting_for
from laneway.engine.access.callers import Caller, Role
from laneway.errors import (
    AbnormalUsage,
    CostExceedsQuota,
    Forbidden,
    LanewayError,
    RateLimited,
    Unauthenticated,
)
from laneway.limits.anonymous import FAILED_LOGINS
from laneway.limits.decision import Decision
from laneway.limits.rules import Partition, Policy, RateClass
from laneway.log import get_logger

log = get_logger("api")
F = TypeVar("F", bound=Callable[..., Any])

_CHARGE = "laneway.charge"
_REPLAYED = "idempotency-replayed"  # an answer with it made no jobs, so that none are charged

Direct = Callable[[Request, Runtime, Caller], Coroutine[Any, Any, Response]]


@dataclass(frozen=True, slots=True)
class Access:
    """What a route costs and whom it serves; `role` None serves everybody, without a key."""

    rate: RateClass
    role: Role | None
    direct: Direct | None
    jobs: int | None
    reads_body: bool = False


def access(
    rate: RateClass,
    role: Role | None = Role.USER,
    *,
    direct: Direct | None = None,
    jobs: int | None = 0,
    reads_body: bool = False,
) -> Callable[[F], F]:
    """Declare a route's rate class and the least role it needs.

    `jobs` is how many jobs it makes, charged to the tenant's budget of jobs together with the request. None:
    the body says; then the route calls `charge_jobs` once it knows, and before that nothing is charged.

    `direct` reads the request and calls the endpoint itself, in place of FastAPI: for the hot route,
    where FastAPI's reading costs more than all that Laneway does. The endpoint's signature documents
    the route either way. With `reads_body` it bounds, reads and checks the body by itself, too.
    """

    def declare(endpoint: F) -> F:
        endpoint.__laneway_access__ = Access(rate, role, direct, jobs, reads_body)  # type: ignore[attr-defined]
        return endpoint

    return declare


class GatedRoute(APIRoute):
    """A route that cannot exist without `@access`. Its rate class is `x-rate-class` in the document."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **how: Any) -> None:
        super().__init__(path, endpoint, **how)
        rate = endpoint.__laneway_access__.rate  # type: ignore[attr-defined]
        self.openapi_extra = {**(self.openapi_extra or {}), "x-rate-class": rate.value}

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()
        declared: Access | None = getattr(self.endpoint, "__laneway_access__", None)
        if declared is None:
            raise TypeError(f"{self.methods} {self.path} declares no @access")
        role, direct, jobs = declared.role, declared.direct, declared.jobs
        if role is None:
            return inner
        path, scope = self.path, scope_of(self.path, next(iter(self.methods or ())))
        takes_body = self.body_field is not None and not declared.reads_body

        async def handle(request: Request) -> Response:
            runtime = runtime_of(request)
            caller = await _authenticate(request, runtime)
            charge = partial(_charge, request, runtime, caller, declared.rate)
            if jobs is not None:
                await charge(jobs)
                response = await answer(request, runtime, caller)
            else:
                await charge(0, spend=False)
                request.scope[_CHARGE] = charge
                try:
                    response = await answer(request, runtime, caller)
                finally:
                    if _CHARGE in request.scope:  # refused before it counted its jobs: for its body, say
                        await charge(0)
            if jobs != 0 and _REPLAYED in response.headers:
                decision: Decision = request.scope["laneway.decision"]
                request.scope["laneway.decision"] = await runtime.limiter.give_back(decision, Policy.JOBS)
            return response

        async def answer(request: Request, runtime: Runtime, caller: Caller) -> Response:
            caller.need(role)
            check_scope(request, caller, path, scope)
            request.scope["laneway.caller"] = caller
            acting_for.set(None if caller.role is Role.ADMIN else caller.tenant_id)  # in this request's task
            if takes_body:
                body_gate.check_media_type(request)
                request = body_gate.bounded(request, runtime.settings.max_body_bytes)
                await body_gate.read(request)
            return await (inner(request) if direct is None else direct(request, runtime, caller))

        return handle


async def charge_jobs(request: Request, jobs: int) -> None:
    """Charge a request that makes `jobs` jobs: its class and its tenant's budgets, all or nothing.

    For routes declared with `jobs=None`: to be awaited once, before anything is made. Raises RateLimited,
    and CostExceedsQuota for more than a window ever holds.
    """
    await request.scope.pop(_CHARGE)(jobs)


async def _charge(
    request: Request, runtime: Runtime, caller: Caller, rate: RateClass, jobs: int, *, spend: bool = True
) -> None:
    decision = await runtime.limiter.hit(
        rate, tenant_id=caller.tenant_id, subject=caller.subject, jobs=jobs, spend=spend
    )
    request.scope["laneway.decision"] = decision
    if not decision.allowed:
        raise _refusal(decision, "this caller")


async def _authenticate(request: Request, runtime: Runtime) -> Caller:
    try:
        return await authenticate(request, runtime)
    except Unauthenticated as error:
        address = request.client.host if request.client else None
        decision = runtime.anonymous.hit(address, failed_login=bool(credential_of(request)))
        request.scope["laneway.decision"] = decision
        if not decision.allowed:
            raise _refusal(decision, "this address") from None
        log.info("authentication_failed", reason=str(error.__cause__), address=address)
        raise


def _refusal(decision: Decision, whom: str) -> LanewayError:
    if decision.never:
        tightest = min(decision.never, key=lambda standing: standing.rule.quota)
        rule = tightest.rule
        if not rule.quota:
            return Forbidden(f'policy "{rule.name}" blocks this operation for {whom}')
        return CostExceedsQuota(
            f'this costs {tightest.charge.cost} {rule.unit}, and policy "{rule.name}" allows {rule.quota} '
            f"per {rule.window_seconds} s: no waiting helps, send less at once",
            violated_policies=[standing.rule.name for standing in decision.never],
        )
    violated = [standing for standing in decision.rules if standing.retry_us != 0]
    rule = max(violated, key=lambda standing: standing.retry_us).rule
    wait = decision.retry_after_seconds
    kind = AbnormalUsage if rule is FAILED_LOGINS else RateLimited
    return kind(
        f'policy "{rule.name}" allows {rule.quota} {rule.unit} per {rule.window_seconds} s for '
        f"{'this tenant' if rule.partition is Partition.TENANT else whom}; try again in {wait} s",
        retry_after_seconds=wait,
        violated_policies=[standing.rule.name for standing in violated],
    )
