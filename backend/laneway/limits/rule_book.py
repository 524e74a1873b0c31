"""Which rules a caller is under: what was set for it, else for its tenant, else in the settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from laneway.clock import Clock
from laneway.limits.decision import Charge
from laneway.limits.rules import Partition, Policy, RateClass, Rule, RuleSet

_FALLS_BACK = (Policy.POLL, Policy.STREAM)  # on `default`, where nothing was set for them
_POLICY_OF = {rate_class: Policy(rate_class) for rate_class in RateClass if rate_class != RateClass.FREE}


@dataclass(frozen=True, slots=True)
class Override:
    """What holds for one tenant, or one caller of it, in place of all windows that the settings name.

    `quota` None is unlimited, and has no window.
    """

    tenant_id: str
    subject: str | None  # None: the whole tenant
    policy: Policy
    quota: int | None
    window_seconds: int | None
    shadow: bool
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Entry:
    rules: tuple[Rule, ...]
    expires_at: datetime | None


_Entries = dict[tuple[Policy, str | None], _Entry]


class RuleBook:
    """The settings' rules and the overrides, which any thread may replace."""

    def __init__(self, rules: RuleSet, *, clock: Clock) -> None:
        self._rules = rules
        self._clock = clock
        self._overrides: Mapping[str, _Entries] = {}  # by tenant

    def take(self, overrides: Iterable[Override]) -> None:
        """From now on these are all overrides."""
        taken: dict[str, _Entries] = {}
        for each in overrides:
            entry = _Entry(self._rules_of(each), each.expires_at)
            taken.setdefault(each.tenant_id, {})[each.policy, each.subject] = entry
        self._overrides = taken

    def rules(self, policy: Policy, *, tenant_id: str, subject: str) -> tuple[Rule, ...]:
        """The rules of one policy for one caller; none: unlimited."""
        if overrides := self._overrides.get(tenant_id):
            for who in (subject, None):
                entry = overrides.get((policy, who))
                if entry and (entry.expires_at is None or self._clock.now() < entry.expires_at):
                    return entry.rules
        rules = self._rules.get(policy)
        if rules is not None:
            return rules
        return (
            self.rules(Policy.DEFAULT, tenant_id=tenant_id, subject=subject) if policy in _FALLS_BACK else ()
        )

    def charges(
        self, rate_class: RateClass, *, tenant_id: str, subject: str, cost: int = 1, jobs: int = 0
    ) -> list[Charge]:
        """What a request owes: `cost` to its class and its tenant, `jobs` to its tenant's jobs."""
        if rate_class is RateClass.FREE:
            return []
        owed = [(_POLICY_OF[rate_class], cost), (Policy.TENANT, cost)]
        if jobs:
            owed.append((Policy.JOBS, jobs))
        return [
            Charge(rule.key(tenant_id=tenant_id, subject=subject), rule, units)
            for policy, units in owed
            for rule in self.rules(policy, tenant_id=tenant_id, subject=subject)
        ]

    def all_charges(self, *, tenant_id: str, subject: str) -> list[tuple[Charge, list[Policy]]]:
        """A charge of nothing to each rule that is enforced on a caller, and the policies it stands for."""
        found: dict[bytes, tuple[Charge, list[Policy]]] = {}
        for policy in Policy:
            for rule in self.rules(policy, tenant_id=tenant_id, subject=subject):
                if not rule.shadow:
                    key = rule.key(tenant_id=tenant_id, subject=subject)
                    found.setdefault(key, (Charge(key, rule, 0), []))[1].append(policy)
        return list(found.values())

    def _rules_of(self, override: Override) -> tuple[Rule, ...]:
        if override.quota is None or override.window_seconds is None:
            return ()
        policy = override.policy
        configured = self._rules.get(policy) or (Rule(policy.value, 0, 1),)
        per_tenant = policy.budget or (
            override.subject is None and configured[0].partition is Partition.TENANT
        )
        return (
            replace(
                configured[0],
                quota=override.quota,
                window_seconds=override.window_seconds,
                partition=Partition.TENANT if per_tenant else Partition.USER,
                shadow=override.shadow,
            ),
        )
