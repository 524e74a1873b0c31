"""Writes down how targets answered, and draws the consequences: pauses, warnings, the end of an endpoint.

Runs in the transaction that settles the attempts, so that what couriers know and what the ledger says
never differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from laneway.domain.events import SystemEvent
from laneway.models import open_delivery
from laneway.models import webhook_deliveries as d
from laneway.models import webhook_endpoints as e
from laneway.models import webhook_health as h
from laneway.notify.rules import current as notifications
from laneway.webhooks.health import BlockedReason, Health, after, due_warning, percent_to_disabling
from laneway.webhooks.messages import TEST, Target, Told, message_id, record
from laneway.webhooks.retries import Answer, DeliveryStatus
from laneway.webhooks.subscriptions import subscribers

if TYPE_CHECKING:
    from laneway.webhooks.deliveries import Claimed

ACTOR = "courier"
PARKED_ROWS = 5_000
_FIELDS = tuple(Health.__dataclass_fields__)


def save(connection: sa.Connection, answers: Sequence[tuple[Claimed, Answer]], *, now: datetime) -> None:
    """Take the answers into account, in their order.

    Targets that answer well and of which nothing bad was known cost one read for all of them.
    """
    by_target: dict[str, list[tuple[Claimed, Answer]]] = {}
    for delivery, answer in answers:
        by_target.setdefault(delivery.target_id, []).append((delivery, answer))
    known = _read(connection, sorted(by_target))
    for target_id in sorted(by_target):  # in one order, whoever writes: no two couriers lock each other out
        seen = by_target[target_id]
        before = known.get(target_id)
        health = before or Health()
        for delivery, answer in seen:
            health = after(health, answer, opened=delivery.health.opened, now=now)
        if not health.worth_keeping and (before is None or not before.worth_keeping):
            continue
        delivery = seen[-1][0]
        gone = any(answer.status_code == HTTPStatus.GONE for _, answer in seen)
        if delivery.manner.id is not None:
            health = _look_after(connection, delivery, before or Health(), health, gone=gone, now=now)
        _write(connection, delivery, health, now=now)
        if health.blocked_until is not None and health.blocked_until > now:
            _park(connection, target_id, health.blocked_until)


def probe(
    connection: sa.Connection, target_ids: Sequence[str], *, until: datetime, now: datetime
) -> set[str]:
    """Which of the targets, whose pauses are over, the caller alone may try before `until`.

    The others are being tried by another courier, which has committed that or is about to.
    """
    free = sa.select(h.c.target_id).where(h.c.target_id.in_(target_ids), h.c.blocked_until <= now)
    found = set(connection.execute(free.with_for_update(skip_locked=True)).scalars())
    if found:
        connection.execute(
            sa.update(h)
            .where(h.c.target_id.in_(found))
            .values(
                blocked_until=until,
                blocked_reason=BlockedReason.PROBE.value,
                version=h.c.version + 1,
                updated_at=now,
            )
        )
    return found


def _park(connection: sa.Connection, target_id: str, until: datetime) -> None:
    """Make what waits for a paused target due when the pause ends: no claim has to pass over it meanwhile."""
    waiting = (
        sa.select(d.c.id)
        .where(d.c.target_id == target_id, open_delivery, d.c.next_at < until, d.c.trigger != TEST)
        .limit(PARKED_ROWS)
    )
    if connection.dialect.name == "postgresql":
        waiting = waiting.with_for_update(skip_locked=True)
    connection.execute(sa.update(d).where(d.c.id.in_(waiting)).values(next_at=until))


def _read(connection: sa.Connection, target_ids: Sequence[str]) -> dict[str, Health]:
    rows = connection.execute(
        sa.select(h).where(h.c.target_id.in_(target_ids)).order_by(h.c.target_id).with_for_update()
    ).mappings()
    return {row["target_id"]: _health(row) for row in rows}


def _health(row: sa.RowMapping) -> Health:
    reason = row["blocked_reason"]
    values = {name: row[name] for name in _FIELDS}
    return Health(**values | {"blocked_reason": reason and BlockedReason(reason)})


def _write(connection: sa.Connection, delivery: Claimed, health: Health, *, now: datetime) -> None:
    values: dict[str, Any] = asdict(health) | {"updated_at": now}
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(h).values(
        target_id=delivery.target_id, tenant_id=delivery.tenant_id, created_by=ACTOR, **values
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[h.c.target_id], set_=values | {"version": h.c.version + 1}
        )
    )


def _look_after(
    connection: sa.Connection, delivery: Claimed, before: Health, health: Health, *, gone: bool, now: datetime
) -> Health:
    """What the answers mean for a registered endpoint. Returns its health with the warning it was given."""
    endpoint = connection.execute(sa.select(e).where(e.c.id == delivery.manner.id)).mappings().first()
    if endpoint is None or endpoint["status"] == "disabled":
        cancel_waiting(connection, delivery.manner.id or "", now=now)  # it was on its way meanwhile
        return health
    percent = percent_to_disabling(health, enabled_at=endpoint["enabled_at"], now=now)
    if gone or percent >= 100:
        disable(connection, endpoint, reason="gone_410" if gone else "failing", now=now)
    elif (step := due_warning(health, percent)) is not None:
        _tell(connection, SystemEvent.ENDPOINT_FAILING, endpoint, now=now, percent=step)
        return replace(health, warned_percent=step)
    elif before.warned_percent and not health.consecutive_failures:
        _tell(connection, SystemEvent.ENDPOINT_RECOVERED, endpoint, now=now)
    return health


def disable(connection: sa.Connection, endpoint: sa.RowMapping, *, reason: str, now: datetime) -> None:
    """Send nothing more to an endpoint: what waits for it is cancelled, and its tenant is told."""
    changed = connection.execute(
        sa.update(e)
        .where(e.c.id == endpoint["id"], e.c.status != "disabled")
        .values(
            status="disabled",
            disabled_reason=reason,
            disabled_at=now,
            version=e.c.version + 1,
            updated_at=now,
        )
    )
    if not changed.rowcount:
        return
    cancel_waiting(connection, endpoint["id"], now=now)
    _tell(connection, SystemEvent.ENDPOINT_DISABLED, endpoint, now=now, reason=reason)


def cancel_waiting(connection: sa.Connection, endpoint_id: str, *, now: datetime) -> int:
    """How many deliveries that waited for the endpoint will not be sent."""
    return connection.execute(
        sa.update(d)
        .where(d.c.target_id == endpoint_id, open_delivery)
        .values(status=DeliveryStatus.CANCELLED.value, version=d.c.version + 1, updated_at=now)
    ).rowcount


def _tell(
    connection: sa.Connection, event: SystemEvent, endpoint: sa.RowMapping, *, now: datetime, **facts: object
) -> None:
    """Tell the tenant's other endpoints, and the operators."""
    tenant_id, endpoint_id = endpoint["tenant_id"], endpoint["id"]
    others = subscribers(connection, [tenant_id]).get(tenant_id, ())
    targets = [Target.endpoint(each) for each in others if each.id != endpoint_id and each.wants(event)]
    targets += [Target.notified(tenant_id, address) for address in notifications().addresses(event)]
    told = Told(
        id=message_id(endpoint_id, now.isoformat(), event),
        tenant_id=tenant_id,
        event_type=event.value,
        data={"endpoint_id": endpoint_id, "url": endpoint["url"], **facts},
        created_by=ACTOR,
        targets=targets,
    )
    record(connection, [told], now=now)
