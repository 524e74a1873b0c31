"""The simulated store does to a row what the real ones do: each move, from each status, fence and all."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from factories import NOW, WORKER, add_job, job_row
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.payload import to_json
from laneway.domain.states import JobStatus
from laneway.engine.outcomes import carry_out
from laneway.engine.transitions import (
    MOVES,
    Applied,
    BackOff,
    Block,
    Cancel,
    Claim,
    Complete,
    Enqueue,
    Expire,
    Fail,
    ForceComplete,
    HeldMove,
    Move,
    Release,
    Retry,
    RetryLater,
    Stop,
    TimeOut,
)
from simulation.design import SOUND
from simulation.kernel import Kernel
from simulation.store import Store

LATER = NOW + timedelta(minutes=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "late": {"expires_at": NOW},
    "in time": {"expires_at": NOW + timedelta(microseconds=1)},
    "to stop": {"cancel_requested_at": NOW},
    "charged": {"retry_count": 2, "crash_count": 1},
}
CLOCKED = {"created_at", "updated_at"}


def moves_on(job_id: str, attempt: int, token: str) -> list[Move]:
    """One of each kind; those of a holder also with what an older holder would name."""
    moves: list[Move] = [
        Enqueue(job_id),
        Claim(job_id, new_id(), WORKER, NOW),
        Block(job_id, reason="tenant_limit"),
        Cancel(job_id, by="bob", reason="because"),
        Expire(job_id),
        Retry(job_id),
        RetryLater(job_id, LATER),
        ForceComplete(job_id, result="1", reason="because"),
    ]
    for hold in ((job_id, attempt, token), (job_id, attempt - 1, token), (job_id, attempt, new_id())):
        moves += [
            Complete(*hold, result="2"),
            BackOff(*hold, LATER, charge=1, crash=1, error="{}"),
            Fail(*hold, error="{}", reason="poison", crash=1),
            TimeOut(*hold, error="{}"),
            Release(*hold, crash=1),
            Stop(*hold),
        ]
    return moves


def test_every_kind_of_move_is_tried() -> None:
    assert {type(move) for move in moves_on("j", 1, "t")} == set(MOVES)


@pytest.mark.parametrize("status", JobStatus)
def test_a_move_does_to_a_simulated_row_what_it_does_to_a_real_one(
    database: Database, status: JobStatus
) -> None:
    different = []
    for name, columns in VARIANTS.items():
        store = Store(Kernel(0), SOUND, lambda *_: None)
        moves, rows = [], []
        for number in range(len(moves_on("", 1, ""))):
            row = job_row(database, add_job(database, status, **columns))
            rows.append(row)
            moves.append(moves_on(row["id"], row["attempt"], row["lease_token"] or new_id())[number])
            store.jobs[row["id"]] = _as_text(row)
            store.events[row["id"]] = []
        simulated = store.carry_out(moves, now=NOW, actor="t")
        with database.write() as connection:
            real = carry_out(connection, moves, now=NOW, actor="t")
        for row, move, ours, theirs in zip(rows, moves, simulated, real, strict=True):
            after = _without_clock(_as_text(job_row(database, row["id"])))
            if type(ours) is not type(theirs) or after != _without_clock(store.jobs[row["id"]]):
                different.append((name, move, ours, theirs))
            if isinstance(move, HeldMove) and move.lease_token != row["lease_token"]:
                assert not isinstance(theirs, Applied)
    assert not different


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    """JSON columns as the text that moves write."""
    texts = {name: to_json(row[name]) for name in ("parameters", "result", "error") if row[name] is not None}
    return row | texts | {"status": JobStatus(row["status"])}


def _without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in CLOCKED}
