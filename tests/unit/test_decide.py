"""What an ending makes of a job, without a store."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from laneway.domain.retry import RetryPolicy
from laneway.domain.spec import MAX_SECONDS
from laneway.engine.endings import Cancelled, Crashed, Ending, Raised, Returned, TimedOut, Unfinished
from laneway.engine.outcomes import MAX_ERROR_MESSAGE, MAX_TRACEBACK, Claimed, decide, error_record
from laneway.engine.transitions import BackOff, Complete, Fail, HeldMove, Release, Stop, TimeOut

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CRASH_LIMIT = 3
JOB = Claimed(
    job_id="j",
    attempt=4,
    lease_token="t",
    tenant_id="tenant",
    lane="normal",
    job_type="demo.echo",
    parameters="{}",
    timeout_seconds=60,
    retry_count=0,
    crash_count=0,
    retry_policy=RetryPolicy(max_retries=2, delay_seconds=10, backoff=2, max_delay_seconds=100, jitter=False),
)
LEFT, LAST = replace(JOB, retry_count=1), replace(JOB, retry_count=2)


def decided(job: Claimed, ending: Ending, *, crash_limit: int = CRASH_LIMIT) -> HeldMove:
    return decide(job, ending, now=NOW, rng=Random(1), crash_limit=crash_limit)


def wait_of(move: HeldMove) -> float:
    assert isinstance(move, BackOff)
    return (move.next_retry_at - NOW).total_seconds()


def error_of(move: HeldMove) -> dict[str, Any]:
    return dict(json.loads(move.error))  # type: ignore[attr-defined]


ENDINGS: list[Ending] = [
    Returned('{"a":1}'),
    Returned(),
    Cancelled(),
    Unfinished(),
    Crashed("killed by signal 9"),
    TimedOut(60),
    Raised("ValueError", "bad"),
    Raised("PermanentError", "bad", permanent=True),
    Raised("Retry", "later", in_seconds=7),
    Raised("Snooze", "later", in_seconds=7, charged=False),
]


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
@pytest.mark.parametrize("job", [LEFT, LAST], ids=["one retry left", "none left"])
def test_every_move_names_what_the_worker_holds(job: Claimed, ending: Ending) -> None:
    move = decided(job, ending)
    assert (move.job_id, move.attempt, move.lease_token) == ("j", 4, "t")


@pytest.mark.parametrize("job", [LEFT, LAST], ids=["one retry left", "none left"])
def test_a_return_completes_a_wish_stops_and_a_drain_releases_whatever_is_left(job: Claimed) -> None:
    done = decided(job, Returned('{"a":1}'))
    assert isinstance(done, Complete)
    assert done.result == '{"a":1}'
    assert isinstance(decided(job, Returned()), Complete)
    assert isinstance(decided(job, Cancelled()), Stop)
    assert decided(job, Unfinished()) == Release("j", 4, "t", crash=0, error=None)


def test_a_failure_waits_its_turn_and_is_charged_while_retries_are_left() -> None:
    move = decided(LEFT, Raised("ValueError", "bad", "trace"))
    assert isinstance(move, BackOff)
    assert (move.charge, move.crash, wait_of(move)) == (1, 0, 20)
    assert error_of(move) == {
        "type": "ValueError",
        "message": "bad",
        "category": "transient",
        "traceback": "trace",
    }


def test_a_failure_on_the_last_attempt_is_a_dead_letter() -> None:
    move = decided(LAST, Raised("ValueError", "bad"))
    assert isinstance(move, Fail)
    assert (move.reason, move.crash) == ("exhausted", 0)


@pytest.mark.parametrize("job", [LEFT, LAST], ids=["one retry left", "none left"])
def test_a_permanent_error_is_a_dead_letter_at_once(job: Claimed) -> None:
    move = decided(job, Raised("PermanentError", "bad", permanent=True))
    assert isinstance(move, Fail)
    assert move.reason == "permanent"
    assert error_of(move)["category"] == "permanent"


def test_a_timeout_is_retried_while_retries_are_left_and_ends_as_timeout_after_that() -> None:
    again = decided(LEFT, TimedOut(60, "trace"))
    assert (again.charge, wait_of(again)) == (1, 20)  # type: ignore[attr-defined]
    assert error_of(again)["category"] == "timeout"
    last = decided(LAST, TimedOut(60))
    assert isinstance(last, TimeOut)
    assert last.reason == "timeout"
    assert "60 s" in error_of(last)["message"]


def test_retry_waits_as_long_as_the_handler_says_and_is_charged() -> None:
    move = decided(LEFT, Raised("Retry", "later", in_seconds=7))
    assert (move.charge, wait_of(move)) == (1, 7)  # type: ignore[attr-defined]
    assert wait_of(decided(LEFT, Raised("Retry", "now", in_seconds=0))) == 0
    assert isinstance(decided(LAST, Raised("Retry", "later", in_seconds=7)), Fail)


def test_snooze_is_not_charged_and_never_uses_up_the_job() -> None:
    for job in (LEFT, LAST):
        move = decided(job, Raised("Snooze", "later", in_seconds=7, charged=False))
        assert (move.charge, wait_of(move)) == (0, 7)  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [math.inf, math.nan, 1e300, MAX_SECONDS + 1, -1.0])
def test_a_wait_that_no_clock_can_hold_is_the_longest_there_is(asked: float) -> None:
    assert wait_of(decided(LEFT, Raised("Retry", "later", in_seconds=asked))) == MAX_SECONDS


def test_the_longest_wait_is_granted() -> None:
    assert wait_of(decided(LEFT, Raised("Retry", "later", in_seconds=MAX_SECONDS))) == MAX_SECONDS


@pytest.mark.parametrize("job", [LEFT, LAST], ids=["one retry left", "none left"])
def test_a_crash_is_charged_as_a_crash_and_not_as_a_retry(job: Claimed) -> None:
    for crashes, wait in ((0, 5), (1, 10)):
        move = decided(replace(job, crash_count=crashes), Crashed("killed by signal 9"))
        assert (move.charge, move.crash, wait_of(move)) == (0, 1, wait)  # type: ignore[attr-defined]


def test_the_crash_that_reaches_the_limit_is_poison() -> None:
    assert isinstance(decided(replace(JOB, crash_count=CRASH_LIMIT - 2), Crashed("x")), BackOff)
    for crashes in (CRASH_LIMIT - 1, CRASH_LIMIT, CRASH_LIMIT + 1):
        move = decided(replace(JOB, crash_count=crashes), Crashed("killed by signal 9"))
        assert isinstance(move, Fail)
        assert (move.reason, move.crash) == ("poison", 1)
        assert error_of(move)["message"] == "killed by signal 9"


def test_a_limit_of_one_makes_the_first_crash_poison() -> None:
    assert isinstance(decided(JOB, Crashed("x"), crash_limit=1), Fail)


@given(st.integers(0, 10), st.integers(0, 10), st.integers())
def test_jitter_keeps_every_wait_between_half_and_all_of_the_policys(
    count: int, spare: int, seed: int
) -> None:
    policy = replace(JOB.retry_policy, max_retries=count + spare + 1, jitter=True)
    job = replace(JOB, retry_count=count, retry_policy=policy)
    full = min(10 * 2**count, 100)
    move = decide(job, Raised("E", "m"), now=NOW, rng=Random(seed), crash_limit=CRASH_LIMIT)
    assert isinstance(move, BackOff)
    half = timedelta(seconds=full / 2)
    assert NOW + half <= move.next_retry_at <= NOW + 2 * half


@given(st.integers(0, 120), st.integers(0, 100))
def test_a_charged_failure_backs_off_exactly_while_retries_are_left(count: int, allowed: int) -> None:
    job = replace(JOB, retry_count=count, retry_policy=replace(JOB.retry_policy, max_retries=allowed))
    assert isinstance(decided(job, Raised("E", "m")), BackOff if count < allowed else Fail)
    assert isinstance(decided(job, TimedOut(1)), BackOff if count < allowed else TimeOut)


def test_an_error_is_kept_up_to_its_limits_and_cut_one_past_them() -> None:
    assert (MAX_ERROR_MESSAGE, MAX_TRACEBACK) == (2_000, 16_000)
    fits = json.loads(error_record("E" * 200, "m" * 2_000, category="c", traceback="t" * 16_000))
    assert [len(fits[name]) for name in ("type", "message", "traceback")] == [200, 2_000, 16_000]
    cut = json.loads(
        error_record("E" * 200 + "!", "m" * 2_000 + "!", category="c", traceback="!" + "t" * 16_000)
    )
    assert cut == fits


def test_a_traceback_keeps_its_end() -> None:
    assert (
        json.loads(error_record("E", "", category="c", traceback="a" * 16_000 + "z"))["traceback"][-1] == "z"
    )


@example("a\ud800\0", "\udfff")
@given(st.text(), st.text())
def test_an_error_can_be_kept_and_sent_whatever_its_text_holds(message: str, trace: str) -> None:
    record = error_record(message, message, category="c", traceback=trace)
    assert record.isascii()
    assert "\0" not in record
    json.dumps(json.loads(record), ensure_ascii=False).encode()
