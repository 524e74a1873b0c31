"""Chains over HTTP: make, change, execute, look, follow, cancel."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from laneway.api.events import stream_place
from laneway.api.following import STREAMED, follow
from laneway.api.gate import GatedRoute, access, charge_jobs
from laneway.api.idempotency import IdempotencyKey, answered, key_of, once, replayed
from laneway.api.jobs import POLL_HINT_SECONDS, CancelRequest, PageQuery, as_json, link_to, page_answer
from laneway.api.runtime import CallerDep, RuntimeDep, ServiceDep, in_thread
from laneway.api.schemas import problems
from laneway.domain.flow import ChainSpec, ExecutionMode, Item
from laneway.domain.states import JobStatus
from laneway.engine import chains
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["chains"])

View = dict[str, Any]


class ChainRequest(ChainSpec):
    """A chain, and whether to execute it at once."""

    execute: bool = False


class ChainChange(BaseModel):
    """What shall be different; runs that have begun go on as they are."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    execution_mode: ExecutionMode | None = None
    chain_definition: Annotated[tuple[Item, ...], Field(min_length=1)] | None = None
    stop_on_failure: bool | None = None
    timeout_seconds: int | None = Field(None, description="Null: no limit.")


class StepView(BaseModel):
    """A step of a run. It is a job once its turn has come."""

    step: int
    job_type: str
    job_id: str | None
    status: JobStatus | None = Field(description="Of its job; null before its turn.")
    progress: Annotated[int, Field(ge=0, le=100)]
    error: str | None = Field(description="Why it could not be made a job: a result it refers to is missing.")


class Progress(BaseModel):
    """Where a run is."""

    status: str = Field(description="`running`, `completed`, `failed`, `timeout` or `cancelled`.")
    cancelling: bool = Field(description="It is to stop: no step starts any more.")
    current_step: int = Field(description="The first step that has not ended; past the last: all have.")
    total_steps: int
    progress_percent: Annotated[int, Field(ge=0, le=100)]
    steps: list[StepView]
    results: dict[str, Any] = Field(description="Of completed steps: `step_0` and so on. Empty in lists.")
    results_truncated: bool = Field(description="Some are left out, since all together pass 1 MiB.")
    error_message: str | None
    started_at: datetime | None
    finished_at: datetime | None


class ChainView(Progress):
    """A chain and where its newest run is; its status is `pending` before the first."""

    id: str
    tenant_id: str
    created_by: str
    name: str
    execution_mode: ExecutionMode
    chain_definition: list[Any]
    stop_on_failure: bool
    timeout_seconds: int | None
    run_id: str | None
    created_at: datetime
    updated_at: datetime


class ChainRunView(Progress):
    """One way through a chain."""

    id: str
    chain_id: str
    name: str


class ChainPage(BaseModel):
    data: list[ChainView]
    next_cursor: str | None
    has_more: bool


class ChainRunPage(BaseModel):
    data: list[ChainRunView]
    next_cursor: str | None
    has_more: bool


def answer(request: Request, chain: View, status: int) -> Response:
    """A chain, and where to look; with 202 also when."""
    headers = {"Location": link_to(request, f"/api/v1/chains/{chain['id']}")}
    if status == 202:
        headers["Retry-After"] = str(POLL_HINT_SECONDS)
    return as_json(chain, status, headers)


@router.post(
    "/chains",
    status_code=201,
    response_model=ChainView,
    operation_id="createChain",
    responses={
        202: {"model": ChainView, "description": "It was made, and its first run has begun: `execute`."},
        **problems(400, 409, 413, 415),
    },
)
@access(RateClass.DEFAULT, jobs=None)
async def create_chain(
    request: Request,
    spec: ChainRequest,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Define steps that run one after the other or side by side; 201, or 202 when executed at once."""
    key = key_of(request, caller, "createChain", await request.body())
    service, first = runtime.service, await answered(runtime, key)
    checked = await in_thread(chains.check, service, spec, caller)
    await charge_jobs(request, checked.steps if spec.execute and first is None else 0)
    chain = await once(
        lambda: in_thread(chains.create, service, checked, caller, execute=spec.execute, key=key)
    )
    return replayed(answer(request, chain, 202 if spec.execute else 201), chain)


@router.get("/chains", response_model=ChainPage, operation_id="listChains", responses=problems(400))
@access(RateClass.DEFAULT)
async def list_chains(
    request: Request, caller: CallerDep, service: ServiceDep, asked: Annotated[PageQuery, Query()]
) -> Response:
    """Chains, newest first. A user sees its own; others see their tenant's."""
    page, following = await in_thread(chains.page, service, caller, limit=asked.limit, cursor=asked.cursor)
    return page_answer(request, page, following)


@router.get("/chains/{chain_id}", response_model=ChainView, operation_id="getChain", responses=problems(404))
@access(RateClass.DEFAULT)
async def get_chain(chain_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """The chain and where its newest run is."""
    return as_json(await in_thread(chains.get, service, str(chain_id), caller))


@router.patch(
    "/chains/{chain_id}",
    response_model=ChainView,
    operation_id="changeChain",
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.DEFAULT)
async def change_chain(
    chain_id: UUID, wanted: ChainChange, caller: CallerDep, service: ServiceDep
) -> Response:
    """Change a chain. It is checked as a whole; runs that have begun go on as they are."""
    said = wanted.model_dump(mode="json", exclude_unset=True)
    if not said:
        return as_json(await in_thread(chains.get, service, str(chain_id), caller))
    before = await in_thread(chains.definition, service, str(chain_id), caller)
    try:
        spec = ChainSpec.model_validate(before | said)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([e | {"loc": ("body", *e["loc"])} for e in found]) from None
    checked = await in_thread(chains.check, service, spec, caller)
    return as_json(await in_thread(chains.change, service, str(chain_id), caller, checked))


@router.delete(
    "/chains/{chain_id}", status_code=204, operation_id="deleteChain", responses=problems(404, 409)
)
@access(RateClass.DEFAULT)
async def delete_chain(chain_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """Delete a chain and its runs; 409 while one is active. Their jobs stay."""
    await in_thread(chains.delete, service, str(chain_id), caller)
    return Response(status_code=204)


@router.post(
    "/chains/{chain_id}/execute",
    status_code=202,
    response_model=ChainView,
    operation_id="executeChain",
    responses=problems(400, 404, 409),
)
@access(RateClass.QUEUE, jobs=None)
async def execute_chain(
    request: Request,
    chain_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Begin a run; 409 while another is active."""
    key = key_of(request, caller, "executeChain", b"", of=chain_id)
    service, first = runtime.service, await answered(runtime, key)
    steps = 0 if first else await in_thread(chains.steps_of, service, str(chain_id), caller)
    await charge_jobs(request, steps)
    chain = await once(lambda: in_thread(chains.execute, service, str(chain_id), caller, key=key))
    return replayed(answer(request, chain, 202), chain)


@router.post(
    "/chains/{chain_id}/cancel",
    response_model=ChainView,
    operation_id="cancelChain",
    responses={
        202: {"model": ChainView, "description": "A step runs, and was asked to stop."},
        **problems(400, 404, 409, 413, 415),
    },
)
@access(RateClass.QUEUE)
async def cancel_chain(
    request: Request, chain_id: UUID, caller: CallerDep, service: ServiceDep, how: CancelRequest | None = None
) -> Response:
    """Stop the active run: 200 it has ended, 202 a step runs and was asked to stop, 409 none is active."""
    how = how or CancelRequest()
    chain = await in_thread(
        chains.cancel,
        service,
        str(chain_id),
        caller,
        reason=how.reason,
        terminate=how.terminate,
        grace_seconds=how.grace_seconds,
    )
    return as_json(chain) if chain["finished_at"] is not None else answer(request, chain, 202)


@router.get(
    "/chains/{chain_id}/runs",
    response_model=ChainRunPage,
    operation_id="listChainRuns",
    responses=problems(400, 404),
)
@access(RateClass.DEFAULT)
async def list_chain_runs(
    request: Request,
    chain_id: UUID,
    caller: CallerDep,
    service: ServiceDep,
    asked: Annotated[PageQuery, Query()],
) -> Response:
    """The chain's runs, newest first."""
    page, following = await in_thread(
        chains.runs, service, str(chain_id), caller, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)


@router.get(
    "/chains/{chain_id}/runs/{run_id}",
    response_model=ChainRunView,
    operation_id="getChainRun",
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def get_chain_run(chain_id: UUID, run_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """A run with its steps and results."""
    return as_json(await in_thread(chains.get_run, service, str(chain_id), str(run_id), caller))


@router.get(
    "/chains/{chain_id}/events",
    operation_id="streamChainEvents",
    response_class=Response,
    responses={**STREAMED, **problems(404)},
    dependencies=[Depends(stream_place)],
)
@access(RateClass.STREAM)
async def stream_chain_events(
    chain_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Follow the chain's newest run: where it is as often as that changes, until it has ended."""

    def look() -> View:
        return chains.get(runtime.service, str(chain_id), caller, results=False)

    def told(view: View) -> tuple[str, ...]:
        steps = "".join((step["status"] or "-")[0] for step in view["steps"])
        return (view["run_id"] or "", view["status"], str(view["progress_percent"]), steps)

    return await follow(runtime, look, noun="chain", told=told, last_event_id=last_event_id)
