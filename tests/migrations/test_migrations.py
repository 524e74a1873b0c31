"""The revisions make exactly the tables of laneway.models, on both stores, forwards and back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from laneway.cli import migrate
from laneway.db import Database
from laneway.errors import Unavailable
from laneway.models import metadata
from servers import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
def blank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Each store in turn, with nothing in it."""
    store = Database(
        f"sqlite:///{tmp_path / 'blank.db'}"
        if request.param == "sqlite"
        else request.getfixturevalue("postgres_server").blank()
    )
    yield store
    store.dispose()


def url_of(store: Database) -> str:
    return store.url.render_as_string(hide_password=False)


def tables(store: Database) -> set[str]:
    with store.read() as connection:
        return set(sa.inspect(connection).get_table_names()) - {"alembic_version"}


def shape(store: Database) -> dict[str, Any]:
    """Everything a store's catalogue says about its tables, comparable between databases."""
    with store.read() as connection:
        if store.dialect == "sqlite":
            rows = connection.exec_driver_sql(
                "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'alembic_version'"
            )
            return {name: _sorted_definition(sql) for name, sql in rows}
        return {
            what: sorted(tuple(row) for row in connection.execute(sa.text(query)))
            for what, query in {
                "columns": """
                    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                           pg_get_expr(d.adbin, d.adrelid)
                    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
                    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
                      AND NOT a.attisdropped AND c.relname <> 'alembic_version'""",
                "constraints": """
                    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(k.oid)
                    FROM pg_constraint k JOIN pg_class c ON c.oid = conrelid
                    WHERE connamespace = 'public'::regnamespace AND c.relname <> 'alembic_version'""",
                "indexes": """
                    SELECT indexname, indexdef FROM pg_indexes
                    WHERE schemaname = 'public' AND tablename <> 'alembic_version'""",
                "storage": """
                    SELECT relname, array_to_string(reloptions, ',') FROM pg_class
                    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
                      AND relname <> 'alembic_version'""",
            }.items()
        }


def _sorted_definition(statement: str) -> list[str]:
    """A CREATE statement's parts, whatever their order and spacing: SQLite keeps the text it was given,
    and writes a column that was added later on the line of the one before it."""
    statement = re.sub(r'^CREATE TABLE "(\w+)"', r"CREATE TABLE \1", statement)  # as a renamed table's reads
    parts = re.split(r"\n|, ", statement)
    return sorted(re.sub(r"\s+", " ", part).strip(" ,") for part in parts if part.strip(" ,"))


def test_a_store_goes_up_down_and_up_again(blank: Database) -> None:
    url = url_of(blank)
    migrate.upgrade(url)
    first = shape(blank)
    assert tables(blank) == set(metadata.tables)

    migrate.downgrade(url)
    assert tables(blank) == set()

    migrate.upgrade(url)
    assert shape(blank) == first


def test_every_revision_can_be_taken_back_and_made_again(blank: Database) -> None:
    url = url_of(blank)
    revisions = [script.revision for script in ScriptDirectory(str(migrate.directory())).walk_revisions()][
        ::-1
    ]
    for revision in revisions:
        migrate.upgrade(url, to=revision)
        made = shape(blank)
        migrate.downgrade(url, to="-1")
        migrate.upgrade(url, to=revision)
        assert shape(blank) == made, revision


def test_alembic_finds_no_difference_from_the_models(database: Database) -> None:
    assert _differences(database) == []


def test_the_catalogue_is_what_the_models_would_make(blank: Database) -> None:
    """Also what alembic does not compare: CHECKs, conditions of indexes, storage settings."""
    with blank.write() as connection:
        metadata.create_all(connection)
    wanted = shape(blank)
    with blank.write() as connection:
        metadata.drop_all(connection)
    migrate.upgrade(url_of(blank))
    assert shape(blank) == wanted


@pytest.mark.parametrize(
    "drift",
    [
        "ALTER TABLE jobs ADD COLUMN surplus integer",
        "DROP INDEX ix_jobs_queued",
        "CREATE INDEX ix_jobs_surplus ON jobs (queue)",
        "DROP INDEX ix_jobs_running; CREATE INDEX ix_jobs_running ON jobs (worker_id)",
    ],
)
def test_the_comparison_sees_drift_on_both_stores(database: Database, drift: str) -> None:
    before = shape(database)
    with database.write() as connection:
        for statement in drift.split(";"):
            connection.exec_driver_sql(statement)
    assert shape(database) != before


@pytest.mark.parametrize(
    "drift",
    [
        "ALTER TABLE jobs DROP CONSTRAINT ck_jobs_running_has_lease",
        "ALTER TABLE jobs ALTER COLUMN attempt DROP DEFAULT",
        "ALTER TABLE jobs ALTER COLUMN title TYPE varchar(199)",
        "ALTER TABLE jobs ALTER COLUMN title SET NOT NULL",
        "ALTER TABLE jobs RESET (fillfactor)",
    ],
)
def test_the_comparison_sees_drift_that_only_postgresql_can_have(postgres_url: str, drift: str) -> None:
    store = Database(postgres_url)
    before = shape(store)
    with store.write() as connection:
        connection.exec_driver_sql(drift)
    assert shape(store) != before
    store.dispose()


def test_a_store_knows_how_far_it_is(blank: Database) -> None:
    url = url_of(blank)
    assert migrate.current(url) is None
    assert migrate.pending(url)
    migrate.upgrade(url)
    assert migrate.current(url) == migrate.head()
    assert not migrate.pending(url)


def test_there_is_one_newest_revision_and_every_file_is_named_by_its_date() -> None:
    scripts = ScriptDirectory(str(migrate.directory()))
    assert len(scripts.get_heads()) == 1
    for script in scripts.walk_revisions():
        assert re.fullmatch(rf"{script.revision}_[a-z0-9_]+\.py", Path(script.path).name)
        assert re.fullmatch(r"\d{8}_\d{4}", script.revision)


MIGRATOR = """
import sys, alembic.command, laneway.cli.migrate, laneway.models, laneway.settings
print("ready", flush=True)
laneway.cli.migrate.upgrade(sys.stdin.read())
"""


def test_migrators_that_start_together_do_the_work_once(blank: Database) -> None:
    migrators = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATOR],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for migrator in migrators:
        assert migrator.stdout is not None
        migrator.stdout.readline()  # it has imported everything and waits for the URL
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda migrator: migrator.communicate(url_of(blank), timeout=60), migrators))
    assert [migrator.returncode for migrator in migrators] == [0] * 4, said
    assert tables(blank) == set(metadata.tables)


def test_a_migration_that_breaks_leaves_nothing_behind(blank: Database) -> None:
    """The table that stands in the way makes the first revision fail after it has made others."""
    with blank.write() as connection:
        connection.exec_driver_sql("CREATE TABLE webhook_attempts (id integer)")
    with pytest.raises(sa.exc.DBAPIError):
        migrate.upgrade(url_of(blank))
    assert tables(blank) == {"webhook_attempts"}
    assert migrate.current(url_of(blank)) is None


def test_a_migration_gives_up_soon_when_a_table_is_in_use(postgres_url: str) -> None:
    """Longer, and every statement of the running release would queue behind it."""
    changes_workers = "20261122_1900"
    migrate.downgrade(postgres_url, to=changes_workers)
    store = Database(postgres_url)
    with store.write() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM workers")
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            migrate.downgrade(postgres_url)
    store.dispose()
    assert migrate.current(postgres_url) == changes_workers


def test_the_migrations_are_found_in_an_installed_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "__file__", str(tmp_path / "lib" / "laneway" / "cli" / "migrate.py"))
    monkeypatch.setattr(migrate.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(Unavailable, match="install laneway again"):
        migrate.directory()
    installed = tmp_path / "share" / "laneway" / "migrations"
    installed.mkdir(parents=True)
    (installed / "env.py").touch()
    assert migrate.directory() == installed


def _differences(store: Database) -> list[Any]:
    with store.read() as connection:
        options = {"compare_type": True, "compare_server_default": True, "target_metadata": metadata}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


def test_the_server_is_the_version_we_say_we_test(postgres_server: PostgresServer) -> None:
    store = Database(postgres_server.fresh())
    with store.read() as connection:
        assert str(connection.scalar(sa.text("SHOW server_version"))).startswith("18.")
    store.dispose()
