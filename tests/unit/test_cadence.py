"""When a schedule is due, and what it says about it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from laneway.domain.cadence import MAX_EXPRESSION, TEMPLATES, BadCadence, Cadence, Cron, Every

BERLIN = "Europe/Berlin"  # 2026: forward on 29 March at 02:00, back on 25 October at 03:00


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def slots(cadence: Cadence, after: str, *, count: int) -> list[str]:
    """The next slots, in UTC."""
    found: list[str] = []
    moment: datetime | None = at(after)
    while moment is not None and len(found) < count:
        moment = cadence.next_after(moment)
        if moment is not None:
            assert moment.utcoffset() == timedelta()
            found.append(moment.strftime("%Y-%m-%d %H:%M:%S"))
    return found


def local(cadence: Cron, after: str, *, count: int) -> list[str]:
    """The next slots, on the clocks of the zone."""
    return [
        at(slot).astimezone(cadence.zone).strftime("%d %H:%M %Z")
        for slot in slots(cadence, after, count=count)
    ]


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("* * * * *", ["2026-01-01 12:01:00", "2026-01-01 12:02:00"]),
        ("*/20 * * * *", ["2026-01-01 12:20:00", "2026-01-01 12:40:00"]),
        ("30 9 * * 1-5", ["2026-01-02 09:30:00", "2026-01-05 09:30:00"]),
        ("30 9 * * mon-FRI", ["2026-01-02 09:30:00", "2026-01-05 09:30:00"]),
        ("0 0 1,15 * *", ["2026-01-15 00:00:00", "2026-02-01 00:00:00"]),
        ("0 0 29 2 *", ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]),
        ("0 12 * * 7", ["2026-01-04 12:00:00", "2026-01-11 12:00:00"]),
        ("0 12 * * 5-7", ["2026-01-02 12:00:00", "2026-01-03 12:00:00"]),
        ("0 0 13 * 5", ["2026-01-02 00:00:00", "2026-01-09 00:00:00"]),  # either fits
        ("0 0 13 */1 5", ["2026-01-02 00:00:00", "2026-01-09 00:00:00"]),
        ("0 0 */13 * 5", ["2026-02-27 00:00:00", "2026-03-27 00:00:00"]),  # one has a star: both fit
        ("0 0 13 * 0-6", ["2026-01-02 00:00:00", "2026-01-03 00:00:00"]),  # every day is a day of the week
        ("0 0 1-31 2 5", ["2026-02-01 00:00:00", "2026-02-02 00:00:00"]),
        ("10-20/5 8 * * *", ["2026-01-02 08:10:00", "2026-01-02 08:15:00"]),
        ("@hourly", ["2026-01-01 13:00:00", "2026-01-01 14:00:00"]),
        ("@Daily", ["2026-01-02 00:00:00", "2026-01-03 00:00:00"]),
        ("@weekly", ["2026-01-04 00:00:00", "2026-01-11 00:00:00"]),
        ("@monthly", ["2026-02-01 00:00:00", "2026-03-01 00:00:00"]),
        ("@yearly", ["2027-01-01 00:00:00", "2028-01-01 00:00:00"]),
    ],
)
def test_the_fields_say_when_it_is_due(expression: str, wanted: list[str]) -> None:
    assert slots(Cron(expression), "2026-01-01 12:00:00", count=2) == wanted


def test_a_slot_is_later_than_the_moment_asked_about_however_little() -> None:
    cron = Cron("0 * * * *")
    assert cron.next_after(at("2026-01-01 11:59:59.999999")) == at("2026-01-01 12:00")
    assert cron.next_after(at("2026-01-01 12:00")) == at("2026-01-01 13:00")
    assert cron.next_after(at("2026-01-01 12:00:00.000001")) == at("2026-01-01 13:00")


def test_a_fixed_time_that_is_skipped_runs_once_when_the_clocks_have_gone_forward() -> None:
    assert local(Cron("30 2 * * *", BERLIN), "2026-03-28 00:00", count=3) == [
        "28 02:30 CET",
        "29 03:00 CEST",
        "30 02:30 CEST",
    ]
    both = Cron("0,30 2,3 * * *", BERLIN)
    assert local(both, "2026-03-29 00:00", count=3) == ["29 03:00 CEST", "29 03:30 CEST", "30 02:00 CEST"]


def test_a_fixed_time_that_comes_twice_runs_the_first_time() -> None:
    cron = Cron("30 2 * * *", BERLIN)
    assert local(cron, "2026-10-24 12:00", count=2) == ["25 02:30 CEST", "26 02:30 CET"]
    between = cron.next_after(at("2026-10-25 01:10"))  # 02:10, the second time
    assert between == at("2026-10-26 01:30")


def test_a_wildcard_follows_the_clock_on_the_wall() -> None:
    assert local(Cron("*/30 * * * *", BERLIN), "2026-03-29 00:00", count=4) == [
        "29 01:30 CET",
        "29 03:00 CEST",
        "29 03:30 CEST",
        "29 04:00 CEST",
    ]
    assert local(Cron("15 * * * *", BERLIN), "2026-10-24 23:30", count=4) == [
        "25 02:15 CEST",
        "25 02:15 CET",
        "25 03:15 CET",
        "25 04:15 CET",
    ]
    assert local(Cron("*/30 2 * * *", BERLIN), "2026-10-24 12:00", count=5) == [
        "25 02:00 CEST",
        "25 02:30 CEST",
        "25 02:00 CET",
        "25 02:30 CET",
        "26 02:00 CET",
    ]


def test_a_wildcard_finds_the_second_round_of_an_hour_that_it_is_in_the_first_of() -> None:
    """Also when the next time that it has not had is a year away."""
    havana = Cron("*/30 0 1 11 *", "America/Havana")  # back on 1 November 2026 at 01:00
    assert local(havana, "2026-11-01 03:00", count=5) == [
        "01 00:00 CDT",
        "01 00:30 CDT",
        "01 00:00 CST",
        "01 00:30 CST",
        "01 00:00 CDT",
    ]


@pytest.mark.parametrize(
    "zone", ["America/Santiago", "Australia/Lord_Howe", "Africa/Casablanca", "Asia/Kathmandu"]
)
def test_unusual_zones_have_a_slot_a_day(zone: str) -> None:
    """Santiago changes at midnight, Lord Howe by half an hour, Casablanca twice a year by the moon."""
    cron = Cron("30 2 * * *", zone)
    found = [at(slot) for slot in slots(cron, "2011-12-01 00:00", count=800)]
    days = {slot.astimezone(ZoneInfo(zone)).date() for slot in found}
    assert len(days) == len(found)
    gaps = {after - before for before, after in pairwise(found)}
    assert min(gaps) >= timedelta(hours=21)
    assert max(gaps) <= timedelta(hours=25)


def test_the_run_of_a_day_that_there_never_was_comes_with_the_next() -> None:
    """Samoa went from 29 to 31 December 2011."""
    assert local(Cron("30 2 * * *", "Pacific/Apia"), "2011-12-29 00:00", count=3) == [
        "29 02:30 -10",
        "31 00:00 +14",
        "31 02:30 +14",
    ]


def test_notes_say_what_changing_clocks_do() -> None:
    fixed, wild = Cron("30 2 * * *", BERLIN), Cron("*/30 * * * *", BERLIN)
    assert fixed.note(at("2026-03-28 01:30")) is None
    assert fixed.note(at("2026-03-29 01:00")) == (
        "its time does not exist that day: runs at 03:00, when the clocks have changed"
    )
    assert fixed.note(at("2026-10-25 00:30")) == "02:30 comes twice that day: runs the first time"
    assert wild.note(at("2026-10-25 01:30")) == "02:30 comes twice that day: runs both times"
    assert wild.note(at("2026-03-29 01:00")) is None


@pytest.mark.parametrize(
    ("expression", "word"),
    [
        ("", "five fields"),
        ("* * * *", "has 4"),
        ("* * * * * *", "has 6"),
        ("0 0 * * * 2026", "has 6"),
        ("@reboot", "five fields"),
        ("60 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of month"),
        ("* * 32 * *", "day of month"),
        ("* * * 13 *", "month"),
        ("* * * foo *", "month"),
        ("* * * * 8", "day of week"),
        ("* * * * fri-mon", "day of week"),
        ("R * * * *", "minute"),
        ("H * * * *", "minute"),
        ("H(0-29)/10 * * * *", "minute"),
        ("* * L * *", "day of month"),
        ("* * 15W * *", "day of month"),
        ("* * ? * *", "day of month"),
        ("* * * * 5#2", "day of week"),
        ("* * * * 5L", "day of week"),
        ("*/0 * * * *", "minute"),
        ("*/60 * * * *", "minute"),
        ("5/15 * * * *", "minute"),
        ("1-5/0 * * * *", "minute"),
        ("20-10 * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("1, 2 * * * *", "has 6"),
        ("*,5 * * * *", "minute"),
        ("٣ * * * *", "minute"),
        ("jan * * * *", "minute"),
        ("0 0 31 2 *", "never comes"),
        ("0 0 31 4,6 */2", "never comes"),
        ("1 " * 200, "at most 200"),
    ],
)
def test_what_it_does_not_understand_is_refused_with_what_is_wrong(expression: str, word: str) -> None:
    with pytest.raises(BadCadence) as refused:
        Cron.checked(expression)
    assert word in str(refused.value)


def test_an_expression_may_have_200_characters() -> None:
    longest = ",".join(str(n) for n in range(60)) + " * * * *"
    Cron(longest.ljust(MAX_EXPRESSION))
    with pytest.raises(BadCadence):
        Cron(longest.ljust(MAX_EXPRESSION + 1))


@pytest.mark.parametrize(
    "zone",
    ["", "Nowhere", "Europe", "../../etc/passwd", "/etc/localtime", "localtime", "CEST+2\0", "x" * 300],
)
def test_what_is_no_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(BadCadence, match="time zone"):
        Cron("* * * * *", zone)


def test_an_interval_counts_from_its_anchor() -> None:
    every = Every(90, at("2026-01-01 12:00"))
    assert slots(every, "2020-01-01 00:00", count=3) == [
        "2026-01-01 12:00:00",
        "2026-01-01 12:01:30",
        "2026-01-01 12:03:00",
    ]
    assert slots(every, "2026-01-01 12:01:29.999999", count=1) == ["2026-01-01 12:01:30"]
    assert slots(every, "2026-01-01 12:01:30", count=1) == ["2026-01-01 12:03:00"]
    assert Every(366 * 86_400, at("9999-01-01 00:00")).next_after(at("9999-06-01 00:00")) is None


@pytest.mark.parametrize(
    ("cadence", "words"),
    [
        (Cron("* * * * *"), "every minute"),
        (Cron("*/1 * * * *"), "every minute"),
        (Cron("*/15 * * * *"), "every 15 minutes"),
        (Cron("*/15 9-17 * * 1-5"), "every 15 minutes of hours 9 to 17 Monday to Friday"),
        (Cron("* 3 * * *"), "every minute of hour 3"),
        (Cron("0 * * * *"), "every hour"),
        (Cron("5 * * * *"), "at minute 5 of every hour"),
        (Cron("5,35 * * * *"), "at minutes 5 and 35 of every hour"),
        (Cron("*/7 * * * *"), "at minutes 0, 7, 14, 21, 28, 35, 42, 49 and 56 of every hour"),
        (Cron("0 */6 * * *"), "every 6 hours"),
        (Cron("30 */6 * * *"), "at minute 30 of every 6th hour"),
        (Cron("30 */2 * * *"), "at minute 30 of every other hour"),
        (Cron("30 9 * * *"), "at 09:30 every day"),
        (Cron("30 9 * * 1-5"), "at 09:30 Monday to Friday"),
        (Cron("0 9,17 * * 6,0"), "at 09:00 and 17:00 on Sunday and Saturday"),
        (Cron("0 0 1 * *"), "at 00:00 on day 1 of the month"),
        (Cron("0 0 1-7 * 1"), "at 00:00 on day 1 to 7 of the month or on Monday"),
        (
            Cron("0 0 */2 * 1"),
            "at 00:00 on day 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29 and 31 "
            "of the month and on Monday",
        ),
        (Cron("0 12 24 12 *"), "at 12:00 on day 24 of the month in December"),
        (Cron("0 12 * jun-aug *"), "at 12:00 in June, July and August"),
        (Cron("@hourly"), "every hour"),
        (Cron("@daily"), "at 00:00 every day"),
        (Cron("@weekly"), "at 00:00 on Sunday"),
        (Cron("@monthly"), "at 00:00 on day 1 of the month"),
        (Cron("@yearly"), "at 00:00 on day 1 of the month in January"),
        (Every(1, at("2026-01-01")), "every second"),
        (Every(90, at("2026-01-01")), "every 90 seconds"),
        (Every(300, at("2026-01-01")), "every 5 minutes"),
        (Every(3600, at("2026-01-01")), "every hour"),
        (Every(172_800, at("2026-01-01")), "every 2 days"),
    ],
    ids=str,
)
def test_it_says_in_words_when_it_is_due(cadence: Cadence, words: str) -> None:
    assert cadence.describe() == words


def test_each_template_is_five_fields() -> None:
    assert all(
        len(fields.split()) == 5 and Cron(name).fields == Cron(fields).fields
        for name, fields in TEMPLATES.items()
    )


def test_the_changes_of_a_zone_are_found() -> None:
    changes = Cron("@daily", BERLIN).changes(at("2026-01-01"), days=365)
    assert [change.isoformat() for change in changes] == [
        "2026-03-29T01:00:00+00:00",
        "2026-10-25T01:00:00+00:00",
    ]
    assert list(Cron("@daily").changes(at("2026-01-01"), days=365)) == []
