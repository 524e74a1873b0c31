"""Several processes at once on the same rows, and their events replayed against the model.

All members work on the same few jobs, the oldest that can still move, and make new ones as those end. Each
makes random batches of moves, with holds it read a moment ago, at a wall clock of its own; it cancels as
callers do and sweeps as schedulers do. Afterwards the record must be a history that the model allows: per
job one event after the other, each legal where it stands, each told to exactly one member, and the row what
the events make of it.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, TENANT, new_job
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import upkeep
from laneway.engine.access.callers import Caller, Role
from laneway.engine.group_commit import commit_each
from laneway.engine.outcomes import carry_out
from laneway.engine.registry import Registry
from laneway.engine.service import JobService
from laneway.engine.transitions import (
    MOVES,
    Applied,
    BackOff,
    Block,
    Cancel,
    Claim,
    Enqueue,
    Expire,
    ForceComplete,
    HeldMove,
    Move,
    NewJob,
    Outcome,
    RetryLater,
    create,
)
from laneway.errors import IllegalTransition
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.log import configure
from laneway.settings import Settings
from model.machine import ALL_EVENTS, ALL_MESSAGES, ALL_ROWS, empty
from model.mutants import MUTANTS
from model.pure import TABLE, UNWISHED, World

JOBS = 12  # that all members work on
OLGA = Caller(TENANT, "olga", Role.OPERATOR)
SCHEDULER = "scheduler"


@dataclass(slots=True)
class Log:
    """What one member did: the jobs it made, and when; its moves that counted, by job and `seq`; its wishes,
    by job and attempt.
    """

    jobs: list[tuple[NewJob, datetime]] = field(default_factory=list)
    made: dict[tuple[str, int], Move] = field(default_factory=dict)
    wished: list[tuple[str, int]] = field(default_factory=list)
    asked: int = 0
    refused: int = 0
    rolled_back: int = 0  # whose transaction was a deadlock's victim, or found the store busy


@dataclass(frozen=True, slots=True)
class Tally:
    """What a crowd did: moves asked for, applied, refused, rolled back; events by action; wishes."""

    asked: int
    applied: int
    refused: int
    rolled_back: int
    events: Counter[str]
    wishes: int


def run_crowd(
    database: Database, *, number: int, members: int, batches: int, mutant: str | None = None
) -> Tally:
    """`members` processes of `batches` random turns each, from seed `number`; then the replay.

    The store is emptied first. Raises AssertionError where the record is no history that the model allows.
    """
    empty(database)
    if database.dialect == "postgresql":
        with database.write() as connection:  # its default second is most of the run
            connection.exec_driver_sql(
                f"ALTER DATABASE \"{database.url.database}\" SET deadlock_timeout = '20ms'"
            )
    url = database.url.render_as_string(hide_password=False)
    with ProcessPoolExecutor(members, mp_context=multiprocessing.get_context("spawn")) as pool:
        seeds = [f"{number}/{member}" for member in range(members)]
        logs = list(pool.map(_member, *zip(*((url, seed, batches, mutant) for seed in seeds), strict=True)))
    with database.read() as connection:
        rows = connection.execute(ALL_ROWS).mappings().all()
        events = connection.execute(ALL_EVENTS).mappings().all()
        messages = {tuple(message) for message in connection.execute(ALL_MESSAGES)}
    world = World()
    for row, now in (made for log in logs for made in log.jobs):
        world.create(row, now=now)
    replay(world, events, logs)
    compare(world, rows)
    assert messages == world.messages
    return Tally(
        sum(log.asked for log in logs),
        sum(len(log.made) for log in logs),
        sum(log.refused for log in logs),
        sum(log.rolled_back for log in logs),
        Counter(event["action"] for event in events),
        sum(len(log.wished) for log in logs),
    )


def replay(world: World, events: Sequence[sa.RowMapping], logs: Sequence[Log]) -> None:
    """Let the events, in the order of job and `seq`, happen to the model. Raises AssertionError."""
    made: dict[tuple[str, int], Move] = {}
    for log in logs:
        assert not made.keys() & log.made.keys(), "two members were told that they made the same event"
        made |= log.made
    wished = Counter(wish for log in logs for wish in log.wished)
    for event in events:
        job_id, row = event["job_id"], world.jobs[event["job_id"]]
        if event["action"] != "create":
            assert event["seq"] == row["event_seq"] + 1, ("an event is missing before", dict(event))
            move = made.pop((job_id, event["seq"]), None) or _unlogged(event)
            assert world.legal(move, now=event["at"]), ("illegal", move, dict(event), row)
            world.make(move, now=event["at"], actor=event["actor"])
        expected = world.events[job_id][event["seq"] - 1]
        assert {name: event[name] for name in expected} == expected
        if event["status"] == "running":  # every wish for an attempt falls between its claim and its end
            for _ in range(wished.pop((job_id, event["attempt"]), 0)):
                world.wish(job_id, by="", reason=None, terminate=False, grace=None, now=event["at"])
    assert not made, ("told to be done, and not in the record", made)
    assert not wished, ("asked to stop while it did not run", wished)


def compare(world: World, rows: Sequence[sa.RowMapping]) -> None:
    """The rows are what the replay left. The order of several wishes for one attempt is not known."""
    assert {row["id"] for row in rows} == set(world.jobs)
    for row in rows:
        expected = dict(world.jobs[row["id"]])
        assert (row["cancel_requested_at"] is None) == (expected["cancel_requested_at"] is None)
        if row["cancel_requested_at"] is not None and expected["cancelled_by"] == "":
            for name in (*UNWISHED, "updated_at"):
                del expected[name]
        wrong = {name: (row[name], value) for name, value in expected.items() if row[name] != value}
        assert not wrong, (row["id"], wrong)


def _unlogged(event: sa.RowMapping) -> Move:
    """The move of a sweep or a caller, which are not told the `seq` of what they did."""
    if (event["action"], event["actor"]) == ("enqueue", SCHEDULER):
        return Enqueue(event["job_id"])
    if (event["action"], event["actor"]) == ("expire", SCHEDULER):
        return Expire(event["job_id"])
    assert (event["action"], event["actor"]) == ("cancel", OLGA.subject), ("nobody did", dict(event))
    return Cancel(event["job_id"], by=OLGA.subject, reason=event["reason"])


def _new_row(rng: Random) -> NewJob:
    queued = rng.random() < 0.7
    return new_job(
        status="queued" if queued else "scheduled",
        queued_at=NOW if queued else None,
        scheduled_for=None if queued else NOW,
        expires_at=NOW + timedelta(seconds=20) if rng.random() < 0.4 else None,
        webhook_url="https://example.com/hook" if rng.random() < 0.5 else None,
    )


def _member(url: str, seed: str, batches: int, mutant: str | None) -> Log:
    configure(level="CRITICAL")
    database = Database(url, pool_size=2)
    with pytest.MonkeyPatch.context() as patch:
        if mutant is not None:
            MUTANTS[mutant](patch)
        log = Log()
        try:
            rng = Random(seed)
            for _ in range(batches):
                _turn(database, rng, log, actor=f"tester:{seed}")
        finally:
            database.dispose()
    return log


def _turn(database: Database, rng: Random, log: Log, *, actor: str) -> None:
    now = NOW + timedelta(seconds=rng.uniform(-30, 30))
    j = models.jobs.c
    unfinished = sa.select(j.id, j.status, j.attempt, j.lease_token).where(j.status != JobStatus.COMPLETED)
    with database.read() as connection:
        rows = connection.execute(unfinished.order_by(j.id).limit(JOBS)).all()
    what = rng.random()
    if len(rows) < JOBS:
        _create(database, rng, JOBS - len(rows), now, log)
    elif what < 0.08:
        sweep = upkeep.promote if what < 0.05 else upkeep.expire
        with suppress(sa.exc.OperationalError):  # a deadlock's victim: schedulers sweep again
            sweep(database, now=now)
    elif what < 0.15:
        _cancel(database, rng.choice([row for row in rows if row.status == "running"] or rows).id, now, log)
    else:
        moves = _moves(rng, rows, now)

        def commit(batch: Sequence[Move]) -> list[Outcome]:
            with database.write() as connection:
                return carry_out(connection, batch, now=now, actor=actor)

        log.asked += len(moves)
        for outcome in commit_each(commit, moves):
            if isinstance(outcome, Applied):
                log.made[outcome.move.job_id, outcome.row["event_seq"]] = outcome.move
            elif isinstance(outcome, Exception):
                log.rolled_back += 1
            else:
                log.refused += 1


def _create(database: Database, rng: Random, count: int, now: datetime, log: Log) -> None:
    rows = [_new_row(rng) for _ in range(count)]
    with database.write_once() as connection:
        assert create(connection, rows, now=now) == [row.id for row in rows]
    log.jobs += [(row, now) for row in rows]


def _cancel(database: Database, job_id: str, now: datetime, log: Log) -> None:
    service = JobService(database, MemoryLanes(), Settings(), Registry(), clock=FrozenClock(now))
    try:
        answer = service.cancel(job_id, OLGA, reason="enough")
    except IllegalTransition:
        return
    except sa.exc.OperationalError:  # a deadlock's victim: its caller is answered 503
        log.rolled_back += 1
        return
    if not answer.done:
        log.wished.append((job_id, answer.job["attempt"]))


def _moves(rng: Random, rows: Sequence[sa.Row[Any, Any, Any, Any]], now: datetime) -> list[Move]:
    """Up to six moves, of one kind a job: mostly one that the job's status allowed when it was read.

    Some name an attempt before, and some are asked for twice.
    """
    kinds = {row.id: _kind(rng, row.status) for row in rows}
    moves = []
    for row in rng.choices(rows, k=rng.randint(1, 6)):
        kind = kinds[row.id]
        hold = {
            "attempt": row.attempt - (rng.random() < 0.1),
            "lease_token": row.lease_token or new_id(),
        }
        extra: dict[type[Move], dict[str, Any]] = {
            Claim: {"lease_token": new_id(), "worker_id": new_id(), "at": now},
            Block: {"reason": "concurrency_key"},
            Cancel: {"by": OLGA.subject, "reason": "bulk"},
            RetryLater: {"next_retry_at": now + timedelta(seconds=1)},
            BackOff: {"next_retry_at": now + timedelta(seconds=1)},
        }
        held = hold if issubclass(kind, HeldMove) else {}
        moves.append(kind(row.id, **held, **extra.get(kind, {})))
    return moves


def _kind(rng: Random, status: str) -> type[Move]:
    if rng.random() < 0.15:
        return rng.choice(MOVES)
    if status == "queued" and rng.random() < 0.6:
        return Claim
    return rng.choice([kind for kind in MOVES if status in TABLE[kind][1] and kind is not ForceComplete])
