"""`PYTHONPATH=tests python -m bench.scale`: what a long queue costs.

The same questions on PostgreSQL to a thousand queued rows and to a million, in turns, so that what else the
machine does falls on both; each half of the rows on one lane and on four. Prints medians and their ratio,
and what Redis holds once the window is full.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from random import Random

import sqlalchemy as sa
from rich.console import Console
from rich.progress import track

from bench.figures import Spread, shown
from bench.ground import Stores
from bench.machine import Placement
from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import Priority, lane_of
from laneway.domain.states import JobStatus
from laneway.engine import doctor, leases, queries, upkeep
from laneway.engine.endings import Unfinished
from laneway.engine.exchange import Holder, exchange
from laneway.engine.queries import JobFilter, Scope
from laneway.lanes.rq_lanes import RqLanes

SMALL = 1_000
WINDOW = 10_000  # the default of LANEWAY_LANE_WINDOW
CLAIMED = 64
PAGE = 50
OWN = 20  # jobs of a user who has few
LANES = tuple(lane_of("default", priority) for priority in Priority)
TENANT = new_id()
TYPES = ("bench.record",)

FILL = sa.text(
    """
    INSERT INTO jobs (id, tenant_id, created_by, job_type, parameters, queue, priority, lane, tags, metadata,
        timeout_seconds, max_retries, retry_delay_seconds, retry_backoff, retry_max_delay_seconds,
        retry_jitter, event_seq, status, queued_at, created_at, updated_at)
    SELECT CAST(lpad(to_hex(CAST(extract(epoch FROM at) * 1000 AS bigint)), 12, '0') || '7'
            || lpad(to_hex(number % 4096), 3, '0') || '8'
            || substr(md5(CAST(number AS text)), 1, 15) AS uuid),
        CAST(:tenant AS uuid), CASE WHEN number % CAST(:apart AS int) = 0 THEN 'few' ELSE 'many' END,
        CASE WHEN number % CAST(:apart AS int) = 1 THEN 'bench.seldom' ELSE 'bench.record' END,
        '{"number"\\:1}', 'default', lane, lane, '[]', '{}', 60, 3, 120, 2, 1800, true, 1,
        'queued', at, at, at
    FROM (SELECT number, (CAST(:lanes AS text[]))[1 + number % CAST(:spread AS int)] AS lane,
            now() - interval '1 day' + number * interval '1 millisecond' AS at
          FROM generate_series(1, CAST(:rows AS int)) AS number) AS made
    """
)


@dataclass(frozen=True)
class Queue:
    """A store with so many queued rows, over the first `spread` lanes of the default queue."""

    database: Database
    lanes: RqLanes
    rows: int
    spread: int

    def fill(self) -> None:
        values = {"tenant": TENANT, "rows": self.rows, "apart": self.rows // OWN, "spread": self.spread}
        patient = sa.create_engine(self.database.url, isolation_level="AUTOCOMMIT")  # without our timeouts
        with patient.connect() as connection:
            connection.execute(FILL, values | {"lanes": list(LANES)})
            connection.exec_driver_sql("VACUUM ANALYZE jobs")  # as autovacuum does within minutes
        patient.dispose()
        upkeep.reconcile(self.database, self.lanes, window=WINDOW, now=SystemClock().now())

    # Each question is (prepare, ask): only `ask` is timed.

    def questions(self) -> dict[str, Callable[[], float]]:
        page = self._page
        now = SystemClock().now()
        oldest = now - timedelta(days=1) + timedelta(milliseconds=self.rows / 10)
        return {
            "claim of 64 by id": self._claim,
            "slow path: 64 ids from the database": self._timed(
                lambda c: leases.find_queued(c, LANES, TYPES, limit=CLAIMED, before=now)
            ),
            "page, no filter": page(JobFilter()),
            "page, status queued": page(JobFilter(statuses=(JobStatus.QUEUED,))),
            "page, status failed (none)": page(JobFilter(statuses=(JobStatus.FAILED,))),
            "page, status running (none)": page(JobFilter(statuses=(JobStatus.RUNNING,))),
            "page, a seldom job type": page(JobFilter(job_type="bench.seldom")),
            "page, created before (the oldest tenth)": page(JobFilter(created_before=oldest)),
            "page, created after (none)": page(JobFilter(created_after=now)),
            "page, one of four lanes' priority": page(JobFilter(priority=Priority.CRITICAL)),
            "page, a user's own few": page(JobFilter(), "few"),
            "reconcile, nothing to do": self._reconcile,
            "promote, nothing due": self._promote,
            "expire, nothing late": self._expire,
            "queue statistics": self._timed(
                lambda c: (
                    queries.lane_state(c, LANES, now=now),
                    queries.status_counts(c, TENANT),
                    queries.known_queues(c),
                )
            ),
            "doctor, all checks": self._doctor,
        }

    def _timed(self, ask: Callable[[sa.Connection], object]) -> Callable[[], float]:
        def measure() -> float:
            began = time.perf_counter()
            with self.database.read() as connection:
                ask(connection)
            return time.perf_counter() - began

        return measure

    def _page(self, wanted: JobFilter, subject: str | None = None) -> Callable[[], float]:
        scope = Scope(TENANT, subject)
        return self._timed(lambda c: queries.page_of_jobs(c, scope, wanted, limit=PAGE, before=None))

    def _claim(self) -> float:
        """A worker's claim; the jobs are handed back, untimed."""
        holder = Holder(new_id(), TYPES, 3, Random(1))
        with self.database.read() as connection:
            now = SystemClock().now()
            ids = leases.find_queued(connection, LANES, TYPES, limit=CLAIMED, before=now)
        wanted = [(job_id, new_id()) for job_id in ids]
        began = time.perf_counter()
        done = exchange(self.database, holder, ended=(), wanted=wanted, news={}, now=now)
        took = time.perf_counter() - began
        assert len(done.claimed) == CLAIMED
        back = [(job, Unfinished()) for job in done.claimed]
        exchange(self.database, holder, ended=back, wanted=(), news={}, now=now)
        return took

    def _reconcile(self) -> float:
        began = time.perf_counter()
        rung = upkeep.reconcile(self.database, self.lanes, window=WINDOW, now=SystemClock().now())
        assert rung == 0
        return time.perf_counter() - began

    def _promote(self) -> float:
        began = time.perf_counter()
        upkeep.next_due(self.database)
        assert not upkeep.promote(self.database, now=SystemClock().now())
        return time.perf_counter() - began

    def _expire(self) -> float:
        began = time.perf_counter()
        assert not upkeep.expire(self.database, now=SystemClock().now())
        return time.perf_counter() - began

    def _doctor(self) -> float:
        began = time.perf_counter()
        doctor.examine(self.database, now=SystemClock().now())
        return time.perf_counter() - began


@contextmanager
def _queue(stores: Stores, number: int, *, rows: int, spread: int) -> Iterator[Queue]:
    """A filled store. Each has a Redis database of its own."""
    with stores.database("postgresql") as url:
        database = Database(url, pool_size=2)
        lanes = RqLanes(f"{stores.redis.url}?db={number}", clock=SystemClock(), window=WINDOW)
        queue = Queue(database, lanes, rows, spread)
        try:
            queue.fill()
            yield queue
        finally:
            lanes.close()
            database.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the long queue (default: a million)")
    parser.add_argument("--rounds", type=int, default=21, help="how often each question is asked")
    options = parser.parse_args()
    with Stores(Placement.FREE) as stores, ExitStack() as cleanup:
        with stores.redis.client() as client:
            empty = int(client.info("memory")["used_memory"])
        for spread in (1, len(LANES)):
            small = cleanup.enter_context(_queue(stores, 0, rows=SMALL, spread=spread))
            large = cleanup.enter_context(_queue(stores, 1, rows=options.rows, spread=spread))
            cases = {f"{q.rows:,} rows": q.questions() for q in (small, large)}
            for question in track(
                small.questions(), description=f"{spread} lanes", console=Console(stderr=True)
            ):
                values: dict[str, list[float]] = {case: [] for case in cases}
                for number in range(options.rounds + 2):  # two to fill caches
                    for case in reversed(cases) if number % 2 else cases:
                        took = cases[case][question]()
                        if number >= 2:
                            values[case].append(took * 1000)
                few, many = (Spread.of(values[case]).median for case in cases)
                print(
                    f"| {question} | {spread} | {shown(few)} | {shown(many)} | {shown(many / few)} |",
                    flush=True,
                )
            with stores.redis.client() as client:
                used = int(client.info("memory")["used_memory"])
                print(
                    f"Redis, {spread} lanes of {WINDOW:,} ids: {(used - empty) / 2**20:.1f} MiB", flush=True
                )
                client.flushall()
            cleanup.close()


if __name__ == "__main__":
    main()
