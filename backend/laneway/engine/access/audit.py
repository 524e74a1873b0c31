"""Who did what: a row for each act that others should be able to look up, written with the act itself.

    record(connection, caller, AuditAction.QUEUE_PAUSED, "queue:emails", {"reason": reason})

The row stands in the act's own transaction: what was rolled back is not in the log, and what is in the
store is. Rows are only added; the store refuses to change or delete them (a trigger, on both stores).
Facts are for people of the tenant: no secrets, no parameters, no bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.payload import to_json
from laneway.engine.access.callers import Caller
from laneway.engine.queries import Clauses, Scope, equal_to, made_between, newest_first, stamp

MAX_TARGET_CHARACTERS = 200
MAX_FACTS_BYTES = 4096

a = models.audit_log.c


class AuditAction(StrEnum):
    """What is written down. Named as events are: noun, and what happened to it."""

    KEY_CREATED = "key.created"
    KEY_CHANGED = "key.changed"
    KEY_ROTATED = "key.rotated"
    KEY_REVOKED = "key.revoked"
    TENANT_CREATED = "tenant.created"
    TENANT_CHANGED = "tenant.changed"
    RATE_LIMIT_SET = "rate_limit.set"
    RATE_LIMIT_REMOVED = "rate_limit.removed"
    QUEUE_PAUSED = "queue.paused"
    QUEUE_RESUMED = "queue.resumed"
    QUEUE_PURGED = "queue.purged"
    JOB_FORCE_COMPLETED = "job.force_completed"
    JOBS_CLEANED_UP = "jobs.cleaned_up"


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries a list holds; None means any."""

    tenant_id: str | None = None
    actor: str | None = None
    action: AuditAction | None = None
    target: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    def clauses(self) -> Clauses:
        return [
            *equal_to(
                (a.tenant_id, self.tenant_id),
                (a.actor, self.actor),
                (a.action, self.action),
                (a.target, self.target),
            ),
            *made_between(models.audit_log, self.created_after, self.created_before),
        ]


def record(
    connection: sa.Connection,
    caller: Caller,
    action: AuditAction,
    target: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write down that `caller` did `action` to `target`: `kind:id`, as in `key:ab12…`, `queue:emails`.

    `connection` is that of the act. Raises InvalidPayload, PayloadTooLarge for facts that are no small JSON.
    """
    facts = dict(facts or {})
    to_json(facts, what="facts", max_bytes=MAX_FACTS_BYTES)
    row = {
        "id": new_id(),
        "tenant_id": caller.tenant_id,
        "actor": caller.subject,
        "role": caller.role.value,
        "key_id": caller.key_id or None,
        "action": action.value,
        "target": target[:MAX_TARGET_CHARACTERS],
        "facts": facts,
        "address": caller.address,
        "request_id": caller.request_id,
    }
    connection.execute(sa.insert(models.audit_log).values(row))


def page(
    database: Database, caller: Caller, wanted: AuditFilter, *, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Entries of all tenants, newest first, and the cursor of the next page. Raises InvalidCursor."""
    query = sa.select(models.audit_log).where(*wanted.clauses())
    bound = (Scope(caller.tenant_id), wanted)
    with database.read() as connection:
        rows, following = newest_first(connection, query, a.id, bound=bound, limit=limit, cursor=cursor)
    return [_view(row) for row in rows], following


def _view(row: sa.RowMapping) -> dict[str, Any]:
    return {str(name): stamp(value) if name == "created_at" else value for name, value in row.items()}
