"""Many jobs by one call: accepted a second, against single posts; drained a second, against loose jobs."""

from __future__ import annotations

import json
import time
from contextlib import closing

from bench import over_http
from bench.client import Connection
from bench.ground import LanewayGround, Stores
from laneway.engine import batches
from laneway.engine.access.callers import Caller, Role
from laneway.engine.batches import BatchSpec


def accepted(stores: Stores, store: str, *, jobs: int) -> dict[str, float]:
    """`rate` of jobs that one `POST /batches` had committed when it was answered."""
    with LanewayGround.on(stores, store) as site, over_http.listening() as listener:
        key = site.key()
        program = site.ground.program("laneway-api", str(listener.fileno()), pass_fds=[listener.fileno()])
        with program as api, closing(Connection(listener.getsockname()[1])) as connection:
            over_http.need_accepted(api, connection.exchange(_request(1, key=key)))  # warms up
            message = _request(jobs, key=key)
            began = time.monotonic()
            over_http.need_accepted(api, connection.exchange(message))
            took = time.monotonic() - began
        assert site.count() == jobs + 1
    return {"rate": jobs / took}


def posted(stores: Stores, store: str, *, seconds: float) -> dict[str, float]:
    """The same of single posts over 32 connections."""
    return {"rate": over_http.laneway_throughput(stores, store, seconds=seconds)["rate"]}


def drained(stores: Stores, store: str, *, jobs: int, together: bool) -> dict[str, float]:
    """`rate` of jobs that were queued before the worker started: one batch, or none of any."""
    with LanewayGround.on(stores, store) as site:
        if together:
            _enqueue(site, jobs)
        else:
            site.enqueue(jobs)
        with site.ground.program("laneway-worker", "") as worker:
            seen = site.ground.wait_for_records(jobs, worker)
            site.wait_until_settled(worker)
        seen.need_each_once(jobs)
        site.need_all_completed_once(jobs)
    return {"rate": seen.rate}


def _enqueue(site: LanewayGround, jobs: int) -> None:
    caller = Caller(site.tenant_id, "bench", Role.USER)
    for first in range(0, jobs, batches.MAX_JOBS):
        numbers = range(first, min(jobs, first + batches.MAX_JOBS))
        wanted = ((f"/items/{number}", {"parameters": {"number": number}}) for number in numbers)
        draft = batches.check(site.service, BatchSpec(job_type="bench.record"), wanted, caller)
        batches.make(site.service, draft, caller)


def _request(jobs: int, *, key: str) -> bytes:
    body = json.dumps(
        {"job_type": "bench.record", "items": [{"number": number} for number in range(jobs)]}
    ).encode()
    lines = [
        "POST /api/v1/batches HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Authorization: Bearer {key}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
