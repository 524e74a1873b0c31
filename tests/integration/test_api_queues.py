"""Job types, queues and health over HTTP."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from urllib.parse import unquote

import sqlalchemy as sa

from api_client import LocalApi, claim, complete
from factories import add_job, add_worker
from laneway import models
from laneway.clock import SystemClock
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role
from servers import RedisServer


def test_job_types_are_listed_by_name(api: LocalApi) -> None:
    listed = api.get("/job-types").json()["data"]
    names = [known["name"] for known in listed]
    assert names == sorted(names)
    assert {"demo.echo", "demo.fail", "demo.noop", "demo.sleep"} <= set(names)
    for known in listed:
        assert api.get(f"/job-types/{known['name']}").json() == known


def test_a_job_type_tells_what_may_be_passed_and_its_defaults(api: LocalApi) -> None:
    known = api.get("/job-types/demo.sleep").json()
    assert known["description"].startswith("Sleep for")
    assert known["parameters_schema"]["properties"]["seconds"]["maximum"] == 86400
    assert known["parameters_schema"]["additionalProperties"] is False
    assert "job" not in known["parameters_schema"]["properties"]
    assert known["defaults"] == {
        "queue": "default",
        "priority": "normal",
        "max_retries": 3,
        "retry_delay_seconds": 120.0,
        "retry_backoff": 2.0,
        "retry_jitter": True,
        "timeout_seconds": None,
        "tags": [],
        "unique_key": None,
        "concurrency_key": None,
        "concurrency_limit": None,
    }


def test_an_unknown_job_type_is_not_found(api: LocalApi) -> None:
    for name in ("no.such", "%00", "%F0%9F%98%80"):
        response = api.get(f"/job-types/{name}")
        assert (response.status_code, response.json()["code"]) == (404, "job_type_not_found"), name


def lanes_of(api: LocalApi, queue: str, key: str = "") -> dict[str, Any]:
    (found,) = [q for q in api.get("/queues/stats", key=key).json()["queues"] if q["name"] == queue]
    return {lane["priority"]: lane for lane in found["lanes"]}


def test_statistics_count_rows_and_ids_per_lane(each_api: LocalApi) -> None:
    assert [lane["queued"] for lane in lanes_of(each_api, "default").values()] == [0, 0, 0, 0]
    for _ in range(3):
        each_api.make(priority="high")
    each_api.make(queue="emails", priority="low")
    each_api.make(delay_seconds=60)
    admin = each_api.key(Role.ADMIN)
    high = lanes_of(each_api, "default", admin)["high"]
    assert (high["lane"], high["queued"], high["depth"]) == ("high", 3, 3)
    assert high["oldest_age_seconds"] >= 0
    assert lanes_of(each_api, "default")["low"]["oldest_age_seconds"] is None
    assert lanes_of(each_api, "emails")["low"]["lane"] == "emails-low"
    stats = each_api.get("/queues/stats").json()
    assert {queue["name"]: queue["queued"] for queue in stats["queues"]} == {"default": 3, "emails": 1}
    assert stats["jobs"] == {"scheduled": 1, "blocked": 0, "queued": 4, "running": 0, "retrying": 0}


def test_queues_are_healthy_while_workers_serve_every_lane_with_jobs(each_api: LocalApi) -> None:
    nobody = each_api.get("/queues/health")
    assert (nobody.status_code, nobody.json()["status"]) == (503, "unhealthy")
    assert nobody.headers["retry-after"]
    now = SystemClock().now()
    worker = add_worker(each_api.database, lanes=["normal"], beat_at=now, held=["a", "b"])
    add_worker(each_api.database, lanes=["emails"], beat_at=now - timedelta(minutes=5))
    add_worker(each_api.database, lanes=["emails"], beat_at=now, state="gone")
    each_api.make()
    healthy = each_api.get("/queues/health", key=each_api.key(Role.OPERATOR))
    assert (healthy.status_code, healthy.json()["redis"]) == (200, "ok")
    assert each_api.get("/queues/health").json()["workers"] is None, "who works is no user's business"
    assert [(w["id"], w["held"]) for w in healthy.json()["workers"]] == [(worker, 2)]
    each_api.make(queue="emails")
    unserved = each_api.get("/queues/health")
    assert unserved.status_code == 503
    assert unserved.json()["reasons"] == ["jobs wait in lane 'emails', and no worker serves it"]


def test_a_tenant_sees_its_own_part_of_the_queues(each_api: LocalApi) -> None:
    stranger = each_api.key(Role.OPERATOR, tenant="other")
    for _ in range(2):
        each_api.make(queue="secretly_named")
    each_api.make()
    for path in ("/queues", "/queues/stats", "/queues/health"):
        assert "secretly_named" not in each_api.get(path, key=stranger).text, path
    unknown = each_api.get("/queues/nobody", key=stranger)
    foreign = each_api.get("/queues/secretly_named", key=stranger)
    assert (unknown.status_code, foreign.status_code) == (404, 404)
    assert foreign.json()["code"] == "queue_not_found"
    assert each_api.get("/queues/default", key=stranger).json()["queued"] == 0
    for key in (each_api.alice, each_api.key(Role.ADMIN, tenant="other")):
        assert each_api.get("/queues/secretly_named", key=key).json()["queued"] == 2
    normal = lanes_of(each_api, "default")["normal"]
    assert (normal["queued"], normal["depth"]) == (1, None), "how much Redis holds is the installation's"


def test_a_queue_tells_how_fast_it_goes(each_api: LocalApi) -> None:
    now = SystemClock().now()
    for n in range(20):
        add_job(
            each_api.database,
            JobStatus.COMPLETED,
            tenant_id=each_api.tenant_id if n % 2 else each_api.tenant("other"),
            queued_at=now - timedelta(seconds=60 + n),
            started_at=now - timedelta(seconds=60),
            finished_at=now - timedelta(seconds=30),
        )
    add_job(
        each_api.database,
        JobStatus.COMPLETED,
        tenant_id=each_api.tenant_id,
        queued_at=now - timedelta(hours=2),
        started_at=now - timedelta(hours=1),
        finished_at=now - timedelta(minutes=6),
    )
    mine = each_api.get("/queues/default").json()
    assert (mine["wait_p50_seconds"], mine["wait_p95_seconds"]) == (9.0, 19.0)
    assert mine["ended_per_minute"] == 2.0
    everybodys = each_api.get("/queues/default", key=each_api.key(Role.ADMIN)).json()
    assert (everybodys["wait_p95_seconds"], everybodys["ended_per_minute"]) == (18.0, 4.0)


def test_queues_are_paused_and_resumed_by_admins(each_api: LocalApi) -> None:
    admin = each_api.key(Role.ADMIN, subject="ada")
    for role in (Role.USER, Role.OPERATOR):
        assert each_api.post("/queues/emails/pause", key=each_api.key(role)).status_code == 403
    paused = each_api.post("/queues/emails/pause", key=admin, json={"reason": "the relay is down"}).json()
    assert (paused["name"], paused["paused"], paused["paused_by"]) == ("emails", True, "ada")
    assert paused["pause_reason"] == "the relay is down"
    again = each_api.post("/queues/emails/pause", key=admin, json={"reason": "again"}).json()
    assert (again["pause_reason"], again["paused_at"]) == ("the relay is down", paused["paused_at"])
    job = each_api.make(queue="emails")
    seen = each_api.get("/queues/emails").json()
    assert (seen["paused"], seen["queued"], seen["paused_by"], seen["pause_reason"]) == (True, 1, None, None)
    assert each_api.get(f"/jobs/{job['id']}").json()["status_reason"] == "queue_paused"
    assert each_api.get(f"/jobs/{job['id']}/status").json()["status_reason"] == "queue_paused"
    add_worker(each_api.database, lanes=["normal"], beat_at=SystemClock().now())
    assert each_api.get("/queues/health").status_code == 200, "nobody need serve a paused queue"
    resumed = each_api.post("/queues/emails/resume", key=admin).json()
    assert (resumed["paused"], resumed["paused_at"]) == (False, None)
    assert each_api.post("/queues/emails/resume", key=admin).status_code == 200
    assert each_api.get(f"/jobs/{job['id']}").json()["status_reason"] is None
    log = each_api.get("/admin/audit-log?target=queue:emails", key=admin).json()["data"]
    assert [(e["action"], e["actor"]) for e in log] == [("queue.resumed", "ada"), ("queue.paused", "ada")]
    assert log[1]["facts"] == {"reason": "the relay is down"}


def test_only_what_can_be_a_queue_is_paused(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)
    for name in ("high", "Emails", "a-b", "x" * 51, "%20", "1x"):
        for action in ("pause", "resume", "purge"):
            body = {"json": {"confirm": unquote(name)[:50]}} if action == "purge" else {}
            response = api.post(f"/queues/{name}/{action}", key=admin, **body)
            assert response.status_code in (404, 422), (name, action)
    assert api.post(f"/queues/{'x' * 50}/pause", key=admin).status_code == 200
    assert api.post("/queues/emails/pause", key=admin, json={"reason": "x" * 200}).status_code == 200
    for reason in ("x" * 201, "nul \x00"):
        assert api.post("/queues/emails/pause", key=admin, json={"reason": reason}).status_code == 422


def test_a_purge_cancels_what_waits_in_the_queue(each_api: LocalApi) -> None:
    admin = each_api.key(Role.ADMIN, subject="ada")
    other = each_api.key(tenant="other")
    waiting = [each_api.make(queue="emails", priority=p)["id"] for p in ("low", "critical")]
    waiting += [each_api.make(queue="emails", delay_seconds=60)["id"]]
    foreign = each_api.make(queue="emails", key=other)["id"]
    elsewhere = each_api.make()["id"]
    running = each_api.make(queue="emails")["id"]
    held = claim(each_api, running)
    for wrong in ({}, {"confirm": "email"}, {"confirm": "default"}, {"confirm": "emails", "force": True}):
        assert each_api.post("/queues/emails/purge", key=admin, json=wrong).status_code == 422
    assert each_api.post("/queues/emails/purge", json={"confirm": "emails"}).status_code == 403
    dry = each_api.post("/queues/emails/purge", key=admin, json={"confirm": "emails", "dry_run": True})
    assert dry.json() == {"queue": "emails", "dry_run": True, "cancelled": 0, "remaining": 4}
    done = each_api.post("/queues/emails/purge", key=admin, json={"confirm": "emails"})
    assert done.json() == {"queue": "emails", "dry_run": False, "cancelled": 4, "remaining": 0}
    for job_id in waiting:
        job = each_api.get(f"/jobs/{job_id}").json()
        assert (job["status"], job["cancelled_by"]) == ("cancelled", "ada")
        last = each_api.get(f"/jobs/{job_id}/timeline").json()["data"][-1]
        assert (last["action"], last["reason"]) == ("cancel", "the queue was purged")
    assert each_api.get(f"/jobs/{foreign}", key=other).json()["status"] == "cancelled"
    assert each_api.get(f"/jobs/{elsewhere}").json()["status"] == "queued"
    complete(each_api, held)
    assert each_api.get(f"/jobs/{running}").json()["status"] == "completed"


def test_without_redis_depths_are_unknown_and_rows_are_counted(
    local: Any, own_redis_server: RedisServer
) -> None:
    api: LocalApi = local(redis_url=own_redis_server.url)
    api.make()
    own_redis_server.stop()
    lane = lanes_of(api, "default", api.key(Role.ADMIN))["normal"]
    assert (lane["queued"], lane["depth"]) == (1, None)
    assert api.get("/queues/health").json()["redis"] == "away"


def test_the_webhook_secret_is_the_one_that_signs(api: LocalApi) -> None:
    operator = api.key(Role.OPERATOR)
    secret = api.get("/webhooks/secret", key=operator).json()["secret"]
    with api.database.read() as connection:
        sealed = connection.execute(sa.select(models.tenants.c.webhook_secret)).scalar_one()
    assert secret not in sealed
    assert api.get("/webhooks/secret", key=operator).json() == {"secret": secret}


def test_the_probes_want_no_key_and_cost_nothing(local: Any) -> None:
    api: LocalApi = local(rate_limits="default=1/60@user")
    for _ in range(3):
        assert api.get("//livez", key=None).json() == {"status": "ok"}
        ready = api.get("//readyz", key=None)
        assert ready.json() == {"status": "ok", "database": "ok", "limiter": "ok"}
        assert not [name for name in ready.headers if "ratelimit" in name]


def test_the_document_and_its_page_are_served(api: LocalApi) -> None:
    document = api.send("GET", "/openapi.json")
    assert document.json() == api.reference.document
    assert "x-request-id" in document.headers
    assert api.send("GET", "/docs").headers["content-type"].startswith("text/html")
