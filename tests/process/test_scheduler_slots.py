"""Schedulers that die, or see a wrong time of day. The whole run: `python -m process.schedule_kills`."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from factories import schedule_columns
from laneway.clock import SystemClock
from laneway.lanes.live import SCHEDULER_CHANNEL
from laneway.models import jobs, schedules
from process.schedule_kills import Size, kill
from process.stack import Stack


def test_each_slot_is_decided_once_whoever_is_killed_or_sees_a_wrong_time(either_stack: Stack) -> None:
    report = kill(either_stack, Size(slots=8, schedulers=2, kills=3, stops=1, jumps=2), seed=1)
    assert report.wrong == [], str(report)
    assert report.decided.total() == 5 * 8


def test_a_scheduler_sleeps_until_a_slot_and_is_rung_for_one_that_is_sooner(stack: Stack) -> None:
    """With a tick of a minute nothing else would wake it."""
    scheduler = stack.scheduler(LANEWAY_TICK_SECONDS="60", LANEWAY_LEASE_SECONDS="600")
    with stack.redis() as redis:
        stack.until(lambda: redis.pubsub_numsub(SCHEDULER_CHANNEL)[0][1] == 1, what="it listens")
        soon = SystemClock().now() + timedelta(seconds=1)
        row = schedule_columns(interval_seconds=1, anchor_at=soon, next_slot=soon, due_at=soon)
        row |= {"ends_at": soon + timedelta(seconds=2), "overlap": "allow"}
        with stack.database.write() as connection:
            connection.execute(sa.insert(schedules).values(row))
        redis.publish(SCHEDULER_CHANNEL, "")
    delayed = stack.enqueue("demo.noop", delay_seconds=0.5)
    stack.wait(delayed, "queued")
    count = sa.select(sa.func.count().label("n")).where(jobs.c.scheduled_job_id.is_not(None))
    stack.until(lambda: stack.rows(count)[0]["n"] == 3, what="three slots have run")
    assert not scheduler.ended()
