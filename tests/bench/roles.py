"""What the measured processes run: `python -m bench.roles ROLE …`.

The workers are built as `laneway worker` and `rq worker` build them, with their default settings and
log levels; the job functions are imported before the first fork on both sides, as RQ's documentation
recommends. Both APIs get the same server options, those of `laneway api`.
"""

from __future__ import annotations

import cProfile
import socket
import sys
from typing import Any


def laneway_worker(profile: str = "") -> int:
    """A pool of two children. With `profile`, under cProfile, whose figures go to that file."""
    from laneway import log
    from laneway.settings import get_settings
    from laneway.worker.pool import PoolWorker

    log.configure()
    pool = PoolWorker(get_settings(), queues=["default"], concurrency=2)
    if not profile:
        return pool.run()
    profiler = cProfile.Profile()
    try:
        return profiler.runcall(pool.run)
    finally:
        profiler.dump_stats(profile)


def laneway_scheduler() -> int:
    from laneway.cli import processes

    processes.scheduler()
    return 0


def laneway_api(listener: str) -> int:
    from laneway import log
    from laneway.api.app import create_app

    log.configure()
    return _serve(create_app(), listener)


def bare_api(listener: str, redis_url: str) -> int:
    from bench import bare

    return _serve(bare.create_app(redis_url), listener)


def rq_worker(kind: str, redis_url: str) -> int:
    import redis
    import rq

    import bench.records  # noqa: F401 - so that no work horse has to

    connection = redis.Redis.from_url(redis_url)
    workers = {"Worker": rq.Worker, "SimpleWorker": rq.SimpleWorker}
    workers[kind](["default"], connection=connection).work(logging_level="INFO")
    return 0


def rq_pool(redis_url: str) -> int:
    import redis
    import rq
    from rq.worker_pool import WorkerPool

    import bench.records  # noqa: F401 - as above

    connection = redis.Redis.from_url(redis_url)
    WorkerPool(["default"], connection=connection, num_workers=2, worker_class=rq.SimpleWorker).start()
    return 0


def _serve(app: Any, listener: str) -> int:
    import uvicorn

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(listener))])
    return 0


ROLES = {
    role.__name__.replace("_", "-"): role
    for role in (laneway_worker, laneway_scheduler, laneway_api, bare_api, rq_worker, rq_pool)
}

if __name__ == "__main__":
    sys.exit(ROLES[sys.argv[1]](*sys.argv[2:]))
