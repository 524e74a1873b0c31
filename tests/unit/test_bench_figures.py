from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.figures import Metric, Spread, Values, as_json, percentile, ratios, shown, table
from bench.records import Records

RATE = Metric("rate", "worker", "jobs/s")


def rendered(values: Values, references: tuple[str, ...], *, markdown: bool) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=120).print(table(RATE, values, references, markdown=markdown))
    return [line.strip() for line in text.getvalue().splitlines() if line.strip()]


def test_a_spread_is_the_middle_round_and_both_ends() -> None:
    assert Spread.of([5, 1, 9]) == Spread(5, 1, 9)
    assert Spread.of([4, 2]) == Spread(3, 2, 4)


def test_a_ratio_compares_what_was_measured_in_the_same_round() -> None:
    values = {"ours": [100, 1000, 40], "theirs": [10, 50, 8]}
    assert ratios(values, "ours", "theirs") == Spread(10, 5, 20)  # the medians' ratio, 100 / 10, hides the 20


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    values = {"ours": [2, 30, 4], "theirs": [1, 10, 4]}
    assert ratios(values, "ours", "theirs").median == 2


def test_a_round_that_one_side_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios({"ours": [1, 2], "theirs": [1]}, "ours", "theirs")


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.501, 51), (0.99, 99), (1.0, 100)]
)
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: int) -> None:
    assert percentile(range(1, 101), share) == expected


def test_a_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7], 0.99) == 7


@pytest.mark.parametrize(
    ("number", "text"),
    [(12345.6, "12,346"), (100.4, "100"), (56.78, "56.8"), (1.234, "1.23"), (0.1234, "0.123")],
)
def test_numbers_show_three_digits_or_more(number: float, text: str) -> None:
    assert shown(number) == text


def test_the_table_sets_each_case_against_each_reference() -> None:
    values = {"ours": [200, 300, 260], "slow": [20, 30, 20], "fast": [100, 100, 100]}
    head, _, *rows = rendered(values, ("slow", "fast"), markdown=True)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]
    assert cells == [
        ["worker", "jobs/s", "min - max", "x slow", "x fast"],
        ["ours", "260", "200 - 300", "10.0 (10.0 - 13.0)", "2.60 (2.00 - 3.00)"],
        ["slow", "20.0", "20.0 - 30.0", "", ""],
        ["fast", "100", "100 - 100", "", ""],
    ]


def test_a_table_without_references_has_no_ratios() -> None:
    head, *_ = rendered({"ours": [1.0]}, (), markdown=False)
    assert head.endswith("min - max")


def test_the_json_keeps_every_round() -> None:
    values = {"ours": [20.0, 30.0], "theirs": [10.0, 10.0]}
    assert as_json(RATE, values, ("theirs",)) == {
        "unit": "jobs/s",
        "cases": {
            "ours": {
                "values": [20.0, 30.0],
                "median": 25.0,
                "min": 20.0,
                "max": 30.0,
                "ratios": {"theirs": {"median": 2.5, "min": 2.0, "max": 3.0}},
            },
            "theirs": {"values": [10.0, 10.0], "median": 10.0, "min": 10.0, "max": 10.0, "ratios": {}},
        },
    }


def test_the_rate_runs_from_the_first_to_the_last_record() -> None:
    second = 1_000_000_000
    assert Records([(2, 9 * second), (0, 7 * second), (1, 8 * second)]).rate == 1.0


def test_jobs_that_began_once_each_pass() -> None:
    Records([(1, 5), (0, 6)]).need_each_once(2)


@pytest.mark.parametrize("entries", [[(0, 5)], [(0, 5), (0, 6)], [(0, 5), (1, 6), (1, 7)], [(0, 5), (2, 6)]])
def test_a_job_that_began_twice_or_never_is_found(entries: list[tuple[int, int]]) -> None:
    with pytest.raises(AssertionError, match="of 2 jobs began"):
        Records(entries).need_each_once(2)
