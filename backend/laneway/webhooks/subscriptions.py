"""Who hears of an event: registered endpoints, read in the transaction that writes the event.

So an endpoint hears of everything that is committed after it was made, and of nothing before. One that
is disabled gets its deliveries too, as `skipped`: a replay then knows exactly what it missed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from laneway.db import any_of, listed
from laneway.domain.events import subscribed
from laneway.models import webhook_endpoints as e


@dataclass(frozen=True, slots=True)
class Subscriber:
    """An endpoint, as far as the fan-out needs it."""

    id: str
    url: str
    status: str
    event_types: Sequence[str]
    filters: Mapping[str, Sequence[str]]
    retry_schedule: Sequence[float]

    def wants(self, event_type: str, job: Mapping[Any, Any] | None = None) -> bool:
        """Whether it hears of `event_type`; `job` (a row) is held against its filters.

        Filters are of jobs: what is told of something else passes them.
        """
        if not subscribed(event_type, self.event_types):
            return False
        if job is None:
            return True
        queues, job_types, tags = (self.filters.get(name) for name in ("queues", "job_types", "tags"))
        return (
            (not queues or job["queue"] in queues)
            and (not job_types or job["job_type"] in job_types)
            and (not tags or not set(tags).isdisjoint(job["tags"]))
        )


Subscribers = Mapping[str, Sequence[Subscriber]]
"""By tenant; tenants without endpoints are not in it."""


def subscribers(connection: sa.Connection, tenant_ids: Collection[str]) -> Subscribers:
    """The endpoints of these tenants, whatever their status: one indexed read for all of them."""
    if not tenant_ids:
        return {}
    dialect = connection.dialect.name
    found: dict[str, list[Subscriber]] = {}
    for row in connection.execute(_select(dialect), {"tenants": listed(dialect, sorted(tenant_ids))}):
        tenant_id, *values = row
        found.setdefault(tenant_id, []).append(Subscriber(*values))
    return found


@cache
def _select(dialect: str) -> sa.Select[Any]:
    return (
        sa.select(
            e.c.tenant_id, e.c.id, e.c.url, e.c.status, e.c.event_types, e.c.filters, e.c.retry_schedule
        )
        .where(sa.text(f"webhook_endpoints.tenant_id IN {any_of(dialect, 'tenants', kind='id')}"))
        .order_by(e.c.id)
    )
