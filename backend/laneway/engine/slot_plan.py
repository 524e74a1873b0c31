"""What shall become of the slots that are due: pure rules over a schedule's row.

Slots that are late by more than MISFIRE_GRACE_SECONDS were missed: `misfire` says which of them still run.
What is to run meets `overlap` when `max_concurrent_runs` runs are active: it is skipped, or waits as the
one next run, or runs all the same. `Skipped` has the reasons for which a slot does not run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any

from laneway.domain.cadence import Cadence, Cron, Every

MISFIRE_GRACE_SECONDS = 60
MAX_CATCH_UP = 100  # late slots that `fire_all` still runs, the newest
MAX_ACTIVE_RUNS = 100  # of a schedule with `overlap: allow`
MAX_SLOTS_AT_ONCE = 1000  # decided of one schedule in one transaction

_MICROSECOND = timedelta(microseconds=1)


class Overlap(StrEnum):
    """What becomes of a slot while `max_concurrent_runs` runs are active."""

    SKIP = "skip"
    QUEUE_ONE = "queue_one"  # it waits; one at most does
    CANCEL_RUNNING = "cancel_running"  # it waits for the oldest run, which is cancelled
    ALLOW = "allow"  # it runs beside the others, up to MAX_ACTIVE_RUNS


class Misfire(StrEnum):
    """Which of the slots that were missed still run."""

    SKIP = "skip"
    FIRE_ONCE = "fire_once"  # the newest, unless one that is on time runs now
    FIRE_ALL = "fire_all"  # the newest MAX_CATCH_UP


class Skipped(StrEnum):
    """Why a slot did not run."""

    MISFIRE = "misfire"  # nobody was there in time
    OVERLAP = "overlap"  # earlier runs were still active
    MAX_CONCURRENT_RUNS = "max_concurrent_runs"  # MAX_ACTIVE_RUNS of them, in spite of `overlap: allow`
    QUOTA = "quota"  # too many jobs of the tenant waited
    OVERLOADED = "overloaded"  # too many jobs of all tenants waited
    PAUSED = "paused"  # it waited for its turn when the schedule was switched off


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of the slots from `slot` to `last_slot`: more than one only when they are skipped."""

    slot: datetime
    status: str  # started, waiting, skipped
    reason: Skipped | None = None
    last_slot: datetime | None = None
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one schedule: its decisions in order, and the slot that comes after them, if any."""

    decisions: tuple[Decision, ...]
    next_slot: datetime | None
    displaces: bool = False  # what waited before this is skipped


@lru_cache(4096)
def _cron(expression: str, timezone: str) -> Cron:
    return Cron(expression, timezone)


def cadence_of(schedule: Mapping[Any, Any]) -> Cadence:
    """What its slots come from. Raises BadCadence."""
    if schedule["cron_expression"] is not None:
        return _cron(schedule["cron_expression"], schedule["timezone"])
    return Every(schedule["interval_seconds"], schedule["anchor_at"])


def slot_after(schedule: Mapping[Any, Any], moment: datetime) -> datetime | None:
    """The first slot later than `moment` within `starts_at` and `ends_at`, both included."""
    if schedule["starts_at"] is not None:
        moment = max(moment, schedule["starts_at"] - _MICROSECOND)
    slot = cadence_of(schedule).next_after(moment)
    too_late = slot is not None and schedule["ends_at"] is not None and slot > schedule["ends_at"]
    return None if too_late else slot


def due_of(schedule: Mapping[Any, Any], slot: datetime) -> datetime:
    """When a slot runs: up to `jitter_seconds` later, always by the same amount."""
    if not schedule["jitter_seconds"]:
        return slot
    digest = hashlib.sha256(f"{schedule['id']}|{slot.timestamp()}".encode()).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48
    return slot + timedelta(milliseconds=int(share * 1000 * schedule["jitter_seconds"]))


def plan(schedule: Mapping[Any, Any], *, active: int, waiting: bool, now: datetime) -> Plan:
    """Decide every slot that is due, MAX_SLOTS_AT_ONCE at most. Pure.

    `active` runs have not ended, and one may be `waiting`.
    """
    due: list[datetime] = []
    slot: datetime | None = schedule["next_slot"]
    while slot is not None and due_of(schedule, slot) <= now and len(due) < MAX_SLOTS_AT_ONCE:
        due.append(slot)
        slot = slot_after(schedule, slot)
    more = slot is not None and due_of(schedule, slot) <= now
    in_time = now - timedelta(seconds=MISFIRE_GRACE_SECONDS)
    late = next((n for n, each in enumerate(due) if due_of(schedule, each) >= in_time), len(due))
    kept = 0
    if schedule["misfire"] == Misfire.FIRE_ONCE and late == len(due) and not more:
        kept = min(late, 1)
    elif schedule["misfire"] == Misfire.FIRE_ALL:
        kept = min(late, MAX_CATCH_UP)
        if more and late > kept:  # which are the newest is seen when the last of them are
            slot = due[late - kept]
            due, late, kept = due[: late - kept], late - kept, 0
    missed, runs = due[: late - kept], due[late - kept :]
    decisions: list[Decision] = []
    if missed:
        decisions.append(Decision(missed[0], "skipped", Skipped.MISFIRE, missed[-1], len(missed)))
    displaces = _meet_overlap(schedule, runs, decisions, active=active, waiting=waiting)
    return Plan(tuple(decisions), slot, displaces)


def _meet_overlap(
    schedule: Mapping[Any, Any],
    runs: Sequence[datetime],
    decisions: list[Decision],
    *,
    active: int,
    waiting: bool,
) -> bool:
    """Decide the slots that are to run; whether one of them takes the place of what waited before."""
    overlap, displaces = Overlap(schedule["overlap"]), False
    most = MAX_ACTIVE_RUNS if overlap is Overlap.ALLOW else schedule["max_concurrent_runs"]
    for slot in runs:
        if active < most:
            decisions.append(Decision(slot, "started"))
            active += 1
        elif overlap is Overlap.ALLOW:
            decisions.append(Decision(slot, "skipped", Skipped.MAX_CONCURRENT_RUNS))
        elif overlap is Overlap.SKIP or (overlap is Overlap.QUEUE_ONE and waiting):
            decisions.append(Decision(slot, "skipped", Skipped.OVERLAP))
        else:
            place = next((n for n, each in enumerate(decisions) if each.status == "waiting"), None)
            if place is not None:
                decisions[place] = Decision(decisions[place].slot, "skipped", Skipped.OVERLAP)
            displaces = displaces or (waiting and place is None)
            decisions.append(Decision(slot, "waiting"))
            waiting = True
    return displaces
