"""What a run of the suite says: a line a seed, everything about a failure, a summary, and files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chaos.checker import CHECKS, growth_percent_per_hour
from chaos.run import Result

VIOLATIONS_SHOWN = 20


@contextmanager
def progress(seconds: float) -> Iterator[Callable[[float], None]]:
    """A bar over so many seconds of load, on standard error; what is yielded moves it on."""
    columns = (TextColumn("chaos"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as bar:
        task = bar.add_task("", total=seconds)
        yield lambda done: bar.advance(task, done)


def tell(result: Result) -> None:
    """One line; of a failure everything that is needed to look into it and to run it again."""
    plan = result.plan
    word = "ok  " if result.passed else "FAIL"
    print(
        f"{word} seed {plan.seed} on {plan.store}: {result.jobs} jobs, {len(result.faults)} faults, "
        f"{result.restarts} restarts, at rest after {result.rest_seconds:.1f} s, {result.seconds:.0f} s",
        flush=True,
    )
    if result.passed:
        return
    print(f"  folder: {result.folder}")
    print(f"  faults: {json.dumps([asdict(fault) for fault in plan.faults])}")
    for complaint in result.complaints:
        print(f"  {complaint}")
    for violation in result.violations[:VIOLATIONS_SHOWN]:
        print(f"  {violation.invariant} {violation.job_id or ''} {violation.sentence}")
    if len(result.violations) > VIOLATIONS_SHOWN:
        print(f"  and {len(result.violations) - VIOLATIONS_SHOWN} more: {_counts(result)}")
    for job_id, lines in result.timelines.items():
        print(f"  timeline of {job_id}")
        for line in lines:
            print(f"    {line}")
    sys.stdout.flush()


def _counts(result: Result) -> dict[str, int]:
    return dict(Counter(str(violation.invariant) for violation in result.violations))


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """The sums of a suite."""
    return {
        "seeds": [result.plan.seed for result in results],
        "jobs": sum(result.jobs for result in results),
        "acknowledged": sum(result.acknowledged for result in results),
        "events": sum(result.events for result in results),
        "deliveries": sum(result.deliveries for result in results),
        "faults": sum(len(result.faults) for result in results),
        "faults_by_name": dict(sorted(sum((Counter(r.faults) for r in results), Counter()).items())),
        "missed": dict(sorted(sum((Counter(r.missed) for r in results), Counter()).items())),
        "restarts": sum(result.restarts for result in results),
        "statuses": dict(sorted(sum((Counter(r.statuses) for r in results), Counter()).items())),
        "violations": dict(sum((Counter(_counts(r)) for r in results), Counter())),
        "complaints": [complaint for result in results for complaint in result.complaints],
        "longest_rest_seconds": round(max((r.rest_seconds for r in results), default=0.0), 1),
        "minutes": round(sum(result.seconds for result in results) / 60, 1),
    }


def summary(results: Sequence[Result]) -> None:
    """The sums, on standard output."""
    sums = figures(results)
    kinds = len({name.partition("@")[2] or name for name in sums["faults_by_name"]})
    print(
        f"{len(results)} seeds, {sums['jobs']} jobs ({sums['acknowledged']} acknowledged), "
        f"{sums['faults']} faults of {kinds} kinds, {sums['restarts']} restarts, {len(CHECKS)} invariants: "
        f"{sum(sums['violations'].values())} violations, {len(sums['complaints'])} complaints"
    )


def keep(results: Sequence[Result], folder: Path, *, at: datetime) -> list[Path]:
    """Write the report as JSON and as Markdown; the files."""
    folder.mkdir(exist_ok=True)
    stem = folder / f"{at:%Y%m%d-%H%M}"
    sums = figures(results)
    flat = [result for result in results if any(s.growth_percent_per_hour is not None for s in result.series)]
    grown = {
        s.name: round(growth_percent_per_hour(s), 2)
        for result in flat
        for s in result.series
        if s.growth_percent_per_hour is not None
    }
    highest = {
        s.name: max((value for _, value in s.points), default=0.0) for result in flat for s in result.series
    }
    whole = {
        "at": at.isoformat(timespec="seconds"),
        **sums,
        "growth_percent_per_hour": grown,
        "highest": highest,
    }
    as_json, as_markdown = stem.with_suffix(".json"), stem.with_suffix(".md")
    as_json.write_text(json.dumps(whole, indent=1) + "\n")
    as_markdown.write_text(_markdown(whole, results))
    return [as_json, as_markdown]


def _markdown(whole: dict[str, Any], results: Sequence[Result]) -> str:
    lines = [f"# Chaos report, {whole['at']}", ""]
    simple = ("jobs", "acknowledged", "events", "deliveries", "faults", "restarts", "longest_rest_seconds")
    lines += [f"- {name.replace('_', ' ')}: {whole[name]}" for name in (*simple, "minutes")]
    lines += [f"- violations: {whole['violations'] or 'none'}", f"- statuses: {whole['statuses']}", ""]
    lines += [
        "| seed | store | jobs | faults | at rest after | result |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        plan, word = result.plan, "passed" if result.passed else "failed"
        lines.append(
            f"| {plan.seed} | {plan.store} | {result.jobs} | {len(result.faults)} "
            f"| {result.rest_seconds:.1f} s | {word} |"
        )
    lines += ["", "| fault | times |", "| --- | --- |"]
    lines += [f"| {name} | {times} |" for name, times in whole["faults_by_name"].items()]
    lines += ["", "| measured without faults | highest | growth, % an hour |", "| --- | --- | --- |"]
    grown = whole["growth_percent_per_hour"]
    lines += [f"| {name} | {most:.0f} | {grown.get(name, '')} |" for name, most in whole["highest"].items()]
    return "\n".join(lines) + "\n"
