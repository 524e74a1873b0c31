"""Batches over HTTP: ten thousand jobs in one call, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from api_client import LocalApi, ServedApi, WorkerProcess
from laneway import models
from laneway.api import batch_body
from laneway.clock import SystemClock
from laneway.engine import batches
from laneway.engine.access.callers import Caller, Role
from laneway.engine.batches import MAX_JOBS, BatchSpec
from laneway.engine.outcomes import carry_out
from laneway.engine.transitions import ForceComplete
from servers import wait_until


def end_all(api: LocalApi, batch_id: str) -> None:
    """Complete every job of a batch, a few hundred in each transaction."""
    j = models.jobs.c
    with api.database.read() as connection:
        ids = connection.execute(sa.select(j.id).where(j.batch_id == batch_id)).scalars().all()
    for first in range(0, len(ids), 500):
        moves = [ForceComplete(job_id) for job_id in ids[first : first + 500]]
        with api.database.write() as connection:
            carry_out(connection, moves, now=SystemClock().now(), actor="test")


def test_ten_thousand_jobs_are_accepted_in_one_call(each_api: LocalApi) -> None:
    api = each_api
    body = {
        "job_type": "demo.echo",
        "items": [{"n": number, "text": "x" * 100} for number in range(MAX_JOBS)],
        "defaults": {"priority": "low", "queue": "bulk"},
        "on_success": {"job_type": "demo.echo", "parameters": {"done": {"$result": "batch.completed"}}},
        "on_failure": {"job_type": "demo.echo"},
    }
    response = api.post("/batches", json=body)
    assert response.status_code == 202, response.text
    batch = response.json()
    assert response.headers["location"].endswith(f"/api/v1/batches/{batch['id']}")
    assert (batch["total"], batch["enqueued"], batch["rejected"]) == (MAX_JOBS, MAX_JOBS, [])
    path = f"/batches/{batch['id']}"
    assert api.get(path).json()["counts"]["queued"] == MAX_JOBS
    page = api.get(f"{path}/jobs?limit=2").json()
    assert [job["parameters"]["n"] for job in page["data"]] == [MAX_JOBS - 1, MAX_JOBS - 2]
    assert page["has_more"]
    end_all(api, batch["id"])
    at = api.get(path).json()
    assert (at["status"], at["counts"]["completed"], at["progress_percent"]) == ("completed", MAX_JOBS, 100)
    assert set(at["callbacks"]) == {"on_success", "on_failure"}
    assert at["callbacks"]["on_failure"]["job_id"] is None
    callback = api.get(f"/jobs/{at['callbacks']['on_success']['job_id']}").json()
    assert callback["parameters"] == {"done": MAX_JOBS}
    assert api.count_jobs() == MAX_JOBS + 1


def test_a_large_batch_is_checked_in_bounded_memory(api: LocalApi) -> None:
    """What is held beside the text is the rows to be: not the objects that all jobs would be together."""
    values = list(range(400))
    body = json.dumps({"jobs": [{"job_type": "demo.echo", "parameters": {"v": values}}] * 600})
    assert len(body) > 1_000_000
    service = api.app.state.runtime.service
    alice = Caller(api.tenant_id, "alice", Role.USER)
    tracemalloc.start()
    outline = batch_body.read(body.encode())
    draft = batches.check(service, BatchSpec(), outline.jobs(), alice)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(draft.jobs) == 600
    assert peak < 8 * len(body), f"{peak / len(body):.1f} times the body"


def test_a_worker_drains_a_batch(each_api: LocalApi, worker: WorkerProcess) -> None:
    api = each_api
    callback = {"job_type": "demo.echo", "parameters": {"failed": {"$result": "batch.failed"}}}
    body = {"job_type": "demo.echo", "items": [{"n": n} for n in range(300)], "on_complete": callback}
    path = f"/batches/{api.post('/batches', json=body).json()['id']}"
    wait_until(lambda: api.get(path).json()["finished_at"] is not None, what="the batch ends", seconds=60)
    at = api.get(path).json()
    assert (at["status"], at["counts"]["completed"]) == ("completed", 300)
    job_id = at["callbacks"]["on_complete"]["job_id"]
    wait_until(
        lambda: api.get(f"/jobs/{job_id}").json()["status"] == "completed",
        what="the callback ran",
        seconds=60,
    )
    assert api.get(f"/jobs/{job_id}").json()["result"] == {"failed": 0}


def test_a_batch_has_a_body_of_its_own_size(local: Callable[..., LocalApi]) -> None:
    api = local(max_batch_body_bytes=4096, max_body_bytes=1024)
    fitting = {"job_type": "demo.echo", "items": [{"x": ""}]}
    room = 4096 - len(json.dumps(fitting))
    fitting["items"] = [{"x": "a" * room}]
    text = json.dumps(fitting)
    assert len(text) == 4096
    headers = {"Content-Type": "application/json"}
    assert api.post("/batches", content=text, headers=headers).status_code == 202
    assert api.post("/batches", content=text + " ", headers=headers).status_code == 413
    assert api.post("/batches", content=text, headers={"Content-Type": "text/plain"}).status_code == 415


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"items": [{}]}, "/items/0/job_type"),
        ({"job_type": "demo.echo"}, ""),
        ({"job_type": "demo.echo", "items": []}, "/items"),
        ({"job_type": "demo.echo", "items": [{}], "jobs": [{}]}, ""),
        ({"job_type": "demo.echo", "items": [[]]}, "/items/0"),
        ({"job_type": "demo.sleep", "items": [{}, {"seconds": "x"}]}, "/items/1/seconds"),
        ({"jobs": [{"job_type": "demo.echo"}, {"job_type": "demo.unknown"}]}, "/jobs/1/job_type"),
        ({"jobs": [{"job_type": "demo.echo"}], "on_invalid": "perhaps"}, "/on_invalid"),
        ({"jobs": [{"job_type": "demo.echo"}], "nonsense": 1}, "/nonsense"),
        ({"jobs": [{"job_type": "demo.echo"}], "defaults": {"x": 1}}, "/defaults/x"),
        (
            {"jobs": [{"job_type": "demo.echo"}], "on_success": {"job_type": "no.such"}},
            "/on_success/job_type",
        ),
        ({"jobs": [{"job_type": "demo.echo"}], "on_success": {"unique_key": "k"}}, "/on_success"),
    ],
)
def test_what_is_no_batch_is_refused_with_its_place(
    api: LocalApi, body: dict[str, Any], pointer: str
) -> None:
    response = api.post("/batches", json=body)
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["pointer"].startswith(pointer), response.text
    assert api.count_jobs() == 0


@pytest.mark.parametrize("body", ["", "[]", "{", '{"jobs":[{]}', '{"jobs":[{}],"jobs":[{}]}', "\ufeff{}"])
def test_what_is_no_json_is_refused(api: LocalApi, body: str) -> None:
    response = api.post("/batches", content=body.encode(), headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text


def test_invalid_jobs_are_left_out_when_asked(api: LocalApi) -> None:
    jobs = [{"job_type": "demo.echo"}, {"job_type": "no.such"}, {"job_type": "demo.echo", "priority": 99}]
    batch = api.post("/batches", json={"jobs": jobs, "on_invalid": "skip"}).json()
    assert (batch["total"], batch["enqueued"], api.count_jobs()) == (3, 1, 1)
    assert [(each["index"], each["code"]) for each in batch["rejected"]] == [
        (1, "unknown_job_type"),
        (2, "invalid_request"),
    ]


def test_a_request_that_is_sent_again_makes_one_batch(local: Callable[..., LocalApi]) -> None:
    api = local(rate_limits="batch=99/60@user,default=99/60@user,jobs=3/60@tenant")
    body, headers = {"job_type": "demo.echo", "items": [{}, {}]}, {"Idempotency-Key": "k"}
    first = api.post("/batches", json=body, headers=headers)
    again = api.post("/batches", json=body, headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    assert api.count_jobs() == 2
    other = api.post("/batches", json=body | {"items": [{}]}, headers=headers)
    assert other.json()["code"] == "idempotency_key_reused"


def test_each_job_is_charged_to_the_budget_of_jobs(local: Callable[..., LocalApi]) -> None:
    api = local(rate_limits="batch=99/60@user,default=99/60@user,jobs=5/60@tenant")
    body = {"job_type": "demo.echo", "items": [{}] * 3}
    assert api.post("/batches", json=body).status_code == 202
    assert api.post("/batches", json=body).status_code == 429
    assert api.post("/batches", json=body | {"items": [{}] * 6}).json()["code"] == "cost_exceeds_quota"
    assert api.count_jobs() == 3


def test_a_batch_is_cancelled_and_what_failed_is_tried_again(api: LocalApi) -> None:
    batch = api.post("/batches", json={"job_type": "demo.echo", "items": [{}] * 3}).json()
    path = f"/batches/{batch['id']}"
    cancelled = api.post(f"{path}/cancel", json={"reason": "enough"})
    assert (cancelled.status_code, cancelled.json()["counts"]["cancelled"]) == (200, 3)
    again = api.post(f"{path}/retry-failed")
    assert (again.status_code, again.json()["retried"]) == (202, 0)


def test_a_user_sees_its_own_batches_and_an_operator_the_tenants(api: LocalApi) -> None:
    batch = api.post("/batches", json={"job_type": "demo.echo", "items": [{}]}).json()
    bob, olga = api.key(Role.USER, subject="bob"), api.key(Role.OPERATOR, subject="olga")
    foreign = api.key(Role.ADMIN, tenant="other")
    for key, status in ((bob, 404), (foreign, 404), (olga, 200)):
        for path in ("", "/jobs"):
            assert api.get(f"/batches/{batch['id']}{path}", key=key).status_code == status
        assert len(api.get("/batches", key=key).json()["data"]) == (status == 200)
    listed = api.get(f"/jobs?batch_id={batch['id']}").json()["data"]
    assert [job["batch_id"] for job in listed] == [batch["id"]]


def test_a_batch_is_followed_to_its_end(served: Callable[..., ServedApi]) -> None:
    api = served()
    path = f"/batches/{api.post('/batches', json={'job_type': 'demo.echo', 'items': [{}] * 2}).json()['id']}"
    events: list[str] = []
    last_id = ""
    with api.stream(f"{path}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("id: "):
                last_id = line[4:]
            if line.startswith("event: "):
                events.append(line[7:])
                if len(events) == 1:
                    api.post(f"{path}/cancel")
    assert events == ["batch.progress", "batch.failed"]
    with api.stream(f"{path}/events", headers={"Last-Event-ID": last_id}) as stream:
        assert stream.status_code == 204
