"""Keeps an API process's rate limits what the table of overrides says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import sqlalchemy as sa

from laneway.clock import Clock
from laneway.db import Database
from laneway.engine.access import overrides
from laneway.limits.rule_book import Override
from laneway.log import get_logger

WATCH_SECONDS = 0.5  # a change is effective within twice as long

log = get_logger("limits")


class OverrideWatch:
    """Hands all overrides in force to `take` whenever one of them has changed.

    A thread of its own looks the counter of changes up every WATCH_SECONDS. While the database is away the
    last overrides known stay in force.
    """

    def __init__(
        self, database: Database, take: Callable[[Iterable[Override]], None], *, clock: Clock
    ) -> None:
        self._database = database
        self._take = take
        self._clock = clock
        self._seen: int | None = None
        self._away = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="override-watch", daemon=True)

    def start(self) -> None:
        """Look once, so that the first request meets the overrides, and go on looking."""
        self.look()
        self._thread.start()

    def look(self) -> None:
        """Take what has changed since the last look, if the database says."""
        try:
            with self._database.read() as connection:
                # The counter first: what is committed between the two reads is read now, and once more.
                count = overrides.changes(connection)
                if count != self._seen:
                    self._take(overrides.in_force(connection, now=self._clock.now()))
                    self._seen = count
        except sa.exc.SQLAlchemyError as error:
            if not self._away:
                log.warning("rate_limit_overrides_unread", error=type(error).__name__)
            self._away = True
        else:
            self._away = False

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_SECONDS):
            self.look()
