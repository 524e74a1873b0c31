"""Jobs to be made later: what a chain or a batch keeps of one until its time comes.

A plan is JSON: the columns of the job, as they were checked when it was asked for, with its parameters as
JSON that may hold references, and its delay. A release that knows more columns leaves them at their
defaults in plans that were written before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from laneway.clock import new_id
from laneway.domain.flow import resolve
from laneway.domain.payload import to_json
from laneway.domain.states import JobStatus
from laneway.engine.transitions import LinkedJob, NewJob

Plan = dict[str, Any]

_OF_ITS_MOMENT = {
    *("id", "tenant_id", "created_by", "scheduled_for", "expires_at"),
    *("unique_key", "status", "queued_at"),
}
_KEPT = (
    *(name for name in NewJob.__slots__ if name not in _OF_ITS_MOMENT),
    *("concurrency_key", "concurrency_limit"),
)


def plan_of(row: NewJob, *, delay_seconds: float | None) -> Plan:
    """The plan of a checked job."""
    kept = {name: getattr(row, name, None) for name in _KEPT}
    return kept | {"parameters": json.loads(row.parameters), "delay_seconds": delay_seconds}


def make(
    plan: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    tenant_id: str,
    created_by: str,
    now: datetime,
    **links: Any,
) -> LinkedJob:
    """The job that a plan has become, its references resolved.

    Raises ResultMissing, and what `to_json` raises when the resolved parameters are too large or too deep.
    """
    starts_at = now + timedelta(seconds=plan["delay_seconds"]) if plan.get("delay_seconds") else None
    job = LinkedJob(
        **{name: plan[name] for name in _KEPT if name in plan and name != "parameters"},
        **links,
        id=new_id(),
        tenant_id=tenant_id,
        created_by=created_by,
        parameters=to_json(resolve(plan["parameters"], results)),
        scheduled_for=starts_at,
        expires_at=None,
        unique_key=None,
        status=JobStatus.QUEUED.value,
        queued_at=now,
    )
    return job if starts_at is None else replace(job, status=JobStatus.SCHEDULED.value, queued_at=None)
