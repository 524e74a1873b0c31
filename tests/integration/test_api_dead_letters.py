"""Dead letters over HTTP: who may do what, and what is answered."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
import redis as redis_py

from api_client import LocalApi
from factories import NOW, add_job, events_of, job_row
from laneway.clock import new_id
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.dead_letters import MAX_BULK, MAX_SAMPLE


def dead(api: LocalApi, status: JobStatus = JobStatus.FAILED, **columns: Any) -> str:
    """A dead letter of Alice's, past the API."""
    return add_job(
        api.database,
        status,
        **({"tenant_id": api.tenant_id, "dead_letter_reason": "exhausted", "attempt": 4} | columns),
    )


def ids_of(page: Any) -> list[str]:
    return [job["id"] for job in page.json()["data"]]


def test_dead_letters_are_listed_and_read_whole(each_api: LocalApi) -> None:
    error = {"type": "E", "message": "m", "category": "transient", "traceback": "frames"}
    ids = [dead(each_api, error=error), dead(each_api, JobStatus.TIMEOUT, dead_letter_reason="timeout")]
    add_job(each_api.database, JobStatus.CANCELLED, tenant_id=each_api.tenant_id)
    page = each_api.get("/dead-letters")
    assert (page.status_code, ids_of(page)) == (200, ids[::-1])
    assert page.json()["data"][1] == each_api.get(f"/dead-letters/{ids[0]}").json()
    assert each_api.get(f"/dead-letters/{ids[0]}").json() == each_api.get(f"/jobs/{ids[0]}").json()
    assert each_api.get(f"/dead-letters/{ids[0]}").json()["error"]["traceback"] == "frames"


def test_pages_are_followed_by_their_link(each_api: LocalApi) -> None:
    ids = [dead(each_api, queue="emails") for _ in range(3)]
    dead(each_api)
    first = each_api.get("/dead-letters?limit=2&queue=emails")
    assert (ids_of(first), first.json()["has_more"]) == ([ids[2], ids[1]], True)
    following = first.headers["link"].removeprefix("<").partition(">")[0].removeprefix("/api/v1")
    second = each_api.get(following)
    assert (ids_of(second), second.json()["next_cursor"]) == ([ids[0]], None)
    cursor = first.json()["next_cursor"]
    for path in (f"/dead-letters?cursor={cursor}", f"/jobs?queue=emails&cursor={cursor}"):
        assert each_api.get(path).json()["code"] == "invalid_cursor"


def test_each_filter_is_taken(each_api: LocalApi) -> None:
    later = NOW + timedelta(hours=2)
    wanted = dead(
        each_api,
        job_type="demo.noop",
        queue="emails",
        dead_letter_reason="poison",
        created_at=later,
        finished_at=later,
    )
    dead(each_api)
    for query in (
        "job_type=demo.noop",
        "queue=emails",
        "reason=poison",
        "created_after=2026-01-01T13:00:00Z",
        "finished_after=2026-01-01T14:00:00%2B01:00",
    ):
        assert ids_of(each_api.get(f"/dead-letters?{query}")) == [wanted], query
    for query in ("created_before=2026-01-01T13:00:00Z", "finished_before=2026-01-01T13:00:00Z"):
        assert wanted not in ids_of(each_api.get(f"/dead-letters?{query}")), query


@pytest.mark.parametrize("query", ["reason=bored", "status=failed", "limit=0", "limit=201", "queue=A B"])
def test_a_question_that_is_not_understood_is_refused(api: LocalApi, query: str) -> None:
    assert api.get(f"/dead-letters?{query}").status_code == 422


def test_users_see_their_own_and_operators_their_tenants(api: LocalApi) -> None:
    mine, bobs = dead(api), dead(api, created_by="bob")
    assert ids_of(api.get("/dead-letters")) == [mine]
    assert ids_of(api.get("/dead-letters", key=api.key(Role.OPERATOR))) == [bobs, mine]
    stranger = api.key(Role.ADMIN, tenant="other")
    assert ids_of(api.get("/dead-letters", key=stranger)) == []
    for key in (api.key(subject="bob"), stranger):
        assert api.get(f"/dead-letters/{mine}", key=key).status_code == 404
        assert api.post(f"/dead-letters/{mine}/retry", key=key).status_code == 404
    assert api.request("DELETE", f"/dead-letters/{mine}", key=stranger).status_code == 404
    assert job_row(api.database, mine)["status"] == "failed"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/dead-letters/retry", {"filter": {}}),
        ("POST", "/dead-letters/purge", {"filter": {}}),
        ("DELETE", "/dead-letters/{}", None),
    ],
)
def test_what_concerns_many_and_deleting_is_for_operators(
    api: LocalApi, method: str, path: str, body: Any
) -> None:
    job_id = dead(api)
    refused = api.request(method, path.format(job_id), json=body)
    assert (refused.status_code, refused.json()["facts"]) == (403, {"needed_role": "operator"})
    assert job_row(api.database, job_id)["status"] == "failed"


def test_one_is_retried_with_other_parameters(each_api: LocalApi, redis: redis_py.Redis) -> None:
    job_id = dead(each_api)
    response = each_api.post(f"/dead-letters/{job_id}/retry", json={"parameters": {"text": "again"}})
    assert (response.status_code, response.headers["location"]) == (202, f"/api/v1/jobs/{job_id}")
    assert (response.json()["status"], response.json()["parameters"]) == ("queued", {"text": "again"})
    assert redis.lrange("rq:queue:normal", 0, -1) == [job_id.encode()]


def test_what_is_no_dead_letter_any_more_is_not_found(each_api: LocalApi) -> None:
    operator = each_api.key(Role.OPERATOR)
    job_id = dead(each_api)
    assert each_api.post(f"/dead-letters/{job_id}/retry").status_code == 202
    cancelled = add_job(each_api.database, JobStatus.CANCELLED, tenant_id=each_api.tenant_id)
    for gone in (job_id, cancelled, new_id()):
        for method, path in (
            ("GET", f"/dead-letters/{gone}"),
            ("POST", f"/dead-letters/{gone}/retry"),
            ("DELETE", f"/dead-letters/{gone}"),
        ):
            answer = each_api.request(method, path, key=operator)
            assert (answer.status_code, answer.json()["code"]) == (404, "dead_letter_not_found")


def test_one_whose_key_is_held_is_a_conflict(each_api: LocalApi) -> None:
    job_id = dead(each_api, unique_key="k")
    holder = each_api.make(unique_key="k")
    response = each_api.post(f"/dead-letters/{job_id}/retry")
    assert (response.status_code, response.json()["code"]) == (409, "unique_key_taken")
    assert response.json()["facts"] == {"job_id": holder["id"]}


def test_many_are_retried_by_one_call(each_api: LocalApi, redis: redis_py.Redis) -> None:
    operator = each_api.key(Role.OPERATOR)
    ids = [dead(each_api, dead_letter_reason="poison") for _ in range(MAX_SAMPLE + 1)]
    left = dead(each_api)
    body = {"filter": {"reason": "poison"}}
    forecast = each_api.post("/dead-letters/retry", key=operator, json=body | {"dry_run": True})
    said = {
        "count": len(ids),
        "sample_ids": ids[:MAX_SAMPLE],
        "skipped": 0,
        "remaining": 0,
        "last_due_at": None,
    }
    assert (forecast.status_code, forecast.json()) == (200, said | {"dry_run": True})
    assert {job_row(each_api.database, job_id)["status"] for job_id in ids} == {"failed"}
    done = each_api.post("/dead-letters/retry", key=operator, json=body)
    assert (done.status_code, done.json()) == (202, said | {"dry_run": False})
    assert done.headers["location"] == "/api/v1/dead-letters"
    assert redis.lrange("rq:queue:normal", 0, -1) == [job_id.encode() for job_id in ids]
    assert ids_of(each_api.get("/dead-letters")) == [left]


def test_a_rate_says_when_the_last_of_them_is_tried(each_api: LocalApi) -> None:
    operator = each_api.key(Role.OPERATOR)
    first, last = dead(each_api), dead(each_api)
    answer = each_api.post("/dead-letters/retry", key=operator, json={"filter": {}, "rate": 0.5}).json()
    jobs = [each_api.get(f"/jobs/{job_id}").json() for job_id in (first, last)]
    assert [job["status"] for job in jobs] == ["retrying", "retrying"]
    assert jobs[1]["next_retry_at"] == answer["last_due_at"]
    moments = [datetime.fromisoformat(job["next_retry_at"]) for job in jobs]
    assert moments[1] - moments[0] == timedelta(seconds=2)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/filter"),
        ({"filter": None}, "/filter"),
        ({"filter": {"status": "failed"}}, "/filter/status"),
        ({"filter": {"reason": "bored"}}, "/filter/reason"),
        ({"filter": {}, "limit": 0}, "/limit"),
        ({"filter": {}, "limit": MAX_BULK + 1}, "/limit"),
        ({"filter": {}, "rate": 0.0009}, "/rate"),
        ({"filter": {}, "rate": 1000.1}, "/rate"),
        ({"filter": {}, "sure": True}, "/sure"),
    ],
)
def test_a_bulk_call_that_is_not_understood_changes_nothing(
    api: LocalApi, body: dict[str, Any], pointer: str
) -> None:
    job_id = dead(api)
    operator = api.key(Role.OPERATOR)
    answer = api.post("/dead-letters/retry", key=operator, json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
    if pointer != "/rate":
        assert api.post("/dead-letters/purge", key=operator, json=body).status_code == 422
    assert job_row(api.database, job_id)["status"] == "failed"


@pytest.mark.parametrize("body", [{"limit": 1}, {"limit": MAX_BULK}, {"rate": 0.001}, {"rate": 1000}])
def test_the_bounds_themselves_are_taken(api: LocalApi, body: dict[str, Any]) -> None:
    operator = api.key(Role.OPERATOR)
    assert api.post("/dead-letters/retry", key=operator, json={"filter": {}} | body).status_code == 202


def test_many_are_deleted_by_one_call(each_api: LocalApi) -> None:
    operator = each_api.key(Role.OPERATOR)
    ids = [dead(each_api, queue="emails") for _ in range(3)]
    left = dead(each_api)
    body = {"filter": {"queue": "emails"}}
    forecast = each_api.post("/dead-letters/purge", key=operator, json=body | {"dry_run": True})
    assert (forecast.json()["count"], forecast.json()["sample_ids"]) == (3, ids)
    done = each_api.post("/dead-letters/purge", key=operator, json=body | {"limit": 2})
    assert (done.status_code, done.json()["count"], done.json()["remaining"]) == (200, 2, 1)
    assert each_api.post("/dead-letters/purge", key=operator, json=body).json()["count"] == 1
    assert ids_of(each_api.get("/dead-letters")) == [left]
    assert [each_api.get(f"/jobs/{job_id}").status_code for job_id in ids] == [404] * 3
    assert events_of(each_api.database, ids[0]) == []


def test_one_is_deleted(each_api: LocalApi) -> None:
    job_id = dead(each_api)
    operator = each_api.key(Role.OPERATOR)
    assert each_api.request("DELETE", f"/dead-letters/{job_id}", key=operator).status_code == 204
    assert each_api.get(f"/jobs/{job_id}").status_code == 404


def test_each_operation_has_its_rate_class(local: Any) -> None:
    api = local(rate_limits="queue=2/60@user,batch=1/60@user,default=4/60@user")
    operator = api.key(Role.OPERATOR)
    job_id = dead(api)
    for method, path, body, limit in (
        ("GET", "/dead-letters", None, "4"),
        ("GET", f"/dead-letters/{job_id}", None, "4"),
        ("DELETE", f"/dead-letters/{new_id()}", None, "4"),
        ("POST", f"/dead-letters/{job_id}/retry", {}, "2"),
        ("POST", "/dead-letters/retry", {"filter": {}}, "1"),
    ):
        answer = api.request(method, path, key=operator, json=body)
        assert answer.headers["x-ratelimit-limit"] == limit, path
    assert api.post("/dead-letters/purge", key=operator, json={"filter": {}}).status_code == 429
