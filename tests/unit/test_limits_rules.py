"""The `rate_limits` setting, and the keys units are counted under."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.limits.rules import MAX_QUOTA, MAX_WINDOW_SECONDS, Partition, RateClass, Rule, parse_rules
from laneway.settings import Settings

DAY = 24 * 3600


def test_the_default_setting_holds_the_documented_numbers() -> None:
    rules = parse_rules(Settings.model_fields["rate_limits"].default)
    default = (Rule("default", 100, 60, Partition.USER),)
    assert rules == {
        RateClass.QUEUE: (Rule("queue", 10, 60, Partition.USER),),
        RateClass.BATCH: (Rule("batch", 5, 60, Partition.USER),),
        RateClass.DEFAULT: default,
        RateClass.STREAM: default,
        RateClass.FREE: (),
    }


def test_off_leaves_every_class_without_rules() -> None:
    assert parse_rules(" off ") == dict.fromkeys(RateClass, ())


def test_a_class_that_is_not_named_is_not_limited() -> None:
    rules = parse_rules("queue=10/60")
    assert [name for name, found in rules.items() if found] == [RateClass.QUEUE]


def test_streams_can_have_rules_of_their_own() -> None:
    rules = parse_rules("default=100/60,stream=7/60")
    assert rules[RateClass.STREAM] == (Rule("stream", 7, 60),)


def test_each_further_window_of_a_class_is_a_rule_with_a_name_of_its_own() -> None:
    rules = parse_rules("queue = 10/60 + 200/3600 + 1000/86400 @ tenant")
    assert rules[RateClass.QUEUE] == (
        Rule("queue", 10, 60, Partition.TENANT),
        Rule("queue-3600", 200, 3600, Partition.TENANT),
        Rule("queue-86400", 1000, 86400, Partition.TENANT),
    )


def test_every_name_fits_a_header_and_a_key() -> None:
    longest = ",".join(f"{name}=1/1+1/{MAX_WINDOW_SECONDS}" for name in RateClass if name != "free")
    for rules in parse_rules(longest).values():
        for rule in rules:
            assert re.fullmatch(r"[a-z][a-z0-9-]{0,31}", rule.name)


def test_the_largest_quota_and_window_are_accepted() -> None:
    (rule,) = parse_rules(f"queue={MAX_QUOTA}/{MAX_WINDOW_SECONDS}")[RateClass.QUEUE]
    assert (rule.quota, rule.window_seconds) == (99_999_999, 30 * DAY)
    windows = "+".join(f"0/{n}" for n in range(1, 9))
    assert len(parse_rules(f"queue={windows}")[RateClass.QUEUE]) == 8


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'': expected class=quota/seconds@user, or 'off' alone"),
        ("queue", "'queue': expected class=quota/seconds@user, or 'off' alone"),
        ("queue=10/60,", "'': expected class=quota/seconds@user, or 'off' alone"),
        ("queue=10/60,off", "'off': expected class=quota/seconds@user, or 'off' alone"),
        ("queue=10/60@", "'queue=10/60@': expected class=quota/seconds@user, or 'off' alone"),
        ("queue=10/60@host", "'queue=10/60@host': unknown partition 'host'; expected user or tenant"),
        ("batch=5/60,quue=10/60", "'quue=10/60': unknown class 'quue'; did you mean 'queue'?"),
        ("Queue{}=1/1", "'Queue{}=1/1': unknown class 'Queue{}'; did you mean 'queue'?"),
        ("x=1/1", "'x=1/1': unknown class 'x'; expected queue, batch, default, stream"),
        ("free=1/1", "'free=1/1': unknown class 'free'; expected queue, batch, default, stream"),
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
