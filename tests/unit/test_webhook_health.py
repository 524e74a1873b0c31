from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.webhooks.health import (
    BREAKER_FAILURES,
    BREAKER_MAX_SECONDS,
    BREAKER_SECONDS,
    SUSPECT_FAILURES,
    BlockedReason,
    Health,
    after,
    capped,
    due_warning,
    next_cap,
    origin,
    percent_to_disabling,
    target_of,
)
from laneway.webhooks.retries import Answer, ErrorClass, Timings

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
NEW = Health()


def ok() -> Answer:
    return Answer(NOW, Timings(1), status_code=200)


def status(code: int, **headers: str) -> Answer:
    kind = ErrorClass.HTTP_4XX if code < 500 else ErrorClass.HTTP_5XX
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(NOW, Timings(1), status_code=code, error_class=kind, headers=named)


def transport(error_class: ErrorClass = ErrorClass.TIMEOUT) -> Answer:
    return Answer(NOW, Timings(1), error_class=error_class)


def failed(times: int, answer: Answer | None = None, *, health: Health = NEW, now: datetime = NOW) -> Health:
    """The health after so many failures of attempts that were claimed in time."""
    for _ in range(times):
        health = after(health, answer or transport(), opened=health.opened, now=now)
    return health


def seconds(health: Health, *, now: datetime = NOW) -> float:
    assert health.blocked_until is not None
    return (health.blocked_until - now).total_seconds()


def test_a_success_forgets_every_failure() -> None:
    assert after(failed(9), ok(), opened=1, now=NOW) == Health(last_success_at=NOW)


def test_a_target_that_only_ever_answered_well_leaves_no_record() -> None:
    assert not after(NEW, ok(), opened=0, now=NOW).worth_keeping
    assert failed(1).worth_keeping


def test_two_failures_make_no_suspect_and_three_do() -> None:
    assert [failed(times).suspect for times in (SUSPECT_FAILURES - 1, SUSPECT_FAILURES)] == [False, True]


def test_the_fifth_failure_opens_the_breaker_for_30_seconds() -> None:
    assert failed(BREAKER_FAILURES - 1).blocked_until is None
    opened = failed(BREAKER_FAILURES)
    assert (seconds(opened), opened.blocked_reason, opened.opened) == (
        BREAKER_SECONDS,
        BlockedReason.BREAKER,
        1,
    )


def test_each_probe_that_fails_doubles_the_pause_up_to_15_minutes() -> None:
    health, pauses = failed(BREAKER_FAILURES), []
    for _ in range(8):
        now = health.blocked_until or NOW
        probing = health.paused(now + timedelta(seconds=50), BlockedReason.PROBE)
        health = after(probing, transport(), opened=probing.opened, now=now)
        pauses.append(seconds(health, now=now))
    assert pauses == [60, 120, 240, 480, 900, 900, 900, 900]
    assert max(pauses) == BREAKER_MAX_SECONDS


def test_what_was_in_flight_when_the_breaker_opened_does_not_lengthen_the_pause() -> None:
    opened = failed(BREAKER_FAILURES)
    late = NOW + timedelta(minutes=1)  # even after the pause
    again = after(opened, transport(), opened=0, now=late)
    assert (again.blocked_until, again.opened) == (opened.blocked_until, 1)
    assert again.consecutive_failures == BREAKER_FAILURES + 1


@pytest.mark.parametrize(
    ("answer", "opens"),
    [
        (transport(ErrorClass.DNS), True),
        (transport(ErrorClass.CONNECT), True),
        (transport(ErrorClass.RESET), True),
        (status(500), True),
        (status(429), True),
        (status(408), True),
        (status(404), False),
        (status(401), False),
        (transport(ErrorClass.REDIRECT), False),
        (transport(ErrorClass.SSRF_BLOCKED), False),
    ],
)
def test_only_what_time_heals_opens_the_breaker(answer: Answer, *, opens: bool) -> None:
    health = failed(BREAKER_FAILURES + 5, answer)
    assert (health.blocked_until is not None) is opens
    assert health.consecutive_failures == BREAKER_FAILURES + 5


@pytest.mark.parametrize("code", [429, 503])
def test_a_retry_after_pauses_the_target_for_as_long_as_it_asks(code: int) -> None:
    paused = after(NEW, status(code, retry_after="120"), opened=0, now=NOW)
    assert (seconds(paused), paused.blocked_reason) == (120, BlockedReason.RETRY_AFTER)
    assert after(paused, status(code, retry_after="60"), opened=0, now=NOW).blocked_until == (
        paused.blocked_until
    )
    assert seconds(after(paused, status(code, retry_after="180"), opened=0, now=NOW)) == 180


@pytest.mark.parametrize("code", [500, 502, 404])
def test_the_retry_after_of_another_status_pauses_no_target(code: int) -> None:
    assert after(NEW, status(code, retry_after="120"), opened=0, now=NOW).blocked_until is None


def test_what_asked_for_a_pause_gets_it_though_another_attempt_succeeds() -> None:
    paused = after(NEW, status(429, retry_after="120"), opened=0, now=NOW)
    during = after(paused, ok(), opened=0, now=NOW + timedelta(seconds=119))
    assert (during.blocked_until, during.consecutive_failures) == (paused.blocked_until, 0)
    assert after(paused, ok(), opened=0, now=NOW + timedelta(seconds=120)).blocked_until is None


def test_a_breaker_that_opens_does_not_shorten_a_pause_that_was_asked_for() -> None:
    paused = after(failed(4), status(503, retry_after="3600"), opened=0, now=NOW)
    assert seconds(after(paused, transport(), opened=0, now=NOW)) == 3600


def test_a_probe_that_fails_otherwise_ends_its_own_pause() -> None:
    probing = failed(2).paused(NOW + timedelta(seconds=50), BlockedReason.PROBE)
    assert after(probing, status(404), opened=0, now=NOW).blocked_until is None


def test_the_cap_grows_by_one_and_halves() -> None:
    caps = [2]
    for answer in (ok(), ok(), ok(), transport(), transport(), transport(), ok()):
        caps.append(next_cap(caps[-1], answer, most=4))
    assert caps == [2, 3, 4, 4, 2, 1, 1, 2]


def test_a_target_that_fails_or_was_paused_is_tried_one_at_a_time() -> None:
    assert capped(8, failed(2)) == 8
    assert capped(8, failed(3)) == 1
    assert capped(8, NEW.paused(NOW, BlockedReason.RETRY_AFTER)) == 1


def test_five_days_of_failing_are_the_whole_way() -> None:
    health = Health(1, failing_since=NOW, last_failure_at=NOW + timedelta(days=5))
    way = [
        percent_to_disabling(health, enabled_at=NOW, now=NOW + timedelta(days=days))
        for days in (0, 2.5, 3.5, 4.5, 4.999, 5, 9)
    ]
    assert way == [0, 50, 70, 90, 99, 100, 100]


def test_failures_within_twelve_hours_disable_nobody() -> None:
    near = Health(9, failing_since=NOW, last_failure_at=NOW + timedelta(hours=11, minutes=59))
    apart = replace(near, last_failure_at=NOW + timedelta(hours=12))
    ways = [percent_to_disabling(each, enabled_at=NOW, now=NOW + timedelta(days=6)) for each in (near, apart)]
    assert ways == [99, 100]


def test_what_failed_before_the_endpoint_was_enabled_does_not_count() -> None:
    health = Health(1, failing_since=NOW - timedelta(days=30), last_failure_at=NOW + timedelta(days=1))
    assert percent_to_disabling(health, enabled_at=NOW, now=NOW + timedelta(days=1)) == 20


def test_a_warning_is_due_once_a_step_and_only_the_highest() -> None:
    due = [
        due_warning(Health(warned_percent=warned), percent)
        for warned, percent in ((0, 49), (0, 50), (50, 69), (50, 70), (0, 95), (90, 99))
    ]
    assert due == [None, 50, None, 70, 90, None]


def test_urls_of_one_origin_share_a_target_within_a_tenant() -> None:
    assert origin("https://hooks.example.com:8443/a?b=/c") == "https://hooks.example.com:8443/"
    assert origin("http://a.example/") == "http://a.example/"
    one, other = (target_of("tenant", f"https://a.example/{path}") for path in ("x", "y"))
    assert one == other
    assert one != target_of("another", "https://a.example/x")
    assert one != target_of("tenant", "https://a.example.evil/x")


answers = st.sampled_from(
    [
        ok(),
        transport(),
        status(404),
        status(410),
        status(500),
        status(429, retry_after="7"),
        status(503, retry_after="90000"),
    ]
)


@given(st.lists(st.tuples(answers, st.floats(0, 100_000)), max_size=40))
def test_whatever_comes_the_record_makes_sense(history: list[tuple[Answer, float]]) -> None:
    health, now = NEW, NOW
    for answer, passed in history:
        now += timedelta(seconds=passed)
        health = after(health, answer, opened=health.opened, now=now)
        assert (health.blocked_until is None) == (health.blocked_reason is None)
        assert (health.consecutive_failures == 0) == (health.failing_since is None)
        if answer.error_class is None:
            assert (health.consecutive_failures, health.opened) == (0, 0)
        if health.blocked_until is not None:
            assert health.blocked_until <= now + timedelta(days=1)
        assert 0 <= percent_to_disabling(health, enabled_at=NOW, now=now) <= 100
