"""How many streams and long waits each caller holds open in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from laneway.engine.access.callers import Caller
from laneway.errors import ConcurrentRequests


class Streams:
    """Counts open places per caller; one event loop."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._held: dict[tuple[str, str], int] = {}

    @contextmanager
    def open(self, caller: Caller) -> Iterator[None]:
        """Hold one place. Raises ConcurrentRequests when the caller holds `limit` already."""
        who = (caller.tenant_id, caller.subject)
        held = self._held.get(who, 0)
        if held >= self._limit:
            raise ConcurrentRequests(
                f"this caller holds {held} streams and long waits open already",
                retry_after_seconds=5,
                violated_policies=["concurrent-streams"],
            )
        self._held[who] = held + 1
        try:
            yield
        finally:
            self._held[who] -= 1
            if not self._held[who]:
                del self._held[who]
