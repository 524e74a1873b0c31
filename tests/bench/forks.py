"""What a process of its own costs a job, against a child that runs many."""

from __future__ import annotations

import time

from bench.drain import laneway
from bench.figures import percentile
from bench.ground import LanewayGround, Stores

JOB_TYPES = {"child": "bench.record", "fork": "bench.record_forked"}


def cost(stores: Stores, store: str, isolation: str, *, count: int, alone: int) -> dict[str, float]:
    """`rate` of no-op jobs that were queued before the worker started, and `p50_ms` from the call that
    enqueues a job to the handler's first line, one job at a time."""
    rate = laneway(stores, store, count=count, job_type=JOB_TYPES[isolation])["rate"]
    with LanewayGround.on(stores, store) as site, site.ground.program("laneway-worker") as worker:
        waits = []
        for number in range(1, alone + 2):  # the first waits for the worker's start
            sent_ns = time.monotonic_ns()
            site.enqueue(1, job_type=JOB_TYPES[isolation])
            seen = site.ground.wait_for_records(number, worker)
            waits.append((seen.entries[-1][1] - sent_ns) / 1e6)
            site.wait_until_settled(worker)
    return {"rate": rate, "p50_ms": percentile(sorted(waits[1:]), 0.5)}
