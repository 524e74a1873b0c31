"""HTTP jobs with real workers and a real target: each answer, the work that goes on there, and kills."""

from __future__ import annotations

import json
import signal
import threading
from collections import defaultdict
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from api_client import LocalApi
from laneway.domain.http_target import REMOTE_WORKER
from laneway.engine.access.callers import Caller, Role
from laneway.engine.history import attempts
from laneway.models import workers
from laneway.settings import Settings
from laneway.webhooks.signing import verify_webhook
from process.stack import Stack
from servers import wait_until
from webhook_receiver import Exchange, Receiver

OPEN = {"LANEWAY_WEBHOOK_ALLOW_HTTP": "1", "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8"}
HUSH = "Bearer hush-7f3a"


class Ground:
    """A stack, its API in this process, and a target that answers as its path says: `/x/503/200`."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.settings = Settings(
            database_url=stack.settings.database_url,
            redis_url=stack.redis_url,
            data_dir=stack.settings.data_dir,
            webhook_allow_http=True,
            webhook_allowed_cidrs=("127.0.0.0/8",),
        )
        self.calls: dict[str, list[Any]] = defaultdict(list)

    def __enter__(self) -> Ground:
        self.api = LocalApi(self.settings).__enter__()
        self.stack.caller = Caller(self.api.tenant_id, "alice", Role.USER)
        self.target = Receiver(self._answer).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.target.__exit__()
        self.api.__exit__()

    def _answer(self, exchange: Exchange) -> None:
        request = exchange.request
        answers = request.path.strip("/").split("/")[1:]
        calls = self.calls[request.path]
        calls.append(request)
        status = int(answers[min(len(calls), len(answers)) - 1])
        fields = {"Retry_After": "1"} if status == 429 else {}
        if status == 307:
            fields["Location"] = self.target.url("/elsewhere/200")
        exchange.answer(status, body=b'{"seen":true}', Content_Type="application/json", **fields)

    def make(self, path: str, **fields: Any) -> str:
        target = {"url": self.target.url(path), "headers": {"Authorization": HUSH}, "body": {"path": path}}
        fast = {"retry_delay_seconds": 0.05, "retry_jitter": False}
        response = self.api.post("/jobs", json={"target": target, **fast, **fields})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def call(self, path: str, number: int = 1) -> httpx.Headers:
        """The headers of a call of this path, as soon as it came."""
        self.stack.until(lambda: len(self.calls[path]) >= number, what=f"call {number} of {path}")
        return httpx.Headers(self.calls[path][number - 1].headers)

    def handed_over(self, job_id: str) -> None:
        self.stack.until(
            lambda: self.stack.row(job_id)["worker_id"] == REMOTE_WORKER, what=f"{job_id} is at its target"
        )

    def report(self, headers: httpx.Headers, what: str, **body: Any) -> httpx.Response:
        path = f"/jobs/{headers['laneway-job-id']}/{what}"
        return self.api.post(path, key=headers["laneway-job-token"], json=body)

    def errors(self, job_id: str) -> list[str]:
        shown, _ = attempts(self.api_service, job_id, self.stack.caller, limit=10, cursor=None)
        return [f"{each['outcome']}: {(each['error'] or {}).get('message')}" for each in shown]

    @property
    def api_service(self) -> Any:
        return self.api.app.state.runtime.service

    def check_silence(self) -> None:
        """No log and no row tells a header's value, a token or a secret."""
        tokens = [call.headers["laneway-job-token"] for calls in self.calls.values() for call in calls]
        for process in self.stack.processes:
            said = process.log.read_text(errors="replace")
            assert HUSH not in said
            assert not [token for token in tokens if token.rpartition(".")[2] in said]


def test_each_answer_makes_of_the_job_what_the_reference_says(either_stack: Stack) -> None:
    with Ground(either_stack) as ground:
        stack = either_stack
        stack.scheduler(**OPEN)
        stack.worker(concurrency=2, **OPEN)
        done = ground.make("/done/200")
        busy = ground.make("/busy/429/503/200")
        refused = ground.make("/refused/404")
        moved = ground.make("/moved/307")
        spent = ground.make("/spent/500", max_retries=1)
        goes_on = ground.make("/goes-on/202")
        fails = ground.make("/fails/202/202/200")
        silent = ground.make("/silent/202", timeout_seconds=1, max_retries=0)
        unwanted = ground.make("/unwanted/202")

        # The work goes on at the target: progress, then its end; a failure, then another attempt
        call = ground.call("/goes-on/202")
        ground.handed_over(goes_on)
        assert ground.report(call, "progress", percent=40, message="half-way").json()["progress"] == 40
        assert ground.api.get(f"/jobs/{goes_on}").json()["status_reason"] == "waits_for_report"
        assert ground.report(call, "complete", result={"sent": 7}).status_code == 200
        first = ground.call("/fails/202/202/200")
        assert ground.report(first, "fail", message="no paper", retry_after_seconds=0).status_code == 200
        second = ground.call("/fails/202/202/200", 2)
        assert second["laneway-attempt"] == "2"
        late = ground.report(first, "complete", result="late")
        assert (late.status_code, late.json()["facts"]["attempt"]) == (409, 2)
        assert ground.report(call, "fail").status_code == 409
        assert ground.report(second, "fail", retry_after_seconds=0).status_code == 200

        ground.handed_over(unwanted)
        ground.api.post(f"/jobs/{unwanted}/cancel", json={"grace_seconds": 0})
        assert json.loads(_text(stack.wait(done)["result"]))["body"] == {"seen": True}
        assert stack.wait(busy)["retry_count"] == 2
        assert stack.wait(refused, "failed")["dead_letter_reason"] == "permanent"
        assert stack.wait(moved, "failed")["dead_letter_reason"] == "permanent"
        assert stack.wait(spent, "failed")["dead_letter_reason"] == "exhausted"
        assert json.loads(_text(stack.wait(goes_on)["result"])) == {"sent": 7}
        assert stack.wait(fails)["attempt"] == 3
        stack.wait(silent, "timeout")
        stack.wait(unwanted, "cancelled")
        assert "/elsewhere/200" not in ground.calls

        errors = ground.errors(busy)
        assert [error.split(":")[0] for error in errors] == ["failed", "failed", "completed"]
        assert 'the target answered 429: {"seen":true}' in errors[0]
        [request] = ground.calls["/done/200"]
        assert request.headers["authorization"] == HUSH
        secret = ground.api.get("/webhooks/secret", key=ground.api.key(Role.OPERATOR)).json()["secret"]
        assert verify_webhook(request.body, request.headers, secret) == {"path": "/done/200"}
        ground.check_silence()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_a_job_at_its_target_outlives_its_worker_and_occupies_no_child(stack: Stack) -> None:
    with Ground(stack) as ground:
        stack.scheduler(LANEWAY_LEASE_SECONDS="3", **OPEN)
        worker = stack.worker(LANEWAY_LEASE_SECONDS="3", **OPEN)
        jobs = [ground.make("/long/202") for _ in range(3)]
        for job_id in jobs:  # one child took all of them
            ground.handed_over(job_id)
        stack.wait(stack.enqueue("demo.noop"))
        worker.send(signal.SIGKILL)
        worker.wait()
        dead = sa.select(workers.c.state).where(workers.c.pid == worker.pid)
        stack.until(lambda: stack.rows(dead)[0]["state"] == "dead", what="the worker is declared dead")
        assert stack.statuses() == {"running": 3, "completed": 1}
        for number in range(1, 4):
            assert ground.report(ground.call("/long/202", number), "complete").status_code == 200
        stack.wait_all(jobs)
        assert [stack.events(job_id) for job_id in jobs] == [["create", "claim", "complete"]] * 3
        assert len(ground.calls["/long/202"]) == 3


def test_a_worker_that_dies_before_it_handed_over_is_replaced_and_the_old_attempt_is_refused(
    stack: Stack,
) -> None:
    with Ground(stack) as ground:
        reached, go = threading.Event(), threading.Event()

        def wait_at_first(exchange: Exchange) -> None:
            if exchange.number == 1:
                reached.set()
                go.wait(30)
            ground._answer(exchange)

        ground.target.mode = wait_at_first
        stack.scheduler(LANEWAY_LEASE_SECONDS="3", **OPEN)
        worker = stack.worker(LANEWAY_LEASE_SECONDS="3", **OPEN)
        job_id = ground.make("/jobs/202")
        assert reached.wait(20)
        worker.kill()  # the target is at work, and nobody has heard of it
        go.set()
        first = httpx.Headers(ground.target.requests[0].headers)
        stack.until(lambda: stack.row(job_id)["status"] == "queued", what="the reaper took it back")
        stack.worker(**OPEN)
        wait_until(lambda: len(ground.target.requests) == 2, what="the target is called again")
        second = httpx.Headers(ground.target.requests[1].headers)
        ground.handed_over(job_id)
        assert ground.report(first, "complete", result="old").status_code == 409
        assert ground.report(second, "complete", result="new").status_code == 200
        assert _text(stack.wait(job_id)["result"]).strip('"') == "new"


def test_a_stock_rq_worker_calls_urls_too(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ground(stack) as ground:
        done, goes_on = ground.make("/stock/200"), ground.make("/stock-on/202")
        stack.env |= OPEN
        stack.stock_worker("normal", burst=True).wait()
        assert stack.row(done)["status"] == "completed"
        assert stack.row(goes_on)["worker_id"] == REMOTE_WORKER
        assert ground.report(ground.call("/stock-on/202"), "complete").status_code == 200
