"""The ledger of webhook deliveries over HTTP: look, send one again, recover many."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.idempotency import IdempotencyKey, key_of, once, replayed
from laneway.api.jobs import MAX_PAGE, POLL_HINT_SECONDS, Moment, PageQuery, as_json, link_to, page_answer
from laneway.api.runtime import CallerDep, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.domain.events import EventType, SystemEvent
from laneway.engine import idempotency, recoveries, webhook_ledger
from laneway.engine.access.callers import Role
from laneway.engine.recoveries import MAX_COUNTED, MAX_PER_SECOND, PER_SECOND, Mode, Wish
from laneway.engine.service import scope_of
from laneway.engine.webhook_ledger import MAX_ATTEMPTS_SHOWN, DeliveryFilter
from laneway.limits.rules import RateClass
from laneway.webhooks.retries import DeliveryStatus, ErrorClass

MIN_PER_SECOND = 0.01

router = APIRouter(route_class=GatedRoute, tags=["webhooks"])

Event = EventType | SystemEvent
Trigger = Literal["auto", "manual", "recover", "test"]


class DeliveryView(BaseModel):
    """One message on its way to one receiver."""

    id: str
    message_id: str = Field(description="The `webhook-id` of every try.")
    event_type: Event
    job_id: str | None
    endpoint_id: str | None = Field(description="null: the job's own `webhook_url`.")
    channel: Literal["webhook", "email", "log"]
    url: str
    trigger: Trigger = Field(description="What put it on its way last.")
    status: DeliveryStatus
    attempt_count: int
    max_attempts: int
    last_status_code: int | None
    last_error: str | None
    created_at: datetime
    next_at: datetime = Field(description="When it is or was due.")
    give_up_at: datetime | None
    delivered_at: datetime | None
    updated_at: datetime


class DeliveryPage(BaseModel):
    data: list[DeliveryView]
    next_cursor: str | None
    has_more: bool


class DeliveryAttempt(BaseModel):
    """One try, and where its time went. A moment that was not needed or not reached is null."""

    number: int
    trigger: Trigger
    started_at: datetime
    remote_ip: str | None
    status_code: int | None
    error_class: ErrorClass | None
    error: str | None
    dns_ms: int | None
    connect_ms: int | None = Field(description="With the TLS handshake; null on a kept connection.")
    first_byte_ms: int | None = Field(description="From the start to the status line.")
    total_ms: int
    request_bytes: int | None
    response_headers: dict[str, str] | None = Field(description="Those that Laneway keeps, lower case.")
    response_body: str | None = Field(description="At most 4 KiB of it.")
    response_truncated: bool


class DeliveryDetail(DeliveryView):
    """A delivery, what it says, and how each try went."""

    payload: str | None = Field(description="What is sent, byte for byte; null once it was pruned.")
    attempts: list[DeliveryAttempt] = Field(
        description="Oldest first; of many the newest.", max_length=MAX_ATTEMPTS_SHOWN
    )


class DeliveryQuery(BaseModel):
    """What `GET /webhooks/deliveries` may be asked. Moments are exclusive."""

    model_config = ConfigDict(extra="forbid")

    status: list[DeliveryStatus] = Field([], description="Repeatable.")
    event_type: Event | None = None
    endpoint_id: UUID | None = None
    job_id: UUID | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    cursor: Annotated[str, Field(max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50

    @property
    def filter(self) -> DeliveryFilter:
        return DeliveryFilter(
            tuple(self.status),
            self.event_type,
            str(self.endpoint_id) if self.endpoint_id else None,
            str(self.job_id) if self.job_id else None,
            self.created_after,
            self.created_before,
        )


class RecoverRequest(BaseModel):
    """Which of the endpoint's messages to send again, and how fast."""

    model_config = ConfigDict(extra="forbid")

    since: Moment = Field(description="From this moment on.")
    until: Moment | None = Field(None, description="To before this moment; now, when it is later or null.")
    mode: Mode = Field(
        Mode.FAILED,
        description="`failed`: tried in vain. `missing`: never tried, for the endpoint was disabled or not "
        "there yet. `all`: both, and what was delivered.",
    )
    per_second: Annotated[float, Field(ge=MIN_PER_SECOND, le=MAX_PER_SECOND, allow_inf_nan=False)] = (
        PER_SECOND
    )
    dry_run: bool = Field(False, description="Only count.")

    @model_validator(mode="after")
    def _span(self) -> Self:
        if self.until is not None and self.until <= self.since:
            raise ValueError("until must be later than since")
        return self


class RecoveryCount(BaseModel):
    """What a recovery would send."""

    dry_run: Literal[True]
    count: int = Field(description=f"Messages, counted up to {MAX_COUNTED}.")


class RecoveryView(BaseModel):
    """A recovery: how far it is."""

    id: str
    endpoint_id: str
    mode: Mode
    since: datetime
    until: datetime
    per_second: float
    status: Literal["running", "done", "cancelled"] = Field(
        description="`done`: all of it is queued, the last of it for the next half minute."
    )
    queued: int = Field(description="Deliveries put on their way so far.")
    created_by: str
    created_at: datetime
    finished_at: datetime | None


@router.get(
    "/webhooks/deliveries",
    response_model=DeliveryPage,
    operation_id="listWebhookDeliveries",
    responses=problems(400),
)
@access(RateClass.DEFAULT)
async def list_deliveries(
    request: Request, caller: CallerDep, runtime: RuntimeDep, asked: Annotated[DeliveryQuery, Query()]
) -> Response:
    """Deliveries, newest first. A user sees those about its own jobs; others see their tenant's."""
    page, following = await in_thread(
        webhook_ledger.page,
        runtime.database,
        scope_of(caller),
        asked.filter,
        limit=asked.limit,
        cursor=asked.cursor,
    )
    return page_answer(request, page, following)


@router.get(
    "/jobs/{job_id}/webhooks",
    response_model=DeliveryPage,
    operation_id="listJobWebhooks",
    responses=problems(400, 404),
)
@access(RateClass.DEFAULT)
async def list_job_webhooks(
    request: Request,
    job_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    asked: Annotated[PageQuery, Query()],
) -> Response:
    """Whom the job's events were told, newest first."""
    page, following = await in_thread(
        webhook_ledger.page_of_job,
        runtime.database,
        scope_of(caller),
        str(job_id),
        limit=asked.limit,
        cursor=asked.cursor,
    )
    return page_answer(request, page, following)


@router.get(
    "/webhooks/deliveries/{delivery_id}",
    response_model=DeliveryDetail,
    operation_id="getWebhookDelivery",
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def get_delivery(delivery_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """One delivery: what is sent, and every try with its timings and what the receiver answered."""

    def find() -> dict[str, Any]:
        with runtime.database.read() as connection:
            return webhook_ledger.get(connection, scope_of(caller), str(delivery_id))

    return as_json(await in_thread(find))


@router.post(
    "/webhooks/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryDetail,
    operation_id="redeliverWebhook",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.QUEUE)
async def redeliver(
    request: Request,
    delivery_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Send it again, whatever became of it: the same bytes under the same `webhook-id`, signed anew.

    409 while it is on its way, when its endpoint is disabled or gone, and once its payload was pruned.
    """

    key = key_of(request, caller, "redeliverWebhook", await request.body(), of=delivery_id)

    def send() -> dict[str, Any]:
        now = runtime.clock.now()
        with runtime.database.write() as connection:
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                return first
            sent = webhook_ledger.redeliver(connection, scope_of(caller), str(delivery_id), now=now)
            idempotency.keep(connection, key, sent)
        runtime.service.news.ring_courier()
        return sent

    where = link_to(request, f"/api/v1/webhooks/deliveries/{delivery_id}")
    sent = await once(lambda: in_thread(send))
    return replayed(_on_its_way(sent, where), sent)


@router.post(
    "/webhooks/endpoints/{endpoint_id}/recover",
    status_code=202,
    response_model=RecoveryView,
    operation_id="recoverWebhookEndpoint",
    responses={
        200: {"model": RecoveryCount, "description": "With `dry_run`."},
        **problems(400, 404, 409, 413, 415),
    },
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def recover(
    request: Request,
    endpoint_id: UUID,
    wanted: RecoverRequest,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Send again, in the background, what an endpoint did not get. Live messages go first.

    409 while another recovery of the endpoint runs, and when the endpoint is disabled.
    """
    now = runtime.clock.now()
    key = key_of(request, caller, "recoverWebhookEndpoint", await request.body(), of=endpoint_id)
    wish = Wish(wanted.mode, wanted.since, min(wanted.until or now, now))

    def count() -> int:
        with runtime.database.read() as connection:
            return recoveries.count(connection, caller.tenant_id, str(endpoint_id), wish)

    def start() -> dict[str, Any]:
        with runtime.database.write() as connection:
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                return first
            started = recoveries.start(
                connection,
                caller.tenant_id,
                str(endpoint_id),
                wish,
                per_second=wanted.per_second,
                by=caller.subject,
                now=now,
            )
            idempotency.keep(connection, key, started)
            return started

    if wanted.dry_run:
        return as_json({"dry_run": True, "count": await in_thread(count)})
    recovery = await once(lambda: in_thread(start))
    where = link_to(request, f"/api/v1/webhooks/recoveries/{recovery['id']}")
    return replayed(_on_its_way(recovery, where), recovery)


@router.get(
    "/webhooks/recoveries/{recovery_id}",
    response_model=RecoveryView,
    operation_id="getWebhookRecovery",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def get_recovery(recovery_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """How far a recovery is."""

    def find() -> dict[str, Any]:
        with runtime.database.read() as connection:
            return recoveries.get(connection, caller.tenant_id, str(recovery_id))

    return as_json(await in_thread(find))


@router.post(
    "/webhooks/recoveries/{recovery_id}/cancel",
    response_model=RecoveryView,
    operation_id="cancelWebhookRecovery",
    responses=problems(404, 409),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def cancel_recovery(recovery_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Stop a recovery. What it queued and nobody has begun to send is cancelled. 409 when it is done."""

    def stop() -> dict[str, Any]:
        with runtime.database.write() as connection:
            return recoveries.cancel(connection, caller.tenant_id, str(recovery_id), now=runtime.clock.now())

    return as_json(await in_thread(stop))


def _on_its_way(content: dict[str, Any], where: str) -> Response:
    return as_json(content, 202, {"Location": where, "Retry-After": str(POLL_HINT_SECONDS)})
