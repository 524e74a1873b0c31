"""Is the process alive, and can it accept work? No key, no limit."""

from __future__ import annotations

import sqlalchemy as sa
from fastapi import APIRouter
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import RuntimeDep, in_thread
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["health"])


@router.get("/livez", operation_id="livez", response_model=dict[str, str])
@access(RateClass.FREE, None)
async def livez() -> Response:
    """200 while the process runs."""
    return as_json({"status": "ok"})


@router.get(
    "/readyz",
    operation_id="readyz",
    response_model=dict[str, str],
    responses={503: {"description": "The database is away: no job can be accepted."}},
)
@access(RateClass.FREE, None)
async def readyz(runtime: RuntimeDep) -> Response:
    """200 when jobs can be accepted, which takes the database. `limiter` and `lanes` tell of Redis."""

    def look() -> None:
        with runtime.database.read() as connection:
            connection.execute(sa.text("SELECT 1"))

    limiter = "degraded" if runtime.limiter.degraded else "ok"
    try:
        await in_thread(look)
    except (sa.exc.DBAPIError, sa.exc.TimeoutError):
        return as_json(
            {"status": "unavailable", "database": "away", "limiter": limiter}, 503, {"Retry-After": "2"}
        )
    return as_json({"status": "ok", "database": "ok", "limiter": limiter})
