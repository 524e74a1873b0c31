"""What a limiter answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laneway.limits.rules import Rule


@dataclass(frozen=True, slots=True)
class Charge:
    """`cost` units asked of one rule's log. Cost 0 looks and spends nothing."""

    key: bytes
    rule: Rule
    cost: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How full one rule's window is after the decision. Times are microseconds from `Decision.now_us`."""

    name: str
    quota: int
    window_seconds: int
    used: int
    reset_us: int  # until the oldest counted unit leaves the window; 0 when none is counted
    retry_us: int  # until the same call would pass this rule; 0: it passes, -1: it never will

    @property
    def remaining(self) -> int:
        """Units left; 0 also where the quota was lowered below what is used."""
        return max(0, self.quota - self.used)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a call may go on. Refused by one rule, it was charged to none."""

    allowed: bool
    rules: tuple[Standing, ...]
    now_us: int  # since 1970, by the clock that decided: Redis', or ours while Redis is away

    @classmethod
    def read(cls, charges: Sequence[Charge], reply: Sequence[int]) -> Decision:
        """The reply of sliding_window.lua, or of its twin, with the rules' names put back."""
        standings = []
        at = 2
        for charge in charges:
            rule = charge.rule
            standings.append(
                Standing(rule.name, rule.quota, rule.window_seconds, reply[at], reply[at + 1], reply[at + 2])
            )
            at += 3
        return cls(reply[0] == 1, tuple(standings), reply[1])

    @property
    def impossible(self) -> bool:
        """True when the cost is above a quota: waiting does not help."""
        return any(rule.retry_us < 0 for rule in self.rules)

    @property
    def retry_after_seconds(self) -> int | None:
        """Whole seconds after which the same call passes, at least 1; None when allowed or `impossible`.

        Rounded up: a caller who waits so long is not refused for having been told too little.
        """
        if self.allowed or self.impossible:
            return None
        return max(1, -(-max(rule.retry_us for rule in self.rules) // 1_000_000))


UNLIMITED = Decision(allowed=True, rules=(), now_us=0)
