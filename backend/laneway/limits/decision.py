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

    charge: Charge
    used: int
    reset_us: int  # until the oldest counted unit leaves the window; 0 when none is counted
    retry_us: int  # until the same call would pass this rule; 0: it passes, -1: it never will

    @property
    def rule(self) -> Rule:
        return self.charge.rule

    @property
    def remaining(self) -> int:
        """Units left; 0 also where the quota was lowered below what is used."""
        return max(0, self.charge.rule.quota - self.used)


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a call may go on. Refused by one rule, it was charged to none."""

    allowed: bool
    rules: tuple[Standing, ...]  # those that were enforced
    now_us: int  # since 1970, by the clock that decided: Redis', or ours while Redis is away
    shadows: tuple[Standing, ...] = ()  # those that only watched
    local: bool = False  # this process decided

    @classmethod
    def read(cls, charges: Sequence[Charge], reply: Sequence[int], *, local: bool = False) -> Decision:
        """The reply of sliding_window.lua, or of its twin, with the rules' names put back."""
        enforced: list[Standing] = []
        shadows: list[Standing] = []
        at = 2
        for charge in charges:
            standing = Standing(charge, reply[at], reply[at + 1], reply[at + 2])
            (shadows if charge.rule.shadow else enforced).append(standing)
            at += 3
        return cls(reply[0] == 1, tuple(enforced), reply[1], tuple(shadows), local)

    @property
    def never(self) -> tuple[Standing, ...]:
        """The rules whose quota is below what was asked: waiting does not help."""
        return tuple([standing for standing in self.rules if standing.retry_us < 0])

    @property
    def retry_after_seconds(self) -> int | None:
        """Whole seconds after which the same call passes, at least 1; None when allowed, or `never`.

        Rounded up: a caller who waits so long is not refused for having been told too little.
        """
        if self.allowed or self.never:
            return None
        return max(1, -(-max(standing.retry_us for standing in self.rules) // 1_000_000))


UNLIMITED = Decision(allowed=True, rules=(), now_us=0)
