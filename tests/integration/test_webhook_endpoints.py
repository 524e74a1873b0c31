"""What registered endpoints hear of, and what becomes of it while they are paused, disabled or deleted."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from laneway.db import Database
from webhook_desk import Desk
from webhook_office import Office
from webhook_receiver import Exchange, Receiver, hang, in_turn

NOWHERE = "http://127.0.0.1:9000/"


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(Office(database))


def heard(receiver: Receiver) -> Counter[str]:
    return Counter(request.headers["webhook-event"] for request in receiver.requests)


def test_an_endpoint_hears_of_its_tenants_jobs_beside_the_jobs_own_url(desk: Desk) -> None:
    stranger = Desk(Office(desk.office.database))
    with Receiver() as receiver, Receiver() as own, Receiver() as others, desk.office.open():
        desk.register(receiver.url(), event_types=["job.*"])
        foreign, _ = stranger.register(others.url(), event_types=["*"])
        desk.complete(webhook_url=own.url())
        desk.fail()
        receiver.wait_for(3)
        own.wait_for(1)
    assert heard(receiver) == {"job.completed": 1, "job.failed": 1, "job.dead_lettered": 1}
    assert heard(own) == {"job.completed": 1}
    assert (heard(others), stranger.deliveries(foreign)) == (Counter(), [])
    [told] = own.requests
    [same] = [each for each in receiver.requests if each.headers["webhook-event"] == "job.completed"]
    assert (same.headers["webhook-id"], same.body) == (told.headers["webhook-id"], told.body)
    assert same.headers["webhook-signature"] != told.headers["webhook-signature"]
    assert b"frames" not in b"".join(each.body for each in receiver.requests)


def test_an_endpoint_whose_url_a_job_names_too_is_told_by_both_ways(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        desk.register(receiver.url())
        desk.complete(webhook_url=receiver.url())
        requests = receiver.wait_for(2)
    assert len({each.headers["webhook-id"] for each in requests}) == 1


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        ({}, [True, True, True]),
        ({"queues": ["emails", "other"]}, [True, False, False]),
        ({"job_types": ["demo.noop"]}, [False, True, False]),
        ({"tags": ["x", "b"]}, [True, True, False]),
        ({"queues": ["emails"], "tags": ["a"]}, [True, False, False]),
        ({"queues": ["emails"], "job_types": ["demo.noop"]}, [False, False, False]),
    ],
)
def test_a_job_must_fit_every_filter_that_is_set(
    desk: Desk, filters: dict[str, Any], fits: list[bool]
) -> None:
    endpoint_id, _ = desk.register(NOWHERE, filters=filters)
    jobs = [
        desk.complete(queue="emails", tags=["a", "b"]),
        desk.complete(job_type="demo.noop", tags=["b"]),
        desk.complete(),
    ]
    told = [row["job_id"] for row in desk.deliveries(endpoint_id)]
    assert told == [job for job, fit in zip(jobs, fits, strict=True) if fit]


def test_an_endpoint_hears_of_nothing_from_before_it_was_made(desk: Desk) -> None:
    desk.complete()
    endpoint_id, _ = desk.register(NOWHERE)
    assert desk.deliveries(endpoint_id) == []


def test_headers_of_ones_own_are_sent_along(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        own = {"Authorization": "Bearer t0ken", "X-Trace": "a b~!"}
        endpoint_id, _ = desk.register(receiver.url(), headers=own)
        desk.complete()
        [first] = receiver.wait_for(1)
        desk.change(endpoint_id, headers=None)
        desk.complete()
        second = receiver.wait_for(2)[-1]
    assert (first.headers["authorization"], first.headers["x-trace"]) == ("Bearer t0ken", "a b~!")
    assert second.headers.keys() == first.headers.keys() - {"authorization", "x-trace"}


def test_cloudevents_carry_the_same_data_in_their_own_envelope(desk: Desk) -> None:
    with Receiver() as receiver, Receiver() as standard, desk.office.open():
        desk.register(receiver.url(), format="cloudevents")
        desk.register(standard.url())
        job_id = desk.complete(result='{"text":"\u00fc"}')
        [request], [plain] = receiver.wait_for(1), standard.wait_for(1)
    told = json.loads(plain.body)
    assert request.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert json.loads(request.body) == {
        "specversion": "1.0",
        "id": request.headers["webhook-id"],
        "source": f"/api/v1/jobs/{job_id}",
        "type": "job.completed",
        "time": told["timestamp"],
        "datacontenttype": "application/json",
        "data": told["data"],
    }
    assert told["data"]["result"] == {"text": "\u00fc"}


def test_a_thin_message_holds_ids_and_the_status_alone(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        desk.register(receiver.url(), format="thin")
        job_id = desk.complete(result='"canary"')
        [request] = receiver.wait_for(1)
    body = json.loads(request.body)
    assert body.keys() == {"type", "timestamp", "data"}
    assert body["data"] == {"job_id": job_id, "status": "completed"}
    assert request.headers["content-type"] == "application/json"


def test_a_paused_endpoints_messages_wait_and_are_sent_when_it_is_enabled(desk: Desk) -> None:
    with Receiver() as receiver, Receiver() as other, desk.office.open():
        paused, _ = desk.register(receiver.url(), status="paused")
        desk.register(other.url())
        jobs = [desk.complete() for _ in range(3)]
        other.wait_for(3)
        assert desk.statuses(paused) == ["pending"] * 3
        assert receiver.requests == []
        desk.change(paused, status="enabled")
        done = desk.wait(paused, *["delivered"] * 3)
    assert [row["job_id"] for row in done] == jobs
    assert [row["attempt_count"] for row in done] == [1, 1, 1]


def test_a_disabled_endpoint_misses_what_happens_and_the_ledger_says_so(desk: Desk) -> None:
    with Receiver() as receiver, Receiver() as other, desk.office.open():
        watching, _ = desk.register(other.url(), event_types=["endpoint.*"])
        endpoint_id, _ = desk.register(receiver.url(), status="paused")
        desk.complete()
        desk.change(endpoint_id, status="disabled")
        desk.complete()
        assert desk.statuses(endpoint_id) == ["cancelled", "skipped"]
        [told] = other.wait_for(1)
        desk.change(endpoint_id, status="enabled")
        desk.complete()
        desk.wait(endpoint_id, "cancelled", "skipped", "delivered")
        assert len(receiver.requests) == 1
        assert desk.statuses(watching) == ["delivered"]
    said = json.loads(told.body)
    assert said["type"] == "endpoint.disabled"
    assert said["data"] == {"endpoint_id": endpoint_id, "url": receiver.url(), "reason": "manual"}


def test_deleting_an_endpoint_cancels_what_waits_for_it_and_keeps_the_rest(desk: Desk) -> None:
    endpoint_id, _ = desk.register(NOWHERE, status="paused")
    other, _ = desk.register(NOWHERE, status="paused")
    desk.complete()
    desk.delete(endpoint_id)
    assert (desk.statuses(endpoint_id), desk.statuses(other)) == (["cancelled"], ["pending"])
    desk.complete()
    assert (desk.statuses(endpoint_id), desk.statuses(other)) == (["cancelled"], ["pending"] * 2)


@pytest.mark.parametrize("how", ["deleted", "disabled"])
def test_what_was_on_its_way_when_its_endpoint_went_is_not_tried_again(desk: Desk, how: str) -> None:
    def held_then_refused(exchange: Exchange) -> None:
        exchange.receiver.let_go.wait()
        exchange.answer(500)

    with Receiver(held_then_refused) as receiver, desk.office.open():
        endpoint_id, _ = desk.register(receiver.url(), timeout_seconds=30)
        desk.complete()
        receiver.wait_for(1)
        desk.delete(endpoint_id) if how == "deleted" else desk.change(endpoint_id, status="disabled")
        assert desk.statuses(endpoint_id) == ["sending"]
        receiver.let_go.set()
        [delivery] = desk.wait(endpoint_id, "cancelled")
    assert (delivery["last_status_code"], len(desk.attempts(delivery["id"]))) == (500, 1)


def test_what_waits_goes_to_the_new_url_and_its_headers_nowhere_else(desk: Desk) -> None:
    with Receiver(in_turn(503, Retry_After="3600")) as old, Receiver() as new, desk.office.open():
        endpoint_id, _ = desk.register(old.url(), headers={"X-Key": "old"})
        job_id = desk.complete()
        desk.wait(endpoint_id, "retrying")
        desk.complete()
        moved = desk.change(endpoint_id, url=new.url(), headers={"X-Key": "new"})
        assert moved["health"]["blocked_until"] is None  # the old receiver asked for the hour
        delivery, _ = desk.wait(endpoint_id, "delivered", "delivered")
    assert [each.headers["x-key"] for each in old.requests] == ["old"]
    assert [each.headers["x-key"] for each in new.requests] == ["new", "new"]
    assert (delivery["url"], delivery["job_id"], delivery["attempt_count"]) == (new.url(), job_id, 2)


def test_an_endpoints_own_schedule_and_deadline_are_kept(desk: Desk) -> None:
    with Receiver(hang) as receiver, desk.office.open():
        endpoint_id, _ = desk.register(receiver.url(), retry_schedule=[100], timeout_seconds=1)
        desk.complete()
        [delivery] = desk.wait(endpoint_id, "retrying")
        assert 80 <= (delivery["next_at"] - desk.office.clock.now()).total_seconds() <= 120
        assert delivery["max_attempts"] == 2
        [attempt] = desk.attempts(delivery["id"])
        assert attempt["error_class"] == "timeout"
        desk.office.clock.advance(seconds=121)
        desk.wait(endpoint_id, "dead")


def test_a_test_event_is_sent_once_to_whoever_subscribed_to_something_else(desk: Desk) -> None:
    office = desk.office
    with Receiver(in_turn(500)) as receiver, office.open():
        endpoint_id, _ = desk.register(receiver.url(), event_types=["job.failed"])
        delivery_id = desk.endpoints.test(office.tenant_id, endpoint_id, by="olga", now=office.clock.now())
        [delivery] = desk.wait(endpoint_id, "dead")
        assert (delivery["id"], delivery["trigger"]) == (delivery_id, "test")
        receiver.mode = in_turn(200)
        desk.endpoints.test(office.tenant_id, endpoint_id, by="olga", now=office.clock.now())
        desk.wait(endpoint_id, "dead", "delivered")
    assert heard(receiver) == {"endpoint.test": 2}
    assert json.loads(receiver.requests[-1].body)["data"]["endpoint_id"] == endpoint_id


def test_an_endpoint_that_failed_starts_afresh_when_it_is_enabled_again(desk: Desk) -> None:
    office = desk.office
    with Receiver(in_turn(410, 200)) as receiver, office.open():
        endpoint_id, _ = desk.register(receiver.url())
        desk.complete()
        desk.wait(endpoint_id, "dead")
        view = desk.endpoints.get(office.tenant_id, endpoint_id, now=office.clock.now())
        assert (view["status"], view["disabled_reason"]) == ("disabled", "gone_410")
        assert view["health"]["consecutive_failures"] == 1
        view = desk.change(endpoint_id, status="enabled")
        assert (view["status"], view["disabled_reason"], view["disabled_at"]) == ("enabled", None, None)
        assert view["health"]["consecutive_failures"] == 0
        desk.complete()
        desk.wait(endpoint_id, "dead", "delivered")
