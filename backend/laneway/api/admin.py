"""What system admins may do over HTTP: look across tenants, repair, clean up; tenants and their limits."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import JobQuery, Moment, PageQuery, as_json, by_alias, link_to, page_answer
from laneway.api.queues import QueueHealth, QueueView
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, ServiceDep, in_thread
from laneway.api.schemas import JobPage, JobView, problems
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import administration, queries, queues, statistics
from laneway.engine.access import audit, overrides, tenants
from laneway.engine.access.audit import AuditAction, AuditFilter
from laneway.engine.access.callers import Role
from laneway.engine.access.overrides import MAX_SUBJECT, OverrideSpec
from laneway.engine.administration import CLEANED_UP_UNNAMED, MAX_CLEANED_UP, AdminFilter
from laneway.engine.queries import MAX_COUNTED
from laneway.engine.statistics import MAX_SAMPLED
from laneway.engine.turns import MAX_WEIGHT
from laneway.limits.rules import Policy, RateClass
from laneway.webhooks.secrets import SecretBox

MAX_WINDOW_DAYS = 31
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}

router = APIRouter(route_class=GatedRoute, tags=["admin"])


class AdminJobQuery(JobQuery):
    """Which jobs, of which tenants."""

    tenant_id: UUID | None = None
    created_by: Annotated[str, Field(max_length=100)] | None = None


@router.get("/admin/jobs", response_model=JobPage, operation_id="listAllJobs", responses=problems(400))
@access(RateClass.DEFAULT, Role.ADMIN)
async def list_all_jobs(
    request: Request, caller: CallerDep, service: ServiceDep, asked: Annotated[AdminJobQuery, Query()]
) -> Response:
    """Jobs of all tenants, newest first. `scope=mine` narrows them to the caller's own."""
    mine = asked.scope == "mine"
    wanted = AdminFilter(
        asked.filter,
        caller.tenant_id if mine else str(asked.tenant_id) if asked.tenant_id else None,
        caller.subject if mine else asked.created_by,
    )
    page, following = await in_thread(
        administration.page_of_jobs,
        service,
        caller,
        wanted,
        q=asked.q,
        limit=asked.limit,
        cursor=asked.cursor,
    )
    return page_answer(request, page, following)


class SpreadView(BaseModel):
    """Of those jobs that have one; null of none."""

    average_seconds: float | None
    p50_seconds: float | None
    p95_seconds: float | None


class FiguresView(BaseModel):
    """How jobs ended. Rates are among those that ran to an end: completed, failed, timeout."""

    total: int
    by_status: dict[str, int]
    success_rate: float | None
    failure_rate: float | None
    duration: SpreadView = Field(description="From the last start to the end.")
    wait: SpreadView = Field(description="From being due to the last start.")


class TypeFiguresView(FiguresView):
    job_type: str


class StatisticsView(FiguresView):
    """How jobs of all tenants ended between `since` and `until`."""

    window_seconds: int = Field(description="What was asked for.")
    since: datetime
    until: datetime
    cut: bool = Field(
        description=f"More than {MAX_SAMPLED:,} jobs of one status ended: `since` is later than asked for."
    )
    job_types: list[TypeFiguresView]


def _window(text: str) -> str:
    found = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text)
    if found is None or timedelta(**{_UNITS[found[2]]: int(found[1])}) > timedelta(days=MAX_WINDOW_DAYS):
        raise ValueError(f"say a window as 15m, 1h or 7d, of at most {MAX_WINDOW_DAYS} days")
    return text


class StatisticsQuery(BaseModel):
    """Which time."""

    model_config = ConfigDict(extra="forbid")

    window: Annotated[str, AfterValidator(_window)] = Field(
        "1h",
        description=f"Up to now: minutes, hours or days, as `15m`, `1h`, `7d`; at most {MAX_WINDOW_DAYS}d.",
    )

    @property
    def length(self) -> timedelta:
        return timedelta(**{_UNITS[self.window[-1]]: int(self.window[:-1])})


@router.get(
    "/admin/statistics",
    response_model=StatisticsView,
    operation_id="getStatistics",
    responses=problems(),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def get_statistics(service: ServiceDep, asked: Annotated[StatisticsQuery, Query()]) -> Response:
    """Success and failure rates, durations and waits, in all and for each job type."""
    return as_json(await in_thread(statistics.of_all, service, window=asked.length))


class QueueStatusView(BaseModel):
    """The installation at a glance."""

    queues: list[QueueView]
    jobs: dict[str, int] = Field(
        description=f"Active jobs of all tenants by status, each counted up to {MAX_COUNTED:,}."
    )
    health: QueueHealth


@router.get(
    "/admin/queue-status",
    response_model=QueueStatusView,
    operation_id="getQueueStatus",
    responses=problems(),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def get_queue_status(caller: CallerDep, service: ServiceDep) -> Response:
    """All queues, all active jobs, all living workers."""
    return as_json(await in_thread(queues.status, service, caller))


class ForceCompleteRequest(BaseModel):
    """How the job shall look."""

    model_config = ConfigDict(extra="forbid")

    result: Any = Field(None, description="JSON, at most 256 KiB.")
    reason: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Kept in the job's timeline and the audit log."
    )


@router.post(
    "/admin/jobs/{job_id}/force-complete",
    response_model=JobView,
    operation_id="forceCompleteJob",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def force_complete_job(
    job_id: UUID, caller: CallerDep, service: ServiceDep, how: ForceCompleteRequest | None = None
) -> Response:
    """Complete a job of any tenant by hand; 409 when it is completed.

    What a worker that still runs it reports later is discarded.
    """
    how = how or ForceCompleteRequest()
    job = await in_thread(
        administration.force_complete, service, str(job_id), caller, result=how.result, reason=how.reason
    )
    return as_json(job)


def _final(status: JobStatus) -> JobStatus:
    if status not in FINAL:
        raise ValueError(f"{status} jobs have not ended; name some of {', '.join(sorted(FINAL))}")
    return status


class CleanupRequest(BaseModel):
    """Which jobs to delete."""

    model_config = ConfigDict(extra="forbid")

    older_than_days: Annotated[int, Field(ge=0, le=36_500)] = Field(description="Since they ended.")
    statuses: Annotated[
        list[Annotated[JobStatus, BeforeValidator(by_alias), AfterValidator(_final)]], Field(min_length=1)
    ] = Field(
        list(CLEANED_UP_UNNAMED), description="Failed and timed-out jobs are kept unless they are named."
    )
    dry_run: bool = Field(False, description="Only count.")


class CleanedUpView(BaseModel):
    """What was deleted, or with `dry_run` would be."""

    dry_run: bool
    deleted: int
    by_status: dict[str, int]
    remaining: int = Field(
        description=f"They match, and are left to the next call; counted up to {MAX_COUNTED:,}."
    )


@router.post(
    "/admin/cleanup",
    response_model=CleanedUpView,
    operation_id="cleanUpJobs",
    responses=problems(400, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def clean_up_jobs(how: CleanupRequest, caller: CallerDep, service: ServiceDep) -> Response:
    """Delete ended jobs of all tenants with their events and webhooks, at most 10,000 a call.

    A job is kept while one of its webhooks is still to be delivered. What was done before a failure stays
    done: the same call again goes on with the rest. So does one that answers `remaining`.
    """
    done = await in_thread(
        administration.clean_up,
        service,
        caller,
        older_than=timedelta(days=how.older_than_days),
        statuses=how.statuses,
        dry_run=how.dry_run,
    )
    return as_json(
        {
            "dry_run": how.dry_run,
            "deleted": min(done.deleted, MAX_CLEANED_UP),
            "by_status": done.by_status,
            "remaining": done.remaining,
        }
    )


class AuditEntry(BaseModel):
    """Something that somebody did."""

    id: str
    tenant_id: str = Field(description="Whose caller it was.")
    created_at: datetime
    actor: str
    role: str
    key_id: str | None
    action: AuditAction
    target: str = Field(description="What it was done to: `queue:emails`, `job:` and its id.")
    facts: dict[str, Any]
    address: str | None
    request_id: str | None


class AuditPage(BaseModel):
    data: list[AuditEntry]
    next_cursor: str | None
    has_more: bool


class AuditQuery(PageQuery):
    """Which entries: all of what is said must hold. Moments are exclusive."""

    tenant_id: UUID | None = None
    actor: Annotated[str, Field(max_length=100)] | None = None
    action: AuditAction | None = None
    target: Annotated[str, Field(max_length=200)] | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None

    @property
    def filter(self) -> AuditFilter:
        return AuditFilter(
            str(self.tenant_id) if self.tenant_id else None,
            self.actor,
            self.action,
            self.target,
            self.created_after,
            self.created_before,
        )


@router.get(
    "/admin/audit-log", response_model=AuditPage, operation_id="listAuditLog", responses=problems(400)
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def list_audit_log(
    request: Request, caller: CallerDep, runtime: RuntimeDep, asked: Annotated[AuditQuery, Query()]
) -> Response:
    """Who did what, of all tenants, newest first."""
    page, following = await in_thread(
        audit.page, runtime.database, caller, asked.filter, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)


class TenantRequest(BaseModel):
    """What a tenant is called."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)] = Field(description="No other tenant has it.")


def _unsaid() -> Any:
    return None


class TenantChange(BaseModel):
    """What shall be different about a tenant: at least one of these."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        default_factory=_unsaid, description="No other tenant has it."
    )
    max_running: Annotated[int, Field(ge=1, le=tenants.MAX_RUNNING)] | None = Field(
        default_factory=_unsaid, description="How many of its jobs run at once; null: as many as there are."
    )
    max_queued: Annotated[int, Field(ge=1, le=tenants.MAX_QUEUED)] | None = Field(
        default_factory=_unsaid,
        description="How many of its jobs may wait; null: what `LANEWAY_WAITING_PER_TENANT` says.",
    )
    weight: Annotated[int, Field(ge=1, le=MAX_WEIGHT)] = Field(
        default_factory=_unsaid,
        description="Its share of the turns inside a lane, beside the weights of the others that wait there.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


class TenantView(BaseModel):
    """A tenant."""

    id: str
    name: str
    max_running: int | None = Field(description="How many of its jobs run at once; null: any number.")
    max_queued: int | None = Field(
        description="How many of its jobs may wait; null: what `LANEWAY_WAITING_PER_TENANT` says."
    )
    weight: int = Field(description="Its share of the turns inside a lane.")
    created_by: str
    created_at: datetime
    updated_at: datetime


class TenantPage(BaseModel):
    data: list[TenantView]
    next_cursor: str | None
    has_more: bool


@router.get("/admin/tenants", response_model=TenantPage, operation_id="listTenants", responses=problems(400))
@access(RateClass.DEFAULT, Role.ADMIN)
async def list_tenants(
    request: Request, caller: CallerDep, runtime: RuntimeDep, asked: Annotated[PageQuery, Query()]
) -> Response:
    """The tenants, newest first."""
    page, following = await in_thread(
        tenants.page, runtime.database, caller, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)


@router.post(
    "/admin/tenants",
    status_code=201,
    response_model=TenantView,
    operation_id="createTenant",
    responses=problems(400, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def create_tenant(
    request: Request, how: TenantRequest, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Make a tenant. Its first key comes from `laneway keys create --tenant`."""
    box = await in_thread(SecretBox.from_settings, runtime.settings)
    tenant = await in_thread(tenants.create, runtime.database, box, caller, name=how.name)
    where = link_to(request, f"/api/v1/admin/tenants/{tenant['id']}")
    return as_json(tenant, 201, {"Location": where})


@router.get(
    "/admin/tenants/{tenant_id}",
    response_model=TenantView,
    operation_id="getTenant",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def get_tenant(tenant_id: UUID, runtime: RuntimeDep) -> Response:
    """One tenant, by its id."""
    return as_json(await in_thread(tenants.need, runtime.database, str(tenant_id)))


@router.patch(
    "/admin/tenants/{tenant_id}",
    response_model=TenantView,
    operation_id="changeTenant",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def change_tenant(
    tenant_id: UUID, how: TenantChange, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Give a tenant another name, or other limits. Its id, and all that is its own, stays.

    Jobs beyond a lower limit run on; none starts until there is room. A `weight` counts for jobs that are
    queued from a second later on, a `max_queued` from the next count on: a second, unless counting is slow.
    """
    given = how.model_dump(include=how.model_fields_set)
    return as_json(await in_thread(tenants.change, runtime.database, str(tenant_id), caller, given))


class RateLimitView(OverrideSpec):
    """A limit that was set in place of the settings'."""

    tenant_id: str
    policy: Policy
    subject: str | None = Field(description="null: the whole tenant's.")
    created_by: str
    created_at: datetime
    updated_by: str
    updated_at: datetime


class TenantRateLimits(BaseModel):
    data: list[RateLimitView]


class SubjectQuery(BaseModel):
    """Whose limit."""

    model_config = ConfigDict(extra="forbid")

    subject: Annotated[str, Field(min_length=1, max_length=MAX_SUBJECT)] | None = Field(
        None, description="One caller of the tenant; left out: the whole tenant."
    )


@router.get(
    "/admin/tenants/{tenant_id}/rate-limits",
    response_model=TenantRateLimits,
    operation_id="listTenantRateLimits",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def list_tenant_rate_limits(tenant_id: UUID, runtime: RuntimeDep) -> Response:
    """What was set for the tenant and its callers, also what has expired."""
    found = await in_thread(_rate_limits, runtime, str(tenant_id))
    return as_json({"data": [_limit_view(limit) for limit in found]})


def _rate_limits(runtime: Runtime, tenant_id: str) -> list[dict[str, Any]]:
    tenants.need(runtime.database, tenant_id)
    with runtime.database.read() as connection:
        return overrides.listed(connection, tenant_id)


@router.get(
    "/admin/tenants/{tenant_id}/rate-limits/{policy}",
    response_model=RateLimitView,
    operation_id="getTenantRateLimit",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def get_tenant_rate_limit(
    tenant_id: UUID, policy: Policy, runtime: RuntimeDep, asked: Annotated[SubjectQuery, Query()]
) -> Response:
    """One limit that was set; 404 where the settings' holds."""

    def read() -> dict[str, Any]:
        with runtime.database.read() as connection:
            return overrides.get(connection, str(tenant_id), policy, subject=asked.subject)

    return as_json(_limit_view(await in_thread(read)))


@router.put(
    "/admin/tenants/{tenant_id}/rate-limits/{policy}",
    response_model=RateLimitView,
    operation_id="setTenantRateLimit",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def set_tenant_rate_limit(
    tenant_id: UUID,
    policy: Policy,
    spec: OverrideSpec,
    caller: CallerDep,
    runtime: RuntimeDep,
    asked: Annotated[SubjectQuery, Query()],
) -> Response:
    """Set a tenant's limit, or one caller's; every API process goes by it within a second.

    A quota of 0 for the policy `tenant` shuts the tenant out.
    """

    def write() -> dict[str, Any]:
        now = runtime.clock.now()
        with runtime.database.write() as connection:
            made = overrides.put(
                connection, str(tenant_id), policy, spec, subject=asked.subject, by=caller.subject, now=now
            )
            facts = {"subject": asked.subject, **spec.model_dump(mode="json")}
            audit.record(connection, caller, AuditAction.RATE_LIMIT_SET, _limit_of(tenant_id, policy), facts)
        return made

    return as_json(_limit_view(await in_thread(write)))


@router.delete(
    "/admin/tenants/{tenant_id}/rate-limits/{policy}",
    status_code=204,
    operation_id="deleteTenantRateLimit",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def delete_tenant_rate_limit(
    tenant_id: UUID,
    policy: Policy,
    caller: CallerDep,
    runtime: RuntimeDep,
    asked: Annotated[SubjectQuery, Query()],
) -> Response:
    """Back to the settings' limit."""

    def remove() -> None:
        with runtime.database.write() as connection:
            overrides.delete(connection, str(tenant_id), policy, subject=asked.subject)
            facts = {"subject": asked.subject}
            target = _limit_of(tenant_id, policy)
            audit.record(connection, caller, AuditAction.RATE_LIMIT_REMOVED, target, facts)

    await in_thread(remove)
    return Response(status_code=204)


def _limit_of(tenant_id: UUID, policy: Policy) -> str:
    return f"rate_limit:{tenant_id}/{policy.value}"


def _limit_view(limit: dict[str, Any]) -> dict[str, Any]:
    return {n: queries.stamp(v) if isinstance(v, datetime) else v for n, v in limit.items()}
