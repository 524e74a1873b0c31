"""A thread of each API process: hears of changed keys, writes when keys were used, fetches issuers' keys.

What changed is asked for in one small query for all keys, by the database's own clock: each look goes back
OVERLAP_SECONDS behind the one before, so that a change that was committed late is seen too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa

from laneway import models
from laneway.db import Database, Rows, utc_now
from laneway.engine.access.credentials import LAST_USED_SECONDS, Callers
from laneway.log import get_logger

POLL_SECONDS = 0.5
WRITE_SECONDS = 5.0
OVERLAP_SECONDS = 30.0

_USED = Rows(id="text", at="moment", ip="text", before="moment")

k = models.api_keys.c
log = get_logger("keys")


class KeyWatch:
    """Keeps the Callers of this process up to date, from `start` to `close`."""

    def __init__(self, database: Database, callers: Callers) -> None:
        self._database = database
        self._callers = callers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="laneway-keys", daemon=True)
        self._since: datetime | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Write down what is still to be written, and end."""
        self._stop.set()
        self._thread.join()
        self._safely(self.write_used)

    def look(self) -> None:
        """Forget the keys that were changed since the last look."""
        with self._database.read() as connection:
            now = connection.execute(sa.select(utc_now())).scalar_one()
            if self._since is not None:
                query = sa.select(k.id).where(k.updated_at >= self._since)
                changed = connection.execute(query).scalars().all()
                if changed:
                    self._callers.forget(changed)
        self._since = now - timedelta(seconds=OVERLAP_SECONDS)

    def write_used(self) -> None:
        """Write when keys were used last: once in LAST_USED_SECONDS a key, however many processes see it."""
        used = self._callers.take_used()
        if not used:
            return
        gap = timedelta(seconds=LAST_USED_SECONDS)
        rows = [(key_id, at, ip, at - gap) for key_id, (at, ip) in sorted(used.items())]
        with self._database.write_once() as connection:
            dialect = self._database.dialect
            connection.execute(
                sa.text(
                    "UPDATE api_keys SET last_used_at = u.at, last_used_ip = u.ip "  # noqa: S608
                    f"FROM {_USED.sql(dialect)} WHERE api_keys.id = u.id "
                    "AND (last_used_at IS NULL OR last_used_at <= u.before)"
                ),
                _USED.bind(dialect, rows),
            )

    def _run(self) -> None:
        turns, due = 0, round(WRITE_SECONDS / POLL_SECONDS)
        while not self._stop.is_set():
            self._safely(self.look)
            self._safely(self._callers.refresh)
            turns += 1
            if turns % due == 0:
                self._safely(self.write_used)
            self._stop.wait(POLL_SECONDS)

    def _safely(self, task: Callable[[], None]) -> None:
        """A store that is away shall not end the watch: what was not seen is seen once it is back."""
        try:
            task()
        except sa.exc.SQLAlchemyError as error:
            log.warning("key_watch_failed", reason=type(error).__name__)
