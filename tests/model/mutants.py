"""The engine broken on purpose, one way each: the model must notice (tests/model/test_conformance.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import sqlalchemy as sa

from laneway import models
from laneway.db import Moment
from laneway.domain.states import RULES, Action, JobStatus
from laneway.engine import progress, queries, reaper, telling, transitions
from laneway.engine.transitions import BackOff, Claim, HeldMove, Move, Outcome, Release, Retry

Mutant = Callable[[pytest.MonkeyPatch], None]

_ATTEMPT = "jobs.attempt = u.attempt"
_TOKEN = "jobs.lease_token = u.lease_token"


def _text(statement: sa.TextClause, old: str, new: str) -> sa.TextClause:
    return sa.text(statement.text.replace(old, new)).bindparams(sa.bindparam("now", type_=Moment))


def _updates(patch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """The UPDATE of every move says `new` instead of `old`, and class attributes are read again."""
    original: Any = transitions._update.__wrapped__

    @cache
    def update(kind: type[Move], dialect: str, known_types: bool) -> Any:
        statement, rows = original(kind, dialect, known_types)
        return _text(statement, old, new), rows

    patch.setattr(transitions, "_update", update)


def _attribute(kind: type[Move], name: str, change: Callable[[str], str]) -> Mutant:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(kind, name, change(getattr(kind, name)))
        _updates(patch, "", "")

    return mutate


def _without_fence(column: str) -> Mutant:
    return lambda patch: _updates(patch, column, "true")


def _ended_can_be_cancelled(patch: pytest.MonkeyPatch) -> None:
    rule = RULES[Action.CANCEL]
    patch.setitem(RULES, Action.CANCEL, replace(rule, sources=frozenset(JobStatus) - {JobStatus.RUNNING}))
    _updates(patch, "", "")


def _no_event_of(action: str) -> Mutant:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        original: Any = transitions._insert_events.__wrapped__

        @cache
        def insert(dialect: str) -> sa.TextClause:
            statement = original(dialect)
            return _text(statement, statement.text, f"{statement.text} WHERE u.action <> '{action}'")

        patch.setattr(transitions, "_insert_events", insert)

    return mutate


def _progress_without(clause: str) -> Mutant:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        original: Any = progress._update.__wrapped__
        patch.setattr(progress, "_update", cache(lambda dialect: _text(original(dialect), clause, "true")))

    return mutate


def _turned_round(patch: pytest.MonkeyPatch) -> None:
    original = transitions.apply
    patch.setattr(transitions, "apply", lambda *a, **k: original(*a, **k)[::-1])


def _no_messages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(telling, "record", lambda *_a, **_k: 0)


def _tenants_share(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queries.Scope, "clauses", lambda _: [sa.true()])


def _everyone_is_blamed(patch: pytest.MonkeyPatch) -> None:
    original = reaper.take_back
    patch.setattr(reaper, "take_back", lambda o, **k: original(replace(o, died_running=True), **k))


def _the_waiting_are_blamed(patch: pytest.MonkeyPatch) -> None:
    original = reaper._orphan
    patch.setattr(reaper, "_orphan", lambda row: replace(original(row), died_running=row.state == "dead"))


def _one_attempt_a_batch(patch: pytest.MonkeyPatch) -> None:
    """Of a job's moves of one kind the first, whatever its attempt: the others find it where it is then."""
    original = transitions.apply

    def apply(connection: sa.Connection, moves: Sequence[Move], **how: Any) -> list[Outcome]:
        first: dict[tuple[type[Move], str], Move] = {}
        for move in moves:
            first.setdefault((type(move), move.job_id), move)
        fit = [move for move in moves if first[type(move), move.job_id] is move]
        made = dict(zip(map(id, fit), original(connection, fit, **how), strict=True))
        found = transitions._where_they_are(connection, [move.job_id for move in moves])
        return [made.get(id(m)) or transitions.Refused(m, *found.get(m.job_id, (None, None))) for m in moves]

    patch.setattr(transitions, "apply", apply)


def _looks_then_leaps(patch: pytest.MonkeyPatch) -> None:
    """Check and act as two statements: alone it does what the guarded UPDATE does."""
    original = transitions.apply
    guards: Any = transitions._update.__wrapped__

    @cache
    def update(kind: type[Move], dialect: str, known_types: bool) -> Any:
        statement, rows = guards(kind, dialect, known_types)
        text = statement.text.replace("COALESCE(jobs.status, '') IN", "'x' NOT IN")
        bare = sa.text(text.replace(_ATTEMPT, "true").replace(_TOKEN, "true"))
        return bare.bindparams(sa.bindparam("now", type_=Moment)), rows

    def apply(connection: sa.Connection, moves: Sequence[Move], **how: Any) -> list[Outcome]:
        j = models.jobs.c
        wanted = [m.job_id for m in moves]
        rows = connection.execute(sa.select(j.id, j.status, j.attempt, j.lease_token).where(j.id.in_(wanted)))
        now = {row.id: row for row in rows}
        fit = [m for m in moves if m.job_id in now and _fits(m, now[m.job_id])]
        made = dict(zip(map(id, fit), original(connection, fit, **how), strict=True))
        return [made.get(id(m)) or transitions.Refused(m, None, None) for m in moves]

    patch.setattr(transitions, "_update", update)
    patch.setattr(transitions, "apply", apply)


def _fits(move: Move, row: Any) -> bool:
    held = not isinstance(move, HeldMove) or (row.attempt, row.lease_token) == (
        move.attempt,
        move.lease_token,
    )
    return held and row.status in RULES[move.action].sources


ALONE: dict[str, Mutant] = {
    "the attempt is not looked at": _without_fence(_ATTEMPT),
    "the lease token is not looked at": _without_fence(_TOKEN),
    "a release leaves no event": _no_event_of("release"),
    "an ended job can be cancelled": _ended_can_be_cancelled,
    "a claim counts no attempt": _attribute(
        Claim, "sets", lambda s: s.replace("jobs.attempt + 1", "jobs.attempt")
    ),
    "a ghost reports progress": _progress_without(_TOKEN),
    "a late job can be claimed": _attribute(Claim, "guard", lambda _: ""),
    "a stopped job gets another attempt": _attribute(BackOff, "guard", lambda _: ""),
    "a released job loses its place": _attribute(Release, "sets", lambda s: f"{s}, queued_at = :now"),
    "a retry keeps the used-up allowance": _attribute(
        Retry, "sets", lambda s: s.replace(" retry_count = 0,", "")
    ),
    "progress falls": _progress_without("jobs.progress <= u.percent"),
    "outcomes come in another order": _turned_round,
    "an end is told to nobody": _no_messages,
    "tenants see each other's jobs": _tenants_share,
    "a job is blamed for a worker that left": _everyone_is_blamed,
    "a job is blamed that had not begun": _the_waiting_are_blamed,
    "a second attempt in one batch is not looked at": _one_attempt_a_batch,
}
"""What a short run of one process shows."""

TOGETHER: dict[str, Mutant] = {
    "looks, then leaps": _looks_then_leaps,
    "a claim leaves no event": _no_event_of("claim"),
}
"""What takes several processes, or shows in their record."""

MUTANTS = ALONE | TOGETHER
