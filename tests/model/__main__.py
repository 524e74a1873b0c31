"""`PYTHONPATH=tests python -m model`: the long run of the conformance model, against stores it starts itself.

Per store: so many steps of the state machine in lives of fresh seeds, then as many moves by several
processes at once. Prints each seed that diverged, with its steps, and what was done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from laneway.cli import migrate
from laneway.db import Database
from laneway.log import configure
from model.crowd import run_crowd
from model.runs import Count, run_machine
from servers import PostgresServer

STORES = ("sqlite", "postgresql")
LIVES = 20  # of one seed
MEMBERS, BATCHES = 4, 500  # processes, and turns of each, of one seed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="of each part on each store")
    parser.add_argument("--seed", type=int, default=1, help="the first one; each part counts up from it")
    parser.add_argument("--store", choices=STORES, action="append", help="both by default")
    options = parser.parse_args()
    configure(level="CRITICAL")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    diverged = 0
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        for store in options.store or STORES:
            with _database(store) as database:
                diverged += _alone(database, options.steps, options.seed, progress)
                diverged += _together(database, options.steps, options.seed, progress)
    print(f"divergences: {diverged}")
    sys.exit(min(diverged, 1))


@contextmanager
def _database(store: str) -> Iterator[Database]:
    if store == "postgresql":
        with PostgresServer() as server:
            database = Database(server.fresh())
            yield database
            database.dispose()
        return
    with tempfile.TemporaryDirectory() as folder:
        migrate.upgrade(url := f"sqlite:///{folder}/laneway.db")
        database = Database(url)
        yield database
        database.dispose()


def _alone(database: Database, steps: int, seed: int, progress: Progress) -> int:
    """One step after the other; how many seeds diverged."""
    task = progress.add_task("", total=steps)
    count = Count(stepped=lambda: progress.advance(task))
    diverged, number = 0, seed
    while count.steps < steps:
        progress.update(task, description=f"{database.dialect}, alone, seed {number}")
        try:
            run_machine(database, number=number, examples=LIVES, shrink=False, count=count)
        except Exception:
            diverged += 1
            print(f"{database.dialect}: the machine diverged with seed {number}")
            traceback.print_exc(file=sys.stdout)
        number += 1
    _say(f"{database.dialect}, alone: {count.steps:,} steps, seeds {seed} to {number - 1}", count.events)
    return diverged


def _together(database: Database, steps: int, seed: int, progress: Progress) -> int:
    """Several processes at once; how many seeds diverged."""
    task = progress.add_task("", total=steps)
    events: Counter[str] = Counter()
    asked = applied = rolled_back = wishes = diverged = 0
    number = seed
    while asked < steps and diverged < 10:
        progress.update(task, description=f"{database.dialect}, {MEMBERS} processes, seed {number}")
        try:
            tally = run_crowd(database, number=number, members=MEMBERS, batches=BATCHES)
        except AssertionError:
            diverged += 1
            print(f"{database.dialect}: the crowd diverged with seed {number}")
            traceback.print_exc(file=sys.stdout)
        else:
            events += tally.events
            asked, applied = asked + tally.asked, applied + tally.applied
            rolled_back, wishes = rolled_back + tally.rolled_back, wishes + tally.wishes
            progress.update(task, completed=asked)
        number += 1
    _say(
        f"{database.dialect}, {MEMBERS} processes: {asked:,} moves, of them {applied:,}"
        f" ({applied / max(asked, 1):.0%}) applied and {rolled_back:,} rolled back; {wishes:,} wishes;"
        f" seeds {seed} to {number - 1}",
        events,
    )
    return diverged


def _say(what: str, events: Counter[str]) -> None:
    told = ", ".join(f"{action} {count:,}" for action, count in sorted(events.items()))
    print(f"{what}; {events.total():,} events replayed: {told}", flush=True)


if __name__ == "__main__":
    main()
