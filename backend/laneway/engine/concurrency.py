"""Slots: how many jobs of a concurrency key, or of a tenant with `max_running`, run at once.

A claim passes by every job that needs a slot; here those are started for which there is one, and the others
are `blocked`. Whatever leaves `running` makes room, and in that transaction the next that wait are queued
again at their old place. What runs is counted where it stands, in the rows: there is no counter to be given
back, so none that a crash, a hand or an older release could leave wrong (docs/decisions/0006).

Two transactions that count the same key come one after the other: both hold its lock until they have
committed (on PostgreSQL an advisory one; SQLite's writers are alone anyway). All locks of a transaction are
taken in one order, after the rows of its own jobs, and whoever holds them waits for no row: one that
somebody else has is left out. So a settlement waits for the claims of its keys, sees whom they blocked, and
nobody waits for ever. What is missed all the same (a limit was raised, a job that was its turn was
cancelled) is found by the sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from hashlib import sha256
from typing import Any, cast

import sqlalchemy as sa

from laneway import models
from laneway.db import Database, Id, Moment, Rows, any_of, listed
from laneway.domain.spec import Priority
from laneway.domain.states import Action, JobStatus
from laneway.engine import transitions
from laneway.engine.transitions import (
    MAY_START,
    Applied,
    Block,
    Claim,
    ClaimSlot,
    Enqueue,
    Move,
    Outcome,
    Refused,
)
from laneway.lanes.backend import Due

KEY_FULL = "concurrency_key"
TENANT_FULL = "tenant_limit"
SWEPT_SLOTS = 200
"""So many keys, and so many tenants, are looked at by one sweep; the next goes on behind them."""

SWEPT_JOBS = 200  # of one key or tenant
NO_LIMIT = 2**31 - 1
ACTOR = "scheduler"

_MAKES_ROOM = frozenset(
    {
        *(Action.COMPLETE, Action.BACK_OFF, Action.FAIL, Action.TIME_OUT, Action.RELEASE, Action.STOP),
        *(Action.FORCE_COMPLETE, Action.CANCEL, Action.EXPIRE),  # of a job whose turn it was, perhaps
    }
)
_RANKS = {priority.value: rank for rank, priority in enumerate(Priority)}

j = models.jobs.c
t = models.tenants.c

# Written out, not bound: only so do both stores see that the partial indexes serve.
_TAKEN = "jobs.status = 'running' AND jobs.gated"
_WAITS_FOR = {
    reason: f"jobs.status = 'blocked' AND jobs.status_reason = '{reason}'"
    for reason in (KEY_FULL, TENANT_FULL)
}


def waits_for(reason: str) -> sa.ColumnElement[bool]:
    """Of a job that waits for slots, for this reason."""
    return sa.literal_column(_WAITS_FOR[reason])


@dataclass(frozen=True, slots=True, order=True)
class Slots:
    """Those of a tenant's key, or with the key '' the tenant's own."""

    tenant_id: str
    key: str = ""

    @property
    def reason(self) -> str:
        """Why a job waits that finds none."""
        return KEY_FULL if self.key else TENANT_FULL

    @property
    def lock(self) -> int:
        """The number of its lock. Two that share one are in each other's way, and no worse."""
        digest = sha256(f"laneway slots {self.tenant_id} {self.key}".encode()).digest()
        return int.from_bytes(digest[:8], signed=True)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that may start: one that a worker wants now, or one that `waits_for` slots."""

    job_id: str
    tenant_id: str
    key: str | None
    limit: int | None
    rank: int
    queued_at: datetime
    waits_for: Slots | None = None

    @classmethod
    def of(cls, row: Any, waits_for: Slots | None = None) -> Candidate:
        return cls(
            row.id,
            row.tenant_id,
            row.concurrency_key,
            row.concurrency_limit,
            _RANKS[row.priority],
            row.queued_at,
            waits_for,
        )

    @property
    def needs(self) -> list[Slots]:
        """The tenant's own only count where it has a limit."""
        own = [Slots(self.tenant_id)]
        return own if self.key is None else [Slots(self.tenant_id, self.key), *own]


@dataclass(frozen=True, slots=True)
class Turns:
    """Whose turn it is: jobs that start, jobs that wait no more, and jobs that wait from now on, and why."""

    start: tuple[str, ...]
    wake: tuple[Candidate, ...]
    block: tuple[tuple[str, str], ...]


def whose_turn(
    candidates: Iterable[Candidate],
    *,
    running: Mapping[Slots, int],
    limits: Mapping[str, int],
    room: Mapping[Slots, int],
) -> Turns:
    """Deal the free slots, to the most urgent first and then to the oldest. Pure.

    `running` has all slots that are dealt, `limits` the tenants' own; a key's limit is what the job says that
    wants it. At most `room` jobs of those that wait are woken.
    """
    start: list[str] = []
    wake: list[Candidate] = []
    block: list[tuple[str, str]] = []
    taken = Counter(running)
    left = Counter(room)
    for each in sorted(candidates, key=lambda c: (c.rank, c.queued_at, c.job_id)):
        needed = [slots for slots in each.needs if slots in running]
        full = next((s for s in needed if taken[s] >= _limit(s, each, limits)), None)
        if each.waits_for is None and full is not None:
            block.append((each.job_id, full.reason))
        elif full is None and (each.waits_for is None or left[each.waits_for] > 0):
            taken.update(needed)
            if each.waits_for is None:
                start.append(each.job_id)
            else:
                left[each.waits_for] -= 1
                wake.append(each)
    return Turns(tuple(start), tuple(wake), tuple(block))


def _limit(slots: Slots, candidate: Candidate, limits: Mapping[str, int]) -> int:
    return (candidate.limit or 1) if slots.key else limits.get(slots.tenant_id, NO_LIMIT)


def take_turns(
    connection: sa.Connection,
    outcomes: list[Outcome],
    *,
    now: datetime,
    actor: str,
    job_types: Sequence[str] | None = None,
) -> list[Due]:
    """Start what was refused its claim and finds a slot, block what finds none, wake what may go on.

    Writes what became of the claims into `outcomes`. Returns the jobs that were woken, to be rung at the
    head of their lanes. Costs nothing where nothing needs a slot. Not for `write_once`.
    """
    claims: dict[str, int] = {}
    gone: list[tuple[str, str | None]] = []
    for place, outcome in enumerate(outcomes):
        if isinstance(outcome, Applied):
            row = outcome.row
            if outcome.move.action in _MAKES_ROOM and (row["gated"] or row["concurrency_key"] is not None):
                gone.append((row["tenant_id"], row["concurrency_key"]))
        elif wants_slot(outcome):
            claims.setdefault(outcome.move.job_id, place)
    if not claims and not gone:
        return []
    wanted = _startable(connection, list(claims), now=now, job_types=job_types) if claims else []
    limits = _tenants_limits(connection, {*(each.tenant_id for each in wanted), *(each for each, _ in gone)})
    room: Counter[Slots] = Counter()
    for each in wanted:
        room.update(s for s in each.needs if s.key or s.tenant_id in limits)
    for tenant_id, key in gone:
        room.update([Slots(tenant_id, key)] if key is not None else [])
        room.update([Slots(tenant_id)] if tenant_id in limits else [])
    running: dict[Slots, int] = {}
    waiting: list[Candidate] = []
    if room:
        _lock(connection, room)
        running, waits = _look(connection, sorted(room))
        waiting = _waiting(connection, {slots: room[slots] for slots in waits}, running)
    turns = whose_turn([*wanted, *waiting], running=running, limits=limits, room=room)
    return _make(connection, outcomes, claims, turns, now=now, actor=actor, job_types=job_types)


def wants_slot(outcome: Outcome) -> bool:
    """Whether it is a claim that was refused for no other reason than that the job needs a slot."""
    return (
        isinstance(outcome, Refused)
        and outcome.needs_slot
        and outcome.status is JobStatus.QUEUED
        and isinstance(outcome.move, Claim)
    )


def _make(
    connection: sa.Connection,
    outcomes: list[Outcome],
    claims: Mapping[str, int],
    turns: Turns,
    *,
    now: datetime,
    actor: str,
    job_types: Sequence[str] | None,
) -> list[Due]:
    moves: list[Move] = []
    for job_id in turns.start:
        claim = cast(Claim, outcomes[claims[job_id]].move)
        moves.append(ClaimSlot(job_id, claim.lease_token, claim.worker_id, claim.at))
    moves += [Block(job_id, reason) for job_id, reason in turns.block]
    moves += [Enqueue(each.job_id, each.queued_at) for each in turns.wake]
    if not moves:
        return []
    made = transitions.apply(connection, moves, now=now, actor=actor, job_types=job_types)
    for outcome in made:
        if not isinstance(outcome, Applied) or isinstance(outcome.move, Enqueue):
            continue  # also one that was to be claimed, and that somebody had blocked by now
        place = claims[outcome.move.job_id]
        blocked = Refused(outcomes[place].move, JobStatus.BLOCKED, outcome.row["attempt"])
        outcomes[place] = blocked if isinstance(outcome.move, Block) else outcome
    return [
        Due(o.row["lane"], o.row["id"], o.row["tenant_id"])
        for o in made
        if isinstance(o, Applied) and isinstance(o.move, Enqueue)
    ]


# Reading


def _tenants_limits(connection: sa.Connection, tenant_ids: Collection[str]) -> dict[str, int]:
    limited = sa.select(t.id, t.max_running).where(t.id.in_(tenant_ids), t.max_running.is_not(None))
    return {row.id: row.max_running for row in connection.execute(limited)}


_TYPES: dict[str, Any] = {
    "id": sa.Text,
    "tenant_id": Id,
    "concurrency_key": sa.Text,
    "concurrency_limit": sa.Integer,
    "priority": sa.Text,
    "queued_at": Moment,
}
_COLUMNS = ", ".join(f"CAST(id AS text) AS {name}" if name == "id" else name for name in _TYPES)


@cache
def _select_startable(dialect: str, known_types: bool) -> sa.TextualSelect:
    free = " FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else ""
    known = f" AND job_type IN {any_of(dialect, 'job_types')}" if known_types else ""
    # As an array of keys, for the sake of the plan: see db.Rows.match.
    by_key = f"jobs.id IN {any_of(dialect, 'ids', kind='id')}"
    chosen = "jobs.id = ANY(CAST(:ids AS uuid[]))" if dialect == "postgresql" else by_key
    return (
        sa.text(
            f"SELECT {_COLUMNS} FROM jobs WHERE {chosen}"  # noqa: S608
            f" AND COALESCE(jobs.status, '') = 'queued' AND {MAY_START}{known} ORDER BY jobs.id{free}"
        )
        .bindparams(sa.bindparam("now", type_=Moment))
        .columns(**_TYPES)
    )


def _startable(
    connection: sa.Connection, ids: Sequence[str], *, now: datetime, job_types: Sequence[str] | None
) -> list[Candidate]:
    """Those of the queued jobs that nothing but a slot keeps from starting, locked."""
    dialect = connection.dialect.name
    parameters = {"now": now, "ids": listed(dialect, ids)}
    if job_types is not None:
        parameters["job_types"] = listed(dialect, job_types)
    rows = connection.execute(_select_startable(dialect, job_types is not None), parameters)
    return [Candidate.of(row) for row in rows]


_LOCK = sa.text("SELECT pg_advisory_xact_lock(n) FROM unnest(CAST(:locks AS bigint[])) AS n")


def _lock(connection: sa.Connection, slots: Iterable[Slots]) -> None:
    """Until the end of the transaction nobody else deals these."""
    if connection.dialect.name == "postgresql":
        connection.execute(_LOCK, {"locks": sorted({each.lock for each in slots})})


_SLOTS = Rows(tenant_id="id", key="text", priority="text", running="int", most="int")


@cache
def _select_state(dialect: str) -> sa.TextualSelect:
    def of_slots(what: str, of_key: str, of_tenant: str) -> str:
        mine = "jobs.tenant_id = u.tenant_id"
        key = f"{what.format(f'{mine} AND jobs.concurrency_key = u.key AND {of_key}')}"
        return f"CASE WHEN u.key = '' THEN {what.format(f'{mine} AND {of_tenant}')} ELSE {key} END"

    running = of_slots("(SELECT count(*) FROM jobs WHERE {})", _TAKEN, _TAKEN)
    # Not EXISTS, which PostgreSQL may answer by reading all that wait.
    one = "(SELECT 1 FROM jobs WHERE {} LIMIT 1) IS NOT NULL"
    waits = of_slots(one, _WAITS_FOR[KEY_FULL], _WAITS_FOR[TENANT_FULL])
    return sa.text(
        f"SELECT u.tenant_id, u.key, {running} AS running, {waits} AS waits FROM {_SLOTS.sql(dialect)}"  # noqa: S608
    ).columns(tenant_id=Id, key=sa.Text, running=sa.Integer, waits=sa.Boolean)


def _look(connection: sa.Connection, slots: Sequence[Slots]) -> tuple[dict[Slots, int], list[Slots]]:
    """How many jobs run in each of these slots, and for which of them others wait."""
    dialect = connection.dialect.name
    bound = _SLOTS.bind(dialect, [(each.tenant_id, each.key, "", 0, 0) for each in slots])
    running: dict[Slots, int] = {}
    waits: list[Slots] = []
    for row in connection.execute(_select_state(dialect), {"u": bound["u"]}):
        each = Slots(row.tenant_id, row.key)
        running[each] = row.running
        if row.waits:
            waits.append(each)
    return running, waits


def _first_waiting(reason: str) -> str:
    """The oldest of one priority that wait for slots which their own limits leave free."""
    key = (
        "jobs.concurrency_key = {0}key AND jobs.concurrency_limit > {0}running AND "
        if reason == KEY_FULL
        else ""
    )
    return (  # to be filled in with where the values come from
        f"SELECT {_COLUMNS} FROM jobs"  # noqa: S608
        f" WHERE jobs.tenant_id = {{0}}tenant_id AND {key}{_WAITS_FOR[reason]}"
        " AND jobs.priority = {0}priority ORDER BY jobs.queued_at, jobs.id LIMIT {0}most"
    )


@cache
def _select_waiting(dialect: str, reason: str, lock: bool) -> sa.TextualSelect:
    if dialect == "postgresql":
        first = _first_waiting(reason).format("u.") + (" FOR UPDATE SKIP LOCKED" if lock else "")
        sql = (
            f"SELECT {', '.join(f'w.{name}' for name in _TYPES)}"  # noqa: S608
            f" FROM {_SLOTS.sql(dialect)} CROSS JOIN LATERAL ({first}) AS w"
        )
    else:  # no LATERAL; a statement is a call
        sql = _first_waiting(reason).format(":")
    return sa.text(sql).columns(**_TYPES)


def _waiting(
    connection: sa.Connection,
    most: Mapping[Slots, int],
    running: Mapping[Slots, int],
    *,
    lock: bool = True,
) -> list[Candidate]:
    """The first jobs that wait for each of these slots, at most so many of each priority."""
    dialect = connection.dialect.name
    found: list[Candidate] = []
    for reason in (KEY_FULL, TENANT_FULL):
        probes = [
            (slots.tenant_id, slots.key, priority.value, running[slots], count)
            for slots, count in sorted(most.items())
            if slots.reason == reason
            for priority in Priority
        ]
        statement = _select_waiting(dialect, reason, lock)
        if dialect == "postgresql":
            bounds = [{"u": _SLOTS.bind(dialect, probes)["u"]}] if probes else []
        else:
            bounds = [dict(zip(_SLOTS.columns, probe, strict=True)) for probe in probes]
        for bound in bounds:
            for row in connection.execute(statement, bound):
                slots = Slots(row.tenant_id, row.concurrency_key if reason == KEY_FULL else "")
                found.append(Candidate.of(row, slots))
    return found


# The sweep


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sweep ended, and the next goes on: the last slots that it looked at, None at the end."""

    key: Slots | None = None
    tenant: Slots | None = None


def sweep(database: Database, *, now: datetime, after: Place | None = None) -> tuple[list[Due], Place]:
    """Wake jobs whose slots are free although nobody wakes them: they are to be rung.

    Looks at what comes `after` the place where the last sweep ended; that of this one is the second answer.
    """
    with database.read() as connection:
        found, free, place = with_room(connection, after or Place())
    if not free:  # on SQLite, an idle scheduler must not take the write lock
        return [], place
    with database.write() as connection:
        limits = _tenants_limits(connection, {each.tenant_id for each in found})
        slots = sorted({*found, *map(Slots, limits)})
        _lock(connection, slots)
        running, waits = _look(connection, slots)
        waiting = _waiting(connection, dict.fromkeys(waits, SWEPT_JOBS), running)
        turns = whose_turn(waiting, running=running, limits=limits, room=dict.fromkeys(waits, SWEPT_JOBS))
        return _make(connection, [], {}, turns, now=now, actor=ACTOR, job_types=None), place


def with_room(connection: sa.Connection, after: Place) -> tuple[list[Slots], tuple[Candidate, ...], Place]:
    """Slots that jobs wait for, the first of those jobs that need not wait, and where to go on."""
    keys = _with_waiting(connection, KEY_FULL, after.key)
    tenants = _with_waiting(connection, TENANT_FULL, after.tenant)
    found = [*keys, *tenants]
    place = Place(*(each[-1] if len(each) == SWEPT_SLOTS else None for each in (keys, tenants)))
    if not found:
        return [], (), place
    running, _ = _look(connection, found)
    limits = _tenants_limits(connection, {each.tenant_id for each in found})
    first = _waiting(connection, dict.fromkeys(found, 1), running, lock=False)
    turns = whose_turn(first, running=running, limits=limits, room=dict.fromkeys(found, 1))
    return found, turns.wake, place


def _with_waiting(connection: sa.Connection, reason: str, after: Slots | None) -> list[Slots]:
    """The next SWEPT_SLOTS slots that jobs wait for: one index probe each, however many jobs."""
    columns = (j.tenant_id, j.concurrency_key) if reason == KEY_FULL else (j.tenant_id,)
    first = sa.select(*columns).where(waits_for(reason)).order_by(*columns).limit(1)
    found: list[Slots] = []
    while len(found) < SWEPT_SLOTS:
        query = first
        if (last := found[-1] if found else after) is not None:
            values = (last.tenant_id, last.key)[: len(columns)]
            bounds = [sa.literal(value, column.type) for value, column in zip(values, columns, strict=True)]
            query = first.where(sa.tuple_(*columns) > sa.tuple_(*bounds))
        row = connection.execute(query).first()
        if row is None:
            break
        found.append(Slots(*row))
    return found
