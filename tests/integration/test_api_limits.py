"""The rate limiter as callers meet it."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import datetime, timedelta
from typing import Any

import http_sf
import httpx
import pytest
import redis as redis_py
from fastapi import APIRouter, Request
from starlette.responses import Response

from api_client import BASE, RATE_HEADERS, LocalApi
from factories import add_job
from laneway.api.app import create_api
from laneway.api.gate import GatedRoute, access, charge_jobs
from laneway.api.jobs import as_json
from laneway.clock import SystemClock, new_id
from laneway.domain.states import JobStatus
from laneway.engine.access import overrides
from laneway.engine.access.callers import Role
from laneway.engine.access.overrides import OverrideSpec
from laneway.limits import redis_windows
from laneway.limits.rules import Policy, RateClass
from laneway.settings import Settings
from servers import RedisServer, wait_until

JOB = {"job_type": "demo.noop"}


PATIENCE_SECONDS = 20.0


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Redis may need longer than the 50 ms that it gets in service."""
    monkeypatch.setattr(redis_windows, "TIMEOUT_SECONDS", PATIENCE_SECONDS)


def left(response: httpx.Response) -> int:
    return int(response.headers["x-ratelimit-remaining"])


def test_every_answer_of_a_limited_operation_tells_what_is_left(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=50/60@user,default=50/60@user")
    job = api.make()
    ended = add_job(api.database, JobStatus.COMPLETED, tenant_id=api.tenant_id)
    tag = api.get(f"/jobs/{job['id']}").headers["etag"]
    answers = {
        200: api.get("/jobs"),
        202: api.post("/jobs", json=JOB),
        204: api.get(f"/jobs/{ended}/events", headers={"Last-Event-ID": "9"}),
        304: api.get(f"/jobs/{job['id']}", headers={"If-None-Match": tag}),
        400: api.post("/jobs", content="{", headers={"Content-Type": "application/json"}),
        401: api.get("/jobs", key=None),
        403: api.get("/webhooks/secret"),
        404: api.get(f"/jobs/{new_id()}"),
        409: api.post(f"/jobs/{ended}/cancel"),
        413: api.post("/jobs", content=b" " * 2**20 + b" ", headers={"Content-Type": "application/json"}),
        415: api.post("/jobs", content="x", headers={"Content-Type": "text/plain"}),
        422: api.post("/jobs", json={}),
        503: api.get("/queues/health"),
    }
    for status, response in answers.items():
        assert response.status_code == status
        for name in RATE_HEADERS:
            assert name in response.headers, (status, name)
        assert ("retry-after" in response.headers) == (status in (202, 503))
        assert 0 <= left(response) < int(response.headers["x-ratelimit-limit"])
        assert int(response.headers["x-ratelimit-reset"]) > time.time()
        assert re.fullmatch(r'"[a-z]+";q=\d+;w=60', response.headers["ratelimit-policy"])
        assert re.fullmatch(r'"[a-z]+";r=\d+;t=\d+', response.headers["ratelimit"])


def test_a_stream_tells_what_is_left(api: LocalApi) -> None:
    ended = add_job(api.database, JobStatus.COMPLETED, tenant_id=api.tenant_id)
    response = api.get(f"/jobs/{ended}/events")
    assert response.status_code == 200
    assert all(name in response.headers for name in RATE_HEADERS)


def test_past_its_quota_a_caller_is_told_when_to_come_back(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=3/60@user,default=9/60@user")
    assert [left(api.post("/jobs", json=JOB)) for _ in range(3)] == [2, 1, 0]
    for response in (api.post("/jobs", json=JOB), api.post("/jobs", content=b"{")):
        problem = response.json()
        assert (response.status_code, problem["code"]) == (429, "rate_limited")
        assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
        assert problem["facts"] == {"violated_policies": ["queue"]}
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.headers["retry-after"] in problem["detail"]
        assert left(response) == 0
    assert api.count_jobs() == 3
    assert left(api.get("/jobs")) == 8, "one class does not eat another's budget"
    assert left(api.post("/jobs", key=api.key(subject="bob"), json=JOB)) == 2
    assert api.post("/jobs", key=api.key(subject="alice"), json=JOB).status_code == 429
    assert left(api.post("/jobs", key=api.key(tenant="other", subject="alice"), json=JOB)) == 2


def test_all_ways_to_look_share_one_budget(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=6/60@user,default=6/60@user")
    job_id = api.make()["id"]
    paths = ("/jobs", f"/jobs/{job_id}", f"/jobs/{job_id}/status", "/job-types", "/queues/stats")
    assert [left(api.get(path)) for path in paths] == [5, 4, 3, 2, 1]
    assert left(api.post(f"/jobs/{job_id}/cancel")) == 0
    assert {api.get(f"/jobs/{new_id()}").status_code for _ in range(3)} == {429}


def test_a_quota_of_zero_blocks_and_promises_nothing(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=0/60@user")
    response = api.post("/jobs", json=JOB)
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert "retry-after" not in response.headers


def test_without_a_limiter_there_are_no_such_headers(local: Any) -> None:
    api: LocalApi = local(rate_limits="off")
    response = api.send("GET", "/api/v1/jobs", headers=api.headers())
    assert response.status_code == 200
    assert not [name for name in response.headers if "ratelimit" in name]


def test_a_refused_role_is_charged(local: Any) -> None:
    api: LocalApi = local(rate_limits="default=2/60@user")
    statuses = [api.get("/webhooks/secret").status_code for _ in range(3)]
    assert statuses == [403, 403, 429]
    assert api.get("/webhooks/secret", key=api.key(Role.OPERATOR)).status_code == 200


def test_without_redis_jobs_are_accepted_and_limits_hold(local: Any, own_redis_server: RedisServer) -> None:
    api: LocalApi = local(redis_url=own_redis_server.url, rate_limits="queue=5/60@user,default=99/60@user")
    api.make()
    own_redis_server.stop()
    statuses = [api.post("/jobs", json=JOB).status_code for _ in range(7)]
    assert statuses == [202] * 5 + [429] * 2
    assert api.count_jobs() == 6
    assert api.get("//readyz", key=None).json()["limiter"] == "degraded"
    job_id = api.get("/jobs?limit=1").json()["data"][0]["id"]
    assert api.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"


def policies(response: httpx.Response) -> dict[str, int]:
    """What is left of each policy, as a parser of structured fields reads it."""
    left_of = http_sf.parse(response.headers["ratelimit"].encode(), tltype="list")
    return {name: parameters["r"] for name, parameters in left_of}


def test_jobs_are_charged_to_their_tenant_and_looking_is_not(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=50/60,jobs=3/60,tenant=9/60")
    bob = api.key(subject="bob")
    first = api.post("/jobs", json=JOB)
    assert policies(first) == {"queue": 49, "tenant": 8, "jobs": 2}
    assert first.headers["ratelimit-policy"].endswith('"jobs";q=3;w=60;qu="jobs"')
    assert policies(api.post("/jobs", key=bob, json=JOB)) == {"queue": 49, "tenant": 7, "jobs": 1}
    assert policies(api.get("/jobs")) == {"tenant": 6}
    assert api.post("/jobs", json=JOB).status_code == 202
    refused = api.post("/jobs", key=bob, json=JOB)
    assert (refused.status_code, refused.json()["facts"]) == (429, {"violated_policies": ["jobs"]})
    assert "3 jobs per 60 s for this tenant" in refused.json()["detail"]
    assert policies(refused) == {"queue": 49, "tenant": 5, "jobs": 0}, "a refusal charges nothing"
    other = api.key(tenant="other", subject="alice")
    assert policies(api.post("/jobs", key=other, json=JOB)) == {"queue": 49, "tenant": 8, "jobs": 2}


def test_a_retry_of_a_job_costs_a_job(local: Any) -> None:
    api: LocalApi = local(rate_limits="jobs=5/60")
    failed = add_job(api.database, JobStatus.FAILED, tenant_id=api.tenant_id)
    assert policies(api.post(f"/jobs/{failed}/retry")) == {"jobs": 4}


def test_a_request_sent_again_costs_a_request_and_no_job(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=9/60,jobs=9/60")
    key = {"Idempotency-Key": new_id()}
    first = api.post("/jobs", json=JOB, headers=key)
    assert policies(first) == {"queue": 8, "jobs": 8}
    for n in range(3):
        again = api.post("/jobs", json=JOB, headers=key)
        assert (again.headers["idempotency-replayed"], again.json()["id"]) == ("true", first.json()["id"])
        assert policies(again) == {"queue": 7 - n, "jobs": 8}
    assert policies(api.post("/jobs", json=JOB)) == {"queue": 4, "jobs": 7}


def test_polling_has_a_budget_of_its_own_where_one_is_set(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=9/60,default=9/60,poll=2/60")
    job_id = api.make()["id"]
    assert policies(api.get(f"/jobs/{job_id}")) == {"poll": 1}
    assert policies(api.get(f"/jobs/{job_id}/status")) == {"poll": 0}
    assert api.get(f"/jobs/{job_id}").status_code == 429
    assert policies(api.get("/jobs")) == {"default": 8}


@pytest.mark.parametrize(
    "spelling",
    ["/jobs/{}", "/jobs/{}?x=1", "/jobs/{}#f", "//api/v1/%6Aobs/{}"],
)
def test_however_an_operation_is_spelled_it_has_one_budget(local: Any, spelling: str) -> None:
    api: LocalApi = local(rate_limits="queue=9/60,default=3/60")
    jobs = [api.make()["id"] for _ in range(4)]
    statuses = [api.get(spelling.format(job_id)).status_code for job_id in jobs]
    assert statuses == [200, 200, 200, 429]


@pytest.mark.parametrize("path", ["/jobs/", "//api/v1/Jobs", "//api/v1/jobs%2F", "//API/v1/jobs"])
def test_what_is_no_operation_is_no_way_around_the_limit(local: Any, path: str) -> None:
    api: LocalApi = local(rate_limits="default=1/60")
    assert api.get("/jobs").status_code == 200
    assert api.get(path).status_code in (404, 429)


def test_another_method_on_a_limited_path_does_no_work(local: Any) -> None:
    api: LocalApi = local(rate_limits="default=1/60")
    assert api.get("/jobs").status_code == 200
    assert api.send("HEAD", f"{BASE}/jobs", headers=api.headers()).status_code == 429
    for method in ("OPTIONS", "TRACE", "PROPFIND"):
        assert api.send(method, f"{BASE}/jobs", headers=api.headers()).status_code == 405


def test_two_keys_of_one_user_share_a_budget(local: Any) -> None:
    api: LocalApi = local(rate_limits="default=9/60")
    keys = [api.key(subject="carol"), api.key(Role.OPERATOR, subject="carol")]
    assert [left(api.get("/jobs", key=key)) for key in keys * 2] == [8, 7, 6, 5]


def test_bodies_that_cannot_be_read_are_charged(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=3/60,jobs=9/60")
    bodies = (b"{", b"[]", b"\xff")
    statuses = [
        api.post("/jobs", content=body, headers={"Content-Type": "application/json"}).status_code
        for body in (*bodies, b"{")
    ]
    assert all(status in (400, 422) for status in statuses[:3])
    assert statuses[3] == 429


BATCHES = APIRouter(route_class=GatedRoute)


@BATCHES.post("/shipments")
@access(RateClass.BATCH, jobs=None)
async def ship(request: Request, items: list[int]) -> Response:
    """An application's route that makes as many jobs as its body says."""
    if items != [0]:
        await charge_jobs(request, len(items))
    return as_json({"made": len(items)}, 202)


@BATCHES.get("/crash")
@access(RateClass.DEFAULT)
async def crash() -> Response:
    raise ZeroDivisionError


@pytest.fixture
def shipping(api_settings: Settings, request: pytest.FixtureRequest) -> Any:
    """An API with that route."""
    settings = api_settings.model_copy(update={"rate_limits": request.param})
    app = create_api(settings)
    app.include_router(BATCHES, prefix=BASE)
    with LocalApi(settings, app=app) as api:
        yield api


def shipped(api: LocalApi, *, count: int = 1, **how: Any) -> httpx.Response:
    body = how or {"json": [7] * count}
    headers = api.headers() | {"Content-Type": "application/json"}
    response = api.send("POST", f"{BASE}/shipments", headers=headers, **body)
    if response.status_code >= 400:
        api.reference.check_problem(response)
    return response


@pytest.mark.parametrize("shipping", ["batch=5/60,jobs=100/60"], indirect=True)
def test_a_batch_costs_one_request_and_all_its_jobs_or_nothing(shipping: LocalApi) -> None:
    assert policies(shipped(shipping, count=60)) == {"batch": 4, "jobs": 40}
    refused = shipped(shipping, count=41)
    assert (refused.status_code, refused.json()["facts"]) == (429, {"violated_policies": ["jobs"]})
    assert policies(refused) == {"batch": 4, "jobs": 40}
    assert policies(shipped(shipping, count=40)) == {"batch": 3, "jobs": 0}
    assert policies(shipped(shipping, count=0)) == {"batch": 2}


@pytest.mark.parametrize("shipping", ["batch=5/60,jobs=100/60"], indirect=True)
def test_more_jobs_than_a_window_ever_holds_are_no_429(shipping: LocalApi) -> None:
    assert shipped(shipping, count=100).status_code == 202
    hopeless = shipped(shipping, count=101)
    problem = hopeless.json()
    assert (hopeless.status_code, problem["code"]) == (422, "cost_exceeds_quota")
    assert "101 jobs" in problem["detail"]
    assert problem["facts"] == {"violated_policies": ["jobs"]}
    assert "retry-after" not in hopeless.headers


@pytest.mark.parametrize("shipping", ["batch=3/60,jobs=100/60"], indirect=True)
def test_a_batch_that_cannot_be_read_costs_a_request_and_no_job(shipping: LocalApi) -> None:
    assert shipped(shipping, content=b"{").status_code == 400
    unfit = shipped(shipping, json={"items": 1})
    assert (unfit.status_code, policies(unfit)) == (422, {"batch": 1})
    uncounted = shipped(shipping, json=[0])
    assert (uncounted.status_code, policies(uncounted)) == (202, {"batch": 0})
    for body in (b"{", b"[7]"):
        refused = shipped(shipping, content=body)
        assert (refused.status_code, refused.json()["facts"]) == (429, {"violated_policies": ["batch"]})


def test_an_applications_batch_is_charged_as_many_jobs_as_it_makes(local: Any) -> None:
    api: LocalApi = local(tasks=("feedback_summaries",), rate_limits="batch=5/60,jobs=3/60")
    path = f"{BASE}/feedback-summaries/evaluation/101"  # in no document: the example is mounted
    batch = {"student_ids": [301, 302]}
    made = api.send("POST", f"{path}/batch-queue", headers=api.headers(), json=batch)
    assert (made.status_code, policies(made)) == (202, {"batch": 4, "jobs": 1})
    one = api.send("POST", f"{path}/student/303/queue", headers=api.headers())
    assert (one.status_code, policies(one)) == (202, {"jobs": 0})
    refused = api.send("POST", f"{path}/batch-queue", headers=api.headers(), json=batch)
    assert (refused.status_code, policies(refused)) == (429, {"batch": 4, "jobs": 0})
    assert api.count_jobs() == 3


@pytest.mark.parametrize("shipping", ["default=3/60"], indirect=True)
def test_an_answer_to_a_crash_tells_what_is_left_too(shipping: LocalApi) -> None:
    response = shipping.send("GET", f"{BASE}/crash", headers=shipping.headers())
    assert (response.status_code, policies(response)) == (500, {"default": 2})


def test_ones_limits_are_shown_and_looking_is_free(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=10/60+200/3600,default=0/60;shadow,jobs=50/60")
    api.make()
    before = time.time()
    for _ in range(3):
        shown = api.get("/rate-limits")
        assert (shown.status_code, shown.json()["degraded"]) == (200, False)
    assert not [name for name in shown.headers if "ratelimit" in name]
    assert [(each["name"], each["used"], each["remaining"]) for each in shown.json()["data"]] == [
        ("queue", 1, 9),
        ("queue-3600", 1, 199),
        ("jobs", 1, 49),
    ]
    first, _, jobs = shown.json()["data"]
    assert (first["quota"], first["window_seconds"], first["unit"]) == (10, 60, "requests")
    assert (first["policies"], first["counted_per"]) == (["queue"], "user")
    assert (jobs["policies"], jobs["counted_per"], jobs["unit"]) == (["jobs"], "tenant", "jobs")
    reset = datetime.fromisoformat(first["reset_at"]).timestamp()
    assert before - 60 < reset - 60 <= time.time() + 1
    assert api.get("/rate-limits", key=api.key(subject="bob")).json()["data"][0]["reset_at"] is None
    assert api.get("/rate-limits", key=None).status_code == 401


def test_a_limit_of_ones_own_holds_soon_and_until_it_expires(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=9/60,default=9/60")

    def override(policy: Policy, quota: int | None, subject: str | None, seconds: float | None) -> None:
        now = SystemClock().now()
        spec = OverrideSpec(
            quota=quota,
            window_seconds=None if quota is None else 3600,
            reason="asked for it",
            expires_at=None if seconds is None else now + timedelta(seconds=seconds),
        )
        with api.database.write() as connection:
            overrides.put(connection, api.tenant_id, policy, spec, subject=subject, by="root", now=now)

    def shown(key: str = "") -> dict[str, int]:
        return {each["name"]: each["quota"] for each in api.get("/rate-limits", key=key).json()["data"]}

    bob = api.key(subject="bob")
    assert shown() == {"queue": 9, "default": 9}
    override(Policy.QUEUE, 1, "alice", None)
    override(Policy.DEFAULT, None, None, None)
    override(Policy.JOBS, 500, None, 2.0)
    wait_until(lambda: shown() == {"queue": 1, "jobs": 500}, what="the overrides are in force")
    assert shown(bob) == {"queue": 9, "jobs": 500}
    assert [api.post("/jobs", json=JOB).status_code for _ in range(2)] == [202, 429]
    assert [api.post("/jobs", key=bob, json=JOB).status_code for _ in range(2)] == [202, 202]
    assert "ratelimit" not in api.send("GET", f"{BASE}/jobs", headers=api.headers()).headers
    wait_until(lambda: shown() == {"queue": 1}, what="one of them has expired")
    with api.database.write() as connection:
        overrides.delete(connection, api.tenant_id, Policy.QUEUE, subject="alice")
    wait_until(lambda: shown() == {"queue": 9}, what="one of them was taken back")
    assert api.post("/jobs", json=JOB).status_code == 202


def test_a_process_starts_with_the_overrides_in_force(local: Any) -> None:
    api: LocalApi = local(rate_limits="default=9/60")
    now = SystemClock().now()
    with api.database.write() as connection:
        spec = OverrideSpec(quota=2, window_seconds=60, reason="little")
        overrides.put(connection, api.tenant_id, Policy.DEFAULT, spec, by="root", now=now)
    with LocalApi(api.settings) as another:
        assert another.get("/job-types").headers["x-ratelimit-limit"] == "2", "from the first request on"


def test_a_rule_that_fails_closed_answers_503_without_redis(
    local: Any, own_redis_server: RedisServer
) -> None:
    rules = "queue=9/60;on_failure=closed,default=9/60"
    api: LocalApi = local(redis_url=own_redis_server.url, rate_limits=rules)
    api.make()
    own_redis_server.kill()
    refused = api.post("/jobs", json=JOB)
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (503, "temporary_reduced_capacity")
    assert problem["type"].endswith("#temporary-reduced-capacity")
    assert api.get("/jobs").status_code == 200
    assert api.count_jobs() == 1
    assert api.get("/rate-limits").json()["degraded"] is True


def limiter_state(api: LocalApi) -> str:
    return str(api.get("//readyz", key=None).json()["limiter"])


def counts_again(api: LocalApi, key: str) -> bool:
    """Whether Redis decides again; only requests find that out."""
    assert api.get("/job-types", key=key).status_code in {200, 429}  # by whoever decides as yet
    return limiter_state(api) == "ok"


@pytest.mark.parametrize("damage", ["out of memory", "read only", "scripts forgotten"])
def test_whatever_redis_says_no_request_fails_and_the_limit_holds(
    local: Any, own_redis_server: RedisServer, damage: str
) -> None:
    api: LocalApi = local(ratelimit_redis_url=own_redis_server.url, rate_limits="default=20/3600")
    assert api.get("/job-types").status_code == 200
    with own_redis_server.client() as client:
        if damage == "out of memory":
            client.config_set("maxmemory", "1")
        elif damage == "read only":
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
        else:
            client.script_flush()
        of_redis = damage == "scripts forgotten"
        statuses = [api.get("/job-types").status_code for _ in range(21)]
        assert statuses == [200] * (19 if of_redis else 20) + [429] * (2 if of_redis else 1)
        assert limiter_state(api) == ("ok" if of_redis else "degraded")
        client.config_set("maxmemory", "0")
        client.execute_command("REPLICAOF", "NO", "ONE")
    bob = api.key(subject="bob")
    wait_until(lambda: counts_again(api, bob), what="Redis counts again")


def test_a_redis_that_hangs_is_survived_and_charged_at_most_once(
    local: Any, own_redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reached it before it was given up on, it runs when it goes on."""
    api: LocalApi = local(ratelimit_redis_url=own_redis_server.url, rate_limits="default=20/3600")
    bob = api.key(subject="bob")
    for _ in range(10):
        assert api.get("/job-types").status_code == 200
    with own_redis_server.client() as client:
        pid = client.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(redis_windows, "TIMEOUT_SECONDS", 0.05)
    try:
        statuses = [api.get("/job-types").status_code for _ in range(21)]
        assert limiter_state(api) == "degraded"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert statuses == [200] * 20 + [429]
    monkeypatch.setattr(redis_windows, "TIMEOUT_SECONDS", PATIENCE_SECONDS)
    wait_until(lambda: counts_again(api, bob), what="Redis counts again")
    (mine,) = api.get("/rate-limits").json()["data"]
    assert mine["used"] in (10, 11)


def test_the_limiter_can_have_a_redis_of_its_own(local: Any, own_redis_server: RedisServer) -> None:
    api: LocalApi = local(ratelimit_redis_url=own_redis_server.url, rate_limits="queue=9/60,default=9/60")
    api.make()
    with own_redis_server.client() as client:
        (key,) = client.keys()
        assert key.startswith(b"rl:")
    own_redis_server.kill()
    job_id = api.make()["id"]
    assert api.get("//readyz", key=None).json()["limiter"] == "degraded"
    assert api.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_processes_share_the_quota_while_redis_is_away(local: Any, own_redis_server: RedisServer) -> None:
    api: LocalApi = local(redis_url=own_redis_server.url, rate_limits="queue=9/60", ratelimit_replicas=2)
    own_redis_server.kill()
    assert [api.post("/jobs", json=JOB).status_code for _ in range(6)] == [202] * 5 + [429]


def test_requests_without_a_key_never_reach_redis(local: Any, redis: redis_py.Redis) -> None:
    api: LocalApi = local()
    wrong = f"lw_live_{'a' * 12}_{'b' * 49}"
    statuses = [api.get("/jobs", key=None).status_code for _ in range(61)]
    assert statuses == [401] * 60 + [429]
    assert api.get("/jobs", key=wrong).status_code == 429
    assert not redis.keys("rl:*")
    assert api.get("/jobs").status_code == 200, "a valid key from the same address is not locked out"


def test_the_eleventh_failed_login_of_a_minute_is_called_abnormal(local: Any) -> None:
    api: LocalApi = local()
    wrong = f"lw_live_{'a' * 12}_{'b' * 49}"
    assert {api.get("/jobs", key=wrong).status_code for _ in range(10)} == {401}
    refused = api.get("/jobs", key=wrong)
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (429, "abnormal_usage_detected")
    assert problem["type"].endswith("#abnormal-usage-detected")
    assert problem["facts"] == {"violated_policies": ["failed-logins"]}
    assert api.get("/jobs", key=None).status_code == 401
    assert api.get("/jobs").status_code == 200
