"""Watches how many jobs of each type fail, and tells when that is too much, and when it is over.

The rules are the operator's (`failure_rates` in the file of laneway/notify/rules.py). Any number of
schedulers may watch: what they tell has its id from the rule, the type and the time, rounded to the
rule's own window, so it is told once. What was told is remembered by each; one that has just started
looks whether it was told within the last two windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.events import SystemEvent
from laneway.domain.states import JobStatus
from laneway.notify.rules import FailureRate, Notifications, current
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.subscriptions import subscribers

ACTOR = "scheduler"
_FAILED = (JobStatus.FAILED, JobStatus.TIMEOUT)

j = models.jobs.c

Subject = tuple[FailureRate, str, str]
"""A rule, a tenant and a job type."""


class FailureRates:
    """The watch of one process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._failing: dict[Subject, bool] = {}

    def watch(self, *, now: datetime) -> int:
        """Count the ends of each rule's window, and write what there is to tell; how many messages."""
        notifications = current()
        return sum(self._watch(rule, notifications, now=now) for rule in notifications.failure_rates)

    def _watch(self, rule: FailureRate, notifications: Notifications, *, now: datetime) -> int:
        with self._database.read() as connection:
            counted = _count(connection, since=now - timedelta(seconds=rule.within_seconds))
        turned: list[tuple[Subject, bool, int, int]] = []
        for tenant_id, job_type, failed, ended in counted:
            subject = (rule, tenant_id, job_type)
            failing = rule.exceeded(failed=failed, ended=ended) if rule.covers(job_type) else None
            if failing is not None and failing != self._failing.get(subject, False):
                turned.append((subject, failing, failed, ended))
        if not turned:
            return 0
        written = 0
        with self._database.write() as connection:
            for subject, failing, failed, ended in turned:
                if subject in self._failing or not _told_lately(connection, subject, now=now):
                    told = _told(connection, subject, failing, notifications, failed, ended, now=now)
                    written += record(connection, [told], now=now)
        self._failing |= {subject: failing for subject, failing, _, _ in turned}
        return written


def _count(connection: sa.Connection, *, since: datetime) -> Sequence[tuple[str, str, int, int]]:
    """Tenant, job type, failures and ends."""
    failures = sa.func.sum(sa.case((j.status.in_(_FAILED), 1), else_=0))
    # Written out, not bound: only so do both stores see that the partial index serves.
    ends: sa.ColumnElement[bool] = sa.literal_column("jobs.status IN ('completed', 'failed', 'timeout')")
    query = (
        sa.select(j.tenant_id, j.job_type, failures, sa.func.count())
        .where(ends, j.finished_at > since, j.finished_at.is_not(None))
        .group_by(j.tenant_id, j.job_type)
        .order_by(j.tenant_id, j.job_type)
    )
    return [(tenant, kind, failed, ended) for tenant, kind, failed, ended in connection.execute(query)]


def _told(
    connection: sa.Connection,
    subject: Subject,
    failing: bool,
    notifications: Notifications,
    failed: int,
    ended: int,
    *,
    now: datetime,
) -> Told:
    rule, tenant_id, job_type = subject
    event = SystemEvent.JOB_TYPE_FAILING if failing else SystemEvent.JOB_TYPE_RECOVERED
    endpoints = subscribers(connection, [tenant_id]).get(tenant_id, ())
    targets = [Target.endpoint(each) for each in endpoints if each.wants(event)]
    addresses = notifications.addresses_of(rule.channels)
    return Told(
        id=_id(subject, event, _window(rule, now)),
        tenant_id=tenant_id,
        event_type=event.value,
        data={
            "job_type": job_type,
            "failed": failed,
            "ended": ended,
            "percent": rule.percent,
            "within_seconds": rule.within_seconds,
        },
        created_by=ACTOR,
        targets=targets + [Target.notified(tenant_id, address) for address in addresses],
    )


def _told_lately(connection: sa.Connection, subject: Subject, *, now: datetime) -> bool:
    window = _window(subject[0], now)
    ids = [_id(subject, SystemEvent.JOB_TYPE_FAILING, each) for each in (window, window - 1)]
    m = models.webhook_messages.c
    return connection.execute(sa.select(m.id).where(m.id.in_(ids))).first() is not None


def _window(rule: FailureRate, now: datetime) -> int:
    return int(now.timestamp()) // rule.within_seconds


def _id(subject: Subject, event: SystemEvent, window: int) -> str:
    rule, tenant_id, job_type = subject
    return message_id(f"{tenant_id}|{job_type}|{rule.model_dump_json()}", window, event)
