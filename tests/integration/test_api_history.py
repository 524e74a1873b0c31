"""A job's attempts and its timeline over HTTP; the deletion of a job with both."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from api_client import LocalApi, claim, complete, move
from factories import add_job, add_webhook, change, events_of
from laneway import models
from laneway.clock import SystemClock, new_id
from laneway.domain.states import ACTIVE, FINAL, JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.outcomes import Claimed, error_record
from laneway.engine.transitions import (
    BackOff,
    Claim,
    Enqueue,
    Fail,
    ForceComplete,
    Release,
    Retry,
    Stop,
    TimeOut,
    apply,
)


def hold_of(held: Claimed) -> tuple[str, int, str]:
    return held.job_id, held.attempt, held.lease_token


def error(category: str) -> str:
    return error_record("SomeError", f"it was {category}", category=category, traceback="line 1")


def back_off(api: LocalApi, held: Claimed, category: str) -> None:
    move(api, BackOff(*hold_of(held), next_retry_at=SystemClock().now(), error=error(category)))
    move(api, Enqueue(held.job_id))


def attempts_of(api: LocalApi, job_id: str, query: str = "") -> Any:
    response = api.get(f"/jobs/{job_id}/attempts{query}")
    assert response.status_code == 200, response.text
    return response.json()


def timeline_of(api: LocalApi, job_id: str, query: str = "") -> Any:
    response = api.get(f"/jobs/{job_id}/timeline{query}")
    assert response.status_code == 200, response.text
    return response.json()


def walk(api: LocalApi, path: str, limit: int) -> list[Any]:
    """The entries of all pages; the Link header leads on."""
    url, entries = f"{path}?limit={limit}", []
    while url:
        response = api.get(url)
        page = response.json()
        assert page["has_more"] == (page["next_cursor"] is not None) == ("link" in response.headers)
        entries += page["data"]
        link = response.headers.get("link", "")
        url = link.partition("<")[2].partition(">")[0].removeprefix("/api/v1")
    return entries


def test_each_attempt_tells_who_ran_it_when_and_how_it_ended(each_api: LocalApi) -> None:
    api, job_id = each_api, each_api.make()["id"]
    assert attempts_of(api, job_id) == {"data": [], "next_cursor": None, "has_more": False}
    for category in ("transient", "timeout", "crash", "snooze"):
        held = claim(api, job_id)
        back_off(api, held, category)
    move(api, Release(*hold_of(claim(api, job_id))))
    move(api, Fail(*hold_of(claim(api, job_id)), error=error("permanent"), reason="permanent"))
    move(api, Retry(job_id))
    move(api, TimeOut(*hold_of(claim(api, job_id)), error=error("timeout")))
    move(api, Retry(job_id))
    move(api, Stop(*hold_of(claim(api, job_id))))
    move(api, Retry(job_id))
    complete(api, claim(api, job_id))
    shown = attempts_of(api, job_id)["data"]
    assert [(entry["attempt"], entry["outcome"]) for entry in shown] == [
        (1, "failed"),
        (2, "timeout"),
        (3, "crashed"),
        (4, "snoozed"),
        (5, "released"),
        (6, "failed"),
        (7, "timeout"),
        (8, "cancelled"),
        (9, "completed"),
    ]
    first, sixth = shown[0], shown[5]
    assert first["started_at"] <= first["finished_at"] <= shown[1]["started_at"]
    assert first["error"] == {
        "type": "SomeError",
        "message": "it was transient",
        "category": "transient",
        "traceback": "line 1",
    }
    assert (sixth["reason"], shown[4]["error"], shown[8]["error"]) == ("permanent", None, None)


def test_an_attempt_under_way_has_no_end_and_one_that_an_admin_ended_has(each_api: LocalApi) -> None:
    job_id, worker_id = each_api.make()["id"], new_id()
    claiming = Claim(job_id, new_id(), worker_id, SystemClock().now())
    with each_api.database.write() as connection:
        apply(connection, [claiming], now=claiming.at, actor=f"worker:{worker_id}")
    [entry] = attempts_of(each_api, job_id)["data"]
    assert (entry["outcome"], entry["finished_at"], entry["error"]) == ("running", None, None)
    assert entry["worker"] == worker_id == each_api.get(f"/jobs/{job_id}").json()["worker"]
    move(each_api, ForceComplete(job_id, reason="by hand"))
    [entry] = attempts_of(each_api, job_id)["data"]
    assert (entry["outcome"], entry["reason"]) == ("completed", "by hand")


def test_the_end_of_an_attempt_is_its_own_and_not_what_comes_later(each_api: LocalApi) -> None:
    job_id = each_api.make()["id"]
    held = claim(each_api, job_id)
    move(each_api, BackOff(*hold_of(held), next_retry_at=SystemClock().now(), error=error("transient")))
    move(each_api, ForceComplete(job_id))
    [entry] = attempts_of(each_api, job_id)["data"]
    assert (entry["outcome"], entry["error"]["message"]) == ("failed", "it was transient")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_pages_hold_every_attempt_and_every_event_once(each_api: LocalApi, count: int) -> None:
    job_id = each_api.make()["id"]
    for _ in range(count):
        move(each_api, Release(*hold_of(claim(each_api, job_id))))
    numbers = [entry["attempt"] for entry in walk(each_api, f"/jobs/{job_id}/attempts", limit=2)]
    assert numbers == list(range(1, count + 1))
    seqs = [entry["seq"] for entry in walk(each_api, f"/jobs/{job_id}/timeline", limit=2)]
    assert seqs == list(range(1, 2 * count + 2))


@pytest.mark.parametrize("what", ["attempts", "timeline"])
def test_a_page_is_bounded_and_a_cursor_is_good_for_its_own_list(api: LocalApi, what: str) -> None:
    job_id, other = api.make()["id"], api.make()["id"]
    for made in (job_id, other):
        for _ in range(2):
            move(api, Release(*hold_of(claim(api, made))))
    path = f"/jobs/{job_id}/{what}"
    for limit, status in ((0, 422), (1, 200), (200, 200), (201, 422)):
        assert api.get(f"{path}?limit={limit}").status_code == status, limit
    cursor = api.get(f"{path}?limit=1").json()["next_cursor"]
    assert api.get(f"{path}?limit=1&cursor={cursor}").status_code == 200
    elsewhere = "timeline" if what == "attempts" else "attempts"
    for bent in (f"{path}?cursor={cursor[:-2]}", f"/jobs/{other}/{what}?cursor={cursor}"):
        assert api.get(bent).json()["code"] == "invalid_cursor", bent
    assert api.get(f"/jobs/{job_id}/{elsewhere}?cursor={cursor}").status_code == 400
    assert api.get(f"{path}?page=1").status_code == 422


def test_the_timeline_tells_all_that_happened_in_order(each_api: LocalApi) -> None:
    api, job_id = each_api, each_api.make()["id"]
    held = claim(api, job_id)
    move(api, Fail(*hold_of(held), error=error("permanent"), reason="permanent"))
    told = SystemClock().now() + timedelta(seconds=1)
    add_webhook(api.database, job_id, at=told, job_seq=3)
    shown = timeline_of(api, job_id)["data"]
    assert [(entry["kind"], entry["status"]) for entry in shown] == [
        ("job", "queued"),
        ("job", "running"),
        ("job", "failed"),
        ("webhook", "delivered"),
    ]
    create, begin, fail, webhook = shown
    assert (create["seq"], create["action"], create["actor"], create["attempt"]) == (1, "create", "alice", 0)
    assert (begin["action"], begin["attempt"]) == ("claim", 1)
    assert (fail["reason"], fail["error"]["type"]) == ("permanent", "SomeError")
    assert fail["error"]["traceback"] is None
    assert datetime.fromisoformat(webhook["at"]) == told
    assert (webhook["attempt"], webhook["url"]) == (1, "https://example.org/")
    assert [entry["at"] for entry in shown] == sorted(entry["at"] for entry in shown)


@pytest.mark.parametrize(("status", "number"), [("pending", 2), ("retrying", 2), ("sending", 1)])
def test_a_webhook_that_is_still_to_come_is_told_with_its_moment(
    each_api: LocalApi, status: str, number: int
) -> None:
    job_id = each_api.make()["id"]
    complete(each_api, claim(each_api, job_id))
    at = SystemClock().now() + timedelta(seconds=1)
    due = at + timedelta(minutes=1)
    add_webhook(
        each_api.database,
        job_id,
        status,
        at=at,
        job_seq=3,
        next_at=due,
        status_code=500,
        error_class="http_5xx",
    )
    tried, next_try = timeline_of(each_api, job_id)["data"][3:]
    assert (tried["status"], tried["status_code"], tried["error_class"]) == ("failed", 500, "http_5xx")
    assert (next_try["status"], next_try["attempt"], next_try["status_code"]) == (status, number, None)
    assert datetime.fromisoformat(next_try["at"]) == due


def test_events_stay_in_their_order_where_clocks_differ(each_api: LocalApi) -> None:
    """The worker's clock is an hour behind the API's; the webhook came between the claim and the end."""
    job_id = each_api.make()["id"]
    complete(each_api, claim(each_api, job_id))
    created = events_of(each_api.database, job_id)[0]["at"]
    e = models.job_events
    with each_api.database.write() as connection:
        for seq, minutes in ((2, -60), (3, -59)):
            connection.execute(
                e.update()
                .where(e.c.job_id == job_id, e.c.seq == seq)
                .values(at=created + timedelta(minutes=minutes))
            )
    add_webhook(each_api.database, job_id, at=created + timedelta(seconds=1), job_seq=3)
    assert [entry["kind"] for entry in timeline_of(each_api, job_id)["data"]] == [
        "job",
        "job",
        "job",
        "webhook",
    ]
    assert [entry.get("seq") for entry in timeline_of(each_api, job_id)["data"]] == [1, 2, 3, None]


def test_webhooks_stand_on_the_page_of_the_event_they_tell_of(each_api: LocalApi) -> None:
    job_id = each_api.make()["id"]
    complete(each_api, claim(each_api, job_id))
    add_webhook(each_api.database, job_id, at=SystemClock().now(), job_seq=3)
    first = timeline_of(each_api, job_id, "?limit=2")
    assert [entry["kind"] for entry in first["data"]] == ["job", "job"]
    rest = timeline_of(each_api, job_id, f"?limit=2&cursor={first['next_cursor']}")
    assert [entry["kind"] for entry in rest["data"]] == ["job", "webhook"]
    assert not rest["has_more"]


# Deleting a job


@pytest.mark.parametrize("status", JobStatus)
def test_an_operator_deletes_ended_jobs_and_no_others(each_api: LocalApi, status: JobStatus) -> None:
    api = each_api
    job_id = add_job(api.database, status, tenant_id=api.tenant_id)
    operator = api.key(Role.OPERATOR)
    refused = api.request("DELETE", f"/jobs/{job_id}")
    assert (refused.status_code, refused.json()["facts"]) == (403, {"needed_role": "operator"})
    answer = api.request("DELETE", f"/jobs/{job_id}", key=operator)
    if status in ACTIVE:
        assert (answer.status_code, answer.json()["code"]) == (409, "illegal_transition")
        assert answer.json()["facts"] == {"current_status": status}
        assert api.get(f"/jobs/{job_id}").status_code == 200
    else:
        assert status in FINAL
        assert answer.status_code == 204
        assert api.get(f"/jobs/{job_id}").status_code == 404
        assert api.get(f"/jobs/{job_id}/timeline").status_code == 404
        assert api.request("DELETE", f"/jobs/{job_id}", key=operator).status_code == 404


def test_a_job_whose_webhook_is_under_way_is_not_deleted_yet(each_api: LocalApi) -> None:
    job_id = add_job(each_api.database, JobStatus.COMPLETED, tenant_id=each_api.tenant_id)
    delivery_id = add_webhook(each_api.database, job_id, "retrying")
    operator = each_api.key(Role.OPERATOR)
    refused = each_api.request("DELETE", f"/jobs/{job_id}", key=operator)
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert refused.json()["facts"] == {"current_status": "completed"}
    change(each_api.database, models.webhook_deliveries, delivery_id, status="dead")
    assert each_api.request("DELETE", f"/jobs/{job_id}", key=operator).status_code == 204


def test_nobody_deletes_a_job_of_another_tenant(each_api: LocalApi) -> None:
    job_id = add_job(each_api.database, JobStatus.COMPLETED, tenant_id=each_api.tenant("other"))
    for role in (Role.OPERATOR, Role.ADMIN):
        assert each_api.request("DELETE", f"/jobs/{job_id}", key=each_api.key(role)).status_code == 404
    assert each_api.request("DELETE", f"/jobs/{new_id()}", key=each_api.key(Role.ADMIN)).status_code == 404
    assert each_api.count_jobs() == 1
