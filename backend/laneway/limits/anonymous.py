"""The limits for requests that nobody has vouched for: counted in this process, never in Redis.

A flood of made-up addresses can so grow neither Redis nor, past the table's size, this process. What a
valid key sends is not counted here: whoever shares an address with an attacker is not locked out.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from laneway.clock import Clock
from laneway.limits.decision import Charge, Decision
from laneway.limits.local import CAPACITY, LocalWindows
from laneway.limits.rules import Rule

ANONYMOUS = Rule("anonymous", quota=60, window_seconds=60)
FAILED_LOGINS = Rule("failed-logins", quota=10, window_seconds=60)


class AnonymousLimiter:
    """What one client address, or one /64 of IPv6, may send without a valid key: 60 requests in any 60 s,
    and 10 of them with a key that is none."""

    def __init__(self, *, clock: Clock, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._windows = LocalWindows(capacity)

    def hit(self, address: str | None, *, failed_login: bool = False) -> Decision:
        """Charge one request. All without a readable address (a unix socket) share one budget."""
        network = _network(address)
        charges = [Charge(network, ANONYMOUS, 1)]
        if failed_login:
            charges.append(Charge(b"login:" + network, FAILED_LOGINS, 1))
        now_us = round(self._clock.now().timestamp() * 1_000_000)
        return Decision.read(charges, self._windows.hit(charges, now_us=now_us), local=True)


@lru_cache(4096)
def _network(address: str | None) -> bytes:
    """The bytes that one client cannot change at will: IPv4 whole, of IPv6 the /64 (RFC 6177)."""
    try:
        ip: IPv4Address | IPv6Address = ip_address(address or "")
    except ValueError:
        return b""
    if isinstance(ip, IPv6Address):
        return ip.ipv4_mapped.packed if ip.ipv4_mapped else ip.packed[:8]
    return ip.packed
