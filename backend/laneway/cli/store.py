"""The commands that work on the store itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from laneway.cli.environment import read_settings
from laneway.errors import Conflict, LanewayError, StorageUnavailable, Unprocessable

if TYPE_CHECKING:
    from laneway.db import Database
    from laneway.settings import Settings
    from laneway.webhooks.secrets import SecretBox

STORES = ("sqlite", "postgresql")

db = typer.Typer(help="The schema of the store.", no_args_is_help=True)


class NotMigrated(Conflict):
    """The store lacks what this version needs."""

    code, title = "not_migrated", "The database is not migrated"


@contextmanager
def reaching_store(settings: Settings) -> Iterator[None]:
    """Turn a store that cannot be used into StorageUnavailable or Unprocessable, without its password."""
    import sqlalchemy as sa

    try:
        url = sa.make_url(settings.database)
    except (sa.exc.ArgumentError, ValueError):
        url = sa.URL.create("no URL")
    if url.get_backend_name() not in STORES:
        raise Unprocessable("LANEWAY_DATABASE_URL is no `postgresql://…` or `sqlite:///…` URL")
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, OSError) as error:
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise StorageUnavailable(
            f"the database {url.render_as_string(hide_password=True)} cannot be used ({reason}); "
            "check LANEWAY_DATABASE_URL"
        ) from None


def need_migrated(settings: Settings) -> None:
    """Raise NotMigrated unless the store has every revision this version knows.

    One that is ahead passes: during a deploy the release before runs on the new schema.
    """
    from laneway.cli import migrate

    with reaching_store(settings):
        seen = migrate.current(settings.database)
    if seen is None:
        raise NotMigrated("the database is not migrated; run `laneway db upgrade`")
    if seen != migrate.head() and migrate.knows(seen):
        raise NotMigrated(
            f"the database is at {seen}, and this version needs {migrate.head()}; run `laneway db upgrade`"
        )
    if settings.row_security:
        _need_row_security(settings)


def _need_row_security(settings: Settings) -> None:
    from laneway.db import Database
    from laneway.engine.access import row_security

    database = Database(settings.database, pool_size=1)
    try:
        with reaching_store(settings):
            lacking = row_security.unprepared(database)
    finally:
        database.dispose()
    if lacking:
        raise NotMigrated(
            f"LANEWAY_ROW_SECURITY is on, and {', '.join(lacking)} have no policy; run `laneway db upgrade`"
        )


@contextmanager
def migrated_store(settings: Settings) -> Iterator[Database]:
    """The store, checked and open. Raises NotMigrated, StorageUnavailable, Unprocessable."""
    from laneway.db import Database

    need_migrated(settings)
    database = Database(settings.database, pool_size=1)
    try:
        with reaching_store(settings):
            yield database
    finally:
        database.dispose()


def secret_box(settings: Settings) -> SecretBox:
    """What seals the webhook secrets. Raises LanewayError for a key that is malformed or open to others."""
    from laneway.webhooks.secrets import SecretBox

    try:
        return SecretBox.from_settings(settings)
    except (ValueError, OSError) as error:
        raise LanewayError(str(error)) from None


@db.command()
def upgrade() -> None:
    """Bring the database to this version's schema. Safe to repeat, and at the same time as others."""
    from laneway.cli import migrate

    settings = read_settings()
    with reaching_store(settings):
        before = migrate.current(settings.database)
        if before is not None and not migrate.knows(before):
            print(f"the database is at {before}, which is newer than this version: nothing to do")
            return
        migrate.upgrade(settings.database)
        if settings.row_security:
            _prepare_row_security(settings)
    after = migrate.head()
    print(f"the database is at {after}" + (" already" if before == after else ""))


def _prepare_row_security(settings: Settings) -> None:
    from laneway.db import Database
    from laneway.engine.access import row_security

    database = Database(settings.database, pool_size=1)
    try:
        row_security.prepare(database)
    finally:
        database.dispose()


@db.command()
def current() -> None:
    """Print the database's revision, and whether it is this version's. Exit code 1 when it is behind."""
    from laneway.cli import migrate

    settings = read_settings()
    with reaching_store(settings):
        seen = migrate.current(settings.database)
    print(seen or "none")
    need_migrated(settings)


@db.command()
def prune(
    older_than: Annotated[
        int | None,
        typer.Option(
            metavar="DAYS",
            min=0,
            max=36_500,
            help="Delete what ended so many days ago, but for dead letters; default: as the settings say.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be deleted.")] = False,
) -> None:
    """Delete old ended jobs, old webhooks and workers that left, as the scheduler does all the time.

    Safe beside everything that runs. Dead letters go by LANEWAY_KEEP_FAILED_DAYS or `laneway dlq purge`.
    """
    from datetime import timedelta

    from laneway.clock import SystemClock
    from laneway.engine import retention

    settings = read_settings()
    keep = retention.Retention.from_settings(settings)
    if older_than is not None:
        keep = retention.Retention.of_all_but_dead_letters(timedelta(days=older_than))
    now = SystemClock().now()
    with migrated_store(settings) as database:
        if dry_run:
            done = [retention.count(database, keep, now=now)]
        else:
            done = [retention.prune(database, keep, now=now)]
            while done[-1].more:
                done.append(retention.prune(database, keep, now=now))
    jobs, webhooks, workers = (
        sum(getattr(batch, kind) for batch in done) for kind in ("jobs", "messages", "workers")
    )
    print(
        f"{'would delete' if dry_run else 'deleted'} {jobs} jobs, {webhooks} webhooks of jobs that are kept, "
        f"{workers} workers"
    )
