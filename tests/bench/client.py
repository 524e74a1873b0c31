"""A load generator: `python -m bench.client` reads a plan (JSON) from standard input, prints what it saw.

Raw sockets, one request in flight on each kept-alive connection, some 15 microseconds of its own CPU a
request: HTTP libraries of Python cost more than the servers that are measured here.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections import Counter
from typing import Any

from bench.figures import percentile

PATIENCE_SECONDS = 60.0


def request(path: str, number: int, *, key: str = "") -> bytes:
    """A POST of a small job, as bytes."""
    body = json.dumps(
        {
            "job_type": "bench.record",
            "parameters": {"number": number},
            "priority": "normal",
            "title": "Benchmark",
            "tags": ["bench"],
            "metadata": {"order": "A-1"},
            "timeout_seconds": 60,
            "max_retries": 3,
        }
    ).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class Connection:
    """One kept-alive connection, with at most one request in flight."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_ns = 0
        self._received = b""

    def send(self, message: bytes) -> None:
        self.sent_ns = time.monotonic_ns()
        self.socket.sendall(message)

    def receive(self) -> int | None:
        """Receive once. The status of the response when it is whole."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return None
        self._received = b""
        return int(head[9:12])

    def close(self) -> None:
        self.socket.close()

    def exchange(self, message: bytes) -> int:
        """Send a request and wait for its response's status."""
        self.send(message)
        while (status := self.receive()) is None:
            pass
        return status


def generate(
    *, port: int, message: bytes, connections: int, warm_up_seconds: float, seconds: float
) -> dict[str, Any]:
    """Keep `connections` requests in flight; measure `seconds` after the warm-up.

    `rate` counts the answers in that time. The waits are of the requests sent in it, also of those still in
    flight at its end, so that a stall at the end is seen. `statuses` has every request that was sent.
    """
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(message)
    start = time.monotonic_ns() + int(warm_up_seconds * 1e9)
    stop = start + int(seconds * 1e9)
    in_flight = connections
    statuses: Counter[int] = Counter()
    answered = 0
    waits: list[int] = []
    while in_flight:
        ready = selector.select(PATIENCE_SECONDS)
        if not ready:
            raise TimeoutError("no response")
        for key, _ in ready:
            status = key.data.receive()
            if status is None:
                continue
            now = time.monotonic_ns()
            statuses[status] += 1
            answered += start <= now < stop
            if key.data.sent_ns >= start:
                waits.append(now - key.data.sent_ns)
            if now < stop:
                key.data.send(message)
            else:
                in_flight -= 1
    assert waits, "no request was sent and answered after the warm-up"
    waits.sort()
    return {
        "statuses": statuses,
        "rate": answered / seconds,
        "p50_ms": percentile(waits, 0.5) / 1e6,
        "p99_ms": percentile(waits, 0.99) / 1e6,
    }


if __name__ == "__main__":
    plan = json.load(sys.stdin)
    plan["message"] = plan["message"].encode()
    json.dump(generate(**plan), sys.stdout)
