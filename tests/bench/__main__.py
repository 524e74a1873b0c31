"""`make bench`: run the benchmarks, print their tables, keep the numbers.

Tables go to standard output, progress to standard error; `bench-results/` gets a JSON file with every
round and all that one must know to read it, and the same tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import drain, machine
from bench.figures import as_json, table
from bench.ground import Stores
from bench.machine import Placement
from bench.suite import Bench, benches
from laneway.clock import SystemClock
from laneway.settings import PREFIX

NAMES = (
    "drain",
    "post",
    "latency",
    "memory",
    "recovery",
    "limiter-1",
    "limiter-3",
    "batches",
    "batch-drain",
    "fork",
)
RESULTS = Path("bench-results")
PROFILE_LINES = 25

Measured = dict[str, dict[str, list[float]]]
"""Metric → case → a value a round."""


def main() -> None:
    options = _options()
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]  # a developer's own settings must not decide what is measured
    with Stores(options.placement) as stores:
        if options.profile:
            _profile(stores, options.scale)
            return
        chosen = [
            b for b in benches(stores, rounds=options.rounds, scale=options.scale) if b.name in options.only
        ]
        report: dict[str, Any] = {
            "at": SystemClock().now().isoformat(timespec="seconds"),
            "placement": options.placement.words,
            "rounds": options.rounds,
            "scale": options.scale,
            "machine": machine.facts(stores.folder),
            "versions": machine.versions() | stores.versions(),
        }
        loads: list[tuple[float, float, float]] = [os.getloadavg()]
        results = {}
        with _progress(sum(b.rounds * len(b.cases) for b in chosen)) as advance:
            for bench in chosen:
                results[bench.name] = _measure(bench, advance, loads)
    report["load_averages"] = loads
    report["results"] = {
        b.name: {m.key: as_json(m, results[b.name][m.key], b.references) for m in b.metrics} for b in chosen
    }
    _show(Console(width=None if sys.stdout.isatty() else 120), report, chosen, results, markdown=False)
    _keep(report, chosen, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=_positive(int), default=5, help="interleaved rounds (default: 5)")
    parser.add_argument(
        "--scale", type=_positive(float), default=1.0, help="multiplies counts and seconds (default: 1)"
    )
    parser.add_argument("--only", type=_names, default=NAMES, help=f"some of {','.join(NAMES)}")
    parser.add_argument(
        "--placement",
        type=Placement,
        choices=list(Placement),
        default=Placement.FREE,
        help="free (default): as the kernel likes; split: stores on one core, all else on another",
    )
    parser.add_argument(
        "--profile", action="store_true", help="only print where the worker's time goes (PostgreSQL)"
    )
    return parser.parse_args()


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if number <= 0:
            raise argparse.ArgumentTypeError("must be above 0")
        return number

    return parse


def _names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(NAMES):
        raise argparse.ArgumentTypeError(f"no benchmark is called {', '.join(sorted(unknown))}")
    return chosen


class _Advance:
    """The progress bar's one knob."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def begin(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def done(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def _progress(total: int) -> Iterator[_Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as progress:
        yield _Advance(progress, total)


def _measure(bench: Bench, advance: _Advance, loads: list[tuple[float, float, float]]) -> Measured:
    """Every case once a round, the order turned round each time, so that none always comes first."""
    measured: Measured = {m.key: {case: [] for case in bench.cases} for m in bench.metrics}
    for number in range(bench.rounds):
        cases = list(bench.cases)
        for case in reversed(cases) if number % 2 else cases:
            advance.begin(f"{bench.name} {number + 1}/{bench.rounds}: {case}")
            values = bench.cases[case]()
            for metric in bench.metrics:
                measured[metric.key][case].append(values[metric.key])
            advance.done()
        loads.append(os.getloadavg())
    return measured


def _show(
    console: Console,
    report: dict[str, Any],
    chosen: Sequence[Bench],
    results: dict[str, Measured],
    *,
    markdown: bool,
) -> None:
    facts: dict[str, object] = {"at": report["at"], "placement": report["placement"]}
    for part in ("machine", "versions"):
        facts |= report[part]
    for name, value in facts.items():
        console.print(f"- {name}: {value}", highlight=False, soft_wrap=True)
    for bench in chosen:
        heading = f"## {bench.title}" if markdown else bench.title
        console.print(f"\n{heading}\n", style="bold", highlight=False)
        for metric in bench.metrics:
            console.print(table(metric, results[bench.name][metric.key], bench.references, markdown=markdown))


def _keep(report: dict[str, Any], chosen: Sequence[Bench], results: dict[str, Measured]) -> None:
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / str(report["at"])[:19].replace(":", "")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    with stem.with_suffix(".md").open("w") as file:
        _show(Console(file=file, width=200), report, chosen, results, markdown=True)
    Console(stderr=True).print(f"kept in {stem}.json and {stem}.md", highlight=False, soft_wrap=True)


def _profile(stores: Stores, scale: float) -> None:
    path = stores.folder / "profile"
    rate = drain.laneway(stores, "postgresql", count=max(10, round(20_000 * scale)), profile=str(path))[
        "rate"
    ]
    print(f"{rate:,.0f} jobs/s under cProfile, which slows Python down: read the shares, not the times")
    pstats.Stats(str(path)).sort_stats("tottime").print_stats(PROFILE_LINES)


if __name__ == "__main__":
    main()
