"""Decisions as header lines, to the letter."""

from __future__ import annotations

import http_sf
import pytest

from laneway.limits.decision import UNLIMITED, Charge, Decision, Standing
from laneway.limits.headers import render
from laneway.limits.rules import Partition, Rule

SECOND = 1_000_000
NOW = 1_795_309_728_250_000


def decision(*rules: Standing, allowed: bool = True) -> Decision:
    return Decision(allowed, rules, NOW)


def queue(used: int = 3, *, reset_us: int = 41_750_000, retry_us: int = 0, quota: int = 10) -> Standing:
    return Standing(Charge(b"", Rule("queue", quota, 60), 1), used, reset_us, retry_us)


def hourly(used: int, *, retry_us: int = 0) -> Standing:
    return Standing(Charge(b"", Rule("queue-3600", 200, 3600), 1), used, 2000 * SECOND, retry_us)


def jobs(used: int) -> Standing:
    rule = Rule("jobs", 10_000, 60, Partition.TENANT)
    return Standing(Charge(b"", rule, 500), used, 3 * SECOND, 0)


def test_an_admitted_call_tells_what_is_left_and_when_more_comes() -> None:
    assert render(decision(queue())) == [
        (b"ratelimit-policy", b'"queue";q=10;w=60'),
        (b"ratelimit", b'"queue";r=7;t=42'),
        (b"x-ratelimit-limit", b"10"),
        (b"x-ratelimit-remaining", b"7"),
        (b"x-ratelimit-reset", b"1795309770"),
    ]


def test_a_refused_call_also_tells_when_to_come_back() -> None:
    refused = decision(queue(10, reset_us=5 * SECOND + 1, retry_us=5 * SECOND + 1), allowed=False)
    assert render(refused) == [
        (b"ratelimit-policy", b'"queue";q=10;w=60'),
        (b"ratelimit", b'"queue";r=0;t=6'),
        (b"x-ratelimit-limit", b"10"),
        (b"x-ratelimit-remaining", b"0"),
        (b"x-ratelimit-reset", b"1795309734"),
        (b"retry-after", b"6"),
    ]


def test_with_several_rules_all_are_listed_and_the_old_headers_describe_the_tightest() -> None:
    assert render(decision(queue(3), hourly(190))) == [
        (b"ratelimit-policy", b'"queue";q=10;w=60, "queue-3600";q=200;w=3600'),
        (b"ratelimit", b'"queue";r=7;t=42, "queue-3600";r=10;t=2000'),
        (b"x-ratelimit-limit", b"200"),
        (b"x-ratelimit-remaining", b"10"),
        (b"x-ratelimit-reset", b"1795311729"),
    ]
    assert dict(render(decision(queue(9), hourly(1))))[b"x-ratelimit-limit"] == b"10"


def test_in_a_refusal_the_rule_that_holds_longest_is_the_tightest() -> None:
    both = decision(queue(10, retry_us=30 * SECOND), hourly(200, retry_us=2000 * SECOND), allowed=False)
    assert dict(render(both))[b"x-ratelimit-limit"] == b"200"
    assert dict(render(both))[b"retry-after"] == b"2000"
    weighted = decision(queue(7, retry_us=30 * SECOND), hourly(199), allowed=False)
    assert dict(render(weighted))[b"x-ratelimit-limit"] == b"10"
    never = decision(queue(0, retry_us=-1, reset_us=0), hourly(200, retry_us=2000 * SECOND), allowed=False)
    assert dict(render(never))[b"x-ratelimit-limit"] == b"10"


def test_what_is_counted_in_jobs_says_so() -> None:
    headers = dict(render(decision(queue(), jobs(500))))
    assert headers[b"ratelimit-policy"] == b'"queue";q=10;w=60, "jobs";q=10000;w=60;qu="jobs"'
    assert headers[b"ratelimit"] == b'"queue";r=7;t=42, "jobs";r=9500;t=3'


def test_a_rule_that_only_watches_is_not_told_of() -> None:
    assert render(Decision(True, (queue(),), NOW, shadows=(hourly(7),))) == render(decision(queue()))
    assert render(Decision(True, (), NOW, shadows=(hourly(7),))) == []


@pytest.mark.parametrize("used", [0, 3, 9, 10, 11])
def test_the_headers_are_structured_fields_within_their_bounds(used: int) -> None:
    """RFC 9651, as a parser that is not ours reads it."""
    headers = dict(render(decision(queue(used), hourly(190), jobs(9_999))))
    policies = http_sf.parse(headers[b"ratelimit-policy"], tltype="list")
    states = http_sf.parse(headers[b"ratelimit"], tltype="list")
    assert [name for name, _ in policies] == [name for name, _ in states] == ["queue", "queue-3600", "jobs"]
    for (_, policy), (_, state) in zip(policies, states, strict=True):
        assert 0 <= state["r"] <= policy["q"]
        assert 1 <= state["t"] <= policy["w"]
    assert policies[2][1]["qu"] == "jobs"


def test_an_unused_window_is_available_for_its_whole_length() -> None:
    headers = dict(render(decision(queue(0, reset_us=0))))
    assert headers[b"ratelimit"] == b'"queue";r=10;t=60'
    assert headers[b"x-ratelimit-reset"] == b"1795309789"


def test_a_lowered_quota_leaves_zero_and_never_less() -> None:
    headers = dict(render(decision(queue(11, quota=5, retry_us=SECOND), allowed=False)))
    assert headers[b"ratelimit"] == b'"queue";r=0;t=42'
    assert headers[b"x-ratelimit-remaining"] == b"0"


def test_quota_zero_is_rendered_without_a_time_to_come_back() -> None:
    headers = dict(render(decision(queue(0, quota=0, reset_us=0, retry_us=-1), allowed=False)))
    assert headers[b"ratelimit-policy"] == b'"queue";q=0;w=60'
    assert headers[b"x-ratelimit-remaining"] == b"0"
    assert b"retry-after" not in headers


def test_without_rules_there_are_no_headers() -> None:
    assert render(UNLIMITED) == []


def test_the_reset_is_the_same_second_in_every_response_until_a_unit_leaves() -> None:
    leaves = NOW + 41_750_000
    seen = {
        dict(render(Decision(True, (queue(reset_us=leaves - now),), now)))[b"x-ratelimit-reset"]
        for now in range(NOW, leaves, 40_009)
    }
    assert seen == {b"1795309770"}


@pytest.mark.parametrize(
    ("retry_us", "seconds"), [(1, 1), (SECOND, 1), (SECOND + 1, 2), (42 * SECOND, 42), (42 * SECOND + 1, 43)]
)
def test_the_time_to_come_back_is_rounded_up(retry_us: int, seconds: int) -> None:
    refused = decision(queue(10, reset_us=retry_us, retry_us=retry_us), hourly(1), allowed=False)
    assert refused.retry_after_seconds == seconds
    assert not refused.never


def test_what_was_admitted_or_never_will_be_has_no_time_to_come_back() -> None:
    assert decision(queue()).retry_after_seconds is None
    never = decision(queue(3, retry_us=-1), hourly(200, retry_us=SECOND), allowed=False)
    assert never.retry_after_seconds is None
    assert [standing.rule.name for standing in never.never] == ["queue"]
