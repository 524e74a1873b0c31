"""Changing a job that waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.payload import to_json
from laneway.domain.spec import JobChange, lane_of
from laneway.domain.states import WAITING, JobStatus
from laneway.engine import queries
from laneway.engine.access.callers import Caller
from laneway.engine.outcomes import carry_out
from laneway.engine.positions import position
from laneway.engine.transitions import Enqueue, record, tag
from laneway.errors import IllegalTransition, PreconditionFailed
from laneway.lanes.backend import Due, LanesUnavailable

if TYPE_CHECKING:
    from laneway.engine.service import JobService

CHANGE = "change"
"""The action of the event that a change leaves; no status follows from it."""

j = models.jobs.c
t = models.job_tags.c


def change(
    service: JobService,
    job_id: str,
    caller: Caller,
    wanted: JobChange,
    *,
    expected: Callable[[int], bool] = lambda _: True,
) -> tuple[dict[str, Any], int]:
    """Change what is given, if `expected` takes the job's version; the job and its version since then.

    The row is locked from the look to the change, so a worker that claims it at the same moment has either
    the old job, which is then refused here, or the whole new one. A scheduled job whose new moment is there
    is queued at once. Raises JobNotFound, PreconditionFailed, IllegalTransition for a job that does not
    wait, and what `prepare` raises for parameters and metadata.
    """
    from laneway.engine.service import MAX_METADATA_BYTES, in_utc

    given = wanted.model_dump(include=wanted.model_fields_set)
    to_json(list(given.get("tags", ())), what="tags")
    to_json(given.get("metadata", {}), what="metadata", max_bytes=MAX_METADATA_BYTES)
    to_json(given.get("parameters", {}))
    if "scheduled_for" in given:
        given["scheduled_for"] = in_utc(given["scheduled_for"], "scheduled_for")
    now = service.clock.now()
    with service.database.write() as connection:
        row = service.find(connection, job_id, caller, lock=True)
        if not expected(row["version"]):
            raise PreconditionFailed("the job has changed since you read it; read it again")
        _check_status(row, given)
        if "parameters" in given:
            service.known_type(row["job_type"], "/parameters").check(given["parameters"])
        connection.execute(
            sa.update(models.jobs)
            .where(j.id == job_id, j.tenant_id == row["tenant_id"], j.status == row["status"])
            .values(
                _columns(row, given)
                | {"version": j.version + 1, "event_seq": j.event_seq + 1, "updated_at": now}
            )
        )
        if "tags" in given:
            mine = sa.delete(models.job_tags).where(t.job_id == job_id, t.tenant_id == row["tenant_id"])
            connection.execute(mine)
            tag(connection, job_id, row["tenant_id"], given["tags"])
        changed = service.find(connection, job_id, caller)
        record(
            connection, changed, action=CHANGE, actor=caller.subject, reason=", ".join(sorted(given)), now=now
        )
        if "scheduled_for" in given and given["scheduled_for"] <= now:
            carry_out(connection, [Enqueue(job_id)], now=now, actor=caller.subject)
            changed = service.find(connection, job_id, caller)
        job = queries.view(changed) | {"position": position(connection, changed)}
    moved = (row["lane"], row["status"]) != (changed["lane"], changed["status"])
    if moved and changed["status"] == JobStatus.QUEUED:
        try:
            service.lanes.remove(row["lane"], [job_id])
        except LanesUnavailable:
            pass  # the id that stays in the old lane is harmless: who comes second is refused the claim
        service.ring([Due(changed["lane"], job_id, changed["tenant_id"])])
    if "scheduled_for" in given and changed["status"] == JobStatus.SCHEDULED:
        service.news.ring_scheduler()
    service.news.changed([job_id])
    return job, changed["version"]


def _check_status(row: sa.RowMapping, given: dict[str, Any]) -> None:
    status = row["status"]
    if status not in WAITING:
        raise IllegalTransition(
            f"the job is {status}: only one that waits can be changed", current_status=status
        )
    if "scheduled_for" in given and status != JobStatus.SCHEDULED:
        raise IllegalTransition(
            f"the job is {status}: only a scheduled one can be put off or brought forward",
            current_status=status,
        )


def _columns(row: sa.RowMapping, given: dict[str, Any]) -> dict[str, Any]:
    columns = dict(given)
    if "priority" in given:
        columns |= {"priority": given["priority"].value, "lane": lane_of(row["queue"], given["priority"])}
    if "tags" in given:
        columns["tags"] = list(given["tags"])
    return columns
