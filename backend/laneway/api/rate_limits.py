"""What limits a caller is under, and how much of them is left."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep, RuntimeDep
from laneway.api.schemas import problems
from laneway.engine.queries import stamp
from laneway.limits.decision import Standing
from laneway.limits.headers import whole_seconds
from laneway.limits.rules import Policy, RateClass

router = APIRouter(route_class=GatedRoute, tags=["rate limits"])


class RateLimitStanding(BaseModel):
    """One window: at most `quota` units in any `window_seconds`."""

    name: str = Field(description="As in the headers.")
    policies: list[Policy] = Field(
        description="What counts: rate classes; all requests of the tenant (`tenant`); its new jobs (`jobs`)."
    )
    unit: Literal["requests", "jobs"]
    counted_per: Literal["user", "tenant"]
    quota: int
    window_seconds: int
    used: int
    remaining: int
    reset_at: datetime | None = Field(description="When more comes free; null when nothing is used.")


class RateLimits(BaseModel):
    """What is not listed has no limit. `degraded`: Redis is away, and this process counts for itself."""

    data: list[RateLimitStanding]
    degraded: bool


@router.get("/rate-limits", response_model=RateLimits, operation_id="getRateLimits", responses=problems())
@access(RateClass.FREE)
async def get_rate_limits(caller: CallerDep, runtime: RuntimeDep) -> Response:
    """The caller's rate limits and what is left of each. Asking costs nothing."""
    decision, policies = await runtime.limiter.standings(tenant_id=caller.tenant_id, subject=caller.subject)
    data = [
        _shown(standing, counted, now_us=decision.now_us)
        for standing, counted in zip(decision.rules, policies, strict=True)
    ]
    return as_json({"data": data, "degraded": decision.local})


def _shown(standing: Standing, policies: list[Policy], *, now_us: int) -> dict[str, object]:
    rule = standing.rule
    reset = whole_seconds(now_us + standing.reset_us)
    return {
        "name": rule.name,
        "policies": policies,
        "unit": rule.unit,
        "counted_per": rule.partition,
        "quota": rule.quota,
        "window_seconds": rule.window_seconds,
        "used": standing.used,
        "remaining": standing.remaining,
        "reset_at": stamp(datetime.fromtimestamp(reset, UTC)) if standing.reset_us else None,
    }
