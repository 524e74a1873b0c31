"""Tenants: whose everything is. An admin makes, names and limits them; nobody deletes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.clock import new_id
from laneway.db import Database, utc_now
from laneway.domain.payload import to_json
from laneway.engine import queries
from laneway.engine.access.audit import AuditAction, record
from laneway.engine.access.callers import Caller
from laneway.engine.queries import Scope, stamp
from laneway.errors import Conflict, TenantNotFound
from laneway.webhooks.secrets import SecretBox, new_webhook_secret, tenant_context

t = models.tenants.c
j = models.jobs.c
MAX_RUNNING = 100_000
MAX_QUEUED = 10_000_000
_LIMITS = (t.max_running, t.max_queued, t.weight)
_SHOWN = (t.id, t.name, *_LIMITS, t.created_by, t.created_at, t.updated_at)


def page(
    database: Database, caller: Caller, *, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Tenants, newest first, and the cursor of the next page. Raises InvalidCursor."""
    bound = (Scope(caller.tenant_id), "tenants")
    with database.read() as connection:
        rows, following = queries.newest_first(
            connection, sa.select(*_SHOWN), t.id, bound=bound, limit=limit, cursor=cursor
        )
    return [_view(row) for row in rows], following


def need(database: Database, tenant_id: str) -> dict[str, Any]:
    """The tenant. Raises TenantNotFound."""
    with database.read() as connection:
        return _need(connection, tenant_id)


def create(database: Database, box: SecretBox, caller: Caller, *, name: str) -> dict[str, Any]:
    """A new tenant with a webhook secret of its own. Raises Conflict when another has the name."""
    to_json(name, what="name")
    tenant_id = new_id()
    values = {
        "id": tenant_id,
        "name": name,
        "webhook_secret": box.seal(new_webhook_secret(), tenant_context(tenant_id)),
        "created_by": caller.subject,
    }
    try:
        with database.write() as connection:
            connection.execute(sa.insert(models.tenants).values(values))
            record(connection, caller, AuditAction.TENANT_CREATED, f"tenant:{tenant_id}", {"name": name})
            return _need(connection, tenant_id)
    except sa.exc.IntegrityError:
        raise _taken(name) from None


def change(database: Database, tenant_id: str, caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
    """The tenant with what is given: a name, limits. Raises TenantNotFound, Conflict for a taken name.

    What runs when a limit comes counts: it is marked in this transaction.
    """
    to_json(given.get("name"), what="name")
    try:
        with database.write() as connection:
            before = _need(connection, tenant_id)
            values = dict(given) | {"version": t.version + 1, "updated_at": utc_now()}
            connection.execute(sa.update(models.tenants).where(t.id == tenant_id).values(values))
            if given.get("max_running") is not None:
                runs: sa.ColumnElement[bool] = sa.literal_column("jobs.status = 'running' AND NOT jobs.gated")
                marked = sa.update(models.jobs).where(j.tenant_id == tenant_id, runs)
                connection.execute(marked.values(gated=True))
            facts = dict(given) | {"was": {name: before[name] for name in given}}
            record(connection, caller, AuditAction.TENANT_CHANGED, f"tenant:{tenant_id}", facts)
            return _need(connection, tenant_id)
    except sa.exc.IntegrityError:
        raise _taken(given["name"]) from None


def _need(connection: sa.Connection, tenant_id: str) -> dict[str, Any]:
    row = connection.execute(sa.select(*_SHOWN).where(t.id == tenant_id)).mappings().first()
    if row is None:
        raise TenantNotFound(f"there is no tenant {tenant_id}", tenant_id=tenant_id)
    return _view(row)


def _taken(name: str) -> Conflict:
    return Conflict(f"there is a tenant called {name!r} already")


def _view(row: sa.RowMapping) -> dict[str, Any]:
    moments = {name: stamp(row[name]) for name in ("created_at", "updated_at")}
    limits = {column.name: row[column.name] for column in _LIMITS}
    return {name: row[name] for name in ("id", "name", "created_by")} | limits | moments
