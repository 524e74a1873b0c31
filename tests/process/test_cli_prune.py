"""`laneway db prune`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from factories import add_job, add_webhook, add_worker, rows_of
from laneway import models
from laneway.clock import SystemClock
from laneway.db import Database
from laneway.domain.states import ACTIVE, FINAL, JobStatus
from laneway.engine.retention import BATCH_ROWS
from laneway_process import laneway

NOW = SystemClock().now()


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Database]:
    """A store with a job in each status that ended 31 days ago, and one that ended just now."""
    database = Database(sqlite_url)
    month_ago = NOW - timedelta(days=31)
    for status in JobStatus:
        add_job(database, status, **({"finished_at": month_ago} if status in FINAL else {}))
    add_job(database, JobStatus.COMPLETED, finished_at=NOW)
    add_worker(database, state="gone", beat_at=month_ago)
    yield database
    database.dispose()


def run(store: Database, *arguments: str, tmp_path: Path, **environment: object) -> str:
    done = laneway(
        "db",
        "prune",
        *arguments,
        LANEWAY_DATABASE_URL=store.url.render_as_string(),
        LANEWAY_DATA_DIR=tmp_path,
        **environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def statuses(store: Database) -> list[str]:
    return sorted(row["status"] for row in rows_of(store, models.jobs))


def test_it_deletes_what_the_settings_say_and_first_only_counts(store: Database, tmp_path: Path) -> None:
    before = statuses(store)
    assert run(store, "--dry-run", tmp_path=tmp_path) == (
        "would delete 3 jobs, 0 webhooks of jobs that are kept, 1 workers"
    )
    assert statuses(store) == before
    said = run(store, tmp_path=tmp_path)
    assert said == "deleted 3 jobs, 0 webhooks of jobs that are kept, 1 workers"
    kept = sorted([*ACTIVE, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.TIMEOUT])
    assert statuses(store) == kept
    told = run(store, tmp_path=tmp_path, LANEWAY_KEEP_FAILED_DAYS=30)
    assert told == "deleted 2 jobs, 0 webhooks of jobs that are kept, 0 workers"


def test_older_than_goes_before_the_settings_and_spares_dead_letters(store: Database, tmp_path: Path) -> None:
    nothing = run(store, "--older-than", "32", tmp_path=tmp_path)
    assert nothing == "deleted 0 jobs, 0 webhooks of jobs that are kept, 1 workers"
    [failed] = [row["id"] for row in rows_of(store, models.jobs) if row["status"] == "failed"]
    add_webhook(store, failed, at=NOW)
    environment = {"LANEWAY_KEEP_FAILED_DAYS": 1, "LANEWAY_KEEP_COMPLETED_DAYS": 0}
    said = run(store, "--older-than", "0", tmp_path=tmp_path, **environment)
    assert said == "deleted 4 jobs, 1 webhooks of jobs that are kept, 0 workers"
    assert statuses(store) == sorted([*ACTIVE, JobStatus.FAILED, JobStatus.TIMEOUT])


def test_it_goes_on_until_nothing_is_left(sqlite_url: str, tmp_path: Path) -> None:
    store = Database(sqlite_url)
    for _ in range(BATCH_ROWS + 1):
        add_job(store, JobStatus.COMPLETED, finished_at=NOW - timedelta(days=31))
    said = run(store, tmp_path=tmp_path)
    assert said == f"deleted {BATCH_ROWS + 1} jobs, 0 webhooks of jobs that are kept, 0 workers"
    store.dispose()
