"""The sliding window in this process: for when Redis is away, and for callers nobody has vouched for."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from laneway.limits.decision import Charge

CAPACITY = 50_000


class LocalWindows:
    """The twin of sliding_window.lua: the same calls at the same moments get the same replies.

    A log is a flat array as the script's value is a flat string: the units in it, then stamp and units
    of each record, oldest first. The table forgets the log that was idle longest when it grows past
    `capacity`; so it cannot be flooded, at the price that who commands more subjects than that is
    forgiven early. For one thread.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._logs: OrderedDict[bytes, array[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._logs)

    def hit(self, charges: Sequence[Charge], *, now_us: int, spend: bool = True) -> list[int]:
        """What the script would reply: allowed, now, then used, reset and retry of each charge's rule."""
        allowed = True
        found: list[tuple[array[int], int, int, int]] = []
        for charge in charges:
            log, first, used = self._live(charge, now_us)
            retry = _retry_us(charge, log, first, used=used, now_us=now_us)
            allowed = allowed and (retry == 0 or charge.rule.shadow)
            found.append((log, first, used, retry))
        reply = [int(allowed), now_us]
        for charge, (log, first, used, retry) in zip(charges, found, strict=True):
            oldest, counted = log[first] if first < len(log) else None, used
            if spend and allowed and charge.cost and retry == 0:
                self._spend(charge, log, first, used=used, now_us=now_us)
                oldest, counted = log[1], used + charge.cost
            reply += (counted, 0 if oldest is None else oldest + charge.rule.window_us - now_us, retry)
        return reply

    def give_back(self, charge: Charge, *, spent_us: int, now_us: int) -> bool:
        """The twin of give_back.lua: whether the units were still there to be given back."""
        log = self._logs.get(charge.key)
        if log is None or spent_us + charge.rule.window_us <= now_us:
            return False
        at = next((at for at in range(1, len(log), 2) if log[at] >= spent_us), None)
        if at is None or log[at + 1] < charge.cost:
            return False
        log[0] -= charge.cost
        log[at + 1] -= charge.cost
        if not log[at + 1]:
            del log[at : at + 2]
        if len(log) == 1:
            del self._logs[charge.key]
        return True

    def _live(self, charge: Charge, now_us: int) -> tuple[array[int], int, int]:
        """The log, where its first record within the window is, and the units from there on."""
        log = self._logs.get(charge.key)
        if log is None:
            return array("q", (0,)), 1, 0
        self._logs.move_to_end(charge.key)
        used, window = log[0], charge.rule.window_us
        if log[-2] > now_us + 2 * window:  # the clock went back; see the script
            log[:] = array("q", (used, now_us, used))
        first, size = 1, len(log)
        while first < size and log[first] + window <= now_us:
            used -= log[first + 1]
            first += 2
        return log, first, used

    def _spend(self, charge: Charge, log: array[int], first: int, *, used: int, now_us: int) -> None:
        del log[1:first]
        grain = charge.rule.grain_us
        stamp = -(-now_us // grain) * grain
        if len(log) > 1 and log[-2] >= stamp:
            log[-1] += charge.cost
        else:
            log.extend((stamp, charge.cost))
        log[0] = used + charge.cost
        self._logs[charge.key] = log
        if len(self._logs) > self._capacity:
            self._logs.popitem(last=False)


def _retry_us(charge: Charge, log: array[int], first: int, *, used: int, now_us: int) -> int:
    excess = used + charge.cost - charge.rule.quota
    if charge.cost > charge.rule.quota:
        return -1
    if excess <= 0:
        return 0
    while True:
        excess -= log[first + 1]
        if excess <= 0:
            return log[first] + charge.rule.window_us - now_us
        first += 2
