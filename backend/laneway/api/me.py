"""Who the caller is, over HTTP."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep
from laneway.api.schemas import problems
from laneway.engine.access.callers import AccessScope, Role
from laneway.engine.queries import stamp
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["auth"])


class MeView(BaseModel):
    """What the credential of this request says."""

    tenant_id: str
    subject: str = Field(description="Owns the jobs that it makes, and holds the limits.")
    role: Role
    scopes: list[AccessScope]
    key_id: str | None = Field(description="The API key; null: a JWT.")
    job_id: str | None = Field(description="The one job that a token opens; null: no such bound.")
    expires_at: datetime | None


@router.get("/me", response_model=MeView, operation_id="getMe", responses=problems())
@access(RateClass.FREE)
async def get_me(caller: CallerDep) -> Response:
    """Who calls, and what they may do."""
    return as_json(
        {
            "tenant_id": caller.tenant_id,
            "subject": caller.subject,
            "role": caller.role,
            "scopes": sorted(caller.scopes),
            "key_id": caller.key_id or None,
            "job_id": caller.job_id,
            "expires_at": stamp(caller.expires_at),
        }
    )
