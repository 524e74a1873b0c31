"""A recovery outlives the schedulers that carry it out."""

from __future__ import annotations

import sqlalchemy as sa

from contract.test_recoveries import HOUR, add_endpoint, tell
from factories import NOW, TENANT
from laneway import models
from laneway.clock import SystemClock
from laneway.engine import recoveries
from laneway.engine.recoveries import Mode, Wish
from process.stack import Stack

MESSAGES = 1_200  # more than five steps of a walk that stays 30 messages and a batch ahead


def test_a_killed_scheduler_loses_and_repeats_nothing(either_stack: Stack) -> None:
    """Five are killed on the way: each message is queued once, in order, at its own moment."""
    stack, database = either_stack, either_stack.database
    endpoint_id = add_endpoint(database)
    now = SystemClock().now()
    an_hour_old = NOW - now + HOUR  # by the real clock: what is a month old the same schedulers would prune
    wanted = [tell(database, endpoint_id if n % 2 else None, age=an_hour_old) for n in range(MESSAGES)]
    with database.write() as connection:
        recovery_id = recoveries.start(
            connection,
            TENANT,
            endpoint_id,
            Wish(Mode.ALL, now - 2 * HOUR, now),
            per_second=1,
            by="olga",
            now=now,
        )["id"]

    def recovery() -> sa.RowMapping:
        r = models.webhook_recoveries
        return stack.rows(sa.select(r).where(r.c.id == recovery_id))[0]

    killed = 0
    while recovery()["status"] == "running":
        before = recovery()["queued"]
        scheduler = stack.scheduler()
        _let_go_on(stack)
        stack.until(
            lambda before=before: recovery()["queued"] > before or recovery()["status"] != "running",
            what="the recovery goes on",
        )
        if killed < 5:
            scheduler.kill()
            killed += 1
    assert killed == 5
    assert (recovery()["status"], recovery()["queued"]) == ("done", MESSAGES)
    d = models.webhook_deliveries.c
    to_endpoint = sa.select(d.message_id, d.trigger, d.max_attempts).where(d.target_id == endpoint_id)
    rows = stack.rows(to_endpoint)
    assert sorted(row["message_id"] for row in rows) == sorted(wanted)
    assert {row["trigger"] for row in rows} == {"recover"}
    assert {row["max_attempts"] for row in rows} <= {3, 1 + 3}


def _let_go_on(stack: Stack) -> None:
    """Let what was queued be due: the walk waits for the sending, and nobody sends here."""
    d = models.webhook_deliveries
    with stack.database.write() as connection:
        waiting = sa.update(d).where(d.c.trigger == "recover", d.c.status == "pending")
        connection.execute(waiting.values(next_at=SystemClock().now()))
