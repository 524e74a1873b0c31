"""What RQ's own tools see of a real worker, what they may ask of it, and a stock worker on our lanes."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
import rq_dashboard.web
import sqlalchemy as sa
from flask.testing import FlaskClient
from rq.command import send_kill_horse_command, send_shutdown_command, send_stop_job_command
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq_dashboard.cli import make_flask_app

from laneway.models import job_events
from process.stack import Process, Stack, is_alive
from servers import wait_until

HOOK = "https://hooks.example.com/jobs"  # no courier runs here: nothing is ever sent


def dashboard_of(stack: Stack) -> FlaskClient:
    app = make_flask_app(None, None, None, "")
    app.config["RQ_DASHBOARD_REDIS_URL"] = stack.redis_url
    rq_dashboard.web.setup_rq_connection(app)
    return app.test_client()


def get(dashboard: FlaskClient, path: str) -> Any:
    answer = dashboard.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json


def plain(stack: Stack) -> redis_py.Redis:
    """A client that answers bytes, as RQ's classes want it."""
    return redis_py.Redis.from_url(stack.redis_url)


def hold(stack: Stack, tmp_path: Path, **spec: Any) -> tuple[str, Path]:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate)}, **spec)
    stack.wait_for_file(ledger)
    return job_id, gate


def name_of(stack: Stack, worker: Process) -> str:
    with stack.redis() as redis:
        keys = stack.until(lambda: redis.smembers("rq:workers"), what="the worker shows itself")
        (key,) = [key for key in keys if redis.hget(key, "pid") == str(worker.pid)]
    return str(key.removeprefix("rq:worker:"))


def test_every_tool_shows_the_lanes_the_worker_and_its_job(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    running, gate = hold(stack, tmp_path, priority="high")
    waiting = {"critical": 1, "high": 3, "normal": 2, "low": 4}
    for priority, count in waiting.items():
        stack.enqueue_all([("demo.noop", {})] * count, priority=priority)
    name = name_of(stack, worker)

    assert stack.redis_cli("LLEN", "rq:queue:high") == "3"
    assert stack.redis_cli("SMEMBERS", "rq:workers") == f"rq:worker:{name}"
    with plain(stack) as redis:
        stack.until(
            lambda: StartedJobRegistry("high", connection=redis).get_job_ids(cleanup=False) == [running],
            what="RQ sees it as started",
        )
        job = Job.fetch(running, connection=redis)
        assert (job.get_status().value, job.worker_name) == ("started", name)

    worker_at = f"{socket.gethostname()} unknown {worker.pid}"
    said = stack.rq("info", "--raw")
    for priority, count in waiting.items():
        assert re.search(rf"^queue {priority} {count}\b", said, re.MULTILINE), said
    stack.until(
        lambda: f"{name} ({worker_at}) busy critical, high, normal, low. jobs" in stack.rq("info", "--raw"),
        what="rq info shows it busy",
    )
    dashboard = dashboard_of(stack)
    queues = {queue["name"]: queue for queue in get(dashboard, "/0/data/queues.json")["queues"]}
    assert {queue: queues[queue]["count"] for queue in waiting} == waiting
    assert queues["high"]["started_job_registry_count"] == 1
    (shown,) = get(dashboard, "/0/data/workers.json")["workers"]
    assert (shown["name"], shown["state"]) == (name, "busy")
    assert shown["queues"] == list(waiting)

    gate.touch()
    stack.until(lambda: stack.statuses() == {"completed": 11}, what="all are done")
    with plain(stack) as redis:
        stack.until(
            lambda: Job.fetch(running, connection=redis).get_status().value == "finished",
            what="RQ sees it as finished",
        )
        assert StartedJobRegistry("high", connection=redis).get_job_ids(cleanup=False) == []
    queues = {queue["name"]: queue for queue in get(dashboard, "/0/data/queues.json")["queues"]}
    assert [queues[queue]["count"] for queue in waiting] == [0, 0, 0, 0]
    assert queues["high"]["finished_job_registry_count"] == 4
    assert queues["high"]["started_job_registry_count"] == 0


def test_rq_suspend_pauses_taking_and_resume_ends_it(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    running, gate = hold(stack, tmp_path)
    name = name_of(stack, worker)
    stack.rq("suspend")
    with stack.redis() as redis:
        stack.until(lambda: redis.hget(f"rq:worker:{name}", "state") == "suspended", what="it has heard")
        gate.touch()
        stack.wait(running)
        waiting = stack.enqueue("demo.noop", priority="critical")
        redis.delete(f"rq:worker:{name}")
        stack.until(lambda: redis.exists(f"rq:worker:{name}"), what="it has looked again")
    assert stack.row(waiting)["status"] == "queued"
    stack.rq("resume")
    stack.wait(waiting)


def test_rqs_shutdown_command_drains(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    running, gate = hold(stack, tmp_path)
    name = name_of(stack, worker)
    with plain(stack) as redis:
        send_shutdown_command(redis, name)
    worker.wait_for("worker_draining")
    assert stack.row(running)["status"] == "running"
    gate.touch()
    assert worker.wait() == 0
    assert stack.row(running)["status"] == "completed"


def test_rqs_commands_to_stop_a_job_are_ignored(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    running, gate = hold(stack, tmp_path)
    name = name_of(stack, worker)
    with plain(stack) as redis:
        send_kill_horse_command(redis, name)
        send_stop_job_command(redis, running)
        for message in ("no json", "[]", "1", '{"command": ["x"]}', '{"command": "stop-execution"}', "{}"):
            redis.publish(f"rq:pubsub:{name}", message)
        worker.wait_for("rq_command_ignored", times=4)
        gate.touch()
        row = stack.wait(running)
        assert (row["attempt"], stack.events(running)) == (1, ["create", "claim", "complete"])
        send_shutdown_command(redis, name)
    assert worker.wait() == 0, "it still listens"


def what_is_left(stack: Stack, job_ids: list[str]) -> list[Any]:
    """All that a run leaves behind of each job, as far as it does not name times and workers."""
    left = []
    webhooks = dict(stack.webhooks())
    for job_id in job_ids:
        row = stack.row(job_id)
        events = stack.rows(
            sa.select(job_events).where(job_events.c.job_id == job_id).order_by(job_events.c.seq)
        )
        same = ("status", "result", "progress", "progress_message", "progress_details", "attempt")
        counts = ("retry_count", "crash_count", "dead_letter_reason")
        left.append(
            {
                **{name: row[name] for name in (*same, *counts)},
                "error": row["error"] and {k: v for k, v in row["error"].items() if k != "traceback"},
                "traced": bool(row["error"] and row["error"]["traceback"]),
                "events": [(e["seq"], e["action"], e["status"], e["attempt"]) for e in events],
                "actors": {e["actor"].partition(":")[0] for e in events},
                "webhook": webhooks.get(job_id),
            }
        )
    return left


PRIORITIES = ("critical", "high", "normal", "low")


def fifty_jobs(stack: Stack, folder: Path) -> list[str]:
    """Some of every ending, and notes of every priority, which write a ledger."""
    folder.mkdir()
    gate = folder / "gate"
    gate.touch()
    reports = [[10, "first", None], [60, "last", {"page": 4}]]
    endings: list[tuple[str, dict[str, Any]]] = [
        ("test.endless", {"how": "exception", "ledger": str(folder / "endless")}),
        ("demo.fail", {"kind": "permanent"}),
        ("demo.fail", {"kind": "transient", "times": 9}),
        ("test.result", {"kind": "nan"}),
        ("test.progress", {"reports": reports, "gate": str(gate)}),
        *[("demo.echo", {"n": n, "text": "é"}) for n in range(9)],
    ]
    # First of all, while the pool still takes one at a time: it would claim some twice to hand them back.
    how = {"webhook_url": HOOK, "timeout_seconds": 1, "max_retries": 0, "priority": "critical"}
    ids = stack.enqueue_all(endings, **how)
    for priority in reversed(PRIORITIES):
        notes = [
            ("test.note", {"ledger": str(folder / "ledger"), "text": f"{priority} {n}"}) for n in range(9)
        ]
        ids += stack.enqueue_all(notes, priority=priority)
    return ids


def test_a_stock_worker_does_what_the_pool_does(stack: Stack, tmp_path: Path) -> None:
    by_pool = fifty_jobs(stack, tmp_path / "pool")
    stack.worker("--burst", ready=False).wait()
    by_stock = fifty_jobs(stack, tmp_path / "stock")
    assert stack.stock_worker(*PRIORITIES, burst=True).wait(120) == 0
    for one, other in zip(what_is_left(stack, by_pool), what_is_left(stack, by_stock), strict=True):
        assert one == other, stack.evidence()
    for folder in ("pool", "stock"):
        lines = (tmp_path / folder / "ledger").read_text().splitlines()
        assert lines == [f"{priority} {n}" for priority in PRIORITIES for n in range(9)], folder
    assert [row["state"] for row in stack.worker_rows()] == ["gone"] * 51
    with plain(stack) as redis:
        jobs = [Job.fetch(job_id, connection=redis) for job_id in by_stock[:14]]
        assert [job.get_status().value for job in jobs] == ["failed"] * 4 + ["finished"] * 10
        assert jobs[5].return_value() == {"n": 0, "text": "é"}


@pytest.mark.parametrize("ask", [{"grace_seconds": 0.1}, {"terminate": True}])
def test_a_cancel_reaches_a_stock_worker(stack: Stack, tmp_path: Path, ask: dict[str, Any]) -> None:
    stack.stock_worker("normal")
    running, _ = hold(stack, tmp_path)
    stack.cancel(running, **ask)
    row = stack.wait(running, "cancelled", seconds=10)
    assert (row["attempt"], stack.events(running)) == (1, ["create", "claim", "stop"])
    stack.wait(stack.enqueue("demo.noop"), seconds=30)


def test_a_stock_worker_shows_progress_while_it_runs_and_kills_what_outstays(
    stack: Stack, tmp_path: Path
) -> None:
    stack.stock_worker("normal")
    gate = tmp_path / "gate"
    reports = [[10, "a", None], [20, "b", None]]
    running = stack.enqueue("test.progress", {"reports": reports, "gate": str(gate)})
    stack.until(lambda: stack.row(running)["progress_message"] == "b", what="the last report arrives")
    gate.touch()
    stack.wait(running)
    endless = {"how": "base", "ledger": str(tmp_path / "ledger")}
    hung = stack.enqueue("test.endless", endless, timeout_seconds=1, max_retries=0)
    row = stack.wait(hung, "timeout")
    assert (row["attempt"], row["dead_letter_reason"]) == (1, "timeout")
    stack.wait(stack.enqueue("demo.noop"), seconds=30)


def test_what_outstays_its_timeout_on_a_stock_worker_is_killed_also_while_the_store_is_away(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    with Stack(postgres_url, redis_url, tmp_path) as stack:
        stack.env |= {"LANEWAY_LEASE_SECONDS": "600", "LANEWAY_STATEMENT_SECONDS": "1"}
        stack.stock_worker("normal")
        stack.enqueue("test.endless", {"how": "base", "ledger": str(ledger)}, timeout_seconds=1)
        (line,) = stack.wait_for_file(ledger)
        with stack.database.write() as connection:
            connection.execute(sa.text("LOCK TABLE workers, jobs IN ACCESS EXCLUSIVE MODE"))
            wait_until(lambda: not is_alive(int(line.split()[1])), what="its process is dead", seconds=30)
