"""Numbers out of rounds: medians with their spread, ratios within a round, the tables. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

Values = Mapping[str, Sequence[float]]
"""Case → what each round measured, in the order of the rounds."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle round, and the lowest and the highest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.least, "max": self.most}


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of numbers: its key in what a case returns, how people read it, its unit."""

    key: str
    title: str
    unit: str


def ratios(values: Values, case: str, reference: str) -> Spread:
    """How many times `reference` the case is, from pairs measured in the same round.

    The median of the rounds' ratios, not the ratio of the medians: what else the machine did in a round
    falls on both of its halves.
    """
    return Spread.of([a / b for a, b in zip(values[case], values[reference], strict=True)])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least value that `share` (0 to 1) of the sorted values do not exceed ("nearest rank")."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def shown(number: float) -> str:
    """At least three digits, and thousands apart: 1,234 · 56.7 · 0.123."""
    decimals = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 3
    return f"{number:,.{decimals}f}"


def table(metric: Metric, values: Values, references: Sequence[str], *, markdown: bool = False) -> Table:
    """A row a case: median, spread, and, for what is no reference itself, the ratio to each reference."""
    made = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    made.add_column(metric.title)
    for title in (metric.unit, "min - max", *(f"x {reference}" for reference in references)):
        made.add_column(title, justify="right")
    for case, measured in values.items():
        compared = () if case in references else (ratios(values, case, r) for r in references)
        spread = Spread.of(measured)
        made.add_row(case, shown(spread.median), _range(spread), *map(_with_range, compared))
    return made


def _range(spread: Spread) -> str:
    return f"{shown(spread.least)} - {shown(spread.most)}"


def _with_range(spread: Spread) -> str:
    return f"{shown(spread.median)} ({_range(spread)})"


def as_json(metric: Metric, values: Values, references: Sequence[str]) -> dict[str, object]:
    """What `table` shows, and every round's value."""
    return {
        "unit": metric.unit,
        "cases": {
            case: {
                "values": list(measured),
                **Spread.of(measured).as_json(),
                "ratios": {r: ratios(values, case, r).as_json() for r in references if r != case},
            }
            for case, measured in values.items()
        },
    }
