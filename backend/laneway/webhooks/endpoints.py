"""Registered endpoints: made, changed, rotated, replayed. One function, one transaction.

Nothing here gives a secret back, except the new one to whoever makes it: at rest all of them are sealed.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic.json_schema import SkipJsonSchema

from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.events import DEFAULT_WEBHOOK_EVENTS, SystemEvent, known_pattern
from laneway.domain.headers import HOP_HEADERS, MAX_HEADERS, check_headers
from laneway.domain.spec import DEFAULT_QUEUE
from laneway.errors import Conflict, EndpointNotFound, FieldError, WebhookUrlRefused
from laneway.models import tenants, webhook_deliveries
from laneway.models import webhook_endpoints as e
from laneway.models import webhook_health as h
from laneway.webhooks import asymmetric
from laneway.webhooks.endpoint_health import cancel_waiting, disable
from laneway.webhooks.formats import Format
from laneway.webhooks.guard import Policy, check_url
from laneway.webhooks.messages import TEST, Target, Told, message_id, record
from laneway.webhooks.papers import endpoint_context, load_certificates, signing_key_context
from laneway.webhooks.retries import MAX_TIMEOUT_SECONDS, QUICK_SECONDS, STANDARD_SECONDS, UNDONE
from laneway.webhooks.secrets import (
    SecretBox,
    keep_old,
    live_secrets,
    new_webhook_secret,
    parse_webhook_secret,
)

MAX_ENDPOINTS = 100  # of a tenant
MAX_EVENT_TYPES = 50
MAX_FILTER_VALUES = 50  # of each kind
MAX_RETRIES = 20
MAX_PAUSE_SECONDS = 86_400
MAX_IN_FLIGHT = 64
_RESERVED_HEADERS = HOP_HEADERS | {"content-type", "cookie", "user-agent"}
SCHEDULES: dict[str, tuple[float, ...]] = {"quick": QUICK_SECONDS, "standard": STANDARD_SECONDS}


def _pattern(value: str) -> str:
    if not known_pattern(value):
        raise ValueError(f"{value!r} is no event; `job.*`, `*` and the names of docs/reference/events.md are")
    return value


def _headers(value: dict[str, str]) -> dict[str, str]:
    check_headers(value, reserved=_RESERVED_HEADERS, prefixes=("webhook-",))
    return value


def _client_certificate(value: str) -> str:
    return _loads(value, certificate=value, wanted="PEM: certificate chain, then its key, not encrypted")


def _authority(value: str) -> str:
    return _loads(value, ca_certificate=value, wanted="PEM: one certificate or more")


def _loads(value: str, *, wanted: str, **parts: str) -> str:
    try:
        load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **parts)
    except (ssl.SSLError, ValueError, TypeError):
        raise ValueError(f"needs {wanted}") from None
    return value


Names = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=MAX_FILTER_VALUES)
]
Pause = Annotated[float, Field(ge=1, le=MAX_PAUSE_SECONDS, allow_inf_nan=False)]
Pem = Annotated[str, Field(min_length=1, max_length=64_000)]
Unset = SkipJsonSchema[None]  # the default of fields of which null is no value


class EndpointFilters(BaseModel):
    """Which jobs' events an endpoint hears of: those that fit every list that is given."""

    model_config = ConfigDict(extra="forbid")

    queues: Names = Field(default=[], examples=[[DEFAULT_QUEUE]])
    job_types: Names = []
    tags: Names = Field(default=[], description="One of them is enough.")


class EndpointChange(BaseModel):
    """What may be set on an endpoint. Fields that are not given stay as they are; null takes away."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=2048)] | Unset = Field(
        None, description="What waits goes to a new one too, at once."
    )
    description: Annotated[str, Field(max_length=500)] | None = None
    event_types: (
        Annotated[
            list[Annotated[str, AfterValidator(_pattern)]], Field(min_length=1, max_length=MAX_EVENT_TYPES)
        ]
        | Unset
    ) = Field(None, description="Events and globs: `job.completed`, `job.*`, `*`. Default: the ends of jobs.")
    filters: EndpointFilters | Unset = None
    format: Format | Unset = None
    status: Literal["enabled", "paused", "disabled"] | Unset = Field(
        None,
        description="Paused: messages wait. Disabled: what waits is cancelled, and messages are noted as "
        "skipped. Enabling a disabled endpoint starts it afresh.",
    )
    headers: Annotated[dict[str, str], Field(max_length=MAX_HEADERS), AfterValidator(_headers)] | None = (
        Field(
            None, repr=False, description="Sent along, and kept encrypted: only their names are ever shown."
        )
    )
    sign_with: Literal["v1", "v1a", "both"] | Unset = Field(
        None, description="v1: HMAC-SHA256 with the secret. v1a: ed25519 with the tenant's key pair."
    )
    timeout_seconds: Annotated[float, Field(ge=1, le=MAX_TIMEOUT_SECONDS)] | Unset = None
    retry_schedule: (
        Literal["quick", "standard"] | Annotated[list[Pause], Field(max_length=MAX_RETRIES)] | Unset
    ) = Field(None, description="Seconds before each retry, or a preset's name.")
    max_in_flight: Annotated[int, Field(ge=1, le=MAX_IN_FLIGHT)] | Unset = None
    max_per_second: Annotated[float, Field(ge=0.01, le=1000, allow_inf_nan=False)] | None = None
    in_order: bool | Unset = Field(None, description="A job's messages one after the other, in their order.")
    client_certificate: Annotated[Pem, AfterValidator(_client_certificate)] | None = Field(
        None, repr=False, description="PEM: certificate chain, then key. For mTLS."
    )
    ca_certificate: Annotated[Pem, AfterValidator(_authority)] | None = Field(
        None, description="PEM: an authority to trust besides the usual ones."
    )

    @field_validator(
        "url",
        "event_types",
        "filters",
        "format",
        "status",
        "sign_with",
        "timeout_seconds",
        "retry_schedule",
        "max_in_flight",
        "in_order",
        mode="before",
    )
    @classmethod
    def _some_value(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("null is no value of it; leave it out")
        return value


class NewEndpoint(EndpointChange):
    """An endpoint to be."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    status: Literal["enabled", "paused"] | Unset = Field(None, description="Paused: messages wait.")
    secret: Annotated[str, AfterValidator(parse_webhook_secret)] | None = Field(
        None, repr=False, description="`whsec_` and base64 of 24 to 64 bytes; made when it is not given."
    )


_DEFAULTS: dict[str, Any] = {
    "event_types": list(DEFAULT_WEBHOOK_EVENTS),
    "filters": {},
    "format": Format.STANDARD.value,
    "status": "enabled",
    "sign_with": "v1",
    "timeout_seconds": 10.0,
    "retry_schedule": list(STANDARD_SECONDS),
    "max_in_flight": 8,
    "in_order": False,
}
_OWN = (
    "id",
    "url",
    "description",
    "event_types",
    "filters",
    "format",
    "status",
    "disabled_reason",
    "sign_with",
    "timeout_seconds",
    "retry_schedule",
    "max_in_flight",
    "max_per_second",
    "in_order",
    "created_by",
    "disabled_at",
    "enabled_at",
    "created_at",
    "updated_at",
)
_HEALTH = ("failing_since", "last_failure_at", "last_success_at", "blocked_until", "blocked_reason")


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The endpoints of all tenants; every method names the one it works for.

    Methods raise EndpointNotFound for an id that is not the tenant's.
    """

    database: Database
    box: SecretBox
    policy: Policy

    def create(
        self, tenant_id: str, wanted: NewEndpoint, *, by: str, now: datetime
    ) -> tuple[dict[str, Any], str]:
        """The endpoint and its secret, which nobody is shown again.

        Raises WebhookUrlRefused, and Conflict once the tenant has 100.
        """
        endpoint_id, secret = new_id(), wanted.secret or new_webhook_secret()
        given = self._columns(endpoint_id, wanted)
        values = {
            **_DEFAULTS,
            **given,
            "id": endpoint_id,
            "tenant_id": tenant_id,
            "created_by": by,
            "secret": self.box.seal(secret, endpoint_context(endpoint_id)),
            "old_secrets": [],
            "enabled_at": now,
            "created_at": now,
            "updated_at": now,
        }
        with self.database.write() as connection:
            _lock_tenant(connection, tenant_id)  # or two at a time could be one too many
            count = sa.select(sa.func.count()).select_from(e).where(e.c.tenant_id == tenant_id)
            if connection.execute(count).scalar_one() >= MAX_ENDPOINTS:
                raise Conflict(f"a tenant may have {MAX_ENDPOINTS} endpoints; delete one first")
            if values["sign_with"] != "v1":
                self._need_key_pair(connection, tenant_id)
            connection.execute(sa.insert(e).values(values))
            return self._view(_find(connection, tenant_id, endpoint_id), now=now), secret

    def all(self, tenant_id: str, *, now: datetime) -> list[dict[str, Any]]:
        """The tenant's endpoints, oldest first."""
        with self.database.read() as connection:
            rows = connection.execute(_SELECT.where(e.c.tenant_id == tenant_id).order_by(e.c.id)).mappings()
            return [self._view(row, now=now) for row in rows]

    def get(self, tenant_id: str, endpoint_id: str, *, now: datetime) -> dict[str, Any]:
        """One of them."""
        with self.database.read() as connection:
            return self._view(_find(connection, tenant_id, endpoint_id), now=now)

    def change(
        self, tenant_id: str, endpoint_id: str, wanted: EndpointChange, *, now: datetime
    ) -> dict[str, Any]:
        """Set what is given.

        What waits goes to a new URL too, at once: headers meant for that go nowhere else. How the receiver
        has been answering is forgotten with its URL, and when a disabled endpoint is back.
        """
        values = self._columns(endpoint_id, wanted)
        status = values.get("status")
        if status == "disabled":
            del values["status"]
        with self.database.write() as connection:
            before = _find(connection, tenant_id, endpoint_id, lock=True)
            is_back = before["status"] == "disabled" and status in ("enabled", "paused")
            moved = values.get("url", before["url"]) != before["url"]
            if is_back:
                values |= {"disabled_reason": None, "disabled_at": None, "enabled_at": now}
            if is_back or moved:
                connection.execute(sa.delete(h).where(h.c.target_id == endpoint_id))
            if values.get("sign_with", "v1") != "v1":
                self._need_key_pair(connection, tenant_id)
            _update(connection, endpoint_id, values, now=now)
            if moved:
                _redirect_waiting(connection, endpoint_id, values["url"], now=now)
            if status == "disabled":
                disable(connection, before, reason="manual", now=now)
            return self._view(_find(connection, tenant_id, endpoint_id), now=now)

    def delete(self, tenant_id: str, endpoint_id: str, *, now: datetime) -> None:
        """Forget it. What waits for it is cancelled; what was delivered stays in the ledger."""
        with self.database.write() as connection:
            _find(connection, tenant_id, endpoint_id, lock=True)
            cancel_waiting(connection, endpoint_id, now=now)
            connection.execute(sa.delete(h).where(h.c.target_id == endpoint_id))
            connection.execute(sa.delete(e).where(e.c.id == endpoint_id))

    def rotate(
        self, tenant_id: str, endpoint_id: str, *, grace_seconds: int, secret: str | None, now: datetime
    ) -> tuple[dict[str, Any], str]:
        """A new secret; for the grace, 0 to 7 days, the old ones sign beside it: five at most."""
        fresh = secret or new_webhook_secret()
        with self.database.write() as connection:
            row = _find(connection, tenant_id, endpoint_id, lock=True)
            old = keep_old(row["secret"], row["old_secrets"], grace_seconds=grace_seconds, now=now)
            values = {
                "secret": self.box.seal(fresh, endpoint_context(endpoint_id)),
                "old_secrets": old,
            }
            _update(connection, endpoint_id, values, now=now)
            return self._view(_find(connection, tenant_id, endpoint_id), now=now), fresh

    def test(self, tenant_id: str, endpoint_id: str, *, by: str, now: datetime) -> str:
        """Send a test event, whatever the endpoint subscribed to. The id of its delivery."""
        with self.database.write() as connection:
            return self.test_within(connection, tenant_id, endpoint_id, by=by, now=now)

    def test_within(
        self, connection: sa.Connection, tenant_id: str, endpoint_id: str, *, by: str, now: datetime
    ) -> str:
        """`test` in a transaction of the caller's."""
        row = _find(connection, tenant_id, endpoint_id)
        if row["status"] == "disabled":
            raise Conflict("the endpoint is disabled; enable it first", current_status="disabled")
        identity = message_id(endpoint_id, new_id(), SystemEvent.ENDPOINT_TEST)
        told = Told(
            id=identity,
            tenant_id=tenant_id,
            event_type=SystemEvent.ENDPOINT_TEST.value,
            data={"endpoint_id": endpoint_id, "url": row["url"], "asked_by": by},
            created_by=by,
            targets=[Target(endpoint_id, row["url"], (), endpoint_id)],
        )
        record(connection, [told], now=now, trigger=TEST)
        d = webhook_deliveries.c
        delivery_id: str = connection.execute(sa.select(d.id).where(d.message_id == identity)).scalar_one()
        return delivery_id

    def public_key(self, tenant_id: str) -> str:
        """What receivers verify v1a signatures with; the key pair is made when there is none."""
        with self.database.write() as connection:
            return asymmetric.public_key(self._need_key_pair(connection, tenant_id))

    def _columns(self, endpoint_id: str, wanted: EndpointChange) -> dict[str, Any]:
        """The columns for the fields that were given; sealed where they must be."""
        given = wanted.model_dump(exclude_unset=True, exclude={"secret"})
        if "url" in given:
            given["url"] = self._target(given["url"])
        if isinstance(given.get("retry_schedule"), str):
            given["retry_schedule"] = list(SCHEDULES[given["retry_schedule"]])
        if "filters" in given:
            given["filters"] = {name: values for name, values in given["filters"].items() if values}
        context = endpoint_context(endpoint_id)
        if "headers" in given:
            headers = given["headers"]
            given["headers"] = self.box.seal(json.dumps(headers), context) if headers else None
        if given.get("client_certificate"):
            given["client_certificate"] = self.box.seal(given["client_certificate"], context)
        return given

    def _target(self, url: str) -> str:
        try:
            return check_url(url, self.policy).url
        except WebhookUrlRefused as refused:
            refused.errors = (FieldError("/url", str(refused), refused.code),)
            raise

    def _need_key_pair(self, connection: sa.Connection, tenant_id: str) -> str:
        context = signing_key_context(tenant_id)
        sealed = _lock_tenant(connection, tenant_id)
        if sealed is not None:
            return self.box.open(sealed, context)
        private_key = asymmetric.new_private_key()
        sealed = self.box.seal(private_key, context)
        connection.execute(
            sa.update(tenants).where(tenants.c.id == tenant_id).values(webhook_signing_key=sealed)
        )
        return private_key

    def _view(self, row: Mapping[Any, Any], *, now: datetime) -> dict[str, Any]:
        headers = row["headers"]
        names = json.loads(self.box.open(headers, endpoint_context(row["id"]))) if headers else {}
        return {
            **{name: row[name] for name in _OWN},
            "filters": EndpointFilters(**row["filters"]).model_dump(),
            "header_names": sorted(names),
            "has_client_certificate": row["client_certificate"] is not None,
            "has_ca_certificate": row["ca_certificate"] is not None,
            "secrets_in_grace": len(live_secrets(row["secret"], row["old_secrets"], now=now)) - 1,
            "health": {
                "consecutive_failures": row["consecutive_failures"] or 0,
                **{name: row[name] for name in _HEALTH},
            },
        }


_SELECT = sa.select(e, h.c.consecutive_failures, *(h.c[name] for name in _HEALTH)).select_from(
    e.outerjoin(h, h.c.target_id == e.c.id)
)


def _find(
    connection: sa.Connection, tenant_id: str, endpoint_id: str, *, lock: bool = False
) -> sa.RowMapping:
    query = _SELECT.where(e.c.id == endpoint_id, e.c.tenant_id == tenant_id)
    row = connection.execute(query.with_for_update(of=e) if lock else query).mappings().first()
    if row is None:
        raise EndpointNotFound(f"there is no webhook endpoint {endpoint_id}", endpoint_id=endpoint_id)
    return row


def _update(connection: sa.Connection, endpoint_id: str, values: Mapping[str, Any], *, now: datetime) -> None:
    changed = dict(values) | {"version": e.c.version + 1, "updated_at": now}
    connection.execute(sa.update(e).where(e.c.id == endpoint_id).values(changed))


def _redirect_waiting(connection: sa.Connection, endpoint_id: str, url: str, *, now: datetime) -> None:
    d = webhook_deliveries.c
    connection.execute(
        sa.update(webhook_deliveries)
        .where(d.endpoint_id == endpoint_id, d.status.in_(sorted(UNDONE)))
        .values(url=url, next_at=now, version=d.version + 1, updated_at=now)
    )


def _lock_tenant(connection: sa.Connection, tenant_id: str) -> str | None:
    """Its sealed signing key, and no other change of the tenant until this transaction ends."""
    t = tenants.c
    query = sa.select(t.webhook_signing_key).where(t.id == tenant_id).with_for_update()
    sealed: str | None = connection.execute(query).scalar_one()
    return sealed
