"""A deploy as clients see it: every process is told to stop in turn and started again, under load.

The clients are what stands behind a load balancer: it probes `/readyz`, sends to what is ready, and may
send a request elsewhere only when no byte of it was sent. A request that was sent must be answered.
`ROLLING_RESTARTS=20` restarts more than CI has time for: every process twice and more.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from laneway.models import jobs, webhook_attempts, webhook_deliveries
from process.stack import Process, Stack
from webhook_receiver import Receiver

RESTARTS = int(os.environ.get("ROLLING_RESTARTS", "4"))
CLIENTS = 3
PROBE_SECONDS = 0.1
PAUSE_SECONDS = 0.03  # between two requests of one client
SETTINGS = {
    "LANEWAY_UNREADY_SECONDS": "1",
    "LANEWAY_DRAIN_SECONDS": "1",
    "LANEWAY_RATE_LIMITS": "off",
    "LANEWAY_WEBHOOK_ALLOW_HTTP": "true",
    "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
    "LANEWAY_WEBHOOK_ALLOWED_PORTS": "*",
}


class Balancer:
    """Knows which of two APIs is ready."""

    def __init__(self) -> None:
        self.ports = (free_port(), free_port())
        self.ready: set[int] = set()
        self.stopping = threading.Event()
        self._threads = [threading.Thread(target=self._probe, args=(port,)) for port in self.ports]

    def __enter__(self) -> Balancer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    def _probe(self, port: int) -> None:
        while not self.stopping.wait(PROBE_SECONDS):
            try:
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                    connection.request("GET", "/readyz")
                    ready = connection.getresponse().status == 200
            except OSError:
                ready = False
            (self.ready.add if ready else self.ready.discard)(port)


class Client(threading.Thread):
    """Sends requests over connections that it keeps, until it is told to stop."""

    def __init__(self, balancer: Balancer, key: str, hook: str) -> None:
        super().__init__()
        self.accepted: list[str] = []
        self.answers: Counter[int] = Counter()
        self.failures: list[str] = []
        self._balancer = balancer
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._hook = hook
        self._connections: dict[int, http.client.HTTPConnection] = {}
        self._rng = random.Random(1)

    def run(self) -> None:
        while not self._balancer.stopping.wait(PAUSE_SECONDS):
            if self.accepted and self._rng.random() < 0.3:
                self._send("GET", f"/api/v1/jobs/{self._rng.choice(self.accepted)}")
            else:
                extra = {"webhook_url": self._hook} if self._rng.random() < 0.2 else {}
                job = {"job_type": "demo.sleep", "parameters": {"seconds": 0.02, "steps": 1}, **extra}
                answer = self._send("POST", "/api/v1/jobs", json.dumps(job))
                if answer:
                    self.accepted.append(answer["id"])
        for connection in self._connections.values():
            connection.close()

    def _send(self, method: str, path: str, body: str | None = None) -> dict[str, Any] | None:
        connection = self._connect()
        if connection is None:
            return None
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.failures.append(f"{method} to {connection.port}: {error!r}")
            connection.close()
            return None
        self.answers[response.status] += 1
        if response.status < 300:
            return dict(json.loads(data))
        if response.status != 503 or not response.headers["Retry-After"]:
            self.failures.append(f"{method}: {response.status} {data[:300]!r}")
        return None

    def _connect(self) -> http.client.HTTPConnection | None:
        """A connection to an API that is ready, of those kept if possible."""
        for port in set(self._connections) - self._balancer.ready:
            self._connections.pop(port).close()
        ready = sorted(self._balancer.ready)
        self._rng.shuffle(ready)
        for port in ready:
            connection = self._connections.get(port) or http.client.HTTPConnection(
                "127.0.0.1", port, timeout=20
            )
            try:
                if connection.sock is None:
                    connection.connect()
            except ConnectionRefusedError:
                continue  # nothing was sent
            self._connections[port] = connection
            return connection
        return None


class Follower(threading.Thread):
    """Follows one job's events to its end, on another API whenever a stream ends."""

    def __init__(self, balancer: Balancer, key: str, job_id: str) -> None:
        super().__init__()
        self.events: list[str] = []
        self.streams = 0
        self.failures: list[str] = []
        self._balancer = balancer
        self._key = key
        self._path = f"/api/v1/jobs/{job_id}/events"

    def run(self) -> None:
        last = ""
        while "job.completed" not in self.events and not self._balancer.stopping.is_set():
            for port in list(self._balancer.ready)[:1]:
                headers = {"Authorization": f"Bearer {self._key}", "Last-Event-ID": last}
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                    try:
                        connection.request("GET", self._path, headers=headers)
                        self.streams += 1
                        for line in connection.getresponse():
                            name, _, value = line.decode().rstrip("\n").partition(": ")
                            last = value if name == "id" else last
                            if name == "event":
                                self.events.append(value)
                    except (OSError, http.client.HTTPException) as error:
                        self.failures.append(repr(error))
            self._balancer.stopping.wait(PROBE_SECONDS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def balancer() -> Iterator[Balancer]:
    with Balancer() as running:
        yield running


def start(stack: Stack, balancer: Balancer, role: str) -> Process:
    """A process of the fleet, ready to serve: `api 0`, `worker 1`, …"""
    kind, number = role.split()
    if kind == "worker":
        return stack.worker(concurrency=2, **SETTINGS)
    if kind == "scheduler":
        return stack.scheduler(**SETTINGS)
    command = [sys.executable, "-m", "laneway", kind]
    if kind == "courier":
        process = stack.start(kind, *command, **SETTINGS)
        process.wait_for("courier_started")
        return process
    port = balancer.ports[int(number)]
    process = stack.start(kind, *command, "--port", port, **SETTINGS)
    stack.until(lambda: port in balancer.ready, what=f"the API on {port} is ready")
    return process


@pytest.mark.timeout(120 + 15 * RESTARTS)
def test_a_rolling_restart_fails_no_request_and_charges_no_attempt(
    either_stack: Stack, balancer: Balancer, tmp_path: Path
) -> None:
    stack, gate = either_stack, tmp_path / "gate"
    roles = [f"{kind} {number}" for number in (0, 1) for kind in ("api", "worker", "scheduler", "courier")]
    with Receiver() as receiver:
        fleet = {role: start(stack, balancer, role) for role in roles}
        key = (tmp_path / "data" / "admin.key").read_text().strip()
        held = json.dumps(
            {"job_type": "test.hold", "parameters": {"ledger": str(tmp_path / "held"), "gate": str(gate)}}
        )
        clients = [Client(balancer, key, receiver.url()) for _ in range(CLIENTS)]
        first = clients[0]._send("POST", "/api/v1/jobs", held)
        assert first
        follower = Follower(balancer, key, first["id"])
        threads: list[threading.Thread] = [*clients, follower]
        for thread in threads:
            thread.start()
        took: list[float] = []
        for turn in range(RESTARTS):
            role = roles[turn % len(roles)]
            began = time.monotonic()
            fleet[role].send(signal.SIGTERM)
            assert fleet[role].wait() == 0, fleet[role].said()
            fleet[role] = start(stack, balancer, role)
            took.append(time.monotonic() - began)
        gate.touch()
        stack.wait(first["id"])
        stack.until(lambda: "job.completed" in follower.events, what="the stream told of the end")
        balancer.stopping.set()
        for thread in threads:
            thread.join()
        accepted = [first["id"], *(job_id for client in clients for job_id in client.accepted)]
        stack.wait_all(accepted, seconds=60)
        deliveries = sa.select(sa.func.count().label("n")).where(webhook_deliveries.c.status != "delivered")
        stack.until(lambda: not stack.rows(deliveries)[0]["n"], what="every webhook is delivered", seconds=60)

    answers = sum((client.answers for client in clients), Counter())
    print(
        f"{RESTARTS} restarts, slowest {max(took):.1f} s; answers {dict(answers)}; {follower.streams} streams"
    )
    assert [failure for thread in [*clients, follower] for failure in thread.failures] == []
    assert set(answers) <= {200, 202, 503}
    assert answers[202] > 20 * RESTARTS, "there was load"
    charged = sa.select(jobs.c.id).where(sa.or_(jobs.c.retry_count > 0, jobs.c.crash_count > 0))
    assert stack.rows(charged) == []
    tries = sa.select(sa.func.count().label("n"), sa.func.max(webhook_attempts.c.number).label("most"))
    (sent,) = stack.rows(tries.select_from(webhook_attempts))
    assert (sent["n"], sent["most"]) == (len(receiver.requests), 1), "none was sent twice"
    assert follower.streams >= 1
    assert follower.events[-1] == "job.completed"
