"""The window in this process, and the limit for callers nobody has vouched for."""

from __future__ import annotations

from laneway.clock import FrozenClock
from laneway.limits.anonymous import AnonymousLimiter
from laneway.limits.decision import Charge
from laneway.limits.local import LocalWindows
from laneway.limits.rules import Rule

START = 1_800_000_000_000_000
ONCE = Rule("queue", 1, 60)


def admitted(windows: LocalWindows, key: str, *, at: int = START) -> bool:
    return bool(windows.hit([Charge(key.encode(), ONCE, 1)], now_us=at)[0])


def test_the_table_holds_its_capacity_and_forgets_whoever_was_idle_longest() -> None:
    windows = LocalWindows(capacity=3)
    assert all(admitted(windows, key) for key in "abc")
    assert not admitted(windows, "a")  # a's refusal is news of a; b is now idle longest
    assert admitted(windows, "d")
    assert len(windows) == 3
    assert not any(admitted(windows, key) for key in "acd")
    assert admitted(windows, "b")


def test_a_flood_of_subjects_does_not_grow_the_table() -> None:
    windows = LocalWindows()
    for n in range(60_000):
        assert admitted(windows, f"subject-{n}")
    assert len(windows) == 50_000


def test_refusals_and_looks_take_no_room() -> None:
    windows = LocalWindows()
    for n in range(100):
        windows.hit([Charge(b"never-%d" % n, ONCE, 2)], now_us=START)
        windows.hit([Charge(b"look-%d" % n, ONCE, 0)], now_us=START)
    assert len(windows) == 0


def allowed(limiter: AnonymousLimiter, *addresses: str | None) -> list[bool]:
    return [limiter.hit(address).allowed for address in addresses]


def test_an_unknown_caller_gets_sixty_requests_a_minute_and_not_one_more(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock)
    assert allowed(limiter, *["192.0.2.1"] * 61) == [True] * 60 + [False]
    assert limiter.hit("192.0.2.1").retry_after_seconds == 60
    assert limiter.hit("192.0.2.2").allowed
    clock.advance(seconds=60)
    assert limiter.hit("192.0.2.1").allowed


def test_the_addresses_of_one_ipv6_network_share_a_budget(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock)
    assert all(allowed(limiter, *[f"2001:db8:1:2:{n:x}::{n:x}" for n in range(1, 61)]))
    assert allowed(limiter, "2001:db8:1:2::", "2001:DB8:1:2:ffff:ffff:ffff:ffff") == [False, False]
    assert allowed(limiter, "2001:db8:1:3::1", "2001:db8:1:1:ffff::") == [True, True]


def test_an_ipv4_address_written_as_ipv6_is_that_address_and_not_a_network(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock)
    assert all(allowed(limiter, *["::ffff:192.0.2.1"] * 60))
    assert allowed(limiter, "192.0.2.1", "::ffff:192.0.2.2") == [False, True]


def test_callers_without_a_readable_address_share_one_budget(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock)
    odd = [None, "", "testclient", "unix:", "192.0.2.1, 10.0.0.1", "::1 "]
    assert all(allowed(limiter, *odd * 10))
    assert allowed(limiter, None, "anything") == [False, False]
    assert allowed(limiter, "192.0.2.1", "fe80::1%eth0") == [True, True]


def test_a_flood_of_addresses_does_not_grow_the_table(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock, capacity=10)
    for n in range(100):
        assert limiter.hit(f"192.0.2.{n}").allowed
    for _ in range(59):
        assert limiter.hit("192.0.2.99").allowed
    assert allowed(limiter, "192.0.2.99") == [False]


def test_of_sixty_requests_ten_may_be_failed_logins(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock)
    failed = [limiter.hit("192.0.2.1", failed_login=True) for _ in range(11)]
    assert [decision.allowed for decision in failed] == [True] * 10 + [False]
    assert failed[10].retry_after_seconds == 60
    assert [(s.rule.name, s.used) for s in failed[10].rules] == [("anonymous", 10), ("failed-logins", 10)]
    assert limiter.hit("192.0.2.2", failed_login=True).allowed, "another address has its own"
    assert allowed(limiter, *["192.0.2.1"] * 51) == [True] * 50 + [False], "what is refused charges nothing"
    assert not limiter.hit("192.0.2.1", failed_login=True).allowed
    clock.advance(seconds=60)
    assert limiter.hit("192.0.2.1", failed_login=True).allowed


def test_failed_logins_from_one_ipv6_network_are_counted_together(clock: FrozenClock) -> None:
    limiter = AnonymousLimiter(clock=clock)
    failed = [limiter.hit(f"2001:db8::{n:x}", failed_login=True).allowed for n in range(1, 12)]
    assert failed == [True] * 10 + [False]


def test_the_decision_names_the_moment_and_the_rule(clock: FrozenClock) -> None:
    found = AnonymousLimiter(clock=clock).hit("192.0.2.1")
    assert found.now_us == int(clock.now().timestamp()) * 1_000_000
    (standing,) = found.rules
    assert (standing.rule.name, standing.rule.quota, standing.rule.window_seconds) == ("anonymous", 60, 60)
    assert (standing.used, found.local) == (1, True)
