"""Jobs a second when the lanes are full, and what the worker weighs afterwards."""

from __future__ import annotations

from bench.ground import LanewayGround, RqGround, Stores

RQ_ROLES = {
    "RQ Worker": ("rq-worker", "Worker"),
    "RQ SimpleWorker": ("rq-worker", "SimpleWorker"),
    "RQ pool of 2": ("rq-pool",),
}


def laneway(
    stores: Stores, store: str, *, count: int, job_type: str = "bench.record", profile: str = ""
) -> dict[str, float]:
    """`rate` of jobs that were queued before the worker started; `rss` and `pss` when all had ended."""
    with LanewayGround.on(stores, store) as site:
        site.enqueue(count, job_type=job_type)
        with site.ground.program("laneway-worker", profile) as worker:
            seen = site.ground.wait_for_records(count, worker)
            site.wait_until_settled(worker)
            memory = worker.memory_mib()
        seen.need_each_once(count)
        site.need_all_completed_once(count)
    return {"rate": seen.rate, **memory}


def stock_rq(stores: Stores, case: str, *, count: int) -> dict[str, float]:
    """The same of one of `RQ_ROLES`."""
    with RqGround.on(stores) as site:
        site.enqueue(count)
        with site.ground.program(*RQ_ROLES[case], site.url) as worker:
            seen = site.ground.wait_for_records(count, worker)
            site.wait_until_settled(count, worker)
            memory = worker.memory_mib()
        seen.need_each_once(count)
    return {"rate": seen.rate, **memory}
