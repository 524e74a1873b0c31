"""API keys over HTTP. A key's text is in the answer that makes it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, TypeVar

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json, link_to
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.engine.access.callers import AccessScope, Caller, Role
from laneway.engine.access.keys import MAX_OVERLAP_SECONDS, OVERLAP_SECONDS, KeyChange, Keys, NewKey
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["api-keys"])
T = TypeVar("T")
KeyId = Annotated[str, Path(pattern="^[a-z0-9]{12}$", description="The 12 characters after `lw_live_`.")]


class KeyView(BaseModel):
    """An API key, without what opens it."""

    id: str
    tenant_id: str
    name: str | None
    subject: str
    role: Role
    scopes: list[AccessScope] | None = Field(description="null: all that the role has.")
    allowed_cidrs: list[str] | None = Field(description="null: it may be used from anywhere.")
    expires_at: datetime | None
    revoked_at: datetime | None
    replaces: str | None = Field(description="The key that this one was rotated from.")
    last_used_at: datetime | None = Field(description="To the minute.")
    last_used_ip: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


class KeyWithText(KeyView):
    """A new key and its text, which is shown this once."""

    key: str


class KeyList(BaseModel):
    """The tenant's keys that are not revoked, oldest first: at most 500."""

    data: list[KeyView]


class KeyRotation(BaseModel):
    """How a key is replaced."""

    model_config = ConfigDict(extra="forbid")

    overlap_seconds: Annotated[int, Field(ge=0, le=MAX_OVERLAP_SECONDS)] = Field(
        OVERLAP_SECONDS, description="So long the old key opens too."
    )


@router.post(
    "/api-keys",
    status_code=201,
    response_model=KeyWithText,
    operation_id="createApiKey",
    responses=problems(400, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def create_api_key(
    request: Request, wanted: NewKey, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Make a key of the caller's tenant, no stronger than the caller. The answer holds its text, once."""
    made, text = await _call(runtime, caller, lambda keys: keys.create(wanted))
    where = link_to(request, f"/api/v1/api-keys/{made['id']}")
    return as_json({**made, "key": text}, 201, {"Location": where})


@router.get("/api-keys", response_model=KeyList, operation_id="listApiKeys", responses=problems())
@access(RateClass.DEFAULT, Role.OPERATOR)
async def list_api_keys(caller: CallerDep, runtime: RuntimeDep) -> Response:
    """The tenant's keys that are not revoked."""
    return as_json({"data": await _call(runtime, caller, lambda keys: keys.all())})


@router.get("/api-keys/{key_id}", response_model=KeyView, operation_id="getApiKey", responses=problems(404))
@access(RateClass.DEFAULT, Role.OPERATOR)
async def get_api_key(key_id: KeyId, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """One key, also a revoked one."""
    return as_json(await _call(runtime, caller, lambda keys: keys.get(key_id)))


@router.patch(
    "/api-keys/{key_id}",
    response_model=KeyView,
    operation_id="changeApiKey",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def change_api_key(
    key_id: KeyId, wanted: KeyChange, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Change what is given; null takes a bound away. In force within a second."""
    changed = await _call(runtime, caller, lambda keys: keys.change(key_id, wanted))
    runtime.callers.forget([key_id])
    return as_json(changed)


@router.post(
    "/api-keys/{key_id}/rotate",
    status_code=201,
    response_model=KeyWithText,
    operation_id="rotateApiKey",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def rotate_api_key(
    request: Request, key_id: KeyId, caller: CallerDep, runtime: RuntimeDep, wanted: KeyRotation | None = None
) -> Response:
    """A new key for the same subject, shown this once; the old one opens until the overlap is over."""
    overlap = (wanted or KeyRotation()).overlap_seconds
    made, text = await _call(runtime, caller, lambda keys: keys.rotate(key_id, overlap_seconds=overlap))
    runtime.callers.forget([key_id])
    where = link_to(request, f"/api/v1/api-keys/{made['id']}")
    return as_json({**made, "key": text}, 201, {"Location": where})


@router.delete("/api-keys/{key_id}", status_code=204, operation_id="revokeApiKey", responses=problems(404))
@access(RateClass.DEFAULT, Role.OPERATOR)
async def revoke_api_key(key_id: KeyId, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Revoke a key: at once here, within a second at every other API process."""
    await _call(runtime, caller, lambda keys: keys.revoke(key_id))
    runtime.callers.forget([key_id])
    return Response(status_code=204)


async def _call(runtime: Runtime, caller: Caller, ask: Callable[[Keys], T]) -> T:
    return await in_thread(lambda: ask(Keys(runtime.database, caller, now=runtime.clock.now())))
