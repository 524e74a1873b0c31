"""The protocol as it is: no seed breaks a promise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from laneway.domain.states import Action, JobStatus
from simulation.world import World, counts

SEEDS = 1_000
PART = 250
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_no_seed_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + PART):
        if World(seed).run():
            again = World(seed, trace=True)
            again.run()
            trace = "\n".join(again.trace or ())
            pytest.fail(f"seed {seed}; again: python -m simulation --seed {seed}\n{trace}", pytrace=False)


def test_the_seeds_go_everywhere() -> None:
    """A simulation in which little happens would find little: each status is an end, each action is taken."""
    ends: Counter[JobStatus] = Counter()
    actions: Counter[Action | None] = Counter()
    faults = 0
    for seed in range(100):
        world = World(seed)
        world.run()
        ends.update(counts(world))
        actions.update(event.action for events in world.store.events.values() for event in events)
        faults += world.faults
    assert set(ends) == {
        JobStatus.COMPLETED,
        JobStatus.FAILED,
        JobStatus.TIMEOUT,
        JobStatus.CANCELLED,
        JobStatus.EXPIRED,
    }
    assert set(Action) - set(actions) <= {Action.RETRY_LATER, Action.BLOCK}  # no job of it has a key
    assert faults > 2_000


def test_a_seed_is_one_run_wherever_it_is_played() -> None:
    """Also in another process, where sets and dictionaries of texts have another order."""
    runs = [
        subprocess.run(
            [sys.executable, "-m", "simulation", "--seed", "7"],
            env=os.environ | {"PYTHONPATH": str(TESTS), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    world = World(7, trace=True)
    assert world.run() == []
    assert runs[0] == runs[1] == "\n".join(world.trace or ()) + "\n"
    assert len(runs[0].splitlines()) > 100
