"""The rate limiter as callers meet it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from api_client import RATE_HEADERS, LocalApi, ServedApi
from factories import add_job
from laneway.clock import new_id
from laneway.domain.states import JobStatus
from laneway.engine.callers import Role
from servers import RedisServer

JOB = {"job_type": "demo.noop"}


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


def test_of_200_parallel_requests_two_processes_admit_exactly_50(served: Any) -> None:
    rules = "default=50/60@user"
    first: ServedApi = served(rate_limits=rules)
    second: ServedApi = served(rate_limits=rules)
    for trial in range(10):
        key = first.key(subject=f"caller-{trial}")
        statuses = asyncio.run(_ask_all_at_once([first.socket, second.socket] * 100, key))
        assert (statuses.count(200), statuses.count(429)) == (50, 150), trial


async def _ask_all_at_once(sockets: Sequence[Path], key: str) -> list[int]:
    """The statuses of as many requests, each on a connection of its own, sent when all are open."""
    head = f"GET /api/v1/job-types HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {key}\r\n\r\n"
    opened = await asyncio.gather(*[asyncio.open_unix_connection(socket) for socket in sockets])
    for _, writer in opened:
        writer.write(head.encode())
    statuses = [int((await reader.readline()).split()[1]) for reader, _ in opened]
    for _, writer in opened:
        writer.close()
    return statuses


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
