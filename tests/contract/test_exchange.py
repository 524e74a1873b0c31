"""Settling and claiming in one transaction, on both stores."""

from __future__ import annotations

from random import Random

import pytest
import sqlalchemy as sa

from factories import NOW, WORKER, add_job
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine.context import Progress
from laneway.engine.endings import Raised, Returned
from laneway.engine.exchange import Exchanged, Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.errors import StorageUnavailable

HOLDER = Holder(WORKER, ("demo.echo",), 3, Random(7))


def claim(database: Database, *ids: str) -> list[Claimed]:
    done = exchange(database, HOLDER, ended=(), wanted=[(i, new_id()) for i in ids], news={}, now=NOW)
    return done.claimed


def settle(database: Database, *ended: tuple[Claimed, object], news: object = None) -> Exchanged:
    return exchange(database, HOLDER, ended=ended, wanted=(), news=news or {}, now=NOW)  # type: ignore[arg-type]


def column(database: Database, job_id: str, name: str) -> object:
    with database.read() as connection:
        return connection.execute(
            sa.select(models.jobs.c[name]).where(models.jobs.c.id == job_id)
        ).scalar_one()


def test_one_exchange_settles_some_and_claims_others(database: Database) -> None:
    first, second = add_job(database), add_job(database)
    (held,) = claim(database, first)
    done = exchange(
        database, HOLDER, ended=[(held, Returned('{"a":1}'))], wanted=[(second, new_id())], news={}, now=NOW
    )
    assert [(s.job.job_id, s.status) for s in done.settled] == [(first, JobStatus.COMPLETED)]
    assert [job.job_id for job in done.claimed] == [second]
    assert column(database, first, "result") == {"a": 1}
    assert column(database, second, "status") == "running"


def test_a_claimed_batch_keeps_its_order_in_started_at(database: Database) -> None:
    ids = [add_job(database) for _ in range(20)]
    wanted = [ids[i] for i in Random(3).sample(range(20), 20)]
    claim(database, *wanted)
    assert sorted(ids, key=lambda i: column(database, i, "started_at")) == wanted  # type: ignore[arg-type,return-value]


def test_ids_that_cannot_be_claimed_are_left_out(database: Database) -> None:
    waiting, ended = add_job(database), add_job(database, JobStatus.COMPLETED)
    unknown_type = add_job(database, job_type="somebody.elses")
    assert [job.job_id for job in claim(database, ended, waiting, unknown_type, new_id())] == [waiting]
    assert column(database, unknown_type, "status") == "queued"


def test_the_last_progress_is_kept_when_the_attempt_fails(database: Database) -> None:
    job_id = add_job(database)
    (held,) = claim(database, job_id)
    news = {job_id: (held, Progress(60, "almost", '{"row":6}'))}
    settle(database, (held, Raised("E", "no", permanent=True)), news=news)
    assert column(database, job_id, "status") == "failed"
    assert (column(database, job_id, "progress"), column(database, job_id, "progress_message")) == (
        60,
        "almost",
    )


def test_an_attempt_that_was_taken_away_is_stale_and_changes_nothing(database: Database) -> None:
    job_id = add_job(database)
    (held,) = claim(database, job_id)
    settle(database, (held, Raised("E", "again", in_seconds=0)))
    done = settle(database, (held, Returned(None)))
    assert [job.job_id for job in done.stale] == [job_id]
    assert column(database, job_id, "status") == "retrying"


def test_an_ending_that_the_store_refuses_does_not_fail_its_neighbours(postgres_url: str) -> None:
    database = Database(postgres_url)
    ids = [add_job(database) for _ in range(5)]
    held = claim(database, *ids)
    nul = Returned('"\0"')  # PostgreSQL text cannot hold it; the payload gate stops it before this
    done = settle(database, *((job, nul if job is held[2] else Returned("1")) for job in held))
    assert [job.job_id for job, _ in done.refused] == [ids[2]]
    assert {s.job.job_id for s in done.settled} == set(ids) - {ids[2]}
    assert column(database, ids[2], "status") == "running"
    database.dispose()


def test_a_store_that_is_away_is_said_so_and_nothing_is_settled(database: Database) -> None:
    job_id = add_job(database)
    (held,) = claim(database, job_id)
    nowhere = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with pytest.raises(StorageUnavailable):
        settle(nowhere, (held, Returned(None)))
    assert column(database, job_id, "status") == "running"
