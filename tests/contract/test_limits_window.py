"""The sliding window, as the script on a real Redis and on fakeredis, and as its twin in this process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any, Protocol

import fakeredis
import pytest
import redis as redis_py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laneway.limits.decision import Charge, Decision
from laneway.limits.local import LocalWindows
from laneway.limits.redis_windows import SPEND, Call, RedisWindows, giving_back, spending
from laneway.limits.rules import Rule

SECOND = 1_000_000
START = 1_800_000_000 * SECOND
MINUTE = 60 * SECOND


class Windows(Protocol):
    def hit(self, charges: list[Charge], *, now_us: int, spend: bool = True) -> list[int]: ...

    def give_back(self, charge: Charge, *, spent_us: int, now_us: int) -> bool: ...


class Scripted:
    """The scripts, run by something that stands for Redis."""

    def run(self, call: Call) -> Any:
        raise NotImplementedError

    def hit(self, charges: list[Charge], *, now_us: int, spend: bool = True) -> list[int]:
        reply = self.run(spending(charges, now_us=now_us, spend=spend))
        assert isinstance(reply, list), reply
        return reply

    def give_back(self, charge: Charge, *, spent_us: int, now_us: int) -> bool:
        reply = self.run(giving_back(charge, spent_us=spent_us, now_us=now_us))
        assert reply in (0, 1), reply
        return bool(reply)


class FakeRedisWindows(Scripted):
    def __init__(self) -> None:
        self.client = fakeredis.FakeRedis()

    def run(self, call: Call) -> Any:
        return self.client.eval(call.script.source.decode(), *call.arguments)


class RealRedisWindows(Scripted):
    def __init__(self, url: str, loop: asyncio.Runner) -> None:
        self._windows = RedisWindows(url)
        self._loop = loop

    def run(self, call: Call) -> Any:
        (reply,) = self._loop.run(self._windows.run([call]))
        return reply

    def close(self) -> None:
        self._loop.run(self._windows.close())


@pytest.fixture
def real(redis_url: str) -> Iterator[RealRedisWindows]:
    with asyncio.Runner() as loop:
        windows = RealRedisWindows(redis_url, loop)
        yield windows
        windows.close()


@pytest.fixture(params=["twin", "fakeredis", "redis"])
def windows(request: pytest.FixtureRequest) -> Windows:
    match request.param:
        case "twin":
            return LocalWindows()
        case "fakeredis":
            return FakeRedisWindows()
        case _:
            found: RealRedisWindows = request.getfixturevalue("real")
            return found


def charge(quota: int, *, cost: int = 1, seconds: int = 60, key: str = "a", shadow: bool = False) -> Charge:
    return Charge(key.encode(), Rule("queue", quota, seconds, shadow=shadow), cost)


def hit(windows: Windows, *charges: Charge, at: int) -> Decision:
    return Decision.read(charges, windows.hit(list(charges), now_us=at))


def test_the_quota_is_admitted_and_one_more_is_not(windows: Windows) -> None:
    decisions = [hit(windows, charge(10), at=START + n) for n in range(11)]
    assert [d.allowed for d in decisions] == [True] * 10 + [False]
    assert [d.rules[0].used for d in decisions] == [*range(1, 11), 10]


def test_a_burst_across_a_minutes_boundary_is_one_burst(windows: Windows) -> None:
    minute = START - START % MINUTE
    for _ in range(10):
        assert hit(windows, charge(10), at=minute + 59_900_000).allowed
    assert not any(hit(windows, charge(10), at=minute + 60_100_000).allowed for _ in range(10))


@pytest.mark.parametrize("quota", [1, 10, 64, 65, 100, 5000])
def test_waiting_as_long_as_told_is_enough_and_a_microsecond_less_is_not(
    windows: Windows, quota: int
) -> None:
    rng = random.Random(quota)
    now = START
    while hit(windows, charge(quota, cost=(quota + 9) // 10), at=now).allowed:
        now += rng.randrange(1, 3 * SECOND)
    for cost in (1, (quota + 1) // 2, quota):
        full = hit(windows, charge(quota, cost=quota), at=now)
        assert not full.allowed
        asked = hit(windows, charge(quota, cost=cost), at=now)
        if not asked.allowed:
            now += asked.rules[0].retry_us
            assert not hit(windows, charge(quota, cost=cost), at=now - 1).allowed
            assert hit(windows, charge(quota, cost=cost), at=now).allowed


def test_a_unit_counts_for_the_window_and_not_a_microsecond_longer(windows: Windows) -> None:
    assert hit(windows, charge(1), at=START).allowed
    assert not hit(windows, charge(1), at=START + MINUTE - 1).allowed
    free = hit(windows, charge(1), at=START + MINUTE)
    assert (free.allowed, free.rules[0].used) == (True, 1)


def test_the_reset_names_the_moment_the_oldest_unit_leaves(windows: Windows) -> None:
    first = hit(windows, charge(10), at=START)
    looks = [hit(windows, charge(10, cost=0), at=START + n * 7919) for n in range(500)]
    assert (
        {d.now_us + d.rules[0].reset_us for d in looks}
        == {START + MINUTE}
        == {START + first.rules[0].reset_us}
    )
    assert hit(windows, charge(10, cost=0), at=START + MINUTE).rules[0].reset_us == 0


def test_a_refusal_by_one_rule_charges_none(windows: Windows) -> None:
    tight, wide = charge(1, key="tight"), charge(10, key="wide")
    assert hit(windows, tight, at=START).allowed
    for order in ((wide, tight), (tight, wide)):
        assert not hit(windows, *order, at=START + 1).allowed
    assert hit(windows, charge(10, cost=0, key="wide"), at=START + 2).rules[0].used == 0


def test_the_longest_wait_of_several_rules_is_the_one_that_counts(windows: Windows) -> None:
    short, long = charge(1, key="short"), charge(1, seconds=3600, key="long")
    assert hit(windows, short, long, at=START).allowed
    refused = hit(windows, short, long, at=START)
    assert [rule.retry_us for rule in refused.rules] == [MINUTE, 60 * MINUTE]
    assert refused.retry_after_seconds == 3600


def test_eight_rules_are_decided_in_one_call(windows: Windows) -> None:
    rules = [charge(n + 1, seconds=10 * (n + 1), key=f"rule-{n}") for n in range(8)]
    assert hit(windows, *rules, at=START).allowed
    refused = hit(windows, *rules, at=START + 1)
    assert [rule.used for rule in refused.rules] == [1] * 8
    assert [rule.retry_us > 0 for rule in refused.rules] == [True] + [False] * 7


def test_a_cost_above_the_quota_is_never_admitted_and_never_charged(windows: Windows) -> None:
    assert hit(windows, charge(10, cost=10), at=START).allowed
    never = hit(windows, charge(10, cost=11, key="b"), at=START)
    assert (never.allowed, len(never.never), never.retry_after_seconds) == (False, 1, None)
    assert never.rules[0].retry_us == -1
    assert hit(windows, charge(10, cost=10, key="b"), at=START).allowed


def test_quota_zero_blocks_for_good(windows: Windows) -> None:
    blocked = hit(windows, charge(0), at=START)
    assert (blocked.allowed, len(blocked.never)) == (False, 1)


def test_cost_zero_looks_and_charges_nothing(windows: Windows) -> None:
    for _ in range(3):
        assert hit(windows, charge(1, cost=0), at=START).rules[0].used == 0
    assert hit(windows, charge(1), at=START).allowed


def test_asking_what_would_be_spends_nothing_and_says_the_truth(windows: Windows) -> None:
    def ask(cost: int) -> Decision:
        charges = [charge(3, cost=cost)]
        return Decision.read(charges, windows.hit(charges, now_us=START + 1, spend=False))

    assert hit(windows, charge(3, cost=2), at=START).allowed
    for _ in range(3):
        assert (ask(1).allowed, ask(1).rules[0].used) == (True, 2)
        assert (ask(2).allowed, ask(2).rules[0].retry_us) == (False, MINUTE - 1)
    assert hit(windows, charge(3), at=START + 2).allowed


def test_a_shadow_rule_refuses_nothing_and_counts_what_it_would_have_let_pass(windows: Windows) -> None:
    enforced, shadow = charge(5, key="enforced"), charge(2, key="shadow", shadow=True)
    decisions = [hit(windows, shadow, enforced, at=START + n) for n in range(6)]
    assert [d.allowed for d in decisions] == [True] * 5 + [False]
    assert [d.shadows[0].used for d in decisions] == [1, 2, 2, 2, 2, 2]
    assert [d.shadows[0].retry_us > 0 for d in decisions] == [False, False, True, True, True, True]
    assert [d.rules[0].used for d in decisions] == [1, 2, 3, 4, 5, 5]
    never = hit(windows, charge(1, cost=2, key="never", shadow=True), at=START)
    assert (never.allowed, never.shadows[0].retry_us, never.shadows[0].used) == (True, -1, 0)


def test_what_an_enforced_rule_refuses_is_not_charged_to_a_shadow(windows: Windows) -> None:
    enforced, shadow = charge(1, key="enforced"), charge(9, key="shadow", shadow=True)
    assert [hit(windows, enforced, shadow, at=START).shadows[0].used for _ in range(3)] == [1, 1, 1]


def test_units_given_back_are_free_at_once_and_once(windows: Windows) -> None:
    assert hit(windows, charge(3, cost=2), at=START).allowed
    assert hit(windows, charge(3), at=START + 5).allowed
    assert windows.give_back(charge(3, cost=2), spent_us=START, now_us=START + 9)
    assert not windows.give_back(charge(3, cost=2), spent_us=START, now_us=START + 9)
    left = hit(windows, charge(3, cost=0), at=START + 10)
    assert (left.rules[0].used, left.rules[0].reset_us) == (1, MINUTE - 5)
    assert hit(windows, charge(3, cost=2), at=START + 11).allowed
    assert not hit(windows, charge(3), at=START + 12).allowed


def test_giving_back_the_only_unit_leaves_nothing(windows: Windows) -> None:
    assert hit(windows, charge(1), at=START).allowed
    assert windows.give_back(charge(1), spent_us=START, now_us=START)
    assert hit(windows, charge(1, cost=0), at=START).rules[0].used == 0
    assert not windows.give_back(charge(1, key="never seen"), spent_us=START, now_us=START)


def test_a_unit_that_has_left_the_window_is_not_given_back_from_anothers(windows: Windows) -> None:
    assert hit(windows, charge(1), at=START).allowed
    assert hit(windows, charge(1), at=START + MINUTE).allowed
    assert not windows.give_back(charge(1), spent_us=START, now_us=START + MINUTE)
    assert not hit(windows, charge(1), at=START + MINUTE + 1).allowed


def test_a_record_that_several_calls_share_loses_only_what_is_given_back(windows: Windows) -> None:
    for n in range(3):
        assert hit(windows, charge(100, cost=10), at=START + n).allowed
    assert windows.give_back(charge(100, cost=10), spent_us=START + 1, now_us=START + 3)
    assert hit(windows, charge(100, cost=0), at=START + 4).rules[0].used == 20


def test_another_quota_or_window_holds_from_the_next_call(windows: Windows) -> None:
    for n in range(10):
        assert hit(windows, charge(10), at=START + n).allowed
    assert hit(windows, charge(11), at=START + 10).allowed
    lowered = hit(windows, charge(5), at=START + 11)
    assert (lowered.allowed, lowered.rules[0].remaining, lowered.rules[0].used) == (False, 0, 11)
    assert lowered.rules[0].retry_us == MINUTE - 5  # the seventh unit, of 0 to 10, must leave
    assert hit(windows, charge(5, seconds=1), at=START + 2 * SECOND).allowed


@pytest.mark.parametrize("seconds", [1, 30 * 24 * 3600])
def test_the_shortest_and_the_longest_window_hold(windows: Windows, seconds: int) -> None:
    for quota in (1, 100):
        key = f"{quota}"
        assert hit(windows, charge(quota, cost=quota, seconds=seconds, key=key), at=START).allowed
        refused = hit(windows, charge(quota, seconds=seconds, key=key), at=START + seconds * SECOND - 1)
        assert not refused.allowed
        assert hit(
            windows,
            charge(quota, seconds=seconds, key=key),
            at=START + seconds * SECOND - 1 + refused.rules[0].retry_us,
        ).allowed


@pytest.mark.parametrize("back", [2 * MINUTE + 1, 60 * MINUTE])
def test_a_clock_that_went_back_further_delays_by_one_window_even_if_all_it_does_is_refuse(
    windows: Windows, back: int
) -> None:
    assert hit(windows, charge(2, cost=2), at=START).allowed
    refused = hit(windows, charge(2), at=START - back)
    assert not refused.allowed
    assert refused.rules[0].retry_us == MINUTE
    later = hit(windows, charge(2), at=START - back + MINUTE - 1)
    assert (later.allowed, later.rules[0].retry_us) == (False, 1)
    assert hit(windows, charge(2), at=START - back + MINUTE).allowed


@pytest.mark.parametrize("back", [30 * SECOND, 2 * MINUTE])
def test_a_clock_that_went_back_up_to_two_windows_delays_by_that_much(windows: Windows, back: int) -> None:
    assert hit(windows, charge(1), at=START).allowed
    assert hit(windows, charge(1), at=START - back).rules[0].retry_us == MINUTE + back


def test_a_clock_that_jumped_ahead_forgives_one_window(windows: Windows) -> None:
    assert hit(windows, charge(1), at=START).allowed
    assert hit(windows, charge(1), at=START + 3600 * SECOND).allowed
    assert not hit(windows, charge(1), at=START + 3600 * SECOND + 1).allowed


def test_a_large_cost_and_a_full_record_are_counted_to_the_unit(windows: Windows) -> None:
    most = 99_999_999
    assert hit(windows, charge(most, cost=most - 1), at=START).allowed
    assert hit(windows, charge(most), at=START + 1).rules[0].used == most
    assert not hit(windows, charge(most), at=START + 2).allowed


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 20 * SECOND) | st.sampled_from([0, 1, MINUTE - 1, MINUTE]), st.integers(1, 40)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(quota=st.integers(1, 200), arrivals=ARRIVALS, name=st.uuids())
def test_no_window_ever_holds_more_than_the_quota(
    windows: Windows, quota: int, arrivals: list[tuple[int, int]], name: object
) -> None:
    now, admitted = START, list[tuple[int, int]]()
    for pause, cost in arrivals:
        now += pause
        asked = charge(quota, cost=cost, key=str(name))
        if cost % 7 == 0 and admitted:  # now and then one is given back
            at, units = admitted[cost % len(admitted)]
            if windows.give_back(charge(quota, cost=units, key=str(name)), spent_us=at, now_us=now):
                admitted.remove((at, units))
        if hit(windows, asked, at=now).allowed:
            admitted.append((now, cost))
            held = sum(units for at, units in admitted if at > now - MINUTE)
            assert held <= quota, (held, quota, admitted)


def test_the_script_and_its_twin_agree_on_random_calls(real: RealRedisWindows) -> None:
    twin, fake = LocalWindows(), FakeRedisWindows()
    rng, now = random.Random(20), START
    rules = [
        ("a", 10, 60),
        ("b", 100, 60),
        ("c", 1000, 3600),
        ("d", 0, 60),
        ("e", 65, 7),
        ("f", 5000, 86_400),
    ]
    refused = 0
    for n in range(6000):
        now += rng.choice([0, 1, 1000, rng.randrange(1, 9 * SECOND)])
        if n % 500 == 499:
            now += rng.choice([-3 * MINUTE, -200 * SECOND, -SECOND, -1, 3600 * SECOND])
        picked = rng.sample([r for r in rules if r[0] != "d" or n % 50 == 0], rng.randint(1, 3))
        charges = [
            charge(
                quota,
                cost=rng.choice([0, 1, 1, 1, 3, quota // 3, quota + 1 if n % 97 == 0 else 1]),
                seconds=seconds,
                key=f"{name}:{n // 1500}",
                shadow=name in "be" and n % 3 == 0,
            )
            for name, quota, seconds in picked
        ]
        spend = n % 11 > 0
        reply = real.hit(charges, now_us=now, spend=spend)
        assert twin.hit(charges, now_us=now, spend=spend) == reply, (n, charges)
        if n < 1500:
            assert fake.hit(charges, now_us=now, spend=spend) == reply, (n, charges)
        refused += not reply[0]
        if reply[0] and n % 5 == 0:
            spent_us = rng.choice([now, now, now - 60 * SECOND])
            given = [real.give_back(each, spent_us=spent_us, now_us=now) for each in charges]
            assert [twin.give_back(each, spent_us=spent_us, now_us=now) for each in charges] == given
            if n < 1500:
                assert [fake.give_back(each, spent_us=spent_us, now_us=now) for each in charges] == given
    assert 1000 < refused < 5000, refused


def test_every_key_expires_with_its_last_unit_and_refusals_leave_none(
    real: RealRedisWindows, redis: redis_py.Redis
) -> None:
    now = START
    for seconds, quota in ((1, 5), (60, 10), (60, 100), (3600, 1000)):
        for n in range(5):
            real.hit(
                [charge(quota, seconds=seconds, cost=quota // 5, key=f"{quota}/{seconds}")], now_us=now + n
            )
    real.hit([charge(2, cost=2, key="stepped")], now_us=START)
    real.hit([charge(2, key="stepped")], now_us=START - 3600 * SECOND)
    real.hit([charge(10, cost=11, key="never")], now_us=START)
    real.hit([charge(10, cost=0, key="look")], now_us=START)
    longest = {b"5/1": 1, b"10/60": 60, b"100/60": 61, b"1000/3600": 3657, b"stepped": 60}
    assert set(redis.keys()) == set(longest)
    for key, seconds_at_most in longest.items():
        assert 0 < redis.pttl(key) <= seconds_at_most * 1000, key


def test_a_log_stays_small_however_large_the_quota_is(real: RealRedisWindows, redis: redis_py.Redis) -> None:
    for n in range(3000):
        real.hit([charge(5000, key="big")], now_us=START + n * 40_000)
    assert redis.strlen("big") <= 10 + 24 * 65
    for n in range(64):
        real.hit([charge(64, key="exact")], now_us=START + n)
    assert redis.strlen("exact") == 10 + 24 * 64


def test_without_a_moment_given_redis_own_clock_decides(
    real: RealRedisWindows, redis: redis_py.Redis
) -> None:
    before = redis.time()
    reply = redis.eval(SPEND.source.decode(), *spending([charge(10)]).arguments)
    after = redis.time()
    assert before[0] * SECOND + before[1] <= reply[1] <= after[0] * SECOND + after[1]
