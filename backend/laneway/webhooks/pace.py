"""How many attempts one courier makes at once: in all, and to each target, tenant and origin.

Whoever hangs or fails holds up its own messages and nobody else's: a target's share grows with its
successes and halves with its failures (webhooks/health.py), those that keep failing share a quarter of all
slots, however many they are, and past 32 a tenant has only what leaves a quarter of all slots free.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from laneway.webhooks.deliveries import Candidate, Claimed, Room
from laneway.webhooks.health import FIRST_CAP, capped, next_cap, origin
from laneway.webhooks.retries import Answer

MAX_IN_FLIGHT = 256
MAX_PER_TARGET = 8
MAX_PER_TENANT = 32  # more while a quarter of all slots is left for the other tenants
MAX_PER_ORIGIN = 32
RESERVED_SHARE = 0.25
SUSPECT_SHARE = 0.25
REMEMBERED_TARGETS = 10_000
BURST_SECONDS = 0.1  # what a target with a rate may have at once is worth so long, and at least one attempt


@dataclass(slots=True)
class _Meter:
    """A target's rate: the generic cell rate algorithm (ITU-T I.371)."""

    per_second: float
    empty_at: float  # the monotonic time at which nothing is owed any more

    def ready(self, now: float) -> int:
        """How many attempts may begin now."""
        burst = max(self.per_second * BURST_SECONDS, 1.0)
        owed = max(self.empty_at - now, 0.0) * self.per_second
        return int(burst - owed + 1e-6)

    def wait(self, now: float) -> float:
        """Seconds until one may begin."""
        burst = max(self.per_second * BURST_SECONDS, 1.0)
        return max(self.empty_at - now - (burst - 1.0) / self.per_second, 0.0)

    def spend(self, now: float) -> None:
        self.empty_at = max(self.empty_at, now) + 1.0 / self.per_second


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
        self._caps: OrderedDict[str, int] = OrderedDict()  # by target; the least recently used goes first
        self._meters: dict[str, _Meter] = {}  # of targets with a rate, until nothing is owed

    def room(self) -> Room:
        """What may be claimed now. It is a copy: attempts may end while the claim is under way."""
        now = self._monotonic()
        self._meters = {target: meter for target, meter in self._meters.items() if meter.empty_at > now}
        return _Room(self, now=now)

    def wait_seconds(self) -> float | None:
        """How long until a target whose rate is used up may have one more; None when none is."""
        now = self._monotonic()
        waits = [meter.wait(now) for meter in self._meters.values() if meter.ready(now) < 1]
        return min(waits, default=None)

    def began(self, delivery: Claimed) -> None:
        self._count(delivery, 1)
        target, now = delivery.target_id, self._monotonic()
        self._keep(target, capped(self._cap(target, _most(delivery.manner.max_in_flight)), delivery.health))
        if per_second := delivery.manner.max_per_second:
            meter = self._meters.setdefault(target, _Meter(per_second, now))
            meter.per_second = per_second
            meter.spend(now)

    def ended(self, delivery: Claimed, answer: Answer | None) -> None:
        """`answer` is None for what was not sent after all."""
        self._count(delivery, -1)
        if answer is not None:
            most = _most(delivery.manner.max_in_flight)
            self._keep(delivery.target_id, next_cap(self._cap(delivery.target_id, most), answer, most=most))

    def _cap(self, target_id: str, most: int) -> int:
        """How many attempts to a target may be in flight, as far as its answers tell."""
        return min(self._caps.get(target_id, FIRST_CAP), most)

    def _keep(self, target_id: str, cap: int) -> None:
        self._caps[target_id] = cap
        self._caps.move_to_end(target_id)
        if len(self._caps) > REMEMBERED_TARGETS:
            self._caps.popitem(last=False)

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
    def __init__(self, pace: Pace, *, now: float) -> None:
        self._targets = pace._by_target.copy()
        self._tenants = pace._by_tenant.copy()
        self._origins = pace._by_origin.copy()
        self._caps = pace._caps  # read only; of up to 10,000 targets a copy each turn would cost too much
        self._ready = {target: meter.ready(now) for target, meter in pace._meters.items()}
        self._free = pace._most - pace._in_flight
        self._reserved = int(pace._most * RESERVED_SHARE)
        self._suspects_left = int(pace._most * SUSPECT_SHARE) - pace._suspects
        full = {target for target, count in self._targets.items() if count >= self._caps.get(target, 1)}
        waiting = {target for target, ready in self._ready.items() if ready < 1}
        super().__init__(
            self._free,
            full=sorted(full | waiting),
            full_tenants=sorted(tenant for tenant in self._tenants if not self._fits_tenant(tenant)),
            full_origins=sorted(place for place, count in self._origins.items() if count >= MAX_PER_ORIGIN),
            suspects=self._suspects_left > 0,
        )

    def admit(self, candidate: Candidate) -> bool:
        target, tenant, place = candidate.target_id, candidate.tenant_id, origin(candidate.url)
        cap = min(self._caps.get(target, FIRST_CAP), _most(candidate.max_in_flight))
        if candidate.max_per_second:
            fresh = _Meter(candidate.max_per_second, 0.0).ready(0.0)
            self._ready.setdefault(target, fresh)
        fits = (
            self._targets[target] < capped(cap, candidate.health)
            and self._fits_tenant(tenant)
            and self._origins[place] < MAX_PER_ORIGIN
            and (not candidate.health.suspect or self._suspects_left > 0)
            and self._ready.get(target, 1) > 0
        )
        if fits:
            self._targets[target] += 1
            self._tenants[tenant] += 1
            self._origins[place] += 1
            self._free -= 1
            self._suspects_left -= candidate.health.suspect
            if target in self._ready:
                self._ready[target] -= 1
        return fits

    def _fits_tenant(self, tenant_id: str) -> bool:
        return self._tenants[tenant_id] < MAX_PER_TENANT or self._free > self._reserved


def _most(max_in_flight: int | None) -> int:
    return max_in_flight or MAX_PER_TARGET
