"""Each thing that the protocol does is needed: without it some seed breaks a promise, and soon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulation.design import MUTANTS
from simulation.world import World

SEEDS = 150
BREAKS = {
    "no_answer_after_commit": {"I1 durable", "I20 backpressure"},
    "no_unique_index": {"I13 unique key"},
    "no_claim_guard": {"I4 final", "one at a time"},
    "no_attempt_fence": {"I3 fence"},
    "no_token_fence": {"I3 fence"},
    "no_progress_fence": {"I3 fence"},
    "no_reaper_fence": {"I3 fence"},
    "no_held_tokens": {"I1 durable"},
    "no_self_fence": {"one at a time"},
    "no_monotonic_lease": {"lease"},
    "no_fresh_watch": {"I16 poison"},
    "no_mass_guard": {"mass silence"},
    "no_crash_limit": {"I16 poison"},
    "no_free_release": {"I8 retries"},
    "no_wish_guard": {"I18 cancel"},
    "no_wish_ending": {"I1 durable"},
    "no_promotion_lock": {"I3 fence", "I4 final"},
    "no_backoff": {"I8 retries"},
    "no_reconciler": {"I22 unheard"},
    "no_own_look": {"I22 stall"},
    "no_message_with_end": {"I9 message"},
    "no_settle_after_send": {"I9 message"},
    "no_courier_lease": {"I9 message"},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found(mutant: str) -> None:
    for seed in range(SEEDS):
        if {violation.invariant for violation in World(seed, mutant=mutant).run()} & BREAKS[mutant]:
            return
    pytest.fail(f"{SEEDS} seeds do not need what {mutant} leaves out")


def test_a_run_that_goes_wrong_is_told_with_its_seed_and_its_trace() -> None:
    def play(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "simulation", "--mutant", "no_message_with_end", *options]
        folder = Path(__file__).parents[1]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)

    all_of_them = play("--seeds", "3")
    assert all_of_them.returncode == 1
    replay = all_of_them.stdout.splitlines()[-1]
    assert replay.startswith("replay: python -m simulation --seed ")
    one = play("--seed", replay.split()[5])
    assert one.returncode == 1
    assert "VIOLATION" in one.stdout
