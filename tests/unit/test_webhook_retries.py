from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.webhooks.retries import (
    QUICK_SECONDS,
    Answer,
    DeliveryStatus,
    ErrorClass,
    Timings,
    Verdict,
    judge,
    retry_after_seconds,
)

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
DAY = 24 * 3600


class Middle(Random):
    """Jitter that changes nothing."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def verdict(
    status_code: int | None = 503,
    error_class: ErrorClass | None = ErrorClass.HTTP_5XX,
    *,
    attempt: int = 1,
    retry_after: str | None = None,
    give_up_at: datetime | None = None,
    rng: Random | None = None,
) -> Verdict:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    answer = Answer(NOW, Timings(1), status_code=status_code, error_class=error_class, headers=headers)
    return judge(
        answer,
        attempt=attempt,
        max_attempts=len(QUICK_SECONDS) + 1,
        schedule=QUICK_SECONDS,
        give_up_at=give_up_at,
        now=NOW,
        rng=rng or Middle(),
    )


def wait(found: Verdict) -> float:
    assert found.status is DeliveryStatus.RETRYING
    assert found.next_at is not None
    return (found.next_at - NOW).total_seconds()


def test_a_2xx_is_delivered_whatever_else_it_says() -> None:
    assert verdict(204, None, retry_after="60") == Verdict(DeliveryStatus.DELIVERED)


def test_three_attempts_are_made_after_5_and_60_seconds() -> None:
    assert wait(verdict(attempt=1)) == 5
    assert wait(verdict(attempt=2)) == 60
    assert verdict(attempt=3) == Verdict(DeliveryStatus.DEAD)
    assert verdict(attempt=4) == Verdict(DeliveryStatus.DEAD)  # a lease that ran out had charged one more


@given(st.integers())
def test_jitter_stays_within_a_fifth(seed: int) -> None:
    assert 4 <= wait(verdict(attempt=1, rng=Random(seed))) <= 6
    assert 48 <= wait(verdict(attempt=2, rng=Random(seed))) <= 72


def test_jitter_spreads() -> None:
    assert len({wait(verdict(rng=Random(seed))) for seed in range(20)}) == 20


def test_410_and_a_refusal_of_the_guard_are_final_at_once() -> None:
    assert verdict(410, ErrorClass.HTTP_4XX).status is DeliveryStatus.DEAD
    assert verdict(None, ErrorClass.SSRF_BLOCKED).status is DeliveryStatus.DEAD


@pytest.mark.parametrize("error_class", sorted(set(ErrorClass) - {ErrorClass.SSRF_BLOCKED}))
def test_every_other_failure_is_tried_again(error_class: ErrorClass) -> None:
    assert wait(verdict(404 if error_class is ErrorClass.HTTP_4XX else None, error_class)) == 5


def test_retry_after_counts_when_it_is_longer_than_the_schedule() -> None:
    assert wait(verdict(retry_after="3600")) == 3600
    assert wait(verdict(retry_after="1")) == 5


def test_an_attempt_that_is_asked_to_wait_is_not_charged_up_to_the_20th() -> None:
    assert not verdict(503, retry_after="60", attempt=3).charged
    assert not verdict(429, ErrorClass.HTTP_4XX, retry_after="60", attempt=20).charged
    assert verdict(503, retry_after="60", attempt=21) == Verdict(DeliveryStatus.DEAD)
    assert verdict(500, retry_after="60").charged
    assert verdict(503).charged


def test_nothing_is_tried_after_the_moment_to_give_up() -> None:
    assert wait(verdict(give_up_at=NOW + timedelta(seconds=5))) == 5
    assert verdict(give_up_at=NOW + timedelta(seconds=4)) == Verdict(DeliveryStatus.DEAD)


def test_a_receiver_may_refuse_one_message_for_good() -> None:
    answer = Answer(
        NOW, Timings(1), status_code=500, error_class=ErrorClass.HTTP_5XX, headers={"webhook-retry": " No "}
    )
    found = judge(
        answer, attempt=1, max_attempts=3, schedule=QUICK_SECONDS, give_up_at=None, now=NOW, rng=Middle()
    )
    assert found == Verdict(DeliveryStatus.DEAD)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("0", 0),
        (" 120 ", 120),
        (str(DAY), DAY),
        (str(DAY + 1), DAY),
        ("9" * 5000, DAY),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("", 0),
        ("\u0665", 0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        ("Thu, 01 Jan 2026 12:01:30 -0000", 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", DAY),
        ("Fri, 31 Dec 9999 23:59:59 -2359", DAY),
    ],
)
def test_retry_after_is_seconds_or_a_date_at_most_a_day_ahead(value: str | None, seconds: int) -> None:
    assert retry_after_seconds(value, now=NOW) == seconds


@given(st.text(max_size=40) | st.text(alphabet="0123456789:-+ ,JanMonGMT", max_size=40))
def test_no_retry_after_can_break_us(value: str) -> None:
    assert 0 <= retry_after_seconds(value, now=NOW) <= DAY
