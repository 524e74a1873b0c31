"""The worker registry over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import MAX_PAGE, as_json, page_answer
from laneway.api.runtime import CallerDep, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.engine import workers
from laneway.engine.access.callers import Role
from laneway.engine.workers import MAX_HELD_SHOWN
from laneway.limits.rules import RateClass

State = Literal["active", "draining", "gone", "dead"]

router = APIRouter(route_class=GatedRoute, tags=["workers"])


class RegisteredWorker(BaseModel):
    """A worker process: `draining` ones take no more jobs, `gone` ones left, `dead` ones fell silent."""

    id: str
    name: str
    host: str
    pid: int
    version: str = Field(description="Of Laneway.")
    state: State
    lanes: list[str]
    held: int = Field(description="Jobs it runs or is about to, of all tenants.")
    held_jobs: list[str] = Field(
        description=f"Ids of those of the caller's tenant, oldest first, at most {MAX_HELD_SHOWN}."
    )
    beat_age_seconds: float = Field(description="How long ago it last said that it lives.")
    started_at: datetime


class WorkerPage(BaseModel):
    data: list[RegisteredWorker]
    next_cursor: str | None
    has_more: bool


class WorkerQuery(BaseModel):
    """Which workers."""

    model_config = ConfigDict(extra="forbid")

    state: list[State] = Field([], description="Repeatable; default: `active` and `draining`.")
    cursor: Annotated[str, Field(max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


@router.get("/workers", response_model=WorkerPage, operation_id="listWorkers", responses=problems(400))
@access(RateClass.DEFAULT, Role.OPERATOR)
async def list_workers(
    request: Request, caller: CallerDep, runtime: RuntimeDep, asked: Annotated[WorkerQuery, Query()]
) -> Response:
    """The workers, newest first. Those that left are kept for a week."""
    page, following = await in_thread(
        workers.page, runtime.database, caller, asked.state, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)


@router.get(
    "/workers/{worker_id}",
    response_model=RegisteredWorker,
    operation_id="getWorker",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def get_worker(worker_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """One worker, also one that left."""
    return as_json(await in_thread(workers.get, runtime.database, str(worker_id), caller))
