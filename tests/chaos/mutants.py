"""Laneway broken on purpose, in memory: what the suite must find. `chaos.program` applies one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import sqlalchemy as sa

from laneway.db import Moment

VARIABLE = "CHAOS_MUTANT"
NO_LIMIT = 10**6


def no_fence() -> None:
    """Endings are written whatever attempt and lease token the row has by now."""
    transitions: Any = import_module("laneway.engine.transitions")
    honest = transitions._update

    def update(*args: Any) -> Any:
        statement, rows = honest(*args)
        text = statement.text
        for guard in ("jobs.attempt = u.attempt", "jobs.lease_token = u.lease_token"):
            text = text.replace(f" AND {guard}", "")
        return sa.text(text).bindparams(sa.bindparam("now", type_=Moment)), rows

    transitions._update = update


def message_after_commit() -> None:
    """A worker writes webhook messages in a transaction of their own, after the one that ended the job."""
    _after_commit("tell", set)


def follow_after_commit() -> None:
    """A worker does what follows from ends in a transaction of its own, after the one that ended the job."""
    _after_commit("follow", import_module("laneway.engine.flow").Followed)


def _after_commit(name: str, nothing: Callable[[], Any]) -> None:
    outcomes: Any = import_module("laneway.engine.outcomes")
    ledger: Any = import_module("laneway.worker.ledger")
    exchange = ledger.exchange
    undone: list[tuple[list[Any], Any]] = []

    def later(_connection: Any, applied: Any, *, now: Any) -> Any:
        undone.append((list(applied), now))
        return nothing()

    def exchange_and_do(database: Any, *args: Any, **kwargs: Any) -> Any:
        honest = getattr(outcomes, name)  # with its failpoints, by now
        setattr(outcomes, name, later)
        try:
            done = exchange(database, *args, **kwargs)
        finally:
            setattr(outcomes, name, honest)
        while undone:
            applied, now = undone.pop()
            with database.write() as connection:
                honest(connection, applied, now=now)
        return done

    ledger.exchange = exchange_and_do


def no_slots() -> None:
    """A job with a concurrency key is claimed like any other."""
    transitions: Any = import_module("laneway.engine.transitions")
    transitions.Claim.guard = transitions.MAY_START


def no_second_look() -> None:
    """Nobody compares the lanes with the rows: a lost id stays lost."""
    upkeep: Any = import_module("laneway.engine.upkeep")
    leases: Any = import_module("laneway.engine.leases")
    upkeep.reconcile = lambda *_args, **_kwargs: 0
    leases.find_queued = lambda *_args, **_kwargs: []


def liveness_only() -> None:
    """A worker that beats keeps every job the database says it runs, known to it or not."""
    watch: Any = import_module("laneway.engine.reaper").Watch
    look = watch.look

    def credulous(self: Any, workers: Any, *, at: float) -> Any:
        return replace(look(self, workers, at=at), lost_claims=frozenset())

    watch.look = credulous


def endless_crashes() -> None:
    """A job may kill as many processes as it likes."""
    exchange: Any = import_module("laneway.engine.exchange")
    reaper: Any = import_module("laneway.engine.reaper").Reaper
    decide, init = exchange.decide, reaper.__init__

    def patient(*args: Any, **kwargs: Any) -> Any:
        return decide(*args, **{**kwargs, "crash_limit": NO_LIMIT})

    def patient_reaper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "crash_limit": NO_LIMIT})

    exchange.decide, reaper.__init__ = patient, patient_reaper


def no_reaper() -> None:
    """What a dead worker held stays with it."""
    reaper: Any = import_module("laneway.engine.reaper").Reaper
    reaper.sweep = lambda _self: []


MUTANTS: Mapping[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        no_fence,
        message_after_commit,
        follow_after_commit,
        no_slots,
        no_second_look,
        liveness_only,
        endless_crashes,
        no_reaper,
    )
}
