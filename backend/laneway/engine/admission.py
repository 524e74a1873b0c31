"""Whether there is room for more jobs: a quota for each tenant, a limit for all of them together.

A tenant's quota is the setting's, or its own (`max_queued` of its row), which each count reads anew.

What waits (queued, blocked, scheduled, retrying) is counted in the background, at most once a second and
in at most a twentieth of the time; in between, a process adds what it has let in itself, so that alone it
is exact. Of what other processes let in it learns at the next count. That makes the overshoot finite:
after a count a process lets in at most SHARE of a limit, or one group of jobs when that is more, before
it counts again, so that with n processes a limit is passed by at most n - 1 times as much.

A job whose unique key finds a holder needs room too: whoever asks does not know that it has one.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock
from laneway.db import Database, Id
from laneway.domain.spec import Priority
from laneway.errors import LanewayError, Overloaded, QuotaQueued, try_again_seconds
from laneway.log import get_logger
from laneway.settings import Settings

if TYPE_CHECKING:
    from laneway.engine.transitions import NewJob

COUNT_SECONDS = 1.0
COUNT_PAUSE = 20  # times as long as the count took
SHARE = 0.05
COUNTS = 3  # at most, before somebody is refused: another's count may have begun too early to be exact
FACTORS = {Priority.LOW: 1, Priority.NORMAL: 2}
"""A priority's limit as a multiple of the setting; more urgent jobs have none."""

Answer = dict[str, Any] | Exception


class Wanted(Protocol):
    """Something with a job to be."""

    @property
    def row(self) -> NewJob: ...


W = TypeVar("W", bound=Wanted)

# One arm for each partial index (models.py), which a condition on several statuses would not use.
_ARMS = " UNION ALL ".join(
    f"SELECT tenant_id FROM (SELECT tenant_id FROM jobs WHERE status = '{status}' LIMIT :most) AS {status}"  # noqa: S608
    for status in ("queued", "blocked", "scheduled", "retrying")
)
_WAITING = sa.text(
    f"SELECT tenant_id, count(*) AS jobs FROM ({_ARMS}) AS waiting GROUP BY tenant_id"  # noqa: S608
).columns(tenant_id=Id, jobs=sa.Integer)

_QUOTAS = sa.select(models.tenants.c.id, models.tenants.c.max_queued).where(
    sa.text("(weight <> 1 OR max_queued IS NOT NULL)"),  # what ix_tenants_own_turns holds
    models.tenants.c.max_queued.is_not(None),
)

log = get_logger("admission")


@dataclass(slots=True)
class _Tally:
    """How many jobs wait: as counted, and what this process has added to that."""

    counted: int = 0
    since: int = 0  # let in after the count began
    during: int = 0  # let in after the count that is under way began
    under_way: int = 0  # let in, not yet committed
    doubtful: int = 0  # were under way when the count began: in it or not, they are added to it

    @property
    def waiting(self) -> int:
        return self.counted + self.since + self.under_way

    def share_used(self, limit: int) -> float:
        """How much of what may be let in between two counts is used up; 1 is all."""
        return (self.since + self.under_way) / max(1.0, SHARE * limit)

    def change(self, *, reserved: int = 0, made: int = 0) -> None:
        self.under_way += reserved
        self.since += made
        self.during += made

    def recount(self, counted: int, doubtful: int) -> None:
        self.counted, self.since, self.doubtful = counted, self.during, doubtful


class Admission:
    """The gate that new jobs pass. Safe to share between threads."""

    def __init__(self, database: Database, settings: Settings, clock: Clock) -> None:
        self._database = database
        self._quota = settings.waiting_per_tenant
        self._quotas: dict[str, int] = {}  # of the tenants that have one of their own
        self._limits = {priority.value: n * settings.waiting_total for priority, n in FACTORS.items()}
        self._lowest = min(self._limits.values())
        self._clock = clock
        self._counting = threading.Lock()
        self._background = ThreadPoolExecutor(1, "admission")
        self._asked = False  # for a count in the background
        self._lock = threading.Lock()  # for what follows
        self._all = _Tally()
        self._tenants: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._count_at = -math.inf
        self._pause = COUNT_SECONDS

    def admit(self, wanted: Sequence[W], create: Callable[[Sequence[W]], Sequence[Answer]]) -> list[Answer]:
        """The answers of `create` to those for which there is room, QuotaQueued or Overloaded to the others.

        In order. Raises what `create` raises, and sqlalchemy's errors when it must count and cannot.
        """
        refusals = self._reserve(wanted)
        passed = [p for p, refusal in zip(wanted, refusals, strict=True) if refusal is None]
        answers: Sequence[Answer] = ()
        try:
            answers = create(passed) if passed else ()
        finally:
            self._settle(passed, answers)
        if len(passed) == len(wanted):
            return list(answers)
        following = iter(answers)
        return [next(following) if refusal is None else refusal for refusal in refusals]

    def _reserve(self, wanted: Sequence[Wanted]) -> list[LanewayError | None]:
        for _ in range(COUNTS):
            with self._lock:
                if not self._must_count(wanted):
                    return self._let_in_all(wanted)
                seen = self._count_at
            self._count(unless_after=seen)
        with self._lock:
            return self._let_in_all(wanted)

    def _let_in_all(self, wanted: Sequence[Wanted]) -> list[LanewayError | None]:
        refusals = [self._let_in(p.row.tenant_id, p.row.priority) for p in wanted]
        if not self._asked and (self._is_old() or self._share_used(wanted) > 0.5):
            self._asked = True
            self._background.submit(self._count_in_background)
        return refusals

    def _settle(self, passed: Sequence[Wanted], answers: Sequence[Answer]) -> None:
        """They are under way no longer; those whose answer is their own job are new."""
        with self._lock:
            for number, p in enumerate(passed):
                answer = answers[number] if answers else None
                made = isinstance(answer, dict) and answer["id"] == p.row.id
                self._tenants[p.row.tenant_id].change(reserved=-1, made=made)
                self._all.change(reserved=-1, made=made)

    def _let_in(self, tenant_id: str, priority: str) -> LanewayError | None:
        tenant = self._tenants[tenant_id]
        quota = self._quota_of(tenant_id)
        if tenant.waiting >= quota:
            return QuotaQueued(
                f"{tenant.waiting} jobs of this tenant wait and {quota} may; "
                "cancel some, or try again when some have ended",
                retry_after_seconds=try_again_seconds(),
                waiting=tenant.waiting,
                limit=quota,
            )
        limit = self._limits.get(priority)
        if limit is not None and self._all.waiting >= limit:
            return Overloaded(
                f"{self._all.waiting} jobs wait; from {limit} on none of priority {priority} is accepted",
                waiting=self._all.waiting,
                limit=limit,
                priority=priority,
            )
        tenant.change(reserved=1)
        self._all.change(reserved=1)
        return None

    def _quota_of(self, tenant_id: str) -> int:
        return self._quotas.get(tenant_id, self._quota)

    def _is_old(self) -> bool:
        return self._clock.monotonic() - self._count_at >= self._pause

    def _share_used(self, wanted: Sequence[Wanted]) -> float:
        tenants = {p.row.tenant_id for p in wanted}
        of_tenants = (self._tenants[t].share_used(self._quota_of(t)) for t in tenants)
        return max(self._all.share_used(self._lowest), *of_tenants)

    def _must_count(self, wanted: Sequence[Wanted]) -> bool:
        if self._count_at == -math.inf or self._share_used(wanted) >= 1:
            return True
        # Nobody is refused for what was true a while ago, or never was.
        full = [self._all] if self._all.waiting + len(wanted) > self._lowest else []
        for tenant_id in {p.row.tenant_id for p in wanted}:
            tenant = self._tenants[tenant_id]
            if tenant.waiting + len(wanted) > self._quota_of(tenant_id):
                full.append(tenant)
        return bool(full) and (self._is_old() or any(tally.doubtful for tally in full))

    def _count_in_background(self) -> None:
        try:
            self._count(unless_after=self._count_at)
        except sa.exc.SQLAlchemyError as error:
            log.warning("count_failed", error=type(error).__name__)
        finally:
            self._asked = False

    def _count(self, *, unless_after: float) -> None:
        """Count what waits, unless somebody has since that moment."""
        with self._counting:
            if self._count_at > unless_after:
                return
            began = self._clock.monotonic()
            with self._lock:
                for tally in (self._all, *self._tenants.values()):
                    tally.during = 0
                doubtful = {t: tally.under_way for t, tally in self._tenants.items()}
            with self._database.read() as connection:
                quotas = {row.id: row.max_queued for row in connection.execute(_QUOTAS)}
                # Rows that are worth counting.
                most = max(self._quota, *self._limits.values(), *quotas.values()) + 1
                rows = connection.execute(_WAITING, {"most": most})
                counted = {row.tenant_id: row.jobs for row in rows}
            with self._lock:
                self._quotas = quotas
                self._count_at = began
                self._pause = max(COUNT_SECONDS, COUNT_PAUSE * (self._clock.monotonic() - began))
                self._all.recount(sum(counted.values()), sum(doubtful.values()))
                for tenant_id in {*self._tenants, *counted}:
                    self._tenants[tenant_id].recount(counted.get(tenant_id, 0), doubtful.get(tenant_id, 0))
                self._forget_idle()

    def _forget_idle(self) -> None:
        for tenant_id in [t for t, tally in self._tenants.items() if not tally.waiting]:
            del self._tenants[tenant_id]
