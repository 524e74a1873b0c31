"""The engine does what the model says: alone step by step, and several processes at once, on both stores.

`PYTHONPATH=tests python -m model` is the long run.
"""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.engine.transitions import MOVES
from model.crowd import run_crowd
from model.machine import FOREIGN
from model.mutants import ALONE, TOGETHER
from model.pure import TABLE, World
from model.runs import Count, run_machine

SEED = 1
SEEDS = (2, 3, 1, 4, 5)  # one of them shows each mutant, mostly the first
FOUND = (AssertionError, KeyError, sa.exc.IntegrityError)  # KeyError: the engine trips over its own answer


def test_the_model_knows_every_move_and_every_column() -> None:
    world = World()
    assert set(TABLE) == set(MOVES)
    assert set(models.jobs.c.keys()) == world.columns() | FOREIGN


def test_random_steps_diverge_nowhere(database: Database) -> None:
    count = Count()
    run_machine(database, number=SEED, examples=15, count=count)
    assert count.steps > 500
    assert len(count.events) >= 12, "the steps lead nowhere: give them better odds"


def test_what_several_processes_do_at_once_is_a_history_of_the_model(database: Database) -> None:
    tally = run_crowd(database, number=SEED, members=3, batches=150)
    assert len(tally.events) >= 12
    assert tally.applied > tally.asked / 3
    assert tally.refused
    assert tally.wishes


@pytest.mark.parametrize("mutant", ALONE)
def test_the_machine_finds(mutant: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(sqlite_url)
    ALONE[mutant](monkeypatch)
    with pytest.raises(FOUND):
        _run_seeds(database)
    database.dispose()


def _run_seeds(database: Database) -> None:
    for number in SEEDS:
        run_machine(database, number=number, examples=12, shrink=False)


@pytest.mark.parametrize(
    ("mutant", "store"), list(zip(TOGETHER, ("postgres_url", "sqlite_url"), strict=True))
)
def test_the_crowd_finds(mutant: str, store: str, request: pytest.FixtureRequest) -> None:
    database = Database(request.getfixturevalue(store))
    with pytest.raises(FOUND):
        run_crowd(database, number=SEED, members=3, batches=100, mutant=mutant)
    database.dispose()
