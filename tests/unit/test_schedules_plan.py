"""What becomes of the slots that are due: misfire, overlap, jitter, bounds."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from factories import NOW, schedule_columns
from laneway.engine.slot_plan import (
    MAX_ACTIVE_RUNS,
    MAX_CATCH_UP,
    MAX_SLOTS_AT_ONCE,
    MISFIRE_GRACE_SECONDS,
    Plan,
    due_of,
    plan,
    slot_after,
)

Said = list[tuple[str, str | None, int]]


def planned(seconds: float, *, active: int = 0, waiting: bool = False, **columns: Any) -> tuple[Plan, Said]:
    """The plan so many seconds after the first slot, and its decisions: status, reason, slots."""
    made = plan(
        schedule_columns(**columns), active=active, waiting=waiting, now=NOW + timedelta(seconds=seconds)
    )
    return made, [(d.status, d.reason, d.slots) for d in made.decisions]


def starts(count: int) -> Said:
    return [("started", None, 1)] * count


def missed(count: int) -> Said:
    return [("skipped", "misfire", count)] if count else []


def test_a_slot_is_started_when_it_is_due_and_not_before() -> None:
    assert planned(-0.001) == (Plan((), NOW), [])
    made, said = planned(0)
    assert said == starts(1)
    assert made.decisions[0].slot == NOW
    assert made.next_slot == NOW + timedelta(seconds=60)


def test_what_is_late_by_a_minute_is_in_time_and_a_moment_more_is_missed() -> None:
    hourly = {"interval_seconds": 3600, "misfire": "skip"}
    assert planned(MISFIRE_GRACE_SECONDS, **hourly)[1] == starts(1)
    assert planned(MISFIRE_GRACE_SECONDS + 0.001, **hourly)[1] == missed(1)


@pytest.mark.parametrize(
    ("misfire", "late", "wanted"),
    [
        ("skip", 10_000, missed(3)),  # slots at 0, 3600 and 7200
        ("fire_once", 10_000, missed(2) + starts(1)),
        ("fire_all", 10_000, starts(3)),
        ("skip", 10_800, missed(3) + starts(1)),  # the fourth is in time
        ("fire_once", 10_800, missed(3) + starts(1)),  # and stands for those before it
        ("fire_all", 10_800, starts(4)),
    ],
)
def test_misfire_says_which_missed_slots_still_run(misfire: str, late: float, wanted: Said) -> None:
    made, said = planned(late, interval_seconds=3600, misfire=misfire, overlap="allow")
    assert said == wanted
    assert made.next_slot == NOW + timedelta(seconds=10_800 if late < 10_800 else 14_400)


@pytest.mark.parametrize(("extra", "skipped"), [(0, 0), (1, 1), (5, 5)])
def test_fire_all_runs_the_newest_100_and_skips_those_before(extra: int, skipped: int) -> None:
    late = 60 * (MAX_CATCH_UP + extra)  # and the last slot is in time
    many = {"misfire": "fire_all", "overlap": "allow", "max_concurrent_runs": MAX_ACTIVE_RUNS}
    _, said = planned(late + 30, interval_seconds=60, active=-200, **many)
    in_time = 2 if MISFIRE_GRACE_SECONDS >= 60 + 30 else 1
    assert said == missed(skipped) + starts(MAX_CATCH_UP + in_time)


@pytest.mark.parametrize("misfire", ["skip", "fire_once", "fire_all"])
def test_a_long_absence_is_worked_off_in_bounded_turns_and_no_slot_is_left_out(misfire: str) -> None:
    columns = schedule_columns(interval_seconds=1, misfire=misfire, overlap="allow")
    now = NOW + timedelta(seconds=5000)
    slots: dict[str, int] = {}
    turns = 0
    following = NOW
    while columns["next_slot"] <= now:
        made = plan(columns, active=-1000, waiting=False, now=now)
        assert sum(d.slots for d in made.decisions) <= MAX_SLOTS_AT_ONCE
        for decision in made.decisions:
            assert decision.slot == following
            following = (decision.last_slot or decision.slot) + timedelta(seconds=1)
            slots[decision.status] = slots.get(decision.status, 0) + decision.slots
        assert made.next_slot == following
        columns["next_slot"] = made.next_slot
        turns += 1
    assert sum(slots.values()) == 5001
    late = 5001 - 61
    assert slots["skipped"] == {"skip": late, "fire_once": late, "fire_all": late - MAX_CATCH_UP}[misfire]
    assert turns <= 7


@pytest.mark.parametrize(
    ("overlap", "active", "waiting", "wanted"),
    [
        ("skip", 0, False, starts(1)),
        ("skip", 2, False, [("skipped", "overlap", 1)]),
        ("queue_one", 2, False, [("waiting", None, 1)]),
        ("queue_one", 2, True, [("skipped", "overlap", 1)]),
        ("cancel_running", 2, False, [("waiting", None, 1)]),
        ("cancel_running", 2, True, [("waiting", None, 1)]),
        ("allow", 2, False, starts(1)),
        ("allow", MAX_ACTIVE_RUNS - 1, False, starts(1)),
        ("allow", MAX_ACTIVE_RUNS, False, [("skipped", "max_concurrent_runs", 1)]),
    ],
)
def test_overlap_says_what_becomes_of_a_slot_while_runs_are_active(
    overlap: str, active: int, waiting: bool, wanted: Said
) -> None:
    made, said = planned(0, overlap=overlap, active=active, waiting=waiting, max_concurrent_runs=2)
    assert said == wanted
    assert made.displaces == (overlap == "cancel_running" and waiting)


def test_so_many_runs_may_be_active_at_once() -> None:
    three = {"interval_seconds": 10, "max_concurrent_runs": 2, "misfire": "fire_all"}
    assert planned(20, overlap="skip", **three)[1] == [*starts(2), ("skipped", "overlap", 1)]
    assert planned(20, overlap="queue_one", **three)[1] == [*starts(2), ("waiting", None, 1)]
    assert planned(20, overlap="queue_one", active=1, **three)[1] == [
        *starts(1),
        ("waiting", None, 1),
        ("skipped", "overlap", 1),
    ]


def test_of_slots_that_wait_for_a_cancel_the_newest_does() -> None:
    made, said = planned(30, interval_seconds=10, overlap="cancel_running", active=1, waiting=True)
    assert said == [*[("skipped", "overlap", 1)] * 3, ("waiting", None, 1)]
    assert made.displaces


def test_a_schedule_starts_and_ends_with_its_slots_included() -> None:
    columns = schedule_columns(interval_seconds=60, starts_at=NOW, ends_at=NOW + timedelta(seconds=60))
    assert slot_after(columns, NOW - timedelta(days=1)) == NOW
    assert slot_after(columns, NOW) == NOW + timedelta(seconds=60)
    assert slot_after(columns, NOW + timedelta(seconds=60)) is None
    made, said = planned(120, interval_seconds=60, ends_at=NOW + timedelta(seconds=60), overlap="allow")
    assert said == [*missed(1), *starts(1)]
    assert made.next_slot is None


def test_jitter_is_the_same_for_a_slot_whoever_asks_and_another_for_the_next() -> None:
    columns = schedule_columns(jitter_seconds=30)
    slots = [NOW + timedelta(minutes=n) for n in range(200)]
    delays = [(due_of(columns, slot) - slot).total_seconds() for slot in slots]
    assert delays == [(due_of(dict(columns), slot) - slot).total_seconds() for slot in slots]
    assert 0 <= min(delays) < 2
    assert 28 < max(delays) < 30
    assert delays != [(due_of(schedule_columns(jitter_seconds=30), s) - s).total_seconds() for s in slots]
    assert due_of(schedule_columns(), NOW) == NOW


def test_a_slot_runs_when_its_jitter_is_over() -> None:
    columns = schedule_columns(jitter_seconds=600, interval_seconds=3600)
    due = due_of(columns, NOW)
    assert due > NOW
    before = plan(columns, active=0, waiting=False, now=due - timedelta(milliseconds=1))
    assert before.decisions == ()
    assert [d.slot for d in plan(columns, active=0, waiting=False, now=due).decisions] == [NOW]
