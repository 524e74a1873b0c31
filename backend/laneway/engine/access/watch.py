"""What each API process remembers of the database, kept up to date: a thread that looks twice a second.

A look is a function that reads what has changed since it looked last, and hands it to who remembers. All
that asks the database shares one Watch: each look is one small query. Whatever may wait for somebody else
(an issuer of JWTs) has a Watch of its own, so that a key that was revoked is not open for so much longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock
from laneway.db import Database, Rows, utc_now
from laneway.engine.access import overrides
from laneway.engine.access.credentials import LAST_USED_SECONDS, Callers
from laneway.limits.rule_book import Override
from laneway.log import get_logger

WATCH_SECONDS = 0.5  # a change is effective within twice as long
WRITE_SECONDS = 5.0
OVERLAP_SECONDS = 30.0

_USED = Rows(id="text", at="moment", ip="text", before="moment")

k = models.api_keys.c
log = get_logger("watch")


@dataclass(frozen=True, slots=True)
class Look:
    """`name` is for the log. One that is `at_end` is called once more when the watch has ended."""

    name: str
    call: Callable[[], None]
    every_seconds: float = WATCH_SECONDS
    at_end: bool = False


class Watch:
    """Calls its looks, in their order, from `start` to `close`.

    One that fails, since the store is away or for whatever reason, is called again at its next turn, and
    keeps no other from being called: what was known stays in force, and what was missed is seen later.
    """

    def __init__(self, *looks: Look) -> None:
        self._looks = looks
        self._failing: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="laneway-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End, after the looks that are to be called at the end."""
        self._stop.set()
        self._thread.join()
        self.look(look for look in self._looks if look.at_end)

    def look(self, looks: Iterable[Look] | None = None) -> None:
        """Call these (default: all) now; a failure is logged, once until it is over."""
        for look in self._looks if looks is None else looks:
            try:
                look.call()
            except Exception as error:
                if look.name not in self._failing:
                    log.warning("look_failed", look=look.name, error=type(error).__name__)
                self._failing.add(look.name)
            else:
                self._failing.discard(look.name)

    def _run(self) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            self.look(look for look in self._looks if turn % round(look.every_seconds / WATCH_SECONDS) == 0)
            self._stop.wait(WATCH_SECONDS)


class KeyLooks:
    """Has `callers` forget what keys were before they were changed, and writes when keys were used.

    What changed is asked for in one small query for all keys, by the database's own clock: each look goes
    back OVERLAP_SECONDS behind the one before, so that a change that was committed late is seen too.
    """

    def __init__(self, database: Database, callers: Callers) -> None:
        self._database = database
        self._callers = callers
        self._since: datetime | None = None

    @property
    def looks(self) -> tuple[Look, ...]:
        return (
            Look("api_keys", self.look),
            Look("api_keys_used", self.write_used, every_seconds=WRITE_SECONDS, at_end=True),
        )

    def look(self) -> None:
        """Forget the keys that were changed since the last look."""
        with self._database.read() as connection:
            now = connection.execute(sa.select(utc_now())).scalar_one()
            if self._since is not None:
                query = sa.select(k.id, k.version).where(k.updated_at >= self._since)
                self._callers.forget_before({row.id: row.version for row in connection.execute(query)})
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


class OverrideLook:
    """Hands all overrides in force to `take` whenever one of them has changed: a counter says so."""

    def __init__(
        self, database: Database, take: Callable[[Iterable[Override]], None], *, clock: Clock
    ) -> None:
        self._database = database
        self._take = take
        self._clock = clock
        self._seen: int | None = None

    @property
    def looks(self) -> tuple[Look, ...]:
        return (Look("rate_limit_overrides", self.look),)

    def look(self) -> None:
        """Take what has changed since the last look, if the database says."""
        with self._database.read() as connection:
            # The counter first: what is committed between the two reads is read now, and once more.
            count = overrides.changes(connection)
            if count != self._seen:
                self._take(overrides.in_force(connection, now=self._clock.now()))
                self._seen = count
