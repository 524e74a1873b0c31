"""How things stand, for those who watch the whole installation: bounded counts, no tenant in sight."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from laneway import models
from laneway.domain.states import ACTIVE
from laneway.engine import queries
from laneway.engine.queries import MAX_COUNTED
from laneway.engine.service import JobService
from laneway.lanes.backend import LanesUnavailable


@dataclass(frozen=True, slots=True)
class Gauges:
    """Rows, counted up to MAX_COUNTED. `depths` of lanes that workers serve; None while Redis is away."""

    jobs: dict[str, int]
    deliveries: int
    workers: dict[str, int]
    held: int
    depths: dict[str, int] | None


def read(service: JobService) -> Gauges:
    """The state of the moment, from a handful of indexed reads."""
    with service.database.read() as connection:
        jobs = {
            status.value: _count(
                connection, models.jobs, sa.literal_column(f"jobs.status = '{status.value}'")
            )
            for status in sorted(ACTIVE)
        }
        deliveries = _count(connection, models.webhook_deliveries, models.open_delivery)
        living = queries.living_workers(connection, within_seconds=service.settings.lease_seconds)
    lanes = sorted({lane for worker in living for lane in worker["lanes"]})
    try:
        depths = service.lanes.depths(lanes)
    except LanesUnavailable:
        depths = None
    states = [worker["state"] for worker in living]
    return Gauges(
        jobs,
        deliveries,
        {state: states.count(state) for state in ("active", "draining")},
        sum(worker["held"] for worker in living),
        depths,
    )


def _count(connection: sa.Connection, table: sa.Table, condition: sa.ColumnElement[bool]) -> int:
    """Rows that match, up to MAX_COUNTED. The condition is written out, so that its partial index serves."""
    some = sa.select(sa.literal(1)).select_from(table).where(condition).limit(MAX_COUNTED).subquery()
    return int(connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one())
