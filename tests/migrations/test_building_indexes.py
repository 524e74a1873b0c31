"""Revisions that build indexes beside the running release, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from factories import add_job, at_once
from laneway.cli import migrate
from laneway.db import Database
from servers import PostgresServer, wait_until

BEFORE = "20261122_0900"
BUILT = ("ix_jobs_ended", "ix_webhook_deliveries_delivered")


@pytest.fixture
def older(postgres_server: PostgresServer) -> Iterator[Database]:
    """A store without the indexes."""
    url = postgres_server.blank()
    migrate.upgrade(url, to=BEFORE)
    store = Database(url)
    yield store
    store.dispose()
    postgres_server.drop(url)


def upgrade(store: Database) -> None:
    migrate.upgrade(store.url.render_as_string(hide_password=False))


def valid_indexes(store: Database) -> set[str]:
    query = "SELECT indexrelid::regclass::text FROM pg_index WHERE indisvalid"
    with store.read() as connection:
        return set(connection.execute(sa.text(query)).scalars())


def building(store: Database) -> bool:
    query = "SELECT true FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting for%'"
    with store.read() as connection:
        return connection.execute(sa.text(query)).first() is not None


def test_a_build_waits_for_older_transactions_and_nobody_waits_for_it(older: Database) -> None:
    with older.engine.connect() as writer:
        transaction = writer.begin()
        writer.execute(sa.text("LOCK TABLE jobs IN ROW EXCLUSIVE MODE"))

        def work_on() -> str:
            wait_until(lambda: building(older), what="the build waits")
            job_id = add_job(older)
            transaction.commit()
            return job_id

        done, made = at_once([lambda: upgrade(older), work_on])
    assert done is None
    assert isinstance(made, str)
    assert set(BUILT) <= valid_indexes(older)
    assert not migrate.pending(older.url.render_as_string(hide_password=False))


def test_what_a_build_that_broke_off_left_is_replaced(older: Database) -> None:
    with older.write() as connection:
        connection.execute(sa.text("CREATE INDEX ix_jobs_ended ON jobs (queue)"))
        connection.execute(
            sa.text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_jobs_ended'::regclass")
        )
    upgrade(older)
    assert set(BUILT) <= valid_indexes(older)
    query = "SELECT pg_get_indexdef('ix_jobs_ended'::regclass)"
    with older.read() as connection:
        assert "(status, finished_at)" in str(connection.scalar(sa.text(query)))


def test_the_revisions_after_it_have_their_short_timeouts_again() -> None:
    """A revision that lifts the timeouts and leaves them so would let the next one block everybody."""
    for path in (migrate.directory() / "versions").glob("*.py"):
        text = path.read_text()
        if "lock_timeout" in text:
            assert text.index('lock="0", statement="2h"') < text.index('lock="2s", statement="30s"'), (
                path.name
            )
