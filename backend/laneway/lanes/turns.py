"""Turns: in which order the ids of a lane come when several tenants have some.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), counted in jobs. A lane's time is the turn of
its first id. A tenant's next id gets the lane's time, or COST / weight after the tenant's last one when that
is later; the lane is in the order of the turns. So whoever comes after a while begins beside the first that
waits, however many wait, and a tenant with twice the weight has twice as many turns in the same time. Of two
ids with the same turn the one that came first is first.

`turns.lua` and `refill.lua` do the same in Redis; `tests/contract/test_fairness_turns.py` holds them to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

COST = 1_000_000
"""How much later the next turn of a tenant of weight 1 is; turns are whole numbers."""

FORGET_EVERY = 256  # tenants new to a lane: then those that are no better off for being known go


@dataclass(slots=True)
class Entered:
    """How many ids got in; the tenants of those that did not, and of those that went out for others."""

    count: int
    unfit: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


class _Entry(NamedTuple):
    turn: int
    tenant: str
    job_id: str


class Turns:
    """The ids of one lane, in the order of their turns, and the turns that tenants' next ids get."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        self.ids: list[str] = []
        self.next: dict[str, int] = {}
        self._weights = weights
        self._of: dict[str, tuple[int, str]] = {}  # turn and tenant of each id

    def take(self, count: int) -> list[str]:
        taken, self.ids = self.ids[:count], self.ids[count:]
        self._forget(taken)
        return taken

    def remove(self, unwanted: Iterable[str]) -> int:
        """How many entries left. Tenants get the turns of their last ids back."""
        gone = set(unwanted).intersection(self.ids)
        before, self.ids = self.ids, [job_id for job_id in self.ids if job_id not in gone]
        for turn, tenant in sorted(map(self._turn, gone), reverse=True):
            if self.next.get(tenant) == turn + self._cost(tenant):
                self.next[tenant] = turn
        self._forget(gone)
        return len(before) - len(self.ids)

    def clear(self) -> int:
        return len(self.take(len(self.ids)))

    def push(self, tenant: str, job_ids: Sequence[str], *, window: int) -> Entered:
        """Let the tenant's ids in, after all that it has here."""
        turn = self._next_turn(tenant, self._time())
        return self._let_in(self._line_up(tenant, turn, job_ids), window)

    def put_first(self, tenant: str, job_ids: Sequence[str]) -> None:
        """Put ids back at the head: they have had their turns."""
        now, cost = self._time(), self._cost(tenant)
        self.ids[:0] = job_ids
        for number, job_id in enumerate(reversed(job_ids), start=1):
            self._of[job_id] = now - number * cost, tenant

    def refill(self, parts: Sequence[tuple[str, Sequence[str], Sequence[str]]], *, window: int) -> Entered:
        """Let in `(tenant, ids before its first, ids after its last)` of several tenants.

        Those before a tenant's first were due before all that is here: the lane's time goes back for them.
        """
        back = max(len(head) * self._cost(tenant) for tenant, head, _ in parts)
        now = self._time() - back
        entries = []
        for tenant, head, tail in parts:
            known = self._next_turn(tenant, now)
            if head:
                entries += self._line_up(tenant, now, head)
                known = max(known, self.next[tenant])
                self.next[tenant] = known
            if tail:
                entries += self._line_up(tenant, known, tail)
        return self._let_in(sorted(entries, key=lambda entry: entry.turn), window)

    def _line_up(self, tenant: str, turn: int, job_ids: Sequence[str]) -> list[_Entry]:
        cost = self._cost(tenant)
        self.next[tenant] = turn + len(job_ids) * cost
        return [_Entry(turn + number * cost, tenant, job_id) for number, job_id in enumerate(job_ids)]

    def _let_in(self, entries: Sequence[_Entry], window: int) -> Entered:
        for entry in entries:
            self.ids.insert(self._place(entry.turn), entry.job_id)
            self._of[entry.job_id] = entry.turn, entry.tenant
        excess, self.ids = self.ids[window:][::-1], self.ids[:window]
        new = {entry.job_id for entry in entries}
        done = Entered(len(entries))
        for job_id in excess:
            turn, tenant = self._turn(job_id)
            self.next[tenant] = turn
            (done.unfit if job_id in new else done.outside).append(tenant)
        self._forget(excess)
        done.count -= len(done.unfit)
        return done

    def _time(self) -> int:
        """The lane's time. In a lane that ran empty all tenants begin anew, where the furthest got."""
        if self.ids:
            return self._turn(self.ids[0])[0]
        furthest = max(self.next.values(), default=0)
        self.next.clear()
        return furthest

    def _next_turn(self, tenant: str, now: int) -> int:
        if tenant not in self.next and self.next and len(self.next) % FORGET_EVERY == 0:
            self.next = {name: turn for name, turn in self.next.items() if turn > now}
        return max(now, self.next.get(tenant, now))

    def _cost(self, tenant: str) -> int:
        return COST // self._weights.get(tenant, 1)

    def _place(self, turn: int) -> int:
        return bisect_right(self.ids, turn, key=lambda job_id: self._turn(job_id)[0])

    def _forget(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            self._of.pop(job_id, None)

    def _turn(self, job_id: str) -> tuple[int, str]:
        return self._of.get(job_id, (0, ""))  # one of two equal ids has gone


class FairPicks:
    """Whose turn it is when rows are taken straight from the database. Not safe to share between threads."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._time = 0

    def order(self, tenants: Sequence[str]) -> list[str]:
        """The tenants, next in turn first; of those with the same turn in the given order."""
        return sorted(tenants, key=lambda tenant: max(self._time, self._next.get(tenant, 0)))

    def pick(self, rows: Mapping[str, Sequence[str]], weights: Mapping[str, int], *, limit: int) -> list[str]:
        """Up to `limit` of the tenants' `rows`, each in order, by turns. The first of equals wins."""
        places = dict.fromkeys((tenant for tenant, ids in rows.items() if ids), 0)
        picked: list[str] = []
        while places and len(picked) < limit:
            self._time = max(self._time, min(self._next.get(tenant, self._time) for tenant in places))
            tenant = min(places, key=lambda name: max(self._time, self._next.get(name, 0)))
            turn = max(self._time, self._next.get(tenant, 0))
            picked.append(rows[tenant][places[tenant]])
            self._next[tenant] = turn + COST // weights.get(tenant, 1)
            places[tenant] += 1
            if places[tenant] == len(rows[tenant]):
                del places[tenant]
        self._next = {tenant: turn for tenant, turn in self._next.items() if turn > self._time}
        return picked
