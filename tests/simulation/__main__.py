"""`python -m simulation`: play seeds, and show those that went wrong."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from simulation.design import MUTANTS
from simulation.world import World

SHOWN = 3


def main() -> int:
    options = _options()
    if options.seed is not None:
        world = World(options.seed, mutant=options.mutant, trace=True)
        violations = world.run()
        print("\n".join(world.trace or ()))
        return 1 if violations else 0
    wrong: list[int] = []
    kinds: Counter[str] = Counter()
    began = time.process_time()
    faults = jobs = 0
    for seed in range(options.first, options.first + options.seeds):
        world = World(seed, mutant=options.mutant)
        violations = world.run()
        faults += world.faults
        jobs += len(world.store.jobs)
        if violations:
            wrong.append(seed)
            kinds.update({violation.invariant for violation in violations})
            if len(wrong) <= SHOWN:
                print(f"seed {seed}: {violations[0]}")
    seconds = time.process_time() - began
    rate = options.seeds / seconds
    print(
        f"{options.seeds} seeds, {jobs} jobs, {faults} faults;"
        f" {seconds:.0f} s of CPU, {rate:.0f} seeds a second"
    )
    print(f"{len(wrong)} wrong {dict(kinds) if wrong else ''}")
    if wrong:
        mutant = f" --mutant {options.mutant}" if options.mutant else ""
        print(f"replay: python -m simulation --seed {wrong[0]}{mutant}")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3000, help="how many to play (default: 3000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--seed", type=int, help="play this one and print what happened")
    parser.add_argument("--mutant", choices=MUTANTS, help="leave something out of the protocol")
    return parser.parse_args()


sys.exit(main())
