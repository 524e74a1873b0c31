"""The `rate_limits` setting, and the keys units are counted under."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.limits.rules import (
    MAX_QUOTA,
    MAX_WINDOW_SECONDS,
    OnFailure,
    Partition,
    Policy,
    RateClass,
    Rule,
    parse_rules,
)
from laneway.settings import Settings

DAY = 24 * 3600


def test_the_default_setting_holds_the_documented_numbers() -> None:
    assert parse_rules(Settings.model_fields["rate_limits"].default) == {
        Policy.QUEUE: (Rule("queue", 10, 60, Partition.USER),),
        Policy.BATCH: (Rule("batch", 5, 60, Partition.USER),),
        Policy.DEFAULT: (Rule("default", 100, 60, Partition.USER),),
    }


def test_off_names_nothing_and_a_policy_that_is_off_has_no_rules() -> None:
    assert parse_rules(" off ") == {}
    assert parse_rules("default=1/1,stream=off") == {
        Policy.DEFAULT: (Rule("default", 1, 1),),
        Policy.STREAM: (),
    }


def test_every_class_but_the_free_one_can_be_set() -> None:
    assert {*RateClass} - {RateClass.FREE} == {policy.value for policy in Policy if not policy.budget}


def test_each_further_window_of_a_policy_is_a_rule_with_a_name_of_its_own() -> None:
    rules = parse_rules("queue = 10/60 + 200/3600 + 1000/86400 @ tenant")
    assert rules[Policy.QUEUE] == (
        Rule("queue", 10, 60, Partition.TENANT),
        Rule("queue-3600", 200, 3600, Partition.TENANT),
        Rule("queue-86400", 1000, 86400, Partition.TENANT),
    )
    assert {rule.policy for rule in rules[Policy.QUEUE]} == {"queue"}


def test_budgets_are_counted_per_tenant() -> None:
    rules = parse_rules("tenant=2000/60,jobs=10000/60+100000/86400@tenant")
    assert [rule.partition for each in rules.values() for rule in each] == [Partition.TENANT] * 3
    assert [rule.unit for each in rules.values() for rule in each] == ["requests", "jobs", "jobs"]


def test_options_hold_for_all_windows_of_a_policy() -> None:
    rules = parse_rules("queue=10/60+20/70@user; shadow ;on_failure=closed,batch=1/1;on_failure=open")
    assert [(rule.shadow, rule.on_failure) for rule in rules[Policy.QUEUE]] == [(True, OnFailure.CLOSED)] * 2
    assert rules[Policy.BATCH] == (Rule("batch", 1, 1, Partition.USER, False, OnFailure.OPEN),)


def test_every_name_fits_a_header_and_a_key() -> None:
    longest = ",".join(f"{name}=1/1+1/{MAX_WINDOW_SECONDS}" for name in Policy)
    for rules in parse_rules(longest).values():
        for rule in rules:
            assert re.fullmatch(r"[a-z][a-z0-9-]{0,31}", rule.name)


def test_the_largest_quota_and_window_are_accepted() -> None:
    (rule,) = parse_rules(f"queue={MAX_QUOTA}/{MAX_WINDOW_SECONDS}")[Policy.QUEUE]
    assert (rule.quota, rule.window_seconds) == (99_999_999, 30 * DAY)
    windows = "+".join(f"0/{n}" for n in range(1, 9))
    assert len(parse_rules(f"queue={windows}")[Policy.QUEUE]) == 8


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'': expected name=quota/seconds@user, or 'off' alone"),
        ("queue", "'queue': expected name=quota/seconds@user, or 'off' alone"),
        ("queue=10/60,", "'': expected name=quota/seconds@user, or 'off' alone"),
        ("queue=10/60,off", "'off': expected name=quota/seconds@user, or 'off' alone"),
        ("queue=10/60@", "'queue=10/60@': expected name=quota/seconds@user, or 'off' alone"),
        ("queue=10/60@host", "'queue=10/60@host': unknown partition 'host'; expected user or tenant"),
        ("batch=5/60,quue=10/60", "'quue=10/60': unknown policy 'quue'; did you mean 'queue'?"),
        ("Queue{}=1/1", "'Queue{}=1/1': unknown policy 'Queue{}'; did you mean 'queue'?"),
        ("x=1/1", "'x=1/1': unknown policy 'x'; expected queue, batch, default, poll, stream, tenant, jobs"),
        (
            "free=1/1",
            "'free=1/1': unknown policy 'free'; expected queue, batch, default, poll, stream, tenant, jobs",
        ),
        ("jobs=1/1@user", "'jobs=1/1@user': jobs is counted per tenant"),
        (
            "queue=1/1;shadowy",
            "'queue=1/1;shadowy': unknown option 'shadowy'; expected shadow or on_failure=local|open|closed",
        ),
        (
            "queue=1/1;on_failure=shut",
            "unknown option 'on_failure=shut'; expected shadow or on_failure=local|open|closed",
        ),
        ("queue=1/1;", "unknown option ''; expected shadow or on_failure=local|open|closed"),
        ("queue=off+1/1", "'queue=off+1/1': expected quota/seconds in whole numbers, got 'off'"),
        ("queue=/60", "'queue=/60': expected quota/seconds in whole numbers, got '/60'"),
        ("queue=-1/60", "'queue=-1/60': expected quota/seconds in whole numbers, got '-1/60'"),
        ("queue=1.5/60", "'queue=1.5/60': expected quota/seconds in whole numbers, got '1.5/60'"),
        ("queue=\u0661/60", "'queue=\u0661/60': expected quota/seconds in whole numbers, got '\u0661/60'"),
        ("queue=10/60s", "'queue=10/60s': expected quota/seconds in whole numbers, got '10/60s'"),
        ("queue=10/60+", "'queue=10/60+': expected quota/seconds in whole numbers, got ''"),
        ("queue=100000000/60", "'queue=100000000/60': quota 100000000 is above 99999999"),
        ("queue=1/0", "'queue=1/0': window of 0 s is not within 1 to 2592000 s"),
        ("queue=1/2592001", "'queue=1/2592001': window of 2592001 s is not within 1 to 2592000 s"),
        ("queue=1/60+2/60", "'queue=1/60+2/60': two windows of 60 s"),
        ("queue=1/1,queue=2/2", "'queue=2/2': queue has rules already; join its windows with '+'"),
        ("queue=" + "+".join(f"0/{n}" for n in range(1, 10)), "9 windows; at most 8"),
    ],
)
def test_a_wrong_setting_is_refused_by_the_name_of_its_wrong_part(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^rate_limits: ") as refused:
        parse_rules(text)
    assert str(refused.value).endswith(complaint)


@pytest.mark.parametrize(("quota", "grain_us"), [(0, 1), (64, 1), (65, 937_500), (100, 937_500)])
def test_stamps_are_exact_up_to_64_units_and_a_64th_of_the_window_above(quota: int, grain_us: int) -> None:
    assert Rule("default", quota, 60).grain_us == grain_us


NASTY = [
    "u1",
    "",
    "}",
    "{x}",
    "a:b",
    "a\nb",
    "a\x00b",
    "a\x1fb",
    "\N{PILE OF POO}",
    "\ud800",
    "\ud801",
    "?",
    "é" * 500_000,
]


@pytest.mark.parametrize("subject", NASTY)
def test_whatever_a_subject_is_called_the_key_keeps_its_form(subject: str) -> None:
    key = Rule("queue", 10, 60).key(tenant_id="0193-77aa", subject=subject)
    assert re.fullmatch(rb"rl:\{0193-77aa\}:queue:[0-9a-f]{32}", key)


def test_no_two_subjects_share_a_key() -> None:
    keys = {Rule("queue", 10, 60).key(tenant_id="t", subject=subject) for subject in NASTY}
    assert len(keys) == len(NASTY)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=2, max_size=2, unique=True))
def test_no_two_users_of_any_tenants_share_a_key(users: list[tuple[str, str]]) -> None:
    one, other = (Rule("queue", 10, 60).key(tenant_id=t, subject=s) for t, s in users)
    assert one != other


def test_a_tenants_rule_counts_all_its_users_together_and_apart_from_any_user() -> None:
    whole, each = Rule("queue", 10, 60, Partition.TENANT), Rule("queue", 10, 60, Partition.USER)
    assert whole.key(tenant_id="t", subject="u1") == whole.key(tenant_id="t", subject="u2")
    assert whole.key(tenant_id="t", subject="u1") != whole.key(tenant_id="t2", subject="u1")
    assert whole.key(tenant_id="t", subject="t") != each.key(tenant_id="t", subject="t")
