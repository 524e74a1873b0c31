"""Secrets and payloads are in no log and in no error, whatever goes wrong; secrets are in no store either."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from canaries import found, secrets_in
from laneway.models import webhook_deliveries
from process.stack import Stack
from webhook_receiver import Exchange, Receiver

PAYLOAD = "canary-payload-3f9c13a8"
HEADER = "canary-header-71be02dd"
ANSWER = "canary-answer-9921c0fe"
QUERY = "canary-query-55d0aa17"
GUESSED = "lw_live_abcdefghijkl_" + "g" * 49


def answers(exchange: Exchange) -> None:
    """By the path: /200, /500, /410, or a redirect."""
    status = int(exchange.request.path[1:4])
    location = {"Location": f"http://127.0.0.1/{ANSWER}"} if status == 302 else {}
    exchange.answer(status, body=ANSWER.encode(), **location)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(answers) as listening:
        yield listening


def start_api(stack: Stack, **env: str) -> httpx.Client:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    stack.start("api", sys.executable, "-m", "laneway", "api", "--port", port, **env)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30)

    def ready() -> bool:
        try:
            return client.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    stack.until(ready, what="the API is ready")
    key = (stack.folder / "data" / "admin.key").read_text().strip()
    client.headers["Authorization"] = f"Bearer {key}"
    return client


def store_files(stack: Stack) -> list[Path]:
    """All that the store has on its disk."""
    if stack.database.dialect == "sqlite":
        return sorted(stack.folder.glob("laneway.db*"))
    with stack.database.read() as connection:
        folder = Path(connection.execute(sa.text("SHOW data_directory")).scalar_one())
        oid = connection.execute(
            sa.text("SELECT oid FROM pg_database WHERE datname = current_database()")
        ).scalar_one()
    with stack.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("CHECKPOINT"))
    return [
        path for part in (f"base/{oid}", "pg_wal") for path in (folder / part).rglob("*") if path.is_file()
    ]


def test_no_log_no_error_and_no_store_tells_a_secret(
    either_stack: Stack, receiver: Receiver, request: pytest.FixtureRequest
) -> None:
    stack = either_stack
    relaxed = {
        "LANEWAY_RATE_LIMITS": "off",
        "LANEWAY_WEBHOOK_ALLOW_HTTP": "1",
        "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
        "LANEWAY_LOG_LEVEL": "DEBUG",
        "LANEWAY_STATEMENT_SECONDS": "1",
    }
    api = start_api(stack, **relaxed)
    request.addfinalizer(api.close)
    stack.worker(**relaxed)
    stack.start("courier", sys.executable, "-m", "laneway", "courier", **relaxed).wait_for("courier_started")
    stack.scheduler(**relaxed)
    refused: list[str] = []

    def say(status: int, method: str, path: str, body: object = None, **headers: str) -> dict[str, object]:
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        answer = api.request(
            method, path, content=content, headers={"Content-Type": "application/json"} | headers
        )
        assert answer.status_code == status, answer.text
        if status >= 400:
            refused.append(answer.text)
        found: dict[str, object] = answer.json() if answer.content else {}
        return found

    # Secrets of all kinds
    endpoint = say(
        201,
        "POST",
        "/webhooks/endpoints",
        {
            "url": receiver.url("/200"),
            "event_types": ["job.*"],
            "headers": {"Authorization": f"Bearer {HEADER}"},
        },
    )
    rotated = say(200, "POST", f"/webhooks/endpoints/{endpoint['id']}/rotate-secret", {})
    say(202, "POST", f"/webhooks/endpoints/{endpoint['id']}/test", {})
    secrets = [
        str(endpoint["secret"]),
        str(rotated["secret"]),
        str(say(200, "GET", "/webhooks/secret")["secret"]),
        api.headers["Authorization"].removeprefix("Bearer "),
        HEADER,
        GUESSED,
    ]
    assert all(len(secret) > 16 for secret in secrets)

    # Jobs that end in every way, told to receivers of every kind
    given = {"parameters": {"card": PAYLOAD}, "metadata": {"card": PAYLOAD}, "title": PAYLOAD}
    ended = []
    for path in ("/200", "/302", "/410", "/500"):
        job = {"job_type": "demo.echo", "webhook_url": receiver.url(f"{path}?token={QUERY}")} | given
        ended.append(str(say(202, "POST", "/jobs", job)["id"]))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"http://127.0.0.1:{gone.getsockname()[1]}/?token={QUERY}"
    told = {"webhook_url": nobody, "max_retries": 0}
    complaint = {"job_type": "test.complain", "parameters": {"about": PAYLOAD}} | told
    ended.append(str(say(202, "POST", "/jobs", complaint)["id"]))
    for job_id in ended:
        stack.wait(job_id, "completed", "failed")

    # Requests that are refused
    say(401, "GET", "/jobs", Authorization=f"Bearer {GUESSED}")
    say(400, "POST", "/jobs", b'{"job_type": "demo.echo", "parameters": {"card": "%s"' % PAYLOAD.encode())
    say(422, "POST", "/jobs", {"job_type": "demo.sleep", "parameters": {"seconds": PAYLOAD}})
    say(422, "POST", "/jobs", {"job_type": "demo.echo", "priority": PAYLOAD, "webhook_url": 7})
    say(422, "POST", "/jobs", {"job_type": "demo.echo", "parameters": {"n": 10**40, "card": PAYLOAD}})
    say(422, "POST", "/webhooks/endpoints", {"url": receiver.url(), "headers": {"Cookie": HEADER}})

    # A store that does not answer in time
    if stack.database.dialect == "postgresql":
        with stack.database.write() as connection:
            connection.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            say(503, "POST", "/jobs", {"job_type": "demo.echo"} | given)

    # Every delivery was tried
    d = webhook_deliveries.c
    untried = sa.select(d.id).where(d.attempt_count == 0)
    stack.until(lambda: not stack.rows(untried), what="every delivery was tried", seconds=30)
    for process in stack.processes:
        process.kill()

    logs = sorted(stack.folder.glob("*.log"))
    assert len(logs) == 4
    assert sum(log.read_bytes().count(b"\n") for log in logs) > 10
    assert found(logs, [PAYLOAD, ANSWER, QUERY, *secrets]) == []
    assert secrets_in(logs) == []
    assert [text for text in refused for canary in (PAYLOAD, *secrets) if canary in text] == []
    assert len(refused) >= 6
    files = store_files(stack)
    assert found(files, secrets) == []
    assert found(files, [PAYLOAD])  # else nothing was looked at
