"""Who may do how much: the `rate_limits` setting as rules, and the key under which each is counted."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

MAX_QUOTA = 99_999_999  # the log's records have eight digits for units
MAX_WINDOW_SECONDS = 30 * 24 * 3600
MAX_WINDOWS = 8  # of one policy; a call has at most three: its class, `tenant` and `jobs`

_EXACT_QUOTA = 64
_WINDOW = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_FORM = "expected name=quota/seconds@user, or 'off' alone"


class RateClass(StrEnum):
    """What an operation is charged to: exactly one of these."""

    QUEUE = "queue"
    BATCH = "batch"
    DEFAULT = "default"
    POLL = "poll"  # charged to `default` unless it has rules of its own
    STREAM = "stream"  # likewise
    FREE = "free"  # never limited


class Policy(StrEnum):
    """What rules can be set for: a rate class, or a budget of a whole tenant beside all classes."""

    QUEUE = "queue"
    BATCH = "batch"
    DEFAULT = "default"
    POLL = "poll"
    STREAM = "stream"
    TENANT = "tenant"  # every limited request of a tenant
    JOBS = "jobs"  # every job that a tenant's requests make: a batch of 500 costs 500

    @property
    def budget(self) -> bool:
        """True where all callers of a tenant share what there is."""
        return self in (Policy.TENANT, Policy.JOBS)


class Partition(StrEnum):
    """Whose units are counted together."""

    USER = "user"
    TENANT = "tenant"


class OnFailure(StrEnum):
    """What becomes of a rule while Redis cannot count."""

    LOCAL = "local"  # this process counts
    OPEN = "open"  # nobody does: it allows
    CLOSED = "closed"  # it refuses, 503


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `quota` units in any `window_seconds`, counted per `partition`. Quota 0 blocks.

    A shadow rule counts what it would have let pass, and refuses nothing.
    """

    name: str  # the policy's; each window after its first is `policy-seconds`
    quota: int
    window_seconds: int
    partition: Partition = Partition.USER
    shadow: bool = False
    on_failure: OnFailure = OnFailure.LOCAL

    @property
    def policy(self) -> str:
        """The name of the policy it was set for."""
        return self.name.partition("-")[0]

    @property
    def unit(self) -> str:
        """What is counted: `jobs` or `requests`."""
        return "jobs" if self.policy == Policy.JOBS else "requests"

    @property
    def window_us(self) -> int:
        return self.window_seconds * 1_000_000

    @property
    def grain_us(self) -> int:
        """What stamps are rounded up to: exact for small quotas, else a 64th of the window.

        Bounds a log at 65 records, however large the quota is. A second divides by 64 without a rest.
        """
        return 1 if self.quota <= _EXACT_QUOTA else self.window_us // 64

    def key(self, *, tenant_id: str, subject: str) -> bytes:
        """The Redis key of this rule's log: `rl:{tenant}:name:digest`.

        `tenant_id` is issued by us and is the hash tag: all keys of one call share a slot. `subject`
        may be anything a caller chose, so only its digest is used: it cannot leave the tag or meet
        another's key, and `KEYS` shows nobody's name.
        """
        counted = tenant_id if self.partition is Partition.TENANT else subject
        named = f"{self.partition}\x1f{counted}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(named, digest_size=16).hexdigest()
        return f"rl:{{{tenant_id}}}:{self.name}:{digest}".encode("utf-8", "surrogatepass")


RuleSet = Mapping[Policy, tuple[Rule, ...]]


def parse_rules(text: str) -> RuleSet:
    """The rules that the setting names: comma-separated parts of the form

        policy=quota/seconds[+quota/seconds…][@user|@tenant][;shadow][;on_failure=local|open|closed]

    or `policy=off`, which names a policy without rules; `off` alone names nothing. Each window after a
    policy's first is a rule called `policy-seconds`. Raises ValueError, which names the part that is wrong.
    """
    named: dict[Policy, tuple[Rule, ...]] = {}
    if text.strip() == "off":
        return named
    for part in text.split(","):
        try:
            policy, rules = _parse_policy(part.strip())
            if policy in named:
                raise ValueError(f"{policy} has rules already; join its windows with '+'")
        except ValueError as wrong:
            raise ValueError(f"rate_limits: {part.strip()!r}: {wrong}") from None
        named[policy] = rules
    return named


def _parse_policy(part: str) -> tuple[Policy, tuple[Rule, ...]]:
    name, equals, value = part.partition("=")
    value, *options = value.split(";")
    windows, at, partition = value.partition("@")
    if not equals or (at and not partition):
        raise ValueError(_FORM)
    policy = _policy_named(name.strip())
    counted_per = _partition_of(policy, partition.strip())
    shadow, on_failure = _parse_options(options)
    if windows.strip() == "off":
        return policy, ()
    rules: list[Rule] = []
    for window in windows.split("+"):
        quota, seconds = _parse_window(window.strip())
        if any(rule.window_seconds == seconds for rule in rules):
            raise ValueError(f"two windows of {seconds} s")
        rule_name = f"{policy}-{seconds}" if rules else str(policy)
        rules.append(Rule(rule_name, quota, seconds, counted_per, shadow, on_failure))
    if len(rules) > MAX_WINDOWS:
        raise ValueError(f"{len(rules)} windows; at most {MAX_WINDOWS}")
    return policy, tuple(rules)


def _policy_named(name: str) -> Policy:
    if name in list(Policy):
        return Policy(name)
    near = difflib.get_close_matches(name, list(Policy), n=1)
    raise ValueError(
        f"unknown policy {name!r}; "
        + (f"did you mean {str(near[0])!r}?" if near else f"expected {', '.join(Policy)}")
    )


def _partition_of(policy: Policy, name: str) -> Partition:
    if name not in ("", *Partition):
        raise ValueError(f"unknown partition {name!r}; expected user or tenant")
    if policy.budget and name == Partition.USER:
        raise ValueError(f"{policy} is counted per tenant")
    return Partition.TENANT if policy.budget else Partition(name or Partition.USER)


def _parse_options(options: list[str]) -> tuple[bool, OnFailure]:
    shadow, on_failure = False, OnFailure.LOCAL
    for option in options:
        name, _, value = option.strip().partition("=")
        if option.strip() == "shadow":
            shadow = True
        elif name == "on_failure" and value in list(OnFailure):
            on_failure = OnFailure(value)
        else:
            raise ValueError(
                f"unknown option {option.strip()!r}; expected shadow or on_failure=local|open|closed"
            )
    return shadow, on_failure


def _parse_window(window: str) -> tuple[int, int]:
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise ValueError(f"expected quota/seconds in whole numbers, got {window!r}")
    quota, seconds = int(match[1]), int(match[2])
    if quota > MAX_QUOTA:
        raise ValueError(f"quota {quota} is above {MAX_QUOTA}")
    if not 1 <= seconds <= MAX_WINDOW_SECONDS:
        raise ValueError(f"window of {seconds} s is not within 1 to {MAX_WINDOW_SECONDS} s")
    return quota, seconds
