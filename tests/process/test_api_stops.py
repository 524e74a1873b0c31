"""An API that is told to stop: what it still answers, and when it goes."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from process.stack import Process, Stack


class Api:
    """`laneway api` that stays unready for ten minutes after SIGTERM."""

    def __init__(self, stack: Stack) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        command = [sys.executable, "-m", "laneway", "api", "--port", self.port]
        self.process: Process = stack.start("api", *command, LANEWAY_UNREADY_SECONDS="600")
        self.stack = stack
        stack.until(lambda: self.is_listening() and self.ask("GET", "/readyz")[0] == 200, what="it is ready")
        self.key = Path(stack.folder / "data" / "admin.key").read_text().strip()

    def is_listening(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def open(self, method: str, path: str, body: object = None, **headers: str) -> http.client.HTTPConnection:
        """A connection on which a request was sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if path.startswith("/api"):
            headers |= {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any, Any]:
        """Status, headers and JSON of an answer."""
        with closing(self.open(method, path, body)) as connection:
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())

    def stop(self) -> None:
        """Send the first SIGTERM."""
        self.process.send(signal.SIGTERM)
        self.stack.until(lambda: self.ask("GET", "/readyz")[0] == 503, what="it says that it is not ready")


@pytest.fixture
def api(stack: Stack) -> Api:
    return Api(stack)


NOOP = {"job_type": "demo.noop"}


def test_it_fails_its_readiness_first_and_answers_everything_meanwhile(api: Api) -> None:
    assert api.ask("POST", "/api/v1/jobs", NOOP)[1]["Connection"] is None
    api.stop()
    status, headers, answer = api.ask("GET", "/readyz")
    assert (status, answer["status"], answer["database"]) == (503, "draining", "ok")
    assert int(headers["Retry-After"]) > 0
    assert api.ask("GET", "/livez")[0] == 200, "nobody should kill it"
    status, headers, answer = api.ask("POST", "/api/v1/jobs", NOOP)
    assert (status, answer["status"]) == (202, "queued")
    assert headers["Connection"] == "close", "the next request goes elsewhere"


def test_when_it_closes_what_waits_is_answered_and_streams_end_whole(api: Api) -> None:
    _, _, job = api.ask("POST", "/api/v1/jobs", NOOP)
    told: list[bytes] = []
    answers: list[tuple[int, bytes]] = []
    path = f"/api/v1/jobs/{job['id']}"
    stream = api.open("GET", f"{path}/events").getresponse()
    assert stream.readline() == b"retry: 2000\n"
    waiting = api.open("GET", path, Prefer="wait=50")

    def wait() -> None:
        response = waiting.getresponse()
        answers.append((response.status, response.read()))

    threads = [threading.Thread(target=lambda: told.append(stream.read())), threading.Thread(target=wait)]
    for thread in threads:
        thread.start()
    api.stop()
    assert not answers, "not yet"
    api.process.send(signal.SIGTERM)
    assert api.process.wait() == 0, api.process.said()
    for thread in threads:
        thread.join()
    assert [(status, json.loads(body)["status"]) for status, body in answers] == [(200, "queued")]
    assert b"event: job.queued" in told[0], "read to its end: it was not cut"
    assert not api.is_listening()
    assert "Cancel" not in api.process.said()


def test_ctrl_c_ends_it_at_once(api: Api) -> None:
    api.process.send(signal.SIGINT)
    assert api.process.wait() == 0, api.process.said()
