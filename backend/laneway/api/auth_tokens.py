"""Short-lived tokens for browsers, over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.engine.access.callers import AccessScope
from laneway.engine.access.tokens import MAX_TOKEN_SECONDS, token_end
from laneway.engine.queries import stamp
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["auth"])


class NewToken(BaseModel):
    """A token to be made."""

    model_config = ConfigDict(extra="forbid")

    job_id: UUID | None = Field(None, description="It opens this job, and nothing else; null: no bound.")
    scopes: Annotated[list[AccessScope], Field(min_length=1, max_length=len(AccessScope))] | None = Field(
        None,
        description="null: what the caller may but for `keys:manage`, or of one job `jobs:read`. "
        "With `jobs:write` a token of one job may cancel it.",
    )
    expires_in_seconds: Annotated[int, Field(ge=1, le=MAX_TOKEN_SECONDS)] = MAX_TOKEN_SECONDS


class TokenView(BaseModel):
    """A token. It is kept nowhere."""

    token: str
    expires_at: datetime
    scopes: list[AccessScope]
    job_id: str | None


@router.post(
    "/auth/tokens",
    status_code=201,
    response_model=TokenView,
    operation_id="createToken",
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.DEFAULT)
async def create_token(caller: CallerDep, runtime: RuntimeDep, wanted: NewToken | None = None) -> Response:
    """A token for a browser: for at most 15 minutes, with no more rights than the caller has."""
    wanted = wanted or NewToken()
    job_id = None if wanted.job_id is None else str(wanted.job_id)
    text, made = runtime.callers.make_token(
        caller,
        scopes=wanted.scopes,
        job_id=job_id,
        expires_at=token_end(runtime.clock.now(), wanted.expires_in_seconds),
    )
    if job_id is not None:
        await in_thread(runtime.service.get, job_id, caller)
    shown = {"expires_at": stamp(made.expires_at), "scopes": sorted(made.scopes), "job_id": job_id}
    return as_json({"token": text, **shown}, 201)
