"""When a schedule is due: `Cron`, five fields in a time zone, and `Every`, so many seconds.

A *slot* is a moment at which a schedule is due. Which slots there are depends on the cadence alone, never
on who asks or when: that is what makes one run a slot possible for any number of schedulers.

Clocks that change are met as Debian's cron does (cron(8)), which is Vixie cron with its two kinds of jobs:

* Fixed times: neither minute nor hour starts with `*`. A local time that is skipped runs once, when the
  clocks have gone forward; one that comes twice runs the first time.
* Wildcards: minute or hour starts with `*`. They follow the clock on the wall: what is skipped does not
  run, what comes twice runs twice.

Likewise of days: if day of month or day of week starts with `*` both must fit, else one of them is enough.
`croniter` finds the next time on a clock that never changes; the rest is here. It is taken for granted that
two days see one change at most, and none moves the clock by a day or more but once (Samoa, 2011).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Protocol, Self
from zoneinfo import ZoneInfo, available_timezones

from croniter import CroniterBadDateError, croniter

MAX_EXPRESSION = 200
TEMPLATES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
"""What may stand for five fields."""

_ONE_AT_A_TIME = threading.Lock()
_CHECKED = 5  # slots are computed before an expression is accepted
_LOOK_AHEAD = timedelta(days=2)
_LOOK_BACK = timedelta(hours=36)
_SECOND = timedelta(seconds=1)

_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_TERM = re.compile(r"(?P<first>\w+)(?:-(?P<last>\w+)(?:/(?P<step>\d+))?)?")


class BadCadence(ValueError):
    """The text says what is wrong, for whoever wrote the expression."""


class Cadence(Protocol):
    """What the slots of a schedule come from."""

    def next_after(self, moment: datetime) -> datetime | None:
        """The first slot later than `moment`, or None when there is none."""
        ...

    def describe(self) -> str:
        """The cadence in words."""
        ...


@dataclass(frozen=True, slots=True)
class Every:
    """A slot every so many seconds, the first at `anchor`. Time of day and time zones do not matter."""

    seconds: int
    anchor: datetime

    def next_after(self, moment: datetime) -> datetime | None:
        passed = (moment - self.anchor) // timedelta(seconds=self.seconds)
        try:
            return self.anchor + timedelta(seconds=self.seconds * max(passed + 1, 0))
        except OverflowError:
            return None

    def describe(self) -> str:
        units = (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))
        name, length = next(unit for unit in units if self.seconds % unit[1] == 0)
        count = self.seconds // length
        return f"every {name}" if count == 1 else f"every {count} {name}s"


@dataclass(frozen=True, slots=True)
class Field:
    """One of the five: its text, and the numbers that it stands for."""

    text: str
    values: Sequence[int]

    @property
    def any(self) -> bool:
        return self.text in ("*", "*/1")

    @property
    def starred(self) -> bool:
        return self.text.startswith("*")

    @property
    def plain(self) -> str:
        """As croniter reads it without doubt: it takes 23-23 for all hours, and knows no Sunday 7."""
        return self.text if self.starred else ",".join(map(str, self.values))


@dataclass(frozen=True)
class Cron:
    """Five fields, or one of TEMPLATES, on the clocks of a time zone.

    Raises BadCadence for what it does not understand.
    """

    expression: str
    timezone: str = "UTC"
    fields: tuple[Field, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", _parse(self.expression))
        if self.timezone not in time_zones():
            raise BadCadence(f"{self.timezone!r} is no time zone; a name is like 'Europe/Berlin'")

    @classmethod
    def checked(cls, expression: str, timezone: str = "UTC") -> Self:
        """One whose next _CHECKED slots have been computed. Raises BadCadence also for what never comes."""
        cron = cls(expression, timezone)
        slot = datetime(2026, 1, 1, tzinfo=UTC)
        for _ in range(_CHECKED):
            following = cron.next_after(slot)
            if following is None:
                raise BadCadence(f"{expression!r} never comes: there is no such date")
            slot = following
        return cron

    @cached_property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    @property
    def is_fixed(self) -> bool:
        """Whether it names times of day: neither minute nor hour starts with `*`."""
        return not self.fields[0].starred and not self.fields[1].starred

    def next_after(self, moment: datetime) -> datetime | None:
        try:
            following = self._fixed(moment) if self.is_fixed else self._wild(moment)
        except (CroniterBadDateError, OverflowError):
            return None
        return following.astimezone(UTC)

    def _fixed(self, moment: datetime) -> datetime:
        local = self._local(moment)
        while True:
            local = self._next_local(local)
            slot = self._instant(local)
            if slot > moment:  # else: the second time round, or a gap's other times
                return slot

    def _wild(self, moment: datetime) -> datetime:
        start = moment
        while True:
            local = self._next_local(self._local(start))
            slot = self._at(local, start)
            end = start + _LOOK_AHEAD
            if self._offset(start) == self._offset(end):
                if slot <= end:
                    return slot
                # Nothing fits before: go on shortly before it, whatever the clocks do in between.
                start = max(self._at(local - _LOOK_BACK, start), end - _SECOND)
                continue
            change = self._change(start, end)
            if slot < change:
                return slot
            first = self._next_local(self._local(change) - timedelta(minutes=1))
            slot = self._at(first, change)
            if slot <= end:
                return slot
            start = max(self._at(first - _LOOK_BACK, change), change)

    def _next_local(self, local: datetime) -> datetime:
        """The next time that fits, on a clock that never changes."""
        minute = local.replace(second=0, microsecond=0)
        with _ONE_AT_A_TIME:  # a croniter keeps its place
            found: datetime = self._croniter.get_next(  # type: ignore[no-untyped-call]
                datetime, start_time=minute, update_current=False
            )
        return found.replace(tzinfo=None)

    @cached_property
    def _croniter(self) -> croniter:
        minute, hour, day, month, weekday = (each.plain for each in self.fields)
        if not (day.startswith("*") or weekday.startswith("*")) and any(
            len(each.values) == span for each, span in zip(self.fields[2::2], (31, 7), strict=True)
        ):
            day = weekday = "*"  # one of them is enough, and one fits always: croniter wants the other
        text = f"{minute} {hour} {day} {month} {weekday}"
        return croniter(text, datetime(2026, 1, 1), implement_cron_bug=True)  # noqa: DTZ001 - a wall clock

    # The zone's clocks

    def _local(self, moment: datetime) -> datetime:
        return moment.astimezone(self.zone).replace(tzinfo=None)

    def _offset(self, moment: datetime) -> timedelta:
        return moment.astimezone(self.zone).utcoffset() or timedelta()

    def _at(self, local: datetime, moment: datetime) -> datetime:
        """When clocks that go on as they do at `moment` show `local`."""
        return (local - self._offset(moment)).replace(tzinfo=UTC)

    def _change(self, before: datetime, after: datetime) -> datetime:
        """The first second on which the offset is the one at `after`."""
        wanted = self._offset(after)
        while after - before > _SECOND:
            middle = before + (after - before) // 2
            if self._offset(middle) == wanted:
                after = middle
            else:
                before = middle
        return after.replace(microsecond=0)

    def _instant(self, local: datetime) -> datetime:
        """When clocks first show `local`, or first show a later time where it is skipped."""
        early = local.replace(tzinfo=self.zone).astimezone(UTC)
        if self._local(early) == local:
            return early
        late = local.replace(tzinfo=self.zone, fold=1).astimezone(UTC)  # PEP 495: in a gap, the earlier one
        return self._change(late, early)

    # In words

    def note(self, slot: datetime) -> str | None:
        """What changing clocks do to this slot, if anything."""
        local = slot.astimezone(self.zone)
        if local.replace(fold=1).utcoffset() != local.replace(fold=0).utcoffset():
            times = "runs the first time" if self.is_fixed else "runs both times"
            return f"{local:%H:%M} comes twice that day: {times}"
        if local.minute not in self.fields[0].values or local.hour not in self.fields[1].values:
            return f"its time does not exist that day: runs at {local:%H:%M}, when the clocks have changed"
        return None

    def describe(self) -> str:
        minute, hour, day, month, weekday = self.fields
        times = _times(minute, hour)
        days = _days(day, weekday)
        if not days and month.any and not minute.starred and not hour.any and not hour.starred:
            days = "every day"
        months = "" if month.any else f"in {_listed([_MONTHS[n - 1] for n in month.values])}"
        return " ".join(part for part in (times, days, months) if part)

    def changes(self, start: datetime, *, days: int) -> Iterator[datetime]:
        """When the zone's clocks change within so many days."""
        moments = [start + timedelta(days=n) for n in range(days + 1)]
        for before, after in pairwise(moments):
            if self._offset(before) != self._offset(after):
                yield self._change(before, after)


@lru_cache
def time_zones() -> frozenset[str]:
    """The names of the IANA database that this machine knows."""
    return frozenset(available_timezones() - {"localtime", "posixrules", "Factory"})


def _parse(expression: str) -> tuple[Field, ...]:
    if len(expression) > MAX_EXPRESSION:
        raise BadCadence(f"a cron expression has at most {MAX_EXPRESSION} characters")
    texts = TEMPLATES.get(expression.lower(), expression).split()
    if len(texts) != 5:
        raise BadCadence(
            f"a cron expression has five fields: minute, hour, day of month, month, day of week; "
            f"{expression!r} has {len(texts)}. Or it is one of {', '.join(TEMPLATES)}"
        )
    ranges: tuple[tuple[str, int, int, dict[str, int]], ...] = (
        ("minute", 0, 59, {}),
        ("hour", 0, 23, {}),
        ("day of month", 1, 31, {}),
        ("month", 1, 12, {name[:3].lower(): n for n, name in enumerate(_MONTHS, 1)}),
        ("day of week", 0, 7, {name[:3].lower(): n for n, name in enumerate(_DAYS)}),
    )
    return tuple(_field(text.lower(), *of) for text, of in zip(texts, ranges, strict=True))


def _field(text: str, name: str, low: int, high: int, names: dict[str, int]) -> Field:
    wrong = BadCadence(
        f"{text!r} is no {name}: give *, */n, a, a-b or a-b/n, from {low} to {high}, or a list"
    )

    def number(word: str) -> int:
        value = names.get(word)
        if value is None:
            if not re.fullmatch(r"[0-9]{1,2}", word):
                raise wrong
            value = int(word)
        if not low <= value <= high:
            raise wrong
        return value

    def step(word: str) -> int:
        if not re.fullmatch(r"[0-9]{1,2}", word) or not 1 <= int(word) <= high:
            raise wrong
        return int(word)

    if text == "*":
        values = list(range(low, high + 1))
    elif text.startswith("*/"):
        values = list(range(low, high + 1, step(text[2:])))
    else:
        values = []
        for term in text.split(","):
            found = _TERM.fullmatch(term)
            if found is None:
                raise wrong
            first = number(found["first"])
            last = number(found["last"]) if found["last"] else first
            if last < first:
                raise wrong
            values += range(first, last + 1, step(found["step"] or "1"))
    if name == "day of week":
        values = [value % 7 for value in values]  # 7 is Sunday too
    return Field(text, sorted(set(values)))


def _times(minute: Field, hour: Field) -> str:
    if minute.any:
        every = "every minute"
        return every if hour.any else f"{every} of {_hours(hour)}"
    if minute.starred and (step := _even_step(minute, 60)):
        every = f"every {step} minutes"
        return every if hour.any else f"{every} of {_hours(hour)}"
    if hour.any and list(minute.values) == [0]:
        return "every hour"
    if not hour.starred and len(minute.values) * len(hour.values) <= 6:
        return "at " + _listed([f"{h:02}:{m:02}" for h, m in product(hour.values, minute.values)])
    if list(minute.values) == [0] and hour.starred and (step := _even_step(hour, 24)):
        return f"every {step} hours"
    minutes = f"at minute{'s' if len(minute.values) > 1 else ''} {_listed(list(map(str, minute.values)))}"
    return f"{minutes} of {'every hour' if hour.any else _hours(hour)}"


def _hours(hour: Field) -> str:
    if hour.starred and (step := _even_step(hour, 24)):
        return "every other hour" if step == 2 else f"every {step}{'rd' if step == 3 else 'th'} hour"
    return f"hour{'s' if len(hour.values) > 1 else ''} {_spans(hour.values)}"


def _even_step(of: Field, span: int) -> int | None:
    step = int(of.text[2:]) if of.text.startswith("*/") else 0
    return step if step > 1 and span % step == 0 else None


def _days(day: Field, weekday: Field) -> str:
    of_month = f"on day {_spans(day.values)} of the month" if not day.any else ""
    of_week = ""
    if not weekday.any and len(weekday.values) < 7:
        first, last = weekday.values[0], weekday.values[-1]
        if len(weekday.values) > 2 and last - first + 1 == len(weekday.values):
            of_week = f"{_DAYS[first]} to {_DAYS[last]}"
        else:
            of_week = f"on {_listed([_DAYS[n] for n in weekday.values])}"
    if of_month and of_week:
        return f"{of_month} {'and' if day.starred or weekday.starred else 'or'} {of_week}"
    return of_month or of_week


def _spans(values: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for value in values:
        if spans and spans[-1][-1] == value - 1:
            spans[-1].append(value)
        else:
            spans.append([value])
    said: list[str] = []
    for span in spans:
        said += [f"{span[0]} to {span[-1]}"] if len(span) > 2 else list(map(str, span))
    return _listed(said)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
