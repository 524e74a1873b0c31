"""The commands that look at schedules, and switch or run them, over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from laneway.cli import show
from laneway.cli.client import Client, Job
from laneway.cli.exits import ExitCode
from laneway.cli.jobs import AsJson

if TYPE_CHECKING:
    from laneway.domain.cadence import Cadence

schedules = typer.Typer(help="Schedules: what runs again and again.", no_args_is_help=True)

MAX_LISTED = 1000
CROWD = 10  # schedules that are due at the same minute, from which on lint says so
LOOK_AHEAD = timedelta(days=1)
CLOCKS_AHEAD_DAYS = 366
RUNS_LOOKED_AT = 50
SLOTS_LOOKED_AT = 300
_NEAR = timedelta(hours=4)

ScheduleId = Annotated[str, typer.Argument(metavar="ID", help="The schedule's id.")]

_COLUMNS = {
    "id": "id",
    "name": "name",
    "job_type": "type",
    "cron_description": "when",
    "timezone": "zone",
    "is_active": "active",
    "next_run_at": "next",
    "last_run_at": "last",
    "success_rate": "success %",
}


@schedules.command()
def ls(
    active: Annotated[bool | None, typer.Option("--active/--paused", help="Only these.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List schedules, newest first."""
    choice = {} if active is None else {"is_active": str(active).lower()}
    with Client.from_environment() as client:
        found = client.pages("/scheduled-jobs", limit=limit, **choice)
    show.rows(found, _COLUMNS, as_json=as_json)


@schedules.command("next")
def next_runs(
    schedule_id: ScheduleId,
    count: Annotated[int, typer.Option(min=1, max=50, help="So many.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Print when a schedule is due next, and what changing clocks do to it."""
    with Client.from_environment() as client:
        schedule = client.get(_path(schedule_id))
        timing = ("cron_expression", "interval_seconds", "timezone", "starts_at", "ends_at")
        asked = {name: schedule[name] for name in timing if schedule[name] is not None}
        if schedule["interval_seconds"] and schedule["next_run_at"]:
            asked["starts_at"] = schedule["next_run_at"]  # that is what an interval goes on from
        found = client.post("/scheduled-jobs/preview", asked | {"count": count})
    show.rows(found["times"], {"at": "UTC", "local": found["timezone"], "note": "note"}, as_json=as_json)


@schedules.command()
def run(schedule_id: ScheduleId, as_json: AsJson = False) -> None:
    """Run a schedule now and print the job's id."""
    with Client.from_environment() as client:
        job = client.post(f"{_path(schedule_id)}/run", None)
    if as_json:
        show.result(job, as_json=True)
    else:
        print(job["id"])


@schedules.command()
def pause(schedule_id: ScheduleId) -> None:
    """Switch a schedule off. What is due meanwhile is not missed."""
    _toggle(schedule_id, active=False)


@schedules.command()
def resume(schedule_id: ScheduleId) -> None:
    """Switch a schedule on again."""
    _toggle(schedule_id, active=True)


@schedules.command()
def lint(as_json: AsJson = False) -> None:
    """Say which schedules will meet changing clocks, crowd together, or overlap with themselves.

    Exits with 1 when there is something to say.
    """
    with Client.from_environment() as client:
        found = client.pages("/scheduled-jobs", limit=MAX_LISTED, is_active="true")
        lasted = {each["id"]: _lasted(client, each["id"]) for each in found if each["total_runs"]}
    said = list(findings(found, lasted, now=datetime.now(UTC)))
    show.rows(said, {"schedule": "schedule", "finding": "finding", "detail": "detail"}, as_json=as_json)
    if said:
        raise typer.Exit(ExitCode.FAILED)
    print(f"laneway: {len(found)} schedules, nothing to say", file=sys.stderr)


def findings(schedules: list[Job], lasted: dict[str, float], *, now: datetime) -> Iterator[dict[str, str]]:
    """What there is to say of active schedules; `lasted` are seconds that their longest runs took."""
    crowds: dict[datetime, list[str]] = {}
    for each in schedules:
        name, cadence = each["name"] or each["id"], _cadence(each)
        for detail in _changed_clocks(cadence, now=now):
            yield {"schedule": name, "finding": "clocks", "detail": detail}
        overlap = _overlaps(each, cadence, lasted.get(each["id"], 0.0), now=now)
        if overlap is not None:
            yield {"schedule": name, "finding": "overlap", "detail": overlap}
        if not each["jitter_seconds"]:
            soon = islice(_slots(cadence, now, LOOK_AHEAD), SLOTS_LOOKED_AT)
            for minute in {slot.replace(second=0, microsecond=0) for slot in soon}:
                crowds.setdefault(minute, []).append(name)
    worst: dict[tuple[str, ...], datetime] = {}
    for minute, names in sorted(crowds.items()):
        if len(names) >= CROWD:
            worst.setdefault(tuple(names), minute)
    for crowd, minute in worst.items():
        detail = f"{len(crowd)} schedules are due at {minute:%H:%M} UTC; give them jitter_seconds"
        yield {"schedule": ", ".join(crowd), "finding": "crowd", "detail": detail}


def _lasted(client: Client, schedule_id: str) -> float:
    """Seconds that the longest of its latest runs took."""
    runs = client.get(f"{_path(schedule_id)}/runs", limit=RUNS_LOOKED_AT)["data"]
    ended = [each for each in runs if each["started_at"] and each["finished_at"]]
    lasted = [_moment(each["finished_at"]) - _moment(each["started_at"]) for each in ended]
    return max(lasted, default=timedelta()).total_seconds()


def _changed_clocks(cadence: Cadence, *, now: datetime) -> Iterator[str]:
    from laneway.domain.cadence import Cron

    if not isinstance(cadence, Cron):
        return
    for change in cadence.changes(now, days=CLOCKS_AHEAD_DAYS):
        notes = [
            f"{slot.astimezone(cadence.zone):%Y-%m-%d}: {note}"
            for slot in _slots(cadence, change - _NEAR, 2 * _NEAR)
            if (note := cadence.note(slot)) is not None
        ]
        if notes:
            yield notes[0] + (f", and {len(notes) - 1} runs more" if len(notes) > 1 else "")


def _overlaps(schedule: Job, cadence: Cadence, seconds: float, *, now: datetime) -> str | None:
    """Whether its longest run took longer than its slots are apart, as many as may be active."""
    slots = islice(_slots(cadence, now, timedelta(days=8)), SLOTS_LOOKED_AT)
    apart = [(after - before).total_seconds() for before, after in pairwise(slots)]
    room = min(apart, default=float("inf")) * schedule["max_concurrent_runs"]
    if seconds <= room:
        return None
    often = f"there is one every {min(apart):.0f} s"
    return f"a run took {seconds:.0f} s, and {often}; overlap: {schedule['overlap']}"


def _slots(cadence: Cadence, start: datetime, length: timedelta) -> Iterator[datetime]:
    slot = cadence.next_after(start)
    while slot is not None and slot <= start + length:
        yield slot
        slot = cadence.next_after(slot)


def _cadence(schedule: Job) -> Cadence:
    from laneway.domain.cadence import Cron, Every

    if schedule["cron_expression"] is not None:
        return Cron(schedule["cron_expression"], schedule["timezone"])
    return Every(schedule["interval_seconds"], _moment(schedule["next_run_at"] or schedule["created_at"]))


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _toggle(schedule_id: str, *, active: bool) -> None:
    with Client.from_environment() as client:
        changed: dict[str, Any] = client.post(
            f"{_path(schedule_id)}/toggle?is_active={str(active).lower()}", None
        )
    print(f"{changed['id']} {'next run ' + str(changed['next_run_at']) if active else 'paused'}")


def _path(schedule_id: str) -> str:
    return f"/scheduled-jobs/{quote(schedule_id, safe='')}"
