"""Paused queues: their jobs are accepted, and wait until the queue is resumed.

A row of `paused_queues` is the pause. The claim looks at it in its own statement (engine/transitions.py),
so no claim that begins after the pause was answered takes a job of the queue, whatever its worker knows.
What was claimed before and has not begun is handed back when its worker learns of the pause: at once
through Redis, with its next beat without. So `beat_seconds` after the answer nothing begins any more.
Workers leave a paused queue's lanes alone and the reconciler fills none, so that no id is taken in vain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.spec import queue_of

QUEUE_PAUSED = "queue_paused"

p = models.paused_queues.c


def paused_queues(connection: sa.Connection) -> dict[str, sa.RowMapping]:
    """The paused queues by name: `reason`, `created_by` and `created_at` of each."""
    rows = connection.execute(sa.select(models.paused_queues).order_by(p.queue)).mappings()
    return {row["queue"]: row for row in rows}


def is_paused(connection: sa.Connection, queue: str) -> bool:
    """Whether the queue's jobs wait until it is resumed."""
    return connection.execute(sa.select(p.queue).where(p.queue == queue)).first() is not None


def paused_names(database: Database) -> frozenset[str]:
    """The names of the paused queues."""
    with database.read() as connection:
        return frozenset(connection.execute(sa.select(p.queue)).scalars())


def open_lanes(lanes: Iterable[str], paused: Collection[str]) -> tuple[str, ...]:
    """The lanes whose queues are not paused, in their order."""
    return tuple(lane for lane in lanes if queue_of(lane) not in paused)
