"""`PYTHONPATH=tests python -m bench.due`: how late delayed jobs are.

Jobs that fall due one after the other, a hundred a second by default, and one scheduler process with default
settings. Late is the time from a job's `scheduled_for` until its id is in its lane in Redis, where a worker
would take it. Prints percentiles for each store.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from laneway.cli import migrate
from laneway.domain.spec import JobSpec
from process.stack import Stack
from servers import PostgresServer, RedisServer

LEAD = timedelta(seconds=3)  # from the making of the last job to the first that is due
MADE_AT_ONCE = 500
PATIENCE_SECONDS = 30


def lateness(stack: Stack, *, per_second: int, seconds: int) -> list[float]:
    """Milliseconds by which each job was late, in order."""
    scheduler = stack.scheduler(
        LANEWAY_TICK_SECONDS="1", LANEWAY_LEASE_SECONDS="30", LANEWAY_BEAT_SECONDS="5"
    )
    count = per_second * seconds
    first = datetime.now(UTC) + LEAD + timedelta(seconds=count / 1000)
    due: dict[str, datetime] = {}
    for start in range(0, count, MADE_AT_ONCE):
        moments = [
            first + timedelta(seconds=n / per_second) for n in range(start, min(start + MADE_AT_ONCE, count))
        ]
        prepared = [
            stack.service.prepare(JobSpec(job_type="demo.noop", scheduled_for=moment), stack.caller)
            for moment in moments
        ]
        for moment, answer in zip(moments, stack.service.enqueue(prepared), strict=True):
            if isinstance(answer, Exception):
                raise answer
            due[answer["id"]] = moment
    if datetime.now(UTC) > first:
        raise SystemExit("this machine is too busy: the jobs were due before they were made")
    late: list[float] = []
    with stack.redis() as redis:
        while len(late) < count:
            popped = redis.blpop(["rq:queue:normal"], timeout=PATIENCE_SECONDS)
            seen = time.time()
            if popped is None:
                raise SystemExit(f"{count - len(late)} jobs are missing\n{scheduler.said()}")
            moment = due.pop(popped[1], None)  # nobody claims it, so it is rung again after a while
            if moment is not None:
                late.append(1000 * (seen - moment.timestamp()))
    scheduler.kill()
    return sorted(late)


def percentile(values: list[float], percent: float) -> float:
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.due", description=__doc__)
    parser.add_argument("--per-second", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=20)
    options = parser.parse_args()
    with PostgresServer() as postgres:
        for store in ("postgresql", "sqlite"):
            with tempfile.TemporaryDirectory() as text, RedisServer() as redis:
                folder = Path(text)
                url = postgres.fresh() if store == "postgresql" else f"sqlite:///{folder / 'laneway.db'}"
                if store == "sqlite":
                    migrate.upgrade(url)
                with Stack(url, redis.url, folder) as stack:
                    late = lateness(stack, per_second=options.per_second, seconds=options.seconds)
                said = ", ".join(f"p{p:g} {percentile(late, p):.1f} ms" for p in (50, 95, 99, 99.9))
                print(f"{store}: {len(late)} jobs, {options.per_second} a second: {said}", flush=True)


if __name__ == "__main__":
    main()
