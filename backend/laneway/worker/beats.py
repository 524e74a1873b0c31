"""The pool's heartbeat: a thread with a connection of its own, so that nothing else can delay it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from laneway.clock import Clock
from laneway.db import Database
from laneway.engine import leases
from laneway.engine.leases import Wish
from laneway.engine.pauses import paused_names
from laneway.log import get_logger
from laneway.settings import Settings

log = get_logger("beats")


class Beats:
    """Beats every `beat_seconds`, and at once when told to; hands on the wishes it reads.

    `named` is told which of the jobs that have begun the database knows of now, `paused` which queues are.

    `lost` is called once the lease can no longer be trusted: the database says that this worker is dead, or
    no beat went through for the lease less two beats. Whoever runs jobs must then stop them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        worker_id: str,
        held: Callable[[], Sequence[str]],
        begun: Callable[[], Sequence[str]],
        clock: Clock,
        wished: Callable[[list[Wish]], None],
        lost: Callable[[], None],
        named: Callable[[Sequence[str]], None] = lambda _: None,
        paused: Callable[[frozenset[str]], None] | None = None,
    ) -> None:
        self._database = Database(
            settings.database, pool_size=1, statement_seconds=settings.worker_statement_seconds
        )
        self._every = settings.beat_seconds
        self._patience = settings.lease_patience_seconds
        self._worker_id = worker_id
        self._held = held
        self._begun = begun
        self._clock = clock
        self._wished = wished
        self._lost = lost
        self._named = named
        self._paused = paused
        self._last = clock.monotonic()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def now(self) -> None:
        """Beat without waiting for the next turn."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        self._database.dispose()

    @property
    def overdue(self) -> bool:
        """Whether the lease may be gone: this process was stopped, or the database is away."""
        return self._clock.monotonic() - self._last > self._patience

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                begun, held = self._begun(), self._held()
                wishes = leases.beat(self._database, worker_id=self._worker_id, held=held, begun=begun)
            except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
                log.warning("beat_failed", worker_id=self._worker_id, error=type(error).__name__)
                if self.overdue:
                    self._lost()
                    return
            else:
                if wishes is None:
                    self._lost()
                    return
                self._last = self._clock.monotonic()
                self._named(begun)
                if wishes:
                    self._wished(wishes)
                self._learn_paused()
            self._wake.wait(self._every)
            self._wake.clear()

    def _learn_paused(self) -> None:
        """Read which queues are paused. Without an answer the last one holds: the claim knows better."""
        if self._paused is None:
            return
        try:
            self._paused(paused_names(self._database))
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("pauses_not_read", worker_id=self._worker_id, error=type(error).__name__)
