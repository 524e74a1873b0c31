"""Bring a store to the newest schema, or say how far it is.

alembic is imported by the functions, not by the module: the command line starts without it.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from laneway.errors import Unavailable

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory


def upgrade(url: str, *, to: str = "head") -> None:
    """Run the revisions that the store at `url` has not seen yet, up to `to`.

    Any number of processes may call this at once: one works, the others wait and find nothing to do.
    """
    from alembic import command

    command.upgrade(_config(url), to)


def downgrade(url: str, *, to: str = "base") -> None:
    """Take revisions back until `to` is the newest. Rows of the tables that go are lost."""
    from alembic import command

    command.downgrade(_config(url), to)


def current(url: str) -> str | None:
    """The newest revision that the store has seen; None for one that was never migrated."""
    from alembic.migration import MigrationContext

    from laneway.db import Database

    database = Database(url, pool_size=1)
    try:
        with database.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        database.dispose()


def head() -> str:
    """The newest revision that this installation carries."""
    revision = _scripts().get_current_head()
    assert revision is not None  # noqa: S101 - a test holds that there is exactly one head
    return revision


def pending(url: str) -> bool:
    """Whether `upgrade(url)` would change anything."""
    return current(url) != head()


def knows(revision: str) -> bool:
    """Whether this installation carries `revision`; one it does not carry comes from a later release."""
    return any(script.revision == revision for script in _scripts().walk_revisions())


def directory() -> Path:
    """Where the revisions are: beside `backend/` in a checkout, else where the wheel put them."""
    checkout = Path(__file__).parents[3] / "migrations"
    installed = Path(sysconfig.get_path("data")) / "share" / "laneway" / "migrations"
    for folder in (checkout, installed):
        if (folder / "env.py").is_file():
            return folder
    raise Unavailable(f"the migrations are neither in {checkout} nor in {installed}; install laneway again")


def _config(url: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    return config


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(directory()))
