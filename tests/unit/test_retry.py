from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway import errors
from laneway.domain.retry import CATEGORIES, Category, RetryPolicy, category_of, crash_delay
from laneway.errors import PermanentError, Retry, Snooze, TransientError

POLICIES = st.builds(
    RetryPolicy,
    max_retries=st.integers(0, 100),
    delay_seconds=st.floats(0, 1e6),
    backoff=st.floats(1, 10),
    max_delay_seconds=st.floats(0, 1e6),
    jitter=st.just(True),
)


@given(POLICIES, st.integers(0, 400), st.integers())
def test_jitter_spreads_over_the_upper_half_of_the_delay(policy: RetryPolicy, count: int, seed: int) -> None:
    full = RetryPolicy(
        policy.max_retries, policy.delay_seconds, policy.backoff, policy.max_delay_seconds, jitter=False
    ).delay(count, rng=Random(seed))
    assert 0.5 * full <= policy.delay(count, rng=Random(seed)) <= full
    assert full <= policy.max_delay_seconds


@given(POLICIES, st.integers(0, 400))
def test_without_jitter_no_delay_is_shorter_than_the_one_before(policy: RetryPolicy, count: int) -> None:
    plain = RetryPolicy(3, policy.delay_seconds, policy.backoff, policy.max_delay_seconds, jitter=False)
    assert plain.delay(count, rng=Random(1)) <= plain.delay(count + 1, rng=Random(1))


def test_the_default_delays_are_two_four_eight_sixteen_then_thirty_minutes() -> None:
    policy = RetryPolicy(jitter=False)
    assert [policy.delay(count, rng=Random(1)) / 60 for count in range(6)] == [2, 4, 8, 16, 30, 30]


def test_jitter_uses_the_whole_of_its_half() -> None:
    rng, policy = Random(7), RetryPolicy(delay_seconds=100)
    delays = [policy.delay(0, rng=rng) for _ in range(1000)]
    assert min(delays) < 52
    assert max(delays) > 98


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        RetryPolicy().delay(-1, rng=Random(1))


def test_a_power_too_large_for_a_float_is_the_cap() -> None:
    assert RetryPolicy(backoff=10, jitter=False).delay(10_000, rng=Random(1)) == 1800


def test_a_crash_waits_five_seconds_then_twice_as_long_up_to_five_minutes() -> None:
    assert [crash_delay(count) for count in (1, 2, 3, 6, 7, 8, 10_000)] == [5, 10, 20, 160, 300, 300, 300]


# What an exception means


class Flaky(TransientError):
    pass


class Declined(ConnectionError):
    pass


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (PermanentError("no"), Category.PERMANENT),
        (TransientError("later"), Category.TRANSIENT),
        (Retry(3), Category.TRANSIENT),
        (Snooze(3), Category.SNOOZE),
        (errors.InvalidParameters("x"), Category.PERMANENT),
        (errors.PayloadTooLarge("x"), Category.PERMANENT),
        (errors.StorageUnavailable("x"), Category.TRANSIENT),
        (errors.RateLimited("x"), Category.TRANSIENT),
        (errors.QuotaQueued("x"), Category.TRANSIENT),
        (ConnectionResetError(), Category.TRANSIENT),
        (TimeoutError(), Category.TRANSIENT),
        (ValueError("x"), Category.TRANSIENT),
        (MemoryError(), Category.TRANSIENT),
        (SystemExit(3), Category.TRANSIENT),
    ],
)
def test_an_exception_is_what_the_nearest_of_its_classes_is_by_the_table(
    error: BaseException, category: Category
) -> None:
    assert category_of(error) is category


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (ConnectionResetError(), Category.TRANSIENT),
        (Declined(), Category.PERMANENT),  # no_retry_on wins
        (ValueError("x"), Category.PERMANENT),  # not among those to retry
        (Flaky(), Category.TRANSIENT),
        (PermanentError(), Category.PERMANENT),
        (Retry(3), Category.TRANSIENT),
        (Snooze(3), Category.SNOOZE),
        (errors.InvalidPayload("x"), Category.PERMANENT),
        (errors.StorageUnavailable("x"), Category.TRANSIENT),
    ],
)
def test_with_retry_on_only_those_are_retried_and_no_retry_on_wins(
    error: BaseException, category: Category
) -> None:
    assert category_of(error, retry_on=(ConnectionError,), no_retry_on=(Declined,)) is category


def test_no_retry_on_alone_leaves_the_others_as_they_are() -> None:
    lists = {"no_retry_on": (ValueError, Flaky)}
    assert category_of(UnicodeError(), **lists) is Category.PERMANENT
    assert category_of(Flaky(), **lists) is Category.PERMANENT
    assert category_of(KeyError(), **lists) is Category.TRANSIENT


def test_what_the_handler_asks_for_by_name_is_not_overruled() -> None:
    everything = {"retry_on": (Exception,), "no_retry_on": (Exception,)}
    assert category_of(Retry(3), **everything) is Category.TRANSIENT
    assert category_of(Snooze(3), **everything) is Category.SNOOZE
    assert category_of(PermanentError(), retry_on=(Exception,)) is Category.PERMANENT
    assert category_of(errors.InvalidParameters("x"), retry_on=(Exception,)) is Category.PERMANENT


def test_every_exception_has_a_category() -> None:
    assert BaseException in CATEGORIES
