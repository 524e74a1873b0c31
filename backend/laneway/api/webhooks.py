"""Webhook endpoints and secrets over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.idempotency import IdempotencyKey, key_of, once, replayed
from laneway.api.jobs import as_json, link_to
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.engine import idempotency
from laneway.engine.access.callers import Role, rotate_webhook_secret, webhook_secret
from laneway.engine.queries import stamp
from laneway.limits.rules import RateClass
from laneway.webhooks.endpoints import EndpointChange, EndpointFilters, Endpoints, NewEndpoint
from laneway.webhooks.guard import Policy
from laneway.webhooks.secrets import GRACE_SECONDS, MAX_GRACE_SECONDS, SecretBox, parse_webhook_secret

router = APIRouter(route_class=GatedRoute, tags=["webhooks"])
T = TypeVar("T")


class WebhookSecret(BaseModel):
    """What signs everything that goes to a job's own `webhook_url`: `whsec_` and base64."""

    secret: str


class HealthView(BaseModel):
    """How the receiver has been answering."""

    consecutive_failures: int
    failing_since: datetime | None
    last_failure_at: datetime | None
    last_success_at: datetime | None
    blocked_until: datetime | None = Field(description="Nothing is sent before then.")
    blocked_reason: str | None = Field(description="`breaker` or `retry_after`.")


class EndpointView(BaseModel):
    """A registered endpoint. Its secret is shown once, when it is made or rotated."""

    id: str
    url: str
    description: str | None
    event_types: list[str]
    filters: EndpointFilters
    format: str
    status: str = Field(description="`enabled`, `paused` or `disabled`.")
    disabled_reason: str | None = Field(description="`gone_410`, `failing` or `manual`.")
    sign_with: str
    timeout_seconds: float
    retry_schedule: list[float]
    max_in_flight: int
    max_per_second: float | None
    in_order: bool
    header_names: list[str]
    has_client_certificate: bool
    has_ca_certificate: bool
    secrets_in_grace: int = Field(description="So many old secrets sign too.")
    created_by: str
    disabled_at: datetime | None
    enabled_at: datetime
    created_at: datetime
    updated_at: datetime
    health: HealthView


class EndpointWithSecret(EndpointView):
    """An endpoint and its secret."""

    secret: str


class EndpointList(BaseModel):
    """All endpoints of the tenant, oldest first: at most 100."""

    data: list[EndpointView]


class Rotation(BaseModel):
    """How a secret is replaced."""

    model_config = ConfigDict(extra="forbid")

    grace_seconds: Annotated[int, Field(ge=0, le=MAX_GRACE_SECONDS)] = Field(
        GRACE_SECONDS, description="So long the old secrets sign too; 0 revokes them all at once."
    )
    secret: Annotated[str, AfterValidator(parse_webhook_secret)] | None = Field(None, repr=False)


class TestSent(BaseModel):
    """A test event is on its way."""

    delivery_id: str


class PublicKey(BaseModel):
    """What v1a signatures are verified with: `whpk_` and base64."""

    public_key: str


@router.get(
    "/webhooks/secret", response_model=WebhookSecret, operation_id="getWebhookSecret", responses=problems()
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def get_webhook_secret(caller: CallerDep, runtime: RuntimeDep) -> Response:
    """The tenant's secret, for receivers to verify with. Needs the role operator."""

    def find() -> str:
        return webhook_secret(runtime.database, SecretBox.from_settings(runtime.settings), caller.tenant_id)

    return as_json({"secret": await in_thread(find)})


@router.post(
    "/webhooks/secret/rotate",
    response_model=WebhookSecret,
    operation_id="rotateWebhookSecret",
    responses=problems(400, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def post_rotate_webhook_secret(wanted: Rotation, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """A new secret for the tenant; for the grace both sign. Needs the role operator."""

    def rotate() -> str:
        return rotate_webhook_secret(
            runtime.database,
            SecretBox.from_settings(runtime.settings),
            caller.tenant_id,
            grace_seconds=wanted.grace_seconds,
            secret=wanted.secret,
            now=runtime.clock.now(),
        )

    return as_json({"secret": await in_thread(rotate)})


@router.get(
    "/webhooks/public-key", response_model=PublicKey, operation_id="getWebhookPublicKey", responses=problems()
)
@access(RateClass.DEFAULT)
async def get_public_key(caller: CallerDep, runtime: RuntimeDep) -> Response:
    """The tenant's public key, for receivers that verify v1a signatures."""
    return as_json({"public_key": await _call(runtime, lambda them: them.public_key(caller.tenant_id))})


@router.post(
    "/webhooks/endpoints",
    status_code=201,
    response_model=EndpointWithSecret,
    operation_id="createWebhookEndpoint",
    responses=problems(400, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def create_endpoint(
    request: Request, wanted: NewEndpoint, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Register a receiver of the tenant's events. The answer holds its secret, this once."""
    now = runtime.clock.now()
    made, secret = await _call(
        runtime, lambda them: them.create(caller.tenant_id, wanted, by=caller.subject, now=now)
    )
    where = link_to(request, f"/api/v1/webhooks/endpoints/{made['id']}")
    return as_json({**_view(made), "secret": secret}, 201, {"Location": where})


@router.get(
    "/webhooks/endpoints",
    response_model=EndpointList,
    operation_id="listWebhookEndpoints",
    responses=problems(),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def list_endpoints(caller: CallerDep, runtime: RuntimeDep) -> Response:
    """The tenant's endpoints and how they are."""
    now = runtime.clock.now()
    found = await _call(runtime, lambda them: them.all(caller.tenant_id, now=now))
    return as_json({"data": [_view(each) for each in found]})


@router.get(
    "/webhooks/endpoints/{endpoint_id}",
    response_model=EndpointView,
    operation_id="getWebhookEndpoint",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def get_endpoint(endpoint_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """One endpoint and how it is."""
    now = runtime.clock.now()
    found = await _call(runtime, lambda them: them.get(caller.tenant_id, str(endpoint_id), now=now))
    return as_json(_view(found))


@router.patch(
    "/webhooks/endpoints/{endpoint_id}",
    response_model=EndpointView,
    operation_id="changeWebhookEndpoint",
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def change_endpoint(
    endpoint_id: UUID, wanted: EndpointChange, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Change what is given: also `status`, to pause it, to disable it or to enable it again."""
    now = runtime.clock.now()
    changed = await _call(
        runtime, lambda them: them.change(caller.tenant_id, str(endpoint_id), wanted, now=now)
    )
    return as_json(_view(changed))


@router.delete(
    "/webhooks/endpoints/{endpoint_id}",
    status_code=204,
    operation_id="deleteWebhookEndpoint",
    responses=problems(404),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def delete_endpoint(endpoint_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Forget an endpoint. What waits for it is not sent."""
    now = runtime.clock.now()
    await _call(runtime, lambda them: them.delete(caller.tenant_id, str(endpoint_id), now=now))
    return Response(status_code=204)


@router.post(
    "/webhooks/endpoints/{endpoint_id}/rotate-secret",
    response_model=EndpointWithSecret,
    operation_id="rotateWebhookEndpointSecret",
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def rotate_endpoint_secret(
    endpoint_id: UUID, wanted: Rotation, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """A new secret, shown this once; for the grace the old one signs too."""
    now = runtime.clock.now()
    made, secret = await _call(
        runtime,
        lambda them: them.rotate(
            caller.tenant_id,
            str(endpoint_id),
            grace_seconds=wanted.grace_seconds,
            secret=wanted.secret,
            now=now,
        ),
    )
    return as_json({**_view(made), "secret": secret})


@router.post(
    "/webhooks/endpoints/{endpoint_id}/test",
    status_code=202,
    response_model=TestSent,
    operation_id="testWebhookEndpoint",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def test_endpoint(
    endpoint_id: UUID,
    request: Request,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,  # noqa: PT028 - no test
) -> Response:
    """Send an `endpoint.test` event, once. How it went: `GET /webhooks/deliveries/{delivery_id}`."""
    now = runtime.clock.now()
    key = key_of(request, caller, "testWebhookEndpoint", await request.body(), of=endpoint_id)

    def send(them: Endpoints) -> dict[str, Any]:
        with runtime.database.write() as connection:
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                return first
            delivery_id = them.test_within(
                connection, caller.tenant_id, str(endpoint_id), by=caller.subject, now=now
            )
            idempotency.keep(connection, key, {"delivery_id": delivery_id})
        return {"delivery_id": delivery_id}

    sent = await once(lambda: _call(runtime, send))
    await in_thread(runtime.service.news.ring_courier)
    where = link_to(request, f"/api/v1/webhooks/deliveries/{sent['delivery_id']}")
    return replayed(as_json(sent, 202, {"Location": where, "Retry-After": "1"}), sent)


async def _call(runtime: Runtime, ask: Callable[[Endpoints], T]) -> T:
    def work() -> T:
        settings = runtime.settings
        return ask(
            Endpoints(runtime.database, SecretBox.from_settings(settings), Policy.from_settings(settings))
        )

    return await in_thread(work)


def _view(endpoint: dict[str, Any]) -> dict[str, Any]:
    shown = _stamped(endpoint)
    return shown | {"health": _stamped(endpoint["health"])}


def _stamped(values: dict[str, Any]) -> dict[str, Any]:
    return {name: stamp(v) if isinstance(v, datetime) else v for name, v in values.items()}
