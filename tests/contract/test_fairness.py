"""One noisy tenant beside others, through rows, lanes and the database: how many takes the others wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import sqlalchemy as sa

from factories import NOW, OTHER_TENANT, TENANT, add_job, change
from laneway import models
from laneway.clock import FrozenClock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import JobStatus
from laneway.engine import leases, upkeep
from laneway.engine.access.callers import Caller, Role
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.engine.turns import first_by_tenant
from laneway.lanes.backend import Due, LaneBackend
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.rq_lanes import RqLanes, turns_key
from laneway.lanes.turns import FairPicks
from laneway.settings import Settings

QUIET, NOISY = TENANT, OTHER_TENANT
MANY, FEW = 50_000, 10
WINDOW = 10_000
LANE = "normal"
TYPES = ("demo.noop",)
PAST = NOW - timedelta(hours=1)

j = models.jobs.c

_NUMBERS = {
    "postgresql": "SELECT n FROM generate_series(1, :rows) AS n",
    "sqlite": "WITH RECURSIVE made (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM made WHERE n < :rows) "
    "SELECT n FROM made",
}
_ID = {
    "postgresql": "CAST(CAST(:begin AS text) || lpad(to_hex(n), 12, '0') AS uuid)",
    "sqlite": ":begin || printf('%012x', n)",
}


def fill(database: Database, tenant: str, rows: int) -> None:
    """So many queued rows of the tenant, the first of them the oldest; no lane has heard of them."""
    model = add_job(database, tenant_id=tenant, job_type=TYPES[0], queued_at=PAST)
    copied = [column.name for column in models.jobs.columns if column.name != "id"]
    into, of = ", ".join(f'"{name}"' for name in copied), ", ".join(f'jobs."{name}"' for name in copied)
    numbers, job_id = _NUMBERS[database.dialect], _ID[database.dialect]
    copy = sa.text(
        f"INSERT INTO jobs (id, {into}) SELECT {job_id}, {of} FROM jobs, ({numbers}) AS numbers "
        "WHERE jobs.id = :model"
    )
    with database.write() as connection:
        connection.execute(copy, {"begin": model[:24], "rows": rows - 1, "model": model})
        connection.exec_driver_sql("ANALYZE jobs")


@dataclass
class Site:
    """A service, its rows and lanes, and a worker that takes one job at a time."""

    database: Database
    lanes: LaneBackend
    window: int = WINDOW
    picks: dict[str, FairPicks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lanes.window = self.window
        self.service = JobService(self.database, self.lanes, Settings(), load([]), clock=FrozenClock())

    def post(self, count: int, tenant: str = QUIET) -> None:
        caller = Caller(tenant, "alice", Role.USER)
        spec = JobSpec(job_type=TYPES[0])
        answers = self.service.enqueue([self.service.prepare(spec, caller) for _ in range(count)])
        assert all(isinstance(answer, dict) for answer in answers)

    def reconcile(self) -> int:
        return upkeep.reconcile(self.database, self.lanes, window=self.window, now=NOW)

    def take(self, count: int) -> list[str]:
        return self.claimed(self.lanes.take([LANE], count, worker_name="w"))

    def find(self, count: int) -> list[str]:
        with self.database.read() as connection:
            found = leases.find_queued(connection, [LANE], TYPES, limit=count, before=NOW, picks=self.picks)
        return self.claimed(found)

    def claimed(self, ids: list[str]) -> list[str]:
        """The tenants whose jobs those are, which do not wait any more."""
        done = {"status": JobStatus.COMPLETED, "finished_at": NOW, "progress": 100}
        with self.database.write() as connection:
            rows = connection.execute(sa.select(j.id, j.tenant_id).where(j.id.in_(ids)))
            of = {row.id: row.tenant_id for row in rows}
            connection.execute(sa.update(models.jobs).where(j.id.in_(ids)).values(done))
        return [of[job_id] for job_id in ids]

    def wait_of_the_quiet(self, *, slow_path: int = 0) -> int:
        """How many jobs were taken until the last of the quiet tenant's was."""
        left = queued(self.database)[QUIET]
        takes = 0
        while left:
            taken = self.find(slow_path) if slow_path else self.take(1)
            assert taken
            takes += len(taken)
            assert takes <= 100 * FEW
            left -= taken.count(QUIET)
        return takes


def queued(database: Database) -> Counter[str]:
    with database.read() as connection:
        count = sa.select(j.tenant_id, sa.func.count()).where(j.status == JobStatus.QUEUED)
        rows = connection.execute(count.group_by(j.tenant_id)).all()
    return Counter(dict(rows))


@pytest.fixture(params=["postgresql and redis", "sqlite and memory"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    big = request.param.startswith("postgresql")
    database = Database(request.getfixturevalue("postgres_url" if big else "sqlite_url"))
    lanes: LaneBackend = MemoryLanes()
    if big:
        lanes = RqLanes(request.getfixturevalue("redis_url"), clock=SystemClock())
    yield Site(database, lanes)
    lanes.close()
    database.dispose()


def add_tenant(database: Database, tenant: str, **columns: int) -> None:
    row = {"id": tenant, "name": tenant, "webhook_secret": "s", "created_by": "t"} | columns
    with database.write() as connection:
        connection.execute(sa.insert(models.tenants).values(row))


def forget(site: Site) -> None:
    """What FLUSHALL does."""
    if isinstance(site.lanes, RqLanes):
        site.lanes._redis.flushall()
    else:
        site.lanes = MemoryLanes(window=site.window)
        site.service = JobService(site.database, site.lanes, Settings(), load([]), clock=FrozenClock())


def test_beside_fifty_thousand_jobs_of_another_ten_wait_at_most_twice_as_long_as_alone(site: Site) -> None:
    fill(site.database, NOISY, MANY)
    assert site.reconcile() == WINDOW
    site.post(FEW)
    assert site.lanes.depths([LANE])[LANE] == WINDOW, "the lane is full, and stays so"
    assert site.wait_of_the_quiet() <= 2 * FEW, "before anything was taken"

    while site.lanes.depths([LANE])[LANE] > WINDOW // 2:
        site.take(1000)
    site.post(FEW)
    assert site.wait_of_the_quiet() <= 2 * FEW, "half drained"

    site.reconcile()
    site.take(100)
    for _ in range(FEW):
        site.post(1)
    assert site.wait_of_the_quiet() <= 2 * FEW, "one by one, after a refill"

    site.post(FEW)
    forget(site)
    change_age(site.database)
    assert site.reconcile() == WINDOW
    assert site.wait_of_the_quiet() <= 2 * FEW, "after FLUSHALL"

    site.post(FEW)
    forget(site)
    site.post(1, NOISY)
    change_age(site.database)
    site.reconcile()
    assert site.wait_of_the_quiet() <= 2 * FEW + 1, "after FLUSHALL and a push before the repair"

    for each in (1, 4, 64):
        site.post(FEW)
        change_age(site.database)
        assert site.wait_of_the_quiet(slow_path=each) <= 2 * FEW + each, "without Redis"


def change_age(database: Database) -> None:
    """Nothing that waits is so young that it may be on its way."""
    old = sa.update(models.jobs).where(j.status == JobStatus.QUEUED, j.queued_at > PAST)
    with database.write() as connection:
        connection.execute(old.values(queued_at=PAST + timedelta(minutes=1)))


def test_a_job_that_no_lane_was_told_of_does_not_wait_for_a_full_lane_to_empty(site: Site) -> None:
    """Redis was away for a moment: the ten are rung by the reconciler."""
    fill(site.database, NOISY, WINDOW + 500)
    site.reconcile()
    fill(site.database, QUIET, FEW)
    assert site.reconcile() > 0
    assert site.wait_of_the_quiet() <= 2 * FEW


def test_weights_of_rows_make_shares_of_takes(site: Site) -> None:
    site.window = site.lanes.window = 400
    add_tenant(site.database, NOISY, weight=3)
    add_tenant(site.database, QUIET)
    for tenant in (QUIET, NOISY):
        fill(site.database, tenant, 600)
    for slow_path in (False, True):
        had: Counter[str] = Counter()
        for _ in range(10):
            site.reconcile()
            had.update(site.find(40) if slow_path else site.take(40))
            assert abs(had[NOISY] - sum(had.values()) * 3 / 4) <= 1, had


def test_what_redis_holds_is_bounded_by_the_window_with_any_number_of_tenants(site: Site) -> None:
    site.window = site.lanes.window = 60
    tenants = [new_id() for _ in range(10)]
    for tenant in tenants:
        fill(site.database, tenant, 300)
        site.reconcile()
        site.lanes.push([Due(LANE, new_id(), tenant) for _ in range(300)])
        assert site.lanes.depths([LANE])[LANE] == 60
    for _ in range(5):
        site.take(20)
        site.reconcile()
        assert site.lanes.depths([LANE])[LANE] <= 60
    if isinstance(site.lanes, RqLanes):
        redis = site.lanes._redis
        waiting = [key for key in redis.keys("rq:job:*") if redis.hget(key, "status") == "queued"]
        assert len(waiting) <= 60
        assert redis.hlen(turns_key(LANE)) <= 10


def test_every_row_is_taken_once_and_each_tenant_s_in_order_while_rows_wait_outside(site: Site) -> None:
    site.window = site.lanes.window = 50
    for tenant, rows in ((NOISY, 400), (QUIET, 90)):
        fill(site.database, tenant, rows)
    run: list[str] = []
    with site.database.read() as connection:
        order = sa.select(j.id, j.tenant_id).where(j.status == JobStatus.QUEUED).order_by(j.queued_at, j.id)
        rows_of = {tenant: [] for tenant in (NOISY, QUIET)}
        for row in connection.execute(order):
            rows_of[row.tenant_id].append(row.id)
    while queued(site.database).total():
        site.reconcile()
        ids = site.lanes.take([LANE], 30, worker_name="w")
        run += ids
        site.claimed(ids)
    assert len(run) == len(set(run)) == 490
    for ids in rows_of.values():
        mine = set(ids)
        assert [job_id for job_id in run if job_id in mine] == ids


def test_of_more_tenants_than_a_lane_has_room_for_none_is_forgotten(site: Site) -> None:
    site.window = site.lanes.window = 4
    tenants = [new_id() for _ in range(9)]
    for tenant in tenants:
        fill(site.database, tenant, 3)
    had: Counter[str] = Counter()
    for _ in range(20):
        site.reconcile()
        had.update(site.take(3))
    assert had == dict.fromkeys(tenants, 3)


@pytest.mark.parametrize("most", [5, 40, 1000])
def test_what_some_do_not_want_goes_to_the_others(database: Database, most: int) -> None:
    sizes = {new_id(): 3, new_id(): 50, new_id(): 120}
    for tenant, rows in sizes.items():
        fill(database, tenant, rows)
    with database.read() as connection:
        found = first_by_tenant(connection, LANE, most, weights={})
    assert set(found) == set(sizes)
    for tenant, (rows, more) in found.items():
        assert more == (len(rows) - more < sizes[tenant])
    got = sum(len(first.rows) - first.more for first in found.values())
    assert min(most, 173) - len(sizes) <= got <= most + len(sizes)


def test_a_tenant_of_which_the_worker_can_run_nothing_keeps_nobody_waiting(database: Database) -> None:
    add_job(database, tenant_id=NOISY, job_type="demo.other", queued_at=PAST)
    wanted = add_job(database, tenant_id=QUIET, job_type=TYPES[0], queued_at=NOW)
    with database.read() as connection:
        assert leases.find_queued(connection, [LANE], TYPES, limit=1, before=NOW) == [wanted]


def test_a_weight_that_the_row_loses_is_forgotten(site: Site) -> None:
    fill(site.database, QUIET, 1)
    add_tenant(site.database, NOISY, weight=9)
    site.reconcile()
    change(site.database, models.tenants, NOISY, weight=1)
    site.reconcile()
    site.lanes.purge(LANE)
    for name, tenant in (("q", QUIET), ("n", NOISY)):
        site.lanes.push([Due(LANE, f"{name}{number}", tenant) for number in range(4)])
    assert [job_id[0] for job_id in site.lanes.contents(LANE)] == ["q", "n"] * 4
