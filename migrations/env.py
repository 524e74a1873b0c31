"""How a revision reaches a store: who may run it, in which transaction, and how long it may wait.

Run by `laneway migrate` (laneway/cli/migrate.py, which names the store) and by alembic's own command
line (which takes it from LANEWAY_DATABASE_URL).

PostgreSQL: each revision is a transaction. One migrator at a time: it holds an advisory lock in a
transaction on a second connection, where neither a commit between revisions nor `autocommit_block()`
(CREATE INDEX CONCURRENTLY) lets go of it. The others try instead of waiting in the lock: a waiting
statement has a snapshot, and CREATE INDEX CONCURRENTLY waits for every older snapshot. A revision that
does not get a table's lock in two seconds gives up, because whoever comes after it in the queue, every
request of the running release, waits as long.

SQLite: one IMMEDIATE transaction for the whole way, foreign keys off within it, since a batch operation
drops and renames tables (sqlite.org/lang_altertable.html section 7), and checked before the commit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import context

from laneway.db import Database
from laneway.errors import Unavailable
from laneway.models import metadata
from laneway.settings import get_settings

LOCK_TIMEOUT = "2s"
STATEMENT_TIMEOUT = "30s"  # a revision that builds an index concurrently lifts both, then sets them again
LONGEST_SECONDS = 4 * 3600.0  # when a silent server is given up: an index of a large table takes long
MIGRATOR_LOCK = 0x6C616E65776179  # "laneway"
MIGRATOR_WAIT_SECONDS = 120.0


def run() -> None:
    url = context.config.attributes.get("url") or get_settings().database
    if context.is_offline_mode():
        context.configure(url=url, target_metadata=metadata, literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    database = Database(url, pool_size=2, statement_seconds=LONGEST_SECONDS)
    try:
        if database.dialect == "sqlite":
            _migrate_sqlite(database)
        else:
            with _only_migrator(database):
                _migrate_postgresql(database)
    finally:
        database.dispose()


def _migrate_sqlite(database: Database) -> None:
    with database.engine.connect().execution_options(laneway_immediate=True) as connection:
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")  # heeded only outside a transaction
        context.configure(
            connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True
        )
        with context.begin_transaction():
            context.run_migrations()
            if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
                raise sa.exc.IntegrityError("PRAGMA foreign_key_check", None, ValueError(f"{broken[:5]}"))


def _migrate_postgresql(database: Database) -> None:
    with database.engine.connect() as connection:
        connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        connection.exec_driver_sql(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'")
        connection.commit()
        context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()


@contextmanager
def _only_migrator(database: Database) -> Iterator[None]:
    deadline = time.monotonic() + MIGRATOR_WAIT_SECONDS
    with database.engine.connect() as connection:
        # Without parameters: a statement that has some keeps its snapshot until the transaction ends.
        locking = f"SELECT pg_try_advisory_xact_lock({MIGRATOR_LOCK})"
        while not connection.exec_driver_sql(locking).scalar():
            connection.rollback()
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"another migration of this database has run for {MIGRATOR_WAIT_SECONDS:g} s"
                )
            threading.Event().wait(0.1)
        yield


run()
