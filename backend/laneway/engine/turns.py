"""Tenants' turns as the database tells them: who waits in a lane, and the first rows of each.

The order of a lane is decided where its ids enter (`lanes/turns.py`). Here is what that needs of the rows:
each tenant's oldest, as many as its share of a lane is by its weight, more where others want less. A lane
with one tenant costs one probe of an index more than a lane without tenants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from laneway import models
from laneway.db import Id, Moment
from laneway.domain.states import JobStatus

MAX_WEIGHT = 100
ROUNDS = 4  # of giving what some do not want to the others

j = models.jobs.c
t = models.tenants.c

# One probe of ix_jobs_queued_tenants for each tenant, however many rows there are. The order is the
# index's own to the last column, so that no other index of jobs looks as good to a planner.
_TENANTS = sa.text(
    """
    WITH RECURSIVE found (tenant_id) AS (
        SELECT * FROM (SELECT tenant_id FROM jobs WHERE status = 'queued' AND lane = :lane
            ORDER BY tenant_id, queued_at, id LIMIT 1) AS the_first
        UNION ALL
        SELECT (SELECT jobs.tenant_id FROM jobs WHERE jobs.status = 'queued' AND jobs.lane = :lane
            AND jobs.tenant_id > found.tenant_id ORDER BY jobs.tenant_id, jobs.queued_at, jobs.id LIMIT 1)
        FROM found WHERE found.tenant_id IS NOT NULL)
    SELECT tenant_id, (SELECT jobs.queued_at FROM jobs WHERE jobs.status = 'queued' AND jobs.lane = :lane
            AND jobs.tenant_id = found.tenant_id ORDER BY jobs.queued_at, jobs.id LIMIT 1) AS oldest
    FROM found WHERE tenant_id IS NOT NULL ORDER BY oldest, tenant_id
    """
).columns(tenant_id=Id, oldest=Moment)


class First(NamedTuple):
    """A tenant's oldest queued rows of a lane, `(id, queued_at)`; with `more`, the last one is too many."""

    rows: list[tuple[str, datetime]]
    more: bool


@dataclass(slots=True)
class _Read:
    rows: list[tuple[str, datetime]] = field(default_factory=list)
    more: bool = True


def tenant_weights(connection: sa.Connection) -> dict[str, int]:
    """The weights of the tenants whose weight is not 1."""
    own = sa.text("(weight <> 1 OR max_queued IS NOT NULL)")  # what ix_tenants_own_turns holds
    rows = connection.execute(sa.select(t.id, t.weight).where(own, t.weight != 1))
    return {row.id: row.weight for row in rows}


def waiting_tenants(connection: sa.Connection, lane: str) -> list[str]:
    """The tenants with queued rows in the lane, those whose oldest row came first before others."""
    return list(connection.execute(_TENANTS, {"lane": lane}).scalars())


def first_by_tenant(
    connection: sa.Connection, lane: str, most: int, *, weights: Mapping[str, int]
) -> dict[str, First]:
    """The first `most` queued rows of the lane by tenants' turns, about; of at most so many tenants.

    Each tenant's are its oldest, in order, and one more when it has more.
    """
    read = {tenant_id: _Read() for tenant_id in waiting_tenants(connection, lane)[:most]}
    for _ in range(ROUNDS):
        wanting = [tenant_id for tenant_id, each in read.items() if each.more]
        left = most - sum(len(each.rows) - (each.more and bool(each.rows)) for each in read.values())
        if not wanting or left <= 0:
            break
        heavy = sum(weights.get(tenant_id, 1) for tenant_id in wanting)
        for tenant_id in wanting:
            share = max(1, left * weights.get(tenant_id, 1) // heavy)
            _read_on(connection, lane, tenant_id, read[tenant_id], share)
    return {tenant_id: First(each.rows, each.more) for tenant_id, each in read.items() if each.rows}


def _read_on(connection: sa.Connection, lane: str, tenant_id: str, read: _Read, share: int) -> None:
    """So many rows of the tenant more, and one to know whether that is all."""
    rows = sa.select(j.id, j.queued_at).where(
        j.lane == lane, j.status == JobStatus.QUEUED, j.tenant_id == tenant_id
    )
    limit = share + 1
    if read.rows:  # the last one was one too many
        last_id, last_at = read.rows[-1]
        later = sa.or_(j.queued_at > last_at, sa.and_(j.queued_at == last_at, j.id > last_id))
        rows, limit = rows.where(j.queued_at >= last_at, later), share
    found = connection.execute(rows.order_by(j.queued_at, j.id).limit(limit)).all()
    read.rows += [(row.id, row.queued_at) for row in found]
    read.more = len(found) == limit
