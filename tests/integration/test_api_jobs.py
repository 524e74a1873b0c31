"""Making, reading, listing and cancelling jobs over HTTP."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import redis as redis_py
import sqlalchemy as sa

from api_client import LocalApi
from factories import add_job, events_of, hold_of, job_row
from laneway.api.schemas import JobStatusView, JobView
from laneway.clock import SystemClock, first_id, new_id
from laneway.db import Database
from laneway.domain.states import ACTIVE, FINAL, JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.transitions import BackOff, apply
from servers import wait_until

ANSWERED = {
    *("depends_on", "on_dependency_failure", "batch_id", "chain_id", "chain_step", "scheduled_job_id"),
    *("id", "tenant_id", "created_by", "job_type", "parameters", "queue", "priority", "title", "description"),
    *("tags", "metadata", "scheduled_for", "expires_at", "timeout_seconds", "max_retries"),
    *("retry_delay_seconds", "retry_backoff", "retry_max_delay_seconds", "retry_jitter", "unique_key"),
    *("webhook_url", "webhook_events", "webhook_delivered", "webhook_attempts", "status", "status_reason"),
    *("concurrency_key", "concurrency_limit", "position"),
    *("cancelling", "progress", "progress_message", "progress_details", "result", "error", "attempt"),
    *("retry_count", "next_retry_at", "worker", "dead_letter_reason", "created_at", "queued_at"),
    *("started_at", "finished_at", "updated_at", "cancelled_at", "cancelled_by"),
}
EVERYTHING: dict[str, Any] = {
    "job_type": "demo.echo",
    "parameters": {"text": "ünï ✓ \U0001f600", "nested": [1, 2.5, None, True, {"a": []}], "big": 2**63 - 1},
    "queue": "emails",
    "priority": "high",
    "title": "A title",
    "description": "What it is for",
    "tags": ["a", "b"],
    "metadata": {"customer": 7},
    "expires_at": "2099-01-01T00:00:00+02:00",
    "timeout_seconds": 60,
    "max_retries": 5,
    "retry_delay_seconds": 1.5,
    "retry_backoff": 3.0,
    "retry_max_delay_seconds": 10.0,
    "retry_jitter": False,
    "unique_key": "one",
    "concurrency_key": "two at once",
    "concurrency_limit": 2,
    "webhook_url": "https://hooks.example.com/laneway",
    "webhook_events": ["job.completed", "job.failed"],
}


def mine(api: LocalApi, status: JobStatus = JobStatus.QUEUED, **columns: Any) -> str:
    """A job of Alice's, past the API."""
    return add_job(api.database, status, tenant_id=api.tenant_id, **columns)


def test_a_job_is_accepted_with_a_place_to_look_and_a_time_to_wait(each_api: LocalApi) -> None:
    response = each_api.post("/jobs", json={"job_type": "demo.echo"})
    assert response.status_code == 202
    assert response.headers["location"] == f"/api/v1/jobs/{response.json()['id']}"
    assert response.headers["retry-after"] == "1"
    place = response.headers["location"].removeprefix("/api/v1")
    assert each_api.get(place).json() == response.json() | {"position": 1}


def test_what_is_asked_for_is_answered_stored_and_read_back(each_api: LocalApi) -> None:
    job = each_api.make(**EVERYTHING)
    asked = EVERYTHING | {"expires_at": "2098-12-31T22:00:00.000000Z"}
    assert {name: job[name] for name in asked} == asked
    assert each_api.get(f"/jobs/{job['id']}").json() == job | {"position": 1}


def test_the_answer_has_the_documented_fields_and_no_others(each_api: LocalApi) -> None:
    job = each_api.make()
    assert set(job) == set(JobView.model_fields) == ANSWERED
    assert (job["status"], job["progress"], job["attempt"], job["max_retries"]) == ("queued", 0, 0, 3)
    assert (job["retry_delay_seconds"], job["retry_backoff"], job["retry_max_delay_seconds"]) == (
        120,
        2,
        1800,
    )
    assert (job["queue"], job["priority"], job["timeout_seconds"]) == ("default", "normal", 3600)
    assert job["created_by"] == "alice"
    for name in ("created_at", "queued_at", "updated_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", job[name])


def test_an_accepted_job_is_a_committed_row_and_its_id_is_in_its_lane(
    each_api: LocalApi, redis: redis_py.Redis
) -> None:
    job = each_api.make(priority="critical")
    assert job_row(each_api.database, job["id"])["status"] == "queued"
    assert [event["action"] for event in events_of(each_api.database, job["id"])] == ["create"]
    assert redis.lrange("rq:queue:critical", 0, -1) == [job["id"].encode()]


def test_integer_priorities_are_understood(api: LocalApi) -> None:
    for number, name in ((10, "critical"), (8, "high"), (5, "normal"), (0, "low")):
        assert api.make(priority=number)["priority"] == name


def test_a_job_for_later_is_scheduled(each_api: LocalApi) -> None:
    moment = datetime.now(UTC).replace(microsecond=123456) + timedelta(hours=1)
    job = each_api.make(scheduled_for=moment.isoformat())
    assert (job["status"], job["queued_at"]) == ("scheduled", None)
    assert datetime.fromisoformat(job["scheduled_for"]) == moment
    assert each_api.make(delay_seconds=60)["status"] == "scheduled"
    assert each_api.make(delay_seconds=0)["status"] == "queued"
    assert each_api.make(scheduled_for="2001-01-01T00:00:00Z")["status"] == "queued"


def test_the_public_url_starts_every_link(local: Any) -> None:
    api = local(public_url="https://jobs.example.com/laneway/")
    for _ in range(2):
        response = api.post("/jobs", json={"job_type": "demo.noop"})
    assert response.headers["location"].startswith("https://jobs.example.com/laneway/api/v1/jobs/")
    link = api.get("/jobs?limit=1").headers["link"]
    assert link.startswith("<https://jobs.example.com/laneway/api/v1/jobs?limit=1&cursor=")


def test_the_same_unique_key_answers_with_the_active_job(each_api: LocalApi) -> None:
    first = each_api.make(unique_key="report-7")
    assert each_api.make(unique_key="report-7")["id"] == first["id"]
    refused = each_api.post(
        "/jobs", json={"job_type": "demo.echo", "unique_key": "report-7", "on_conflict": "reject"}
    )
    assert (refused.status_code, refused.json()["code"]) == (409, "unique_key_taken")
    assert refused.json()["facts"] == {"job_id": first["id"]}
    each_api.post(f"/jobs/{first['id']}/cancel")
    assert each_api.make(unique_key="report-7")["id"] != first["id"]


def test_a_unique_key_shows_nobody_the_job_of_another_user(each_api: LocalApi) -> None:
    job = each_api.make(unique_key="payroll", parameters={"secret": 1})
    bob = each_api.key(subject="bob")
    asked = {"job_type": "demo.echo", "unique_key": "payroll"}
    refused = each_api.post("/jobs", key=bob, json=asked)
    assert (refused.status_code, refused.json()["code"]) == (409, "unique_key_taken")
    assert job["id"] not in refused.text
    operator = each_api.key(Role.OPERATOR)
    assert each_api.make(key=operator, unique_key="payroll")["id"] == job["id"]
    stranger = each_api.key(tenant="elsewhere", subject="alice")
    assert each_api.make(key=stranger, unique_key="payroll")["id"] != job["id"]


def test_of_parallel_requests_with_one_unique_key_one_makes_the_job(each_api: LocalApi) -> None:
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda _: each_api.make(unique_key="once")["id"], range(40)))
    assert len(set(made)) == 1
    assert each_api.count_jobs() == 1


def test_parallel_requests_share_transactions_and_lose_nothing(each_api: LocalApi) -> None:
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda n: each_api.make(parameters={"n": n}), range(100)))
    assert {each_api.get(f"/jobs/{job['id']}").json()["parameters"]["n"] for job in made} == set(range(100))


def test_the_status_is_small(each_api: LocalApi) -> None:
    job = each_api.make(parameters={"x": 1})
    status = each_api.get(f"/jobs/{job['id']}/status").json()
    assert set(status) == set(JobStatusView.model_fields)
    assert status == {name: job[name] for name in status}


def test_the_result_of_an_ended_job_is_served(each_api: LocalApi) -> None:
    completed = mine(each_api, JobStatus.COMPLETED, result={"rows": [1, 2]})
    assert each_api.get(f"/jobs/{completed}/result").json() == {
        "id": completed,
        "status": "completed",
        "result": {"rows": [1, 2]},
        "error": None,
        "finished_at": "2026-01-01T12:00:00.000000Z",
    }
    error = {"type": "ValueError", "message": "no", "category": "error", "traceback": "…"}
    failed = mine(each_api, JobStatus.FAILED, error=error, dead_letter_reason="exhausted")
    assert each_api.get(f"/jobs/{failed}/result").json()["error"] == error


def test_a_job_that_has_not_ended_has_no_result_yet(api: LocalApi) -> None:
    for status in ACTIVE:
        response = api.get(f"/jobs/{mine(api, status)}/result")
        assert (response.status_code, response.json()["code"]) == (409, "not_finished")
        assert response.json()["facts"] == {"current_status": status}


def test_a_job_in_any_status_can_be_read(each_api: LocalApi) -> None:
    for status in JobStatus:
        job_id = mine(each_api, status)
        assert each_api.get(f"/jobs/{job_id}").json()["status"] == status
        assert each_api.get(f"/jobs/{job_id}/status").json()["status"] == status
        assert [job["id"] for job in each_api.get(f"/jobs?status={status}").json()["data"]] == [job_id]


def test_an_unknown_id_is_not_found(api: LocalApi) -> None:
    for path in ("", "/status", "/result", "/events"):
        response = api.get(f"/jobs/{new_id()}{path}")
        assert (response.status_code, response.json()["code"]) == (404, "job_not_found")
        assert api.get(f"/jobs/no-uuid{path}").status_code == 422


# Pages


def test_pages_show_every_job_once_newest_first(each_api: LocalApi) -> None:
    made = [each_api.make()["id"] for _ in range(7)]
    seen: list[str] = []
    path = "/jobs?limit=3"
    while path:
        response = each_api.get(path)
        page = response.json()
        seen += [job["id"] for job in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None) == ("link" in response.headers)
        link = re.fullmatch(r'<(/api/v1)(/jobs\?[^>]+)>; rel="next"', response.headers.get("link", ""))
        path = link[2] if link else ""
        if link:
            assert page["next_cursor"] in path
    assert seen == made[::-1]


def test_a_page_that_is_just_full_is_the_last(each_api: LocalApi) -> None:
    for _ in range(3):
        each_api.make()
    page = each_api.get("/jobs?limit=3").json()
    assert (len(page["data"]), page["has_more"], page["next_cursor"]) == (3, False, None)


def test_a_page_has_1_to_200_jobs(api: LocalApi) -> None:
    for limit in (1, 200):
        assert api.get(f"/jobs?limit={limit}").status_code == 200
    for limit in (0, 201, -1):
        response = api.get(f"/jobs?limit={limit}")
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "query/limit")


def test_a_page_of_200_holds_200(api: LocalApi) -> None:
    for _ in range(201):
        mine(api)
    page = api.get("/jobs?limit=200").json()
    assert (len(page["data"]), page["has_more"]) == (200, True)


def test_filters_narrow_the_list(each_api: LocalApi) -> None:
    first = each_api.make()["id"]
    high = each_api.make(priority="high")["id"]
    emails = each_api.make(queue="emails")["id"]
    noop = each_api.make("demo.noop")["id"]
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    done = mine(each_api, JobStatus.COMPLETED, id=first_id(long_ago), created_at=long_ago)
    for query, wanted in [
        ("priority=high", {high}),
        ("queue=emails", {emails}),
        ("job_type=demo.noop", {noop}),
        ("status=completed", {done}),
        ("status=success", {done}),
        ("status=pending", {first, high, emails, noop}),
        ("status=pending&status=completed", {first, high, emails, noop, done}),
        ("status=processing", set()),
        ("created_before=2020-01-01T00:00:00.000001Z", {done}),
        ("created_before=2020-01-01T00:00:00Z", set()),
        ("created_before=0001-01-01T00:00:00Z", set()),
        ("created_after=9999-12-31T23:59:59Z", set()),
        ("created_after=0001-01-01T00:00:00Z", {first, high, emails, noop, done}),
        ("created_after=2019-12-31T23:59:59%2B00:00", {first, high, emails, noop, done}),
        ("created_after=2020-01-01T01:00:00%2B01:00", {first, high, emails, noop}),
        (f"tag={'x' * 100}", set()),
        (f"q={'x' * 200}", set()),
        (f"q={emails.upper()}", {emails}),
    ]:
        assert {job["id"] for job in each_api.get(f"/jobs?{query}").json()["data"]} == wanted, query


def test_a_filter_that_cannot_be_meant_is_refused(each_api: LocalApi) -> None:
    for query in (
        *("status=wrong", "priority=urgent", "queue=No", "queue=%00", "job_type=%00", "job_type=a%27b"),
        *("created_after=yesterday", "created_after=2020-01-01T00:00:00", "scope=all", "limit=1e2"),
        *("created_after=0001-01-01T00:00:00%2B14:00", "created_before=9999-12-31T23:59:59-14:00"),
        *("tag=", f"tag={'x' * 101}", "tag=%00", "q=", f"q={'x' * 201}", "q=%00", "page=2"),
        f"cursor={'A' * 101}",
    ):
        response = each_api.get(f"/jobs?{query}")
        assert response.status_code == 422, query
        assert response.json()["errors"][0]["pointer"].startswith(f"query/{query.partition('=')[0]}")


def test_a_bent_cursor_is_refused_wherever_it_is_bent(each_api: LocalApi) -> None:
    for _ in range(2):
        each_api.make()
    cursor = each_api.get("/jobs?limit=1").json()["next_cursor"]
    for at in range(len(cursor)):
        bent = cursor[:at] + ("B" if cursor[at] == "A" else "A") + cursor[at + 1 :]
        response = each_api.get(f"/jobs?limit=1&cursor={bent}")
        assert (response.status_code, response.json()["code"]) == (400, "invalid_cursor"), bent
    for wrong in (cursor[:-1], cursor + "AAAA", "x", "%00", "%F0%9F%98%80", "=="):
        assert each_api.get(f"/jobs?limit=1&cursor={wrong}").status_code == 400, wrong


def test_a_cursor_serves_its_own_filters_only(each_api: LocalApi) -> None:
    operator = each_api.key(Role.OPERATOR, subject="olga")
    for _ in range(2):
        each_api.make(key=operator)
    cursor = each_api.get("/jobs?limit=1", key=operator).json()["next_cursor"]
    assert each_api.get(f"/jobs?limit=5&cursor={cursor}", key=operator).status_code == 200
    for other in ("status=queued", "priority=low", "scope=mine", "queue=default"):
        response = each_api.get(f"/jobs?limit=1&{other}&cursor={cursor}", key=operator)
        assert (response.status_code, response.json()["code"]) == (400, "invalid_cursor"), other


# Cancelling


def test_a_waiting_job_is_cancelled_at_once(each_api: LocalApi) -> None:
    for status in ACTIVE - {JobStatus.RUNNING}:
        job_id = mine(each_api, status)
        response = each_api.post(f"/jobs/{job_id}/cancel", json={"reason": "not needed"})
        job = response.json()
        assert (response.status_code, job["status"], job["cancelled_by"]) == (200, "cancelled", "alice")
        assert job["cancelled_at"] == job["finished_at"] is not None
        assert each_api.get(f"/jobs/{job_id}").json() == job
        assert events_of(each_api.database, job_id)[-1]["reason"] == "not needed"


def test_a_cancelled_job_leaves_its_lane(each_api: LocalApi, redis: redis_py.Redis) -> None:
    job = each_api.make()
    assert redis.llen("rq:queue:normal") == 1
    assert each_api.post(f"/jobs/{job['id']}/cancel").status_code == 200
    assert redis.llen("rq:queue:normal") == 0


def test_a_running_job_is_asked_to_stop(each_api: LocalApi) -> None:
    job_id = mine(each_api, JobStatus.RUNNING)
    how = {"reason": "enough", "terminate": True, "grace_seconds": 1.5}
    response = each_api.post(f"/jobs/{job_id}/cancel", json=how)
    assert (response.status_code, response.json()["status"]) == (202, "running")
    assert response.json()["cancelling"] is True
    assert response.json()["cancelled_at"] is None
    row = job_row(each_api.database, job_id)
    assert (row["cancel_reason"], row["cancel_terminate"], row["cancel_grace_seconds"]) == (
        "enough",
        True,
        1.5,
    )
    again = each_api.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["cancelling"]) == (202, True)
    assert job_row(each_api.database, job_id)["cancel_terminate"], "a second request takes nothing back"


def test_cancelling_twice_is_no_error(each_api: LocalApi) -> None:
    job = each_api.make()
    first = each_api.post(f"/jobs/{job['id']}/cancel")
    second = each_api.post(f"/jobs/{job['id']}/cancel")
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json() == second.json()


def test_an_ended_job_cannot_be_cancelled(each_api: LocalApi) -> None:
    for status in FINAL - {JobStatus.CANCELLED}:
        job_id = mine(each_api, status)
        response = each_api.post(f"/jobs/{job_id}/cancel")
        assert (response.status_code, response.json()["code"]) == (409, "illegal_transition")
        assert response.json()["facts"] == {"current_status": status}
        assert each_api.get(f"/jobs/{job_id}").json()["status"] == status


def test_cancelling_an_unknown_job_is_not_found(api: LocalApi) -> None:
    assert api.post(f"/jobs/{new_id()}/cancel").status_code == 404


WRONG_CANCELS: list[object] = [
    *({"reason": "x" * 201}, {"grace_seconds": -1}, {"grace_seconds": 3601}, {"terminate": "perhaps"}),
    *({"why": "x"}, [], "x", {"reason": "a\0b"}, {"reason": 5}),
]


def test_a_cancel_that_cannot_be_meant_is_refused(each_api: LocalApi) -> None:
    for how in WRONG_CANCELS:
        job = each_api.make()
        assert each_api.post(f"/jobs/{job['id']}/cancel", json=how).status_code == 422
        assert each_api.get(f"/jobs/{job['id']}").json()["status"] == "queued"


def test_a_cancel_meets_its_limits_at_the_number(each_api: LocalApi) -> None:
    job_id = mine(each_api, JobStatus.RUNNING)
    how = {"reason": "x" * 200, "grace_seconds": 3600}
    assert each_api.post(f"/jobs/{job_id}/cancel", json=how).status_code == 202


def test_a_job_that_is_handed_on_meanwhile_is_cancelled_all_the_same(local: Any, postgres_url: str) -> None:
    """A worker's commit falls between the cancel's look at the running job and its wish."""
    api: LocalApi = local(database_url=postgres_url)
    job_id = mine(api, JobStatus.RUNNING)
    job, attempt, token = hold_of(api.database, job_id)
    now = SystemClock().now()
    back_off = BackOff(job, attempt, token, next_retry_at=now + timedelta(hours=1))
    with api.database.write() as worker:
        apply(worker, [back_off], now=now, actor="worker")
        with api.asking("POST", f"/jobs/{job_id}/cancel") as answer:
            wait_until(
                lambda: _someone_waits_for_a_lock(api.database), what="the cancel meets the worker's lock"
            )
            worker.commit()
            response = answer()
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")


def _someone_waits_for_a_lock(database: Database) -> bool:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with database.read() as connection:
        return bool(connection.execute(sa.text(waiting)).scalar())
