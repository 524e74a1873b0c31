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
MAX_WINDOWS = 8  # of one class; all of them are decided in one call

_EXACT_QUOTA = 64
_WINDOW = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


class RateClass(StrEnum):
    """What an operation is charged to: exactly one of these."""

    QUEUE = "queue"
    BATCH = "batch"
    DEFAULT = "default"
    STREAM = "stream"  # charged to `default` unless it has rules of its own
    FREE = "free"  # never limited


class Partition(StrEnum):
    """Whose units are counted together."""

    USER = "user"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `quota` units in any `window_seconds`, counted per `partition`. Quota 0 blocks."""

    name: str
    quota: int
    window_seconds: int
    partition: Partition = Partition.USER

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


RuleSet = Mapping[RateClass, tuple[Rule, ...]]


def parse_rules(text: str) -> RuleSet:
    """The rules of every class, from `class=quota/seconds[+quota/seconds…][@user|@tenant]`, comma-separated.

    A class that is not named has no rules; `off` names none. Each window after a class's first is a
    rule called `class-seconds`. Raises ValueError, which names the part that is wrong.
    """
    named: dict[RateClass, tuple[Rule, ...]] = {}
    if text.strip() != "off":
        for part in text.split(","):
            try:
                rate_class, rules = _parse_class(part.strip())
                if rate_class in named:
                    raise ValueError(f"{rate_class} has rules already; join its windows with '+'")
            except ValueError as wrong:
                raise ValueError(f"rate_limits: {part.strip()!r}: {wrong}") from None
            named[rate_class] = rules
    rules_of = {rate_class: named.get(rate_class, ()) for rate_class in RateClass}
    rules_of[RateClass.STREAM] = named.get(RateClass.STREAM, rules_of[RateClass.DEFAULT])
    return rules_of


def _parse_class(part: str) -> tuple[RateClass, tuple[Rule, ...]]:
    name, equals, value = part.partition("=")
    windows, at, partition = value.partition("@")
    if not equals or (at and not partition):
        raise ValueError("expected class=quota/seconds@user, or 'off' alone")
    rate_class = _class_named(name.strip())
    if partition.strip() not in ("", *Partition):
        raise ValueError(f"unknown partition {partition.strip()!r}; expected user or tenant")
    counted_per = Partition(partition.strip() or Partition.USER)
    rules: list[Rule] = []
    for window in windows.split("+"):
        quota, seconds = _parse_window(window.strip())
        if any(rule.window_seconds == seconds for rule in rules):
            raise ValueError(f"two windows of {seconds} s")
        rule_name = f"{rate_class}-{seconds}" if rules else str(rate_class)
        rules.append(Rule(rule_name, quota, seconds, counted_per))
    if len(rules) > MAX_WINDOWS:
        raise ValueError(f"{len(rules)} windows; at most {MAX_WINDOWS}")
    return rate_class, tuple(rules)


def _class_named(name: str) -> RateClass:
    limited = [str(rate_class) for rate_class in RateClass if rate_class is not RateClass.FREE]
    if name in limited:
        return RateClass(name)
    near = difflib.get_close_matches(name, limited, n=1)
    raise ValueError(
        f"unknown class {name!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"expected {', '.join(limited)}")
    )


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
