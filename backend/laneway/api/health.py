"""Is the process alive, and can it accept work? No key, no limit."""

from __future__ import annotations

from contextlib import suppress

import anyio
import anyio.to_thread
import sqlalchemy as sa
from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import RuntimeDep
from laneway.errors import try_again_seconds
from laneway.limits.rules import RateClass

LOOK_SECONDS = 2.0

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
    responses={
        503: {"model": Readiness, "description": "The database is away, or this process is about to stop."}
    },
    openapi_extra=_KEYLESS,
)
@access(RateClass.FREE, None)
async def readyz(runtime: RuntimeDep) -> Response:
    """200 when jobs can be accepted, which takes the database; within 2 s. `limiter` tells of Redis.

    503 `draining` once the process was told to stop: what is sent all the same is answered until it closes.
    """

    def look() -> None:
        with runtime.database.read() as connection:
            connection.execute(sa.text("SELECT 1"))

    limiter = "degraded" if runtime.limiter.degraded else "ok"
    seen = False
    with anyio.move_on_after(LOOK_SECONDS), suppress(sa.exc.SQLAlchemyError):
        await anyio.to_thread.run_sync(look, abandon_on_cancel=True)
        seen = True
    if runtime.leaving.draining:
        answer = {"status": "draining", "database": "ok" if seen else "away", "limiter": limiter}
        return as_json(answer, 503, {"Retry-After": str(try_again_seconds())})
    if seen:
        return as_json({"status": "ok", "database": "ok", "limiter": limiter})
    answer = {"status": "unavailable", "database": "away", "limiter": limiter}
    return as_json(answer, 503, {"Retry-After": str(try_again_seconds())})
