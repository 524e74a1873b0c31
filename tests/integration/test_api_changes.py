"""`PATCH /jobs/{id}`, entity tags and `If-Match` over HTTP."""

from __future__ import annotations

from typing import Any

import redis as redis_py

from api_client import LocalApi, claim
from factories import add_job, change, events_of, job_row
from laneway import models
from laneway.clock import new_id
from laneway.domain.spec import MAX_TAGS
from laneway.domain.states import FINAL, JobStatus


def patch(api: LocalApi, job_id: str, body: object, **how: Any) -> Any:
    return api.request("PATCH", f"/jobs/{job_id}", json=body, **how)


def test_a_waiting_job_is_changed_and_answered_whole(each_api: LocalApi, redis: redis_py.Redis) -> None:
    job_id = each_api.make(tags=["old"])["id"]
    response = patch(each_api, job_id, {"priority": 10, "tags": ["new"], "parameters": {"text": "é"}})
    assert response.status_code == 200, response.text
    job = response.json()
    assert (job["priority"], job["tags"], job["parameters"]) == ("critical", ["new"], {"text": "é"})
    read = each_api.get(f"/jobs/{job_id}")
    assert (read.json(), read.headers["etag"]) == (job, response.headers["etag"])
    assert redis.lrange("rq:queue:critical", 0, -1) == [job_id.encode()]
    assert redis.llen("rq:queue:normal") == 0
    for tag, found in (("new", [job_id]), ("old", [])):
        assert [each["id"] for each in each_api.get(f"/jobs?tag={tag}").json()["data"]] == found
    timeline = each_api.get(f"/jobs/{job_id}/timeline").json()["data"]
    assert [entry["action"] for entry in timeline] == ["create", "change"]


def test_a_scheduled_job_is_brought_forward(each_api: LocalApi, redis: redis_py.Redis) -> None:
    job_id = each_api.make(delay_seconds=3600)["id"]
    later = patch(each_api, job_id, {"scheduled_for": "2099-01-01T02:00:00+02:00"})
    assert later.json()["scheduled_for"] == "2099-01-01T00:00:00.000000Z"
    now = patch(each_api, job_id, {"scheduled_for": "2020-01-01T00:00:00Z"})
    assert (now.status_code, now.json()["status"]) == (200, "queued")
    assert redis.lrange("rq:queue:normal", 0, -1) == [job_id.encode()]


def test_a_job_that_runs_or_has_ended_is_left_alone(each_api: LocalApi) -> None:
    for status in (*FINAL, JobStatus.RUNNING):
        job_id = add_job(each_api.database, status, tenant_id=each_api.tenant_id)
        response = patch(each_api, job_id, {"priority": "low"})
        assert (response.status_code, response.json()["code"]) == (409, "illegal_transition")
        assert response.json()["facts"] == {"current_status": status}


WRONG: list[object] = [
    *({}, [], None, "x", {"title": "x"}, {"priority": "low", "queue": "x"}, {"status": "queued"}),
    *({"priority": None}, {"priority": "urgent"}, {"priority": 7}, {"tags": None}, {"tags": [""]}),
    *({"tags": ["x" * 101]}, {"tags": ["t"] * (MAX_TAGS + 1)}, {"metadata": None}, {"parameters": None}),
    *({"scheduled_for": None}, {"scheduled_for": "2020-01-01T00:00:00"}, {"scheduled_for": "soon"}),
    *({"metadata": {"a": "\0"}}, {"parameters": {"x": 2**64}}, {"tags": ["a\0b"]}),
]


def test_a_change_that_cannot_be_meant_is_refused(api: LocalApi) -> None:
    job_id = api.make()["id"]
    before = job_row(api.database, job_id)
    for body in WRONG:
        assert patch(api, job_id, body).status_code == 422, body
    assert job_row(api.database, job_id) == before
    full = {"tags": ["x" * 100] + [str(n) for n in range(MAX_TAGS - 1)]}
    assert patch(api, job_id, full).status_code == 200
    assert patch(api, new_id(), {"priority": "low"}).status_code == 404
    assert patch(api, job_id, {"priority": "low"}, key=api.key(subject="bob")).status_code == 404


def test_a_change_holds_for_the_version_that_was_seen(each_api: LocalApi) -> None:
    job_id = each_api.make()["id"]
    tag = each_api.get(f"/jobs/{job_id}").headers["etag"]
    for other in ('"0"', '"x"', f"W/{tag}", tag.strip('"'), "", '"99999999999"', f'{tag}"'):
        refused = patch(each_api, job_id, {"priority": "low"}, headers={"If-Match": other})
        assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed"), other
    first = patch(each_api, job_id, {"priority": "low"}, headers={"If-Match": f'"0", {tag}'})
    assert first.status_code == 200
    second = patch(each_api, job_id, {"priority": "high"}, headers={"If-Match": tag})
    assert second.status_code == 412
    assert patch(each_api, job_id, {"priority": "high"}, headers={"If-Match": "*"}).status_code == 200
    assert [event["action"] for event in events_of(each_api.database, job_id)] == [
        "create",
        "change",
        "change",
    ]


def test_a_tag_tells_what_is_told_of_the_moment_apart(each_api: LocalApi) -> None:
    """A queued job that no worker can run says so, although its row has not changed."""
    job_id = each_api.make()["id"]
    fresh = each_api.get(f"/jobs/{job_id}")
    assert fresh.json()["status_reason"] is None
    row = job_row(each_api.database, job_id)
    change(each_api.database, models.jobs, job_id, queued_at=row["queued_at"].replace(year=2020))
    stuck = each_api.get(f"/jobs/{job_id}", headers={"If-None-Match": fresh.headers["etag"]})
    assert (stuck.status_code, stuck.json()["status_reason"]) == (200, "no_capable_worker")
    again = each_api.get(f"/jobs/{job_id}", headers={"If-None-Match": stuck.headers["etag"]})
    assert again.status_code == 304
    for tag in (fresh.headers["etag"], stuck.headers["etag"]):
        assert tag.startswith('"1'), "strong, and both of the same row"
    changed = patch(each_api, job_id, {"priority": "low"}, headers={"If-Match": stuck.headers["etag"]})
    assert changed.status_code == 200


def test_a_claimed_job_has_what_the_change_made_of_it(each_api: LocalApi) -> None:
    job_id = each_api.make(parameters={"x": 1})["id"]
    patch(each_api, job_id, {"parameters": {"x": 2}})
    assert claim(each_api, job_id).parameters == '{"x":2}'
    assert patch(each_api, job_id, {"parameters": {"x": 3}}).status_code == 409
