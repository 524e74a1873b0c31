"""The suite's own parts: plans are what their seed says, every failpoint exists, and every mutant applies."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from chaos import failpoints, plan, report
from chaos.checker import Invariant, Violation
from chaos.failpoints import PLACES, Board, Place, Strike
from chaos.faults import MENU
from chaos.ground import PATHS
from chaos.history import Series
from chaos.run import Result


def test_a_seed_is_always_the_same_plan() -> None:
    def made(seed: int) -> str:
        each = plan.make(seed, store="pg", seconds=60, jobs_per_second=10, faults=9)
        return json.dumps(each.as_json())

    assert made(7) == made(7)
    assert made(7) != made(8)


def test_every_fault_of_the_plans_is_on_the_menu() -> None:
    assert plan.FAULTS.keys() | {plan.STRUCK} == MENU.keys()


def test_a_soak_meets_every_fault_and_every_failpoint() -> None:
    planned = [fault for each in plan.soak() for fault in each.faults]
    on_pg = {name for name, (_, stores) in plan.FAULTS.items() if "pg" in stores}
    assert on_pg <= {fault.name for fault in planned}
    assert {fault.place for fault in planned} - {""} == PLACES.keys()
    assert len(planned) >= 200
    assert sum(len(each.jobs) for each in plan.soak()) >= 20_000


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_failpoint_is_a_function_of_laneway(place: Place) -> None:
    holder, name = failpoints.find(place.target)
    assert callable(getattr(holder, name))


def test_every_mutant_can_be_applied() -> None:
    # In another process: this one needs Laneway as it is.
    code = "from chaos.mutants import MUTANTS; [apply() for apply in MUTANTS.values()]"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(PATHS)}, check=True, timeout=60)


def test_a_report_is_written_of_runs_that_passed_and_failed(tmp_path: Path) -> None:
    planned = plan.make(7, store="pg", seconds=10, jobs_per_second=1, faults=1)
    flat = [Series("api-0 rss bytes", [(60.0, 100.0), (120.0, 110.0)], 200.0, 50.0)]
    passed = Result(planned, tmp_path, faults=["redis_killed"], jobs=10, series=flat)
    failed = Result(planned, tmp_path, missed=["redis_killed"], jobs=9, complaints=["api-0 did not stop"])
    failed.violations = [Violation(Invariant.DURABLE, "a", "is gone")]
    as_json, as_markdown = report.keep(
        [passed, failed], tmp_path / "results", at=datetime(2026, 1, 2, tzinfo=UTC)
    )
    kept = json.loads(as_json.read_text())
    assert (kept["jobs"], kept["faults"], kept["violations"]) == (19, 1, {"I1": 1})
    assert kept["growth_percent_per_hour"]["api-0 rss bytes"] > 500
    assert "| 7 | pg | 9 | 0 | 0.0 s | failed |" in as_markdown.read_text()


def test_a_failure_says_how_to_look_into_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan.make(7, store="pg", seconds=10, jobs_per_second=1, faults=1)
    violations = [Violation(Invariant.DURABLE, "a", "is gone")]
    report.tell(Result(planned, tmp_path, violations=violations, timelines={"a": ["12:00 it was there"]}))
    said = capsys.readouterr().out
    assert all(words in said for words in ("seed 7", str(tmp_path), "I1 a is gone", "12:00 it was there"))


def test_a_place_strikes_once_at_the_pass_that_was_ordered(tmp_path: Path) -> None:
    board = Board(tmp_path)
    place = Place("take.after_pop", "json:dumps", after=True)
    call = failpoints._wrapped(json.dumps, place, tmp_path)
    board.arm(place.name, Strike.PAUSE, order="one", pass_number=2)
    call({})
    assert board.struck("one") is None
    call({})
    assert board.struck("one") is not None
    assert not list((tmp_path / "armed").iterdir())


def test_a_withdrawn_order_strikes_nobody(tmp_path: Path) -> None:
    board = Board(tmp_path)
    place = Place("take.after_pop", "json:dumps")
    call = failpoints._wrapped(json.dumps, place, tmp_path)
    board.arm(place.name, Strike.PAUSE, order="one")
    board.disarm(place.name)
    call({})
    assert board.struck("one") is None
