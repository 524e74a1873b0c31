"""Whose rules hold: a caller's own, its tenant's, the settings'."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from redis.crc import key_slot

from laneway.clock import FrozenClock
from laneway.limits.rule_book import Override, RuleBook
from laneway.limits.rules import OnFailure, Partition, Policy, RateClass, Rule, parse_rules

SETTING = "queue=10/60+200/3600;on_failure=closed,batch=5/60@tenant,default=100/60"


@pytest.fixture
def book(clock: FrozenClock) -> RuleBook:
    return RuleBook(parse_rules(SETTING), clock=clock)


def override(policy: Policy, quota: int | None, *, subject: str | None = None, **more: Any) -> Override:
    window = None if quota is None else 30
    said = {"tenant_id": "t", "window_seconds": window, "shadow": False, "expires_at": None} | more
    return Override(subject=subject, policy=policy, quota=quota, **said)


def quotas(book: RuleBook, policy: Policy, *, tenant: str = "t", subject: str = "ada") -> list[int]:
    return [rule.quota for rule in book.rules(policy, tenant_id=tenant, subject=subject)]


def owed(book: RuleBook, rate_class: RateClass, **more: int) -> list[tuple[str, int]]:
    charges = book.charges(rate_class, tenant_id="t", subject="ada", **more)
    return [(charge.rule.name, charge.cost) for charge in charges]


def test_polling_and_streams_are_charged_to_default_until_they_have_rules_of_their_own(
    clock: FrozenClock,
) -> None:
    for rate_class in (RateClass.DEFAULT, RateClass.POLL, RateClass.STREAM):
        assert owed(RuleBook(parse_rules("default=1/1"), clock=clock), rate_class) == [("default", 1)]
    split = RuleBook(parse_rules("default=1/1,poll=2/2,stream=off"), clock=clock)
    assert owed(split, RateClass.POLL) == [("poll", 1)]
    assert owed(split, RateClass.STREAM) == []


def test_a_request_owes_its_class_its_tenant_and_the_jobs_it_makes(clock: FrozenClock) -> None:
    book = RuleBook(parse_rules("queue=1/1,batch=2/2,tenant=3/3,jobs=4/4"), clock=clock)
    assert owed(book, RateClass.QUEUE, jobs=1) == [("queue", 1), ("tenant", 1), ("jobs", 1)]
    assert owed(book, RateClass.BATCH, jobs=500) == [("batch", 1), ("tenant", 1), ("jobs", 500)]
    assert owed(book, RateClass.BATCH) == [("batch", 1), ("tenant", 1)]
    assert owed(book, RateClass.DEFAULT) == [("tenant", 1)]
    assert owed(book, RateClass.FREE, jobs=7) == []


def test_all_keys_of_a_call_share_the_tenants_hash_tag(clock: FrozenClock) -> None:
    book = RuleBook(parse_rules("queue=1/1+2/2@user,tenant=3/3,jobs=4/4"), clock=clock)
    charges = book.charges(RateClass.QUEUE, tenant_id="0193-77aa", subject="}{x}", jobs=1)
    assert len({charge.key for charge in charges}) == 4
    assert all(charge.key.startswith(b"rl:{0193-77aa}:") for charge in charges)
    assert len({key_slot(charge.key) for charge in charges}) == 1


def test_a_callers_own_limit_beats_its_tenants_and_that_the_settings(book: RuleBook) -> None:
    assert quotas(book, Policy.QUEUE) == [10, 200]
    book.take([override(Policy.QUEUE, 20), override(Policy.QUEUE, 30, subject="ada")])
    assert quotas(book, Policy.QUEUE) == [30]
    assert quotas(book, Policy.QUEUE, subject="bob") == [20]
    assert quotas(book, Policy.QUEUE, tenant="another") == [10, 200]
    assert quotas(book, Policy.BATCH) == [5]
    book.take([])
    assert quotas(book, Policy.QUEUE) == [10, 200]


def test_an_override_of_default_holds_for_what_falls_back_on_it(book: RuleBook) -> None:
    book.take([override(Policy.DEFAULT, 7)])
    assert quotas(book, Policy.POLL) == quotas(book, Policy.STREAM) == [7]
    book.take([override(Policy.DEFAULT, 7), override(Policy.POLL, 8)])
    assert (quotas(book, Policy.POLL), quotas(book, Policy.STREAM)) == ([8], [7])


def test_no_quota_is_no_limit_and_zero_blocks(book: RuleBook) -> None:
    book.take([override(Policy.QUEUE, None), override(Policy.BATCH, 0)])
    assert (quotas(book, Policy.QUEUE), quotas(book, Policy.BATCH)) == ([], [0])


def test_a_budget_that_the_settings_do_not_name_can_be_given_to_one_tenant(book: RuleBook) -> None:
    book.take([override(Policy.JOBS, 500)])
    assert owed(book, RateClass.BATCH, jobs=3) == [("batch", 1), ("jobs", 3)]
    (rule,) = book.rules(Policy.JOBS, tenant_id="t", subject="ada")
    assert (rule.partition, rule.unit) == (Partition.TENANT, "jobs")


def test_an_override_keeps_what_the_settings_say_of_partition_and_failure(book: RuleBook) -> None:
    book.take(
        [
            override(Policy.QUEUE, 1),
            override(Policy.BATCH, 2, shadow=True),
            override(Policy.BATCH, 3, subject="ada"),
        ]
    )
    assert book.rules(Policy.QUEUE, tenant_id="t", subject="ada") == (
        Rule("queue", 1, 30, Partition.USER, on_failure=OnFailure.CLOSED),
    )
    (tenants,) = book.rules(Policy.BATCH, tenant_id="t", subject="bob")
    (own,) = book.rules(Policy.BATCH, tenant_id="t", subject="ada")
    assert (tenants.partition, tenants.shadow) == (Partition.TENANT, True)
    assert (own.partition, own.shadow) == (Partition.USER, False), "one caller's limit is its own"


def test_an_override_ends_at_its_moment(book: RuleBook, clock: FrozenClock) -> None:
    end: datetime = clock.now() + timedelta(seconds=60)
    book.take([override(Policy.QUEUE, 20), override(Policy.QUEUE, 30, subject="ada", expires_at=end)])
    clock.advance(seconds=59.999)
    assert quotas(book, Policy.QUEUE) == [30]
    clock.advance(seconds=0.001)
    assert quotas(book, Policy.QUEUE) == [20]


def test_what_is_shown_to_a_caller_names_each_window_once(clock: FrozenClock) -> None:
    book = RuleBook(parse_rules("queue=1/1,default=2/2,stream=3/3;shadow,jobs=4/4"), clock=clock)
    shown = book.all_charges(tenant_id="t", subject="ada")
    assert [(charge.rule.name, policies, charge.cost) for charge, policies in shown] == [
        ("queue", [Policy.QUEUE], 0),
        ("default", [Policy.DEFAULT, Policy.POLL], 0),
        ("jobs", [Policy.JOBS], 0),
    ]
