"""How many attempts one courier makes at once: in all, and to each target, tenant and origin.

Whoever hangs or fails holds up its own messages and nobody else's: a target's share grows with its
successes and halves with its failures (webhooks/health.py), and those that keep failing share a quarter
of all slots, however many they are.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from laneway.webhooks.deliveries import Claimed, Room
from laneway.webhooks.health import first_cap, next_cap, origin
from laneway.webhooks.retries import Answer

MAX_IN_FLIGHT = 256
MAX_PER_TARGET = 8
MAX_PER_TENANT = 32
MAX_PER_ORIGIN = 32
SUSPECT_SHARE = 0.25
REMEMBERED_TARGETS = 10_000


class Pace:
    """The attempts in flight, and how many more there may be. Used by the courier's event loop alone."""

    def __init__(self, monotonic: Callable[[], float], *, most: int = MAX_IN_FLIGHT) -> None:
        self._monotonic = monotonic
        self._most = most
        self._in_flight = 0
        self._suspects = 0
        self._by_target: Counter[str] = Counter()
        self._by_tenant: Counter[str] = Counter()
        self._by_origin: Counter[str] = Counter()
        self._caps: OrderedDict[str, int] = OrderedDict()  # the least recently used goes first
        self._next_at: dict[str, float] = {}  # by target with a rate: the earliest monotonic time of its next

    def room(self) -> Room:
        """What may be claimed now. It is a copy: attempts may end while the claim is under way."""
        return _Room(self)

    def began(self, delivery: Claimed) -> None:
        self._count(delivery, 1)
        if delivery.manner.max_per_second:
            target, now = delivery.target_id, self._monotonic()
            self._next_at[target] = (
                max(self._next_at.get(target, 0.0), now) + 1 / delivery.manner.max_per_second
            )

    def ended(self, delivery: Claimed, answer: Answer | None) -> None:
        """`answer` is None for what was not sent after all."""
        self._count(delivery, -1)
        if answer is not None:
            self._caps[delivery.target_id] = next_cap(self.cap(delivery), answer, most=_most(delivery))

    def cap(self, delivery: Claimed) -> int:
        """How many attempts to the delivery's target may be in flight."""
        target = delivery.target_id
        if target not in self._caps:
            self._caps[target] = first_cap(delivery.health, most=_most(delivery))
            if len(self._caps) > REMEMBERED_TARGETS:
                self._caps.popitem(last=False)
        else:
            self._caps.move_to_end(target)
        return self._caps[target]

    def _count(self, delivery: Claimed, change: int) -> None:
        self._in_flight += change
        self._suspects += change * delivery.health.suspect
        for counter, key in (
            (self._by_target, delivery.target_id),
            (self._by_tenant, delivery.tenant_id),
            (self._by_origin, origin(delivery.url)),
        ):
            counter[key] += change
            if not counter[key]:
                del counter[key]


class _Room(Room):
    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._targets = pace._by_target.copy()
        self._tenants = pace._by_tenant.copy()
        self._origins = pace._by_origin.copy()
        self._suspects_left = int(pace._most * SUSPECT_SHARE) - pace._suspects
        now = pace._monotonic()
        paused = {target for target, at in pace._next_at.items() if at > now}
        pace._next_at = {target: pace._next_at[target] for target in paused}
        full = {target for target, count in self._targets.items() if count >= pace._caps.get(target, 1)}
        super().__init__(
            pace._most - pace._in_flight, full=sorted(full | paused), suspects=self._suspects_left > 0
        )

    def admit(self, delivery: Claimed) -> bool:
        place = origin(delivery.url)
        cap = 1 if delivery.manner.max_per_second else self._pace.cap(delivery)
        fits = (
            self._targets[delivery.target_id] < cap
            and self._tenants[delivery.tenant_id] < MAX_PER_TENANT
            and self._origins[place] < MAX_PER_ORIGIN
            and (not delivery.health.suspect or self._suspects_left > 0)
        )
        if fits:
            self._targets[delivery.target_id] += 1
            self._tenants[delivery.tenant_id] += 1
            self._origins[place] += 1
            self._suspects_left -= delivery.health.suspect
        return fits


def _most(delivery: Claimed) -> int:
    return delivery.manner.max_in_flight or MAX_PER_TARGET
