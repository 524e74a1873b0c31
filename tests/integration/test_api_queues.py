"""Job types, queues and health over HTTP."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from api_client import LocalApi
from factories import add_worker
from laneway import models
from laneway.clock import SystemClock
from laneway.engine.callers import Role
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
    }


def test_an_unknown_job_type_is_not_found(api: LocalApi) -> None:
    for name in ("no.such", "%00", "%F0%9F%98%80"):
        response = api.get(f"/job-types/{name}")
        assert (response.status_code, response.json()["code"]) == (404, "job_type_not_found"), name


def lanes_of(api: LocalApi, queue: str) -> dict[str, Any]:
    (found,) = [q for q in api.get("/queues/stats").json()["queues"] if q["name"] == queue]
    return {lane["priority"]: lane for lane in found["lanes"]}


def test_statistics_count_rows_and_ids_per_lane(each_api: LocalApi) -> None:
    assert [lane["queued"] for lane in lanes_of(each_api, "default").values()] == [0, 0, 0, 0]
    for _ in range(3):
        each_api.make(priority="high")
    each_api.make(queue="emails", priority="low")
    each_api.make(delay_seconds=60)
    high = lanes_of(each_api, "default")["high"]
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
    healthy = each_api.get("/queues/health")
    assert (healthy.status_code, healthy.json()["redis"]) == (200, "ok")
    assert [(w["id"], w["held"]) for w in healthy.json()["workers"]] == [(worker, 2)]
    each_api.make(queue="emails")
    unserved = each_api.get("/queues/health")
    assert unserved.status_code == 503
    assert unserved.json()["reasons"] == ["jobs wait in lane 'emails', and no worker serves it"]


def test_without_redis_depths_are_unknown_and_rows_are_counted(
    local: Any, own_redis_server: RedisServer
) -> None:
    api: LocalApi = local(redis_url=own_redis_server.url)
    api.make()
    own_redis_server.stop()
    lane = lanes_of(api, "default")["normal"]
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
