"""How long a job waits when the machine under its worker is gone."""

from __future__ import annotations

import time

from bench.ground import LanewayGround, Stores
from servers import wait_until


def recovery(stores: Stores, store: str) -> dict[str, float]:
    """`seconds` from SIGKILL for the whole tree of the worker that runs a job to the re-run's first line.

    Default lease and beat. The scheduler and the worker that takes over run since before the kill.
    """
    with LanewayGround.on(stores, store) as site, site.ground.program("laneway-scheduler") as scheduler:
        site.enqueue(1, job_type="bench.hold")
        with site.ground.program("laneway-worker") as doomed:
            site.ground.wait_for_records(1, doomed, scheduler)
            with site.ground.program("laneway-worker") as heir:
                wait_until(lambda: site.living_workers() == 2, what="two workers live", evidence=heir.words)
                killed_at = time.monotonic_ns()
                doomed.kill()
                seen = site.ground.wait_for_records(2, heir, scheduler)
    (_, again_at) = seen.entries[1]
    return {"seconds": (again_at - killed_at) / 1e9}
