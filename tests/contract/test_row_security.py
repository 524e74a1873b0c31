"""The second wall: PostgreSQL keeps a transaction to the tenant it is for, whatever its queries say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from factories import OTHER_TENANT, TENANT, add_job, job_row
from laneway import models
from laneway.cli.store import NotMigrated, need_migrated
from laneway.db import Database, acting_for
from laneway.engine.access import row_security
from laneway.settings import Settings

j = models.jobs.c


@pytest.fixture
def walled(postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL store with its policies."""
    store = Database(postgres_url, row_security=True)
    row_security.prepare(store)
    yield store
    store.dispose()


@contextmanager
def working_for(tenant_id: str) -> Iterator[None]:
    token = acting_for.set(tenant_id)
    try:
        yield
    finally:
        acting_for.reset(token)


def seen(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.execute(sa.select(j.id)).scalars())


def test_a_query_without_a_tenant_finds_one_s_own_alone(walled: Database) -> None:
    mine, theirs = add_job(walled), add_job(walled, tenant_id=OTHER_TENANT)
    assert seen(walled) == {mine, theirs}
    with working_for(TENANT):
        assert seen(walled) == {mine}
    with working_for(OTHER_TENANT):
        assert seen(walled) == {theirs}
    assert seen(walled) == {mine, theirs}, "the next transaction on the connection is free again"


def test_nothing_of_others_is_changed_or_made(walled: Database) -> None:
    theirs = add_job(walled, tenant_id=OTHER_TENANT)
    with working_for(TENANT):
        with walled.write() as connection:
            for statement in (sa.update(models.jobs).values(title="taken"), sa.delete(models.jobs)):
                assert connection.execute(statement).rowcount == 0
        with pytest.raises(sa.exc.DBAPIError, match="row-level security"):
            add_job(walled, tenant_id=OTHER_TENANT)
        assert job_row(walled, add_job(walled))["tenant_id"] == TENANT
    assert job_row(walled, theirs)["title"] is None


def test_every_table_with_a_tenant_has_its_policy(walled: Database) -> None:
    owned = {name for name, table in models.metadata.tables.items() if "tenant_id" in table.c}
    assert owned | {"tenants"} == set(row_security.tenants_columns())
    assert row_security.unprepared(walled) == []
    row_security.prepare(walled)
    with walled.write() as connection:
        connection.exec_driver_sql(f"DROP POLICY {row_security.POLICY} ON jobs")
    assert row_security.unprepared(walled) == ["jobs"]
    row_security.prepare(walled)
    with working_for(TENANT):
        assert seen(walled) == set()


def test_a_process_does_not_start_without_the_policies(postgres_url: str) -> None:
    need_migrated(Settings(database_url=postgres_url))
    with pytest.raises(NotMigrated, match=r"jobs.* have no policy; run `laneway db upgrade`"):
        need_migrated(Settings(database_url=postgres_url, row_security=True))


def test_sqlite_has_no_row_security() -> None:
    with pytest.raises(ValidationError, match="row_security needs PostgreSQL"):
        Settings(database_url="sqlite:///x.db", row_security=True)


def test_without_the_setting_nothing_is_narrowed(postgres_url: str) -> None:
    store = Database(postgres_url)
    row_security.prepare(store)
    ids = {add_job(store), add_job(store, tenant_id=OTHER_TENANT)}
    with working_for(TENANT):
        assert seen(store) == ids
    store.dispose()
