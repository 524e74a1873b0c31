"""A job type that fails too often is told of once, until it recovers."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from factories import NOW, OTHER_TENANT, TENANT, add_job, rows_of
from laneway import models
from laneway.api.event_payloads import PAYLOADS, example
from laneway.db import Database
from laneway.domain.events import SystemEvent
from laneway.domain.states import JobStatus
from laneway.engine.failure_rates import FailureRates
from laneway.settings import get_settings

RULE = '[channels.ops]\nkind = "log"\n[[failure_rates]]\nchannels = ["ops"]\njob_types = ["billing.*"]\n'


@pytest.fixture(autouse=True)
def _notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notifications.toml").write_text(RULE)
    monkeypatch.setenv("LANEWAY_NOTIFICATIONS", str(tmp_path / "notifications.toml"))
    get_settings.cache_clear()


def ends(database: Database, *, failed: int, completed: int, at: datetime = NOW, **columns: Any) -> None:
    given = {"job_type": "billing.charge", "finished_at": at} | columns
    statuses = [JobStatus.FAILED, JobStatus.TIMEOUT] * failed
    for status in statuses[:failed] + [JobStatus.COMPLETED] * completed:
        add_job(database, status, **given)


def told(database: Database) -> list[tuple[str, str, int, int]]:
    """Event, tenant, failures and ends of each message, oldest first."""
    rows = sorted(rows_of(database, models.webhook_messages), key=lambda row: row["created_at"])
    data = [json.loads(row["payload"])["data"] for row in rows]
    return [
        (row["event_type"], row["tenant_id"], of["failed"], of["ended"])
        for row, of in zip(rows, data, strict=True)
    ]


def test_more_failures_than_the_rule_allows_are_told_once(database: Database) -> None:
    watch = FailureRates(database)
    ends(database, failed=2, completed=8)  # 20 %: not more
    assert watch.watch(now=NOW) == 0
    ends(database, failed=1, completed=0)
    assert watch.watch(now=NOW) == 1
    ends(database, failed=5, completed=0)
    assert watch.watch(now=NOW + timedelta(seconds=300)) == 0
    assert told(database) == [("job_type.failing", TENANT, 3, 11)]
    [delivery] = rows_of(database, models.webhook_deliveries)
    assert (delivery["channel"], delivery["url"], delivery["status"]) == ("log", "log:ops", "pending")
    data = json.loads(rows_of(database, models.webhook_messages)[0]["payload"])["data"]
    PAYLOADS[SystemEvent.JOB_TYPE_FAILING].model_validate(data)
    assert set(data) == set(example(SystemEvent.JOB_TYPE_FAILING)["data"])


def test_nothing_is_said_of_fewer_ends_than_ten_or_of_other_jobs(database: Database) -> None:
    ends(database, failed=9, completed=0)
    ends(database, failed=20, completed=0, job_type="report")
    ends(database, failed=5, completed=0, at=NOW - timedelta(seconds=600))  # just too long ago
    ends(database, failed=9, completed=0, tenant_id=OTHER_TENANT)
    assert FailureRates(database).watch(now=NOW) == 0
    ends(database, failed=1, completed=0, tenant_id=OTHER_TENANT)
    assert FailureRates(database).watch(now=NOW) == 1
    assert told(database) == [("job_type.failing", OTHER_TENANT, 10, 10)]


def test_it_is_told_when_it_is_over_and_when_it_begins_again(database: Database) -> None:
    watch, later = FailureRates(database), NOW + timedelta(seconds=900)
    ends(database, failed=10, completed=0)
    watch.watch(now=NOW)
    assert watch.watch(now=later) == 0  # nothing ended since: nobody knows
    ends(database, failed=1, completed=9, at=later)
    assert watch.watch(now=later) == 1
    assert watch.watch(now=later) == 0
    again = later + timedelta(seconds=900)
    ends(database, failed=3, completed=7, at=again)
    assert watch.watch(now=again) == 1
    assert [event for event, *_ in told(database)] == [
        "job_type.failing",
        "job_type.recovered",
        "job_type.failing",
    ]


def test_several_schedulers_and_one_that_starts_anew_tell_it_once(database: Database) -> None:
    ends(database, failed=10, completed=0)
    assert [FailureRates(database).watch(now=NOW) for _ in range(3)] == [1, 0, 0]
    ends(database, failed=10, completed=0, at=NOW + timedelta(seconds=700))
    assert FailureRates(database).watch(now=NOW + timedelta(seconds=700)) == 0
    assert len(told(database)) == 1
