"""Slots are those of cronsim, which mimics Debian's cron, but for differences that are on a list.

Each difference is one of cronsim's, and is proven: a walk over all minutes around the change of clocks, by
the documented rule and nothing of ours, gives our slot.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from laneway.domain.cadence import Cron

EXPRESSIONS = 10_000
SEED = 20261122
ZONES = (
    "UTC",
    "Europe/Berlin",
    "Europe/London",
    "Europe/Dublin",
    "America/New_York",
    "America/Santiago",
    "America/Havana",
    "America/Asuncion",
    "America/St_Johns",
    "Asia/Beirut",
    "Asia/Tehran",
    "Asia/Kathmandu",
    "Africa/Casablanca",
    "Africa/Cairo",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Pacific/Apia",
    "Antarctica/Troll",
)
NAMES = {
    3: ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    4: ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
NEAR = timedelta(hours=27)  # of a change of clocks: where cronsim may differ

NO_SUCH_TIME = "its answer is a local time that is skipped"
NOT_AFTER = "its answer to a question from the second round of an hour lies in the first"
HALF_HOUR = "past a change by half an hour it goes on in steps of whole hours"
MIDNIGHT = "where the day begins with a skipped hour it takes that hour for the first one"


def some_field(rng: Random, place: int) -> str:
    low, high = BOUNDS[place]

    def number(value: int) -> str:
        names = NAMES.get(place)
        if names and rng.random() < 0.3 and value - low < len(names):
            return names[value - low]
        return str(value)

    def term() -> str:
        first = rng.randint(low, high)
        if rng.random() < 0.5:
            return number(first)
        last = rng.randint(first, high)
        # Of a range of one cronsim takes 6-6/3 for 6/3, which goes on to the end.
        step = f"/{rng.randint(1, high - low)}" if first < last and rng.random() < 0.3 else ""
        return f"{first}-{last}{step}"

    kind = rng.random()
    if kind < (0.25, 0.3, 0.6, 0.75, 0.6)[place]:
        return "*"
    if kind < 0.85:
        return ",".join(term() for _ in range(rng.choice((1, 1, 1, 2, 3))))
    return f"*/{rng.randint(1, high if place < 4 else 6)}"


def some_moment(rng: Random, zone: ZoneInfo) -> datetime:
    """Half of them within two days of a change of clocks."""
    moment = datetime(2005, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(30 * 366 * 86_400))
    if rng.random() < 0.5 or zone.key == "UTC":
        return moment
    for days in range(0, 400, 5):
        start, end = moment + timedelta(days=days), moment + timedelta(days=days + 5)
        if start.astimezone(zone).utcoffset() != end.astimezone(zone).utcoffset():
            return start + timedelta(minutes=rng.randrange(5 * 1440))
    return moment


def theirs(expression: str, moment: datetime, zone: ZoneInfo) -> datetime | None:
    try:
        return next(CronSim(expression, moment.astimezone(zone)))
    except (CronSimError, StopIteration):  # no such date
        return None


def walked(cron: Cron, moment: datetime, until: datetime) -> datetime | None:
    """The first slot up to `until`, found minute by minute."""
    minute, hour, day, month, weekday = (set(each.values) for each in cron.fields)
    both = cron.fields[2].starred or cron.fields[4].starred
    zone = ZoneInfo(cron.timezone)

    def fits(local: datetime) -> bool:
        days = (local.day in day, local.isoweekday() % 7 in weekday)
        when = local.minute in minute and local.hour in hour and local.month in month
        return when and (all(days) if both else any(days))

    instant = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
    shown = moment.astimezone(zone).replace(tzinfo=None, second=0, microsecond=0)
    while instant <= until:
        local = instant.astimezone(zone)
        wall = local.replace(tzinfo=None)
        if not cron.is_fixed:
            if fits(wall):
                return instant
        else:
            skipped = (shown + timedelta(minutes=n) for n in range(1, (wall - shown) // timedelta(minutes=1)))
            if local.fold == 0 and (fits(wall) or any(map(fits, skipped))):
                return instant
        shown = wall
        instant += timedelta(minutes=1)
    return None


def why_they_differ(
    cron: Cron, moment: datetime, ours: datetime | None, other: datetime | None, zone: ZoneInfo
) -> str | None:
    """The entry of the list that the difference is, once the walk has proven ours right."""
    if ours is None or other is None or walked(cron, _before_change(zone, moment, ours), ours) != ours:
        return None
    if other.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != other.replace(tzinfo=None):
        return NO_SUCH_TIME
    if other.astimezone(UTC) <= moment:
        return NOT_AFTER
    changes = [each for near in (moment, ours, other.astimezone(UTC)) for each in _changes(zone, near)]
    if any(by % timedelta(hours=1) for _, by in changes):
        return HALF_HOUR
    if any(change.astimezone(zone).hour == 1 and by > timedelta() for change, by in changes):
        return MIDNIGHT
    return None


def _before_change(zone: ZoneInfo, moment: datetime, ours: datetime) -> datetime:
    """A place for the walk to begin: the moment, or three days before our slot if that is later."""
    return max(moment, ours - timedelta(days=3))


def _changes(zone: ZoneInfo, near: datetime) -> list[tuple[datetime, timedelta]]:
    """Changes of clocks about that time, and by how much."""
    found = []
    instant = (near - NEAR).replace(minute=0, second=0, microsecond=0)
    while instant < near + NEAR:
        following = instant + timedelta(minutes=30)
        before, after = instant.astimezone(zone).utcoffset(), following.astimezone(zone).utcoffset()
        assert before is not None
        assert after is not None
        if before != after:
            found.append((following, after - before))
        instant = following
    return found


def test_ten_thousand_random_expressions_are_due_when_cronsim_says() -> None:
    rng = Random(SEED)
    differences: dict[str, int] = {}
    compared = 0
    while compared < EXPRESSIONS:
        expression = " ".join(some_field(rng, place) for place in range(5))
        zone = ZoneInfo(rng.choice(ZONES))
        moment = some_moment(rng, zone)
        said = f"{expression!r} in {zone.key} after {moment.isoformat()}"
        cron = Cron(expression, zone.key)
        compared += 1
        ours, other = cron.next_after(moment), theirs(expression, moment, zone)
        assert ours is None or ours > moment, said
        if ours == (None if other is None else other.astimezone(UTC)):
            continue
        why = why_they_differ(cron, moment, ours, other, zone)
        assert why is not None, f"{said}: ours {ours}, cronsim's {other}"
        differences[why] = differences.get(why, 0) + 1
    print(f"{compared} compared, differences: {differences}")
    assert sum(differences.values()) < EXPRESSIONS // 50, differences
