"""Waiting for a job over HTTP: `Prefer: wait`, ETags, long polls."""

from __future__ import annotations

from typing import Any

import redis as redis_py

from api_client import LocalApi, WorkerProcess, claim, complete, report
from factories import add_job
from laneway.clock import new_id
from laneway.domain.states import JobStatus
from servers import wait_until


def wait_for(seconds: float, tag: str | None = None) -> dict[str, str]:
    return {"Prefer": f"wait={seconds}"} | ({"If-None-Match": tag} if tag else {})


def test_a_job_that_ends_in_time_is_answered_with_its_result(
    each_api: LocalApi, worker: WorkerProcess
) -> None:
    response = each_api.post(
        "/jobs", json={"job_type": "demo.echo", "parameters": {"x": 1}}, headers=wait_for(30)
    )
    assert response.status_code == 200, response.text
    assert response.headers["preference-applied"] == "wait=30"
    assert "location" not in response.headers
    job = response.json()
    assert (job["status"], job["progress"], job["result"]) == ("completed", 100, {"x": 1})
    assert each_api.get(f"/jobs/{job['id']}").json() == job


def test_a_job_that_does_not_end_in_time_is_accepted_all_the_same(each_api: LocalApi) -> None:
    response = each_api.post("/jobs", json={"job_type": "demo.echo"}, headers=wait_for(1))
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    assert "preference-applied" not in response.headers
    assert response.headers["location"].endswith(response.json()["id"])


def test_other_preferences_are_let_be(api: LocalApi) -> None:
    for preference in ("wait=0", "respond-async", "wait=-1", "wait=x", "waiting=9", 'wait="', "wait"):
        response = api.post("/jobs", json={"job_type": "demo.noop"}, headers={"Prefer": preference})
        assert (response.status_code, "preference-applied" in response.headers) == (202, False), preference


def test_an_etag_changes_with_each_visible_change(each_api: LocalApi) -> None:
    job_id = each_api.make()["id"]
    tags: list[str] = []

    def look() -> None:
        for path in ("", "/status"):
            response = each_api.get(f"/jobs/{job_id}{path}")
            tag = response.headers["etag"]
            assert tag.startswith('"')
            assert response.headers["cache-control"] == "private, no-cache"
            same = each_api.get(f"/jobs/{job_id}{path}", headers={"If-None-Match": tag})
            assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
            older = {"If-None-Match": ", ".join(['"none"', *tags])}
            assert each_api.get(f"/jobs/{job_id}{path}", headers=older).status_code == 200
        assert tag not in tags
        tags.append(tag)

    look()
    held = claim(each_api, job_id)
    look()
    report(each_api, held, 40)
    look()
    each_api.post(f"/jobs/{job_id}/cancel")
    look()
    complete(each_api, held, "{}")
    look()


def test_if_none_match_takes_lists_weak_tags_and_a_star(api: LocalApi) -> None:
    job_id = api.make()["id"]
    tag = api.get(f"/jobs/{job_id}").headers["etag"]
    for matching in (f'"x", {tag}', f"W/{tag}", "*"):
        assert api.get(f"/jobs/{job_id}", headers={"If-None-Match": matching}).status_code == 304, matching
    for other in ('"x"', "", '"', tag[:-2]):
        assert api.get(f"/jobs/{job_id}", headers={"If-None-Match": other}).status_code == 200, other


def test_a_long_poll_answers_at_the_first_change(each_api: LocalApi, redis: redis_py.Redis) -> None:
    job_id = each_api.make()["id"]
    tag = each_api.get(f"/jobs/{job_id}").headers["etag"]
    with each_api.asking("GET", f"/jobs/{job_id}", headers=wait_for(30, tag)) as answer:
        each_api.post(f"/jobs/{job_id}/cancel")
        response = answer()
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert response.headers["preference-applied"] == "wait=30"
    assert response.headers["etag"] != tag


def test_a_long_poll_without_a_change_ends_unmodified(api: LocalApi) -> None:
    job_id = api.make()["id"]
    tag = api.get(f"/jobs/{job_id}").headers["etag"]
    response = api.get(f"/jobs/{job_id}/status", headers=wait_for(1, tag))
    assert (response.status_code, response.headers["etag"]) == (304, tag)


def test_a_wait_without_a_tag_is_for_the_end(api: LocalApi) -> None:
    ended = add_job(api.database, JobStatus.COMPLETED, tenant_id=api.tenant_id)
    assert api.get(f"/jobs/{ended}", headers=wait_for(30)).status_code == 200
    job_id = api.make()["id"]
    assert api.get(f"/jobs/{job_id}", headers=wait_for(1)).json()["status"] == "queued"
    with api.asking("GET", f"/jobs/{job_id}/status", headers=wait_for(30)) as answer:
        held = claim(api, job_id)
        report(api, held, 10)
        complete(api, held, "1")
        assert answer().json()["status"] == "completed"


def test_nobody_waits_past_the_limit_of_streams(local: Any) -> None:
    api: LocalApi = local(streams_per_caller=2)
    job_id = api.make()["id"]
    tag = api.get(f"/jobs/{job_id}").headers["etag"]
    long_poll = f"/jobs/{job_id}"
    with (
        api.asking("GET", long_poll, headers=wait_for(30, tag)) as first,
        api.asking("GET", long_poll, headers=wait_for(30, tag)) as second,
    ):
        refused = wait_until(
            lambda: (r := api.get(long_poll, headers=wait_for(1, tag))).status_code == 429 and r,
            what="both long polls are under way",
        )
        assert refused.json()["facts"] == {"violated_policies": ["concurrent-streams"]}
        before = api.count_jobs()
        refused = api.post("/jobs", json={"job_type": "demo.noop"}, headers=wait_for(1))
        assert (refused.status_code, api.count_jobs()) == (429, before)
        assert api.get(long_poll).status_code == 200, "who does not wait takes no place"
        bob = api.key(subject="bob")
        assert api.get(f"/jobs/{new_id()}", key=bob, headers=wait_for(1)).status_code == 404
        api.post(f"/jobs/{job_id}/cancel")
        assert [first().status_code, second().status_code] == [200, 200]
    assert api.get(long_poll, headers=wait_for(1)).status_code == 200


def test_news_that_make_no_sense_leave_the_listener_listening(api: LocalApi, redis: redis_py.Redis) -> None:
    wait_until(lambda: redis.pubsub_numsub("laneway:live")[0][1] == 1, what="the API listens")
    for text in (b"", b"[", b"\xff\xfe", b"5", b"null", b'{"a":1}', b"[[1]]", b"[null]"):
        redis.publish("laneway:live", text)
    api.get("/job-types")
    assert redis.pubsub_numsub("laneway:live")[0][1] == 1
