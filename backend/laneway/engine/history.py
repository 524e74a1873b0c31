"""What became of a job, from its events and webhooks: attempt by attempt, or all that happened.

Events are in the order of their `seq`, which is that of the commits; `at` comes from the clock of the
process that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa

from laneway import models
from laneway.domain.retry import Category
from laneway.domain.states import Action
from laneway.engine import queries
from laneway.engine.access.callers import Caller
from laneway.engine.queries import stamp
from laneway.engine.service import JobService, scope_of
from laneway.errors import JobNotFound
from laneway.webhooks.retries import UNDONE, DeliveryStatus

WORKER_ACTOR = "worker:"

e = models.job_events.c
m = models.webhook_messages.c
d = models.webhook_deliveries.c
a = models.webhook_attempts.c

Outcome = Literal["running", "completed", "failed", "timeout", "crashed", "snoozed", "released", "cancelled"]
Page = tuple[list[dict[str, Any]], str | None]

_ENDS: dict[str, Outcome] = {
    Action.COMPLETE: "completed",
    Action.FORCE_COMPLETE: "completed",
    Action.BACK_OFF: "failed",
    Action.FAIL: "failed",
    Action.TIME_OUT: "timeout",
    Action.RELEASE: "released",
    Action.STOP: "cancelled",
}
_FAULTS: dict[str, Outcome] = {
    Category.TIMEOUT: "timeout",
    Category.CRASH: "crashed",
    Category.SNOOZE: "snoozed",
}


def attempts(service: JobService, job_id: str, caller: Caller, *, limit: int, cursor: str | None) -> Page:
    """The job's attempts, first to last, and the cursor of the next page.

    Raises JobNotFound, InvalidCursor.
    """
    bound = (scope_of(caller), ("attempts", job_id))
    after = UUID(queries.decode_cursor(cursor, *bound)).int if cursor else 0
    with service.database.read() as connection:
        last = _find(connection, job_id, caller)["attempt"]
        here = sa.select(models.job_events).where(
            e.job_id == job_id, e.attempt > after, e.attempt <= after + limit
        )
        events = connection.execute(here.order_by(e.seq)).mappings().all()
    more = last > after + limit
    return _attempts(events), queries.encode_cursor(str(UUID(int=after + limit)), *bound) if more else None


def timeline(service: JobService, job_id: str, caller: Caller, *, limit: int, cursor: str | None) -> Page:
    """At most `limit` events of the job, oldest first, and the cursor of the next page.

    Tries to deliver a webhook are on the page of the event that it tells of, in the order of time.
    Raises JobNotFound, InvalidCursor.
    """
    bound = (scope_of(caller), ("timeline", job_id))
    after = UUID(queries.decode_cursor(cursor, *bound)).int if cursor else 0
    with service.database.read() as connection:
        last = _find(connection, job_id, caller)["event_seq"]
        here = sa.select(models.job_events).where(e.job_id == job_id, e.seq > after)
        events = connection.execute(here.order_by(e.seq).limit(limit)).mappings().all()
        end = events[-1]["seq"] if events else last
        tries = connection.execute(_webhooks().where(d.job_id == job_id, m.job_seq.between(after + 1, end)))
        shown = _merged(events, tries.mappings().all())
    return shown, queries.encode_cursor(str(UUID(int=end)), *bound) if last > end else None


def _find(connection: sa.Connection, job_id: str, caller: Caller) -> sa.RowMapping:
    row = queries.find_job(connection, job_id, scope_of(caller))
    if row is None:
        raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
    return row


def _attempts(events: Iterable[sa.RowMapping]) -> list[dict[str, Any]]:
    """One entry a claim; what comes after an attempt's end (a retry, say) bears its number, too."""
    shown: dict[int, dict[str, Any]] = {}
    for event in events:
        number, action, error = event["attempt"], event["action"], event["error"]
        if action == Action.CLAIM:
            shown[number] = {
                "attempt": number,
                "outcome": "running",
                "worker": event["actor"].removeprefix(WORKER_ACTOR),
                "started_at": stamp(event["at"]),
                "finished_at": None,
                "reason": None,
                "error": None,
            }
        elif action in _ENDS and number in shown and shown[number]["outcome"] == "running":
            shown[number] |= {
                "outcome": _FAULTS.get((error or {}).get("category", ""), _ENDS[action]),
                "finished_at": stamp(event["at"]),
                "reason": event["reason"],
                "error": error,
            }
    return list(shown.values())


def _webhooks() -> sa.Select[Any]:
    """Each try of each delivery; a delivery without one has a row as well."""
    return (
        sa.select(
            d.id.label("delivery_id"),
            d.url,
            d.status,
            d.attempt_count,
            d.next_at,
            m.event_type,
            a.number,
            a.started_at,
            a.status_code,
            a.error_class,
            a.error,
            a.total_ms,
        )
        .select_from(models.webhook_deliveries)
        .join(models.webhook_messages, m.id == d.message_id)
        .outerjoin(models.webhook_attempts, a.delivery_id == d.id)
        .order_by(d.id, a.number)
    )


def _merged(events: Sequence[sa.RowMapping], tries: Sequence[sa.RowMapping]) -> list[dict[str, Any]]:
    placed: list[tuple[datetime, int, dict[str, Any]]] = []
    for event in events:
        # Clocks differ, and the order is that of seq.
        at = max(event["at"], placed[-1][0]) if placed else event["at"]
        placed.append((at, 0, _job_entry(event)))
    placed += [(row["started_at"], 1, _try_entry(row)) for row in tries if row["number"] is not None]
    undone = {row["delivery_id"]: row for row in tries if row["status"] in UNDONE}
    placed += [(row["next_at"], 1, _next_entry(row)) for row in undone.values()]
    return [entry for *_, entry in sorted(placed, key=lambda place: place[:2])]


def _job_entry(event: sa.RowMapping) -> dict[str, Any]:
    error = event["error"]
    return {
        "kind": "job",
        "at": stamp(event["at"]),
        **{name: event[name] for name in ("seq", "action", "status", "attempt", "actor", "reason")},
        "error": error and error | {"traceback": None},
    }


def _try_entry(row: Mapping[Any, Any]) -> dict[str, Any]:
    """An attempt to deliver: only an answer of 2xx has no error class."""
    status = DeliveryStatus.DELIVERED.value if row["error_class"] is None else "failed"
    return _webhook_entry(row, at=row["started_at"], status=status, attempt=row["number"])


def _next_entry(row: Mapping[Any, Any]) -> dict[str, Any]:
    """What a delivery waits for. One that is being sent has counted its attempt already."""
    number = row["attempt_count"] + (row["status"] != DeliveryStatus.SENDING)
    said = {"status_code": None, "error_class": None, "error": None, "total_ms": None}
    return _webhook_entry({**row, **said}, at=row["next_at"], status=row["status"], attempt=number)


def _webhook_entry(row: Mapping[Any, Any], *, at: datetime, status: str, attempt: int) -> dict[str, Any]:
    names = ("event_type", "delivery_id", "url", "status_code", "error_class", "error", "total_ms")
    said = {name: row[name] for name in names}
    return {"kind": "webhook", "at": stamp(at), "status": status, "attempt": attempt, **said}
