"""What `laneway schedules lint` says."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from laneway.cli.schedules import CROWD, findings

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def schedule(name: str, cron: str | None = "30 9 * * *", **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "name": name,
        "cron_expression": cron,
        "interval_seconds": None,
        "timezone": "UTC",
        "jitter_seconds": 0,
        "max_concurrent_runs": 1,
        "overlap": "skip",
        "next_run_at": "2026-01-01T12:00:30.000000Z",
        "created_at": "2026-01-01T00:00:00.000000Z",
    } | fields


def said(*schedules: dict[str, Any], **lasted: float) -> list[tuple[str, str, str]]:
    found = findings(list(schedules), lasted, now=NOW)
    return [(each["schedule"], each["finding"], each["detail"]) for each in found]


def test_a_sound_schedule_is_not_talked_about() -> None:
    assert said(schedule("a", timezone="Europe/Berlin"), a=3600.0) == []


def test_what_changing_clocks_will_do_is_said() -> None:
    found = said(schedule("a", "30 2 * * *", timezone="Europe/Berlin"))
    assert found == [
        (
            "a",
            "clocks",
            "2026-03-29: its time does not exist that day: runs at 03:00, when the clocks have changed",
        ),
        ("a", "clocks", "2026-10-25: 02:30 comes twice that day: runs the first time"),
    ]
    [often] = said(schedule("a", "*/30 * * * *", timezone="Europe/Berlin"))
    assert often[2] == "2026-10-25: 02:00 comes twice that day: runs both times, and 3 runs more"


def test_a_run_that_lasts_longer_than_its_slots_are_apart_is_said() -> None:
    every = schedule("a", None, interval_seconds=60)
    assert said(every, a=60.0) == []
    assert said(every, a=61.0) == [
        ("a", "overlap", "a run took 61 s, and there is one every 60 s; overlap: skip")
    ]
    assert said(every | {"max_concurrent_runs": 2}, a=61.0) == []
    workdays = schedule("b", "0 9,17 * * 1-5")
    assert said(workdays, b=8 * 3600.0) == []
    assert said(workdays, b=8 * 3600.0 + 1)[0][1] == "overlap"


def test_ten_schedules_at_one_minute_are_a_crowd_and_nine_are_not() -> None:
    names = [f"s{n}" for n in range(CROWD)]
    crowd = [schedule(name, "0 6 * * *") for name in names]
    assert said(*crowd[1:]) == []
    detail = f"{CROWD} schedules are due at 06:00 UTC; give them jitter_seconds"
    assert said(*crowd) == [(", ".join(names), "crowd", detail)]
    assert said(*crowd[1:], crowd[0] | {"jitter_seconds": 60}) == []
