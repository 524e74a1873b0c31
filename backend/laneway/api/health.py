"""Is the process alive, and can it accept work? No key, no limit."""

from __future__ import annotations

import sqlalchemy as sa
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import RETRY_AFTER_SECONDS, RuntimeDep, in_thread
from laneway.errors import StorageUnavailable
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["health"])
_KEYLESS: dict[str, object] = {"security": []}


class Liveness(BaseModel):
    status: str


class Readiness(BaseModel):
    """`status` and `database` decide; `limiter` is `degraded` while Redis does not count for it."""

    status: str
    database: str
    limiter: str


@router.get("/livez", operation_id="livez", response_model=Liveness, openapi_extra=_KEYLESS)
@access(RateClass.FREE, None)
async def livez() -> Response:
    """200 while the process runs."""
    return as_json({"status": "ok"})


@router.get(
    "/readyz",
    operation_id="readyz",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "The database is away: no job can be accepted."}},
    openapi_extra=_KEYLESS,
)
@access(RateClass.FREE, None)
async def readyz(runtime: RuntimeDep) -> Response:
    """200 when jobs can be accepted, which takes the database. `limiter` tells of Redis."""

    def look() -> None:
        with runtime.database.read() as connection:
            connection.execute(sa.text("SELECT 1"))

    limiter = "degraded" if runtime.limiter.degraded else "ok"
    try:
        await in_thread(look)
    except StorageUnavailable:
        answer = {"status": "unavailable", "database": "away", "limiter": limiter}
        return as_json(answer, 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})
    return as_json({"status": "ok", "database": "ok", "limiter": limiter})
