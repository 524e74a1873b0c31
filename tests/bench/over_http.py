"""POST: how many a second, and how long until the handler's first line."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from bench.client import PATIENCE_SECONDS, Connection, request
from bench.figures import percentile
from bench.ground import Ground, LanewayGround, RqGround, Stores
from bench.programs import Program, command, environment

CONNECTIONS = 32
WARM_UP_SECONDS = 1.0
PAUSE_SECONDS = 0.02


def laneway_throughput(stores: Stores, store: str, *, seconds: float) -> dict[str, float]:
    """`rate`, `p50_ms`, `p99_ms` of jobs that are checked, authorised, counted, committed and pushed."""
    with LanewayGround.on(stores, store) as site, listening() as listener:
        key = site.key()
        with site.ground.program("laneway-api", str(listener.fileno()), pass_fds=[listener.fileno()]) as api:
            seen, accepted = _load(api, listener, "/api/v1/jobs", seconds=seconds, key=key)
        assert site.count() == accepted, f"{accepted} accepted, {site.count()} rows"
        depth = site.service.lanes.depths(["normal"])["normal"]
        assert depth == accepted, f"{accepted} accepted, {depth} ids in the lane"
    return seen


def bare_throughput(stores: Stores, *, seconds: float) -> dict[str, float]:
    """The same of an endpoint that only calls `Queue.enqueue`."""
    with RqGround.on(stores) as site, listening() as listener:
        role = ("bare-api", str(listener.fileno()), site.url)
        with site.ground.program(*role, pass_fds=[listener.fileno()]) as api:
            seen, accepted = _load(api, listener, "/jobs", seconds=seconds)
        assert site.queue.count == accepted, f"{accepted} accepted, {site.queue.count} in the queue"
    return seen


def laneway_latency(stores: Stores, store: str, *, count: int) -> dict[str, float]:
    """`p50_ms` and `p99_ms` from the first byte sent to the handler's first line, with an idle worker."""
    with LanewayGround.on(stores, store) as site, listening() as listener:
        key = site.key()
        api = site.ground.program("laneway-api", str(listener.fileno()), pass_fds=[listener.fileno()])
        with api, site.ground.program("laneway-worker") as worker:
            return _latency(site.ground, worker, listener, "/api/v1/jobs", count=count, key=key)


def bare_latency(stores: Stores, *, count: int) -> dict[str, float]:
    """The same of the bare endpoint and RQ's forking worker."""
    with RqGround.on(stores) as site, listening() as listener:
        role = ("bare-api", str(listener.fileno()), site.url)
        api = site.ground.program(*role, pass_fds=[listener.fileno()])
        with api, site.ground.program("rq-worker", "Worker", site.url) as worker:
            return _latency(site.ground, worker, listener, "/jobs", count=count)


@contextmanager
def listening() -> Iterator[socket.socket]:
    """A listening socket to hand to a server: connections wait in its backlog until the server is up."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        yield listener


def _load(
    api: Program, listener: socket.socket, path: str, *, seconds: float, key: str = ""
) -> tuple[dict[str, float], int]:
    """What the load generator measured, and how many jobs were accepted in all."""
    port = listener.getsockname()[1]
    message = request(path, 0, key=key)
    with closing(Connection(port)) as first:
        need_accepted(api, first.exchange(message))  # waits for the server's start
    plan = {
        "port": port,
        "message": message.decode(),
        "connections": CONNECTIONS,
        "warm_up_seconds": WARM_UP_SECONDS,
        "seconds": seconds,
    }
    ran = subprocess.run(
        command("bench.client"),
        input=json.dumps(plan),
        env=environment({}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS + 2 * seconds,
    )
    seen: dict[str, Any] = json.loads(ran.stdout)
    statuses = seen.pop("statuses")
    assert set(statuses) == {"202"}, f"{statuses}\n{api.words()}"
    return seen, statuses["202"] + 1


def _latency(
    ground: Ground, worker: Program, listener: socket.socket, path: str, *, count: int, key: str = ""
) -> dict[str, float]:
    """Each request starts PAUSE_SECONDS after the job before it began, so that the worker is idle again.

    The first one only warms up.
    """
    sent: list[int] = []
    with closing(Connection(listener.getsockname()[1])) as connection:
        for number in range(count + 1):
            need_accepted(worker, connection.exchange(request(path, number, key=key)))
            sent.append(connection.sent_ns)
            ground.wait_for_records(number + 1, worker)
            threading.Event().wait(PAUSE_SECONDS)
    seen = ground.wait_for_records(count + 1, worker)
    seen.need_each_once(count + 1)
    waits = sorted(at - sent[number] for number, at in seen.entries if number > 0)
    return {"p50_ms": percentile(waits, 0.5) / 1e6, "p99_ms": percentile(waits, 0.99) / 1e6}


def need_accepted(program: Program, status: int) -> None:
    assert status == 202, f"status {status}\n{program.words()}"
