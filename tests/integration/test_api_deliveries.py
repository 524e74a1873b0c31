"""The ledger of deliveries over HTTP: what was sent, sending it again, recovering what was not."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from api_client import LocalApi
from factories import add_job
from laneway import models
from laneway.clock import SystemClock, first_id, new_id
from laneway.domain.states import JobStatus
from laneway.engine import recoveries, webhook_ledger
from laneway.engine.access.callers import Role
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.retries import QUICK_SECONDS
from webhook_office import Office
from webhook_receiver import Receiver, in_turn

URL = "https://example.org/hook"


def told(
    api: LocalApi,
    status: str = "dead",
    *,
    by: str = "alice",
    endpoint_id: str | None = None,
    event_type: str = "job.completed",
    age_hours: float = 0,
    **data: Any,
) -> tuple[str, str]:
    """A job that ended and the delivery that tells of it, in `status`: their ids."""
    at = SystemClock().now() - timedelta(hours=age_hours)
    job_id = add_job(
        api.database, JobStatus.COMPLETED, tenant_id=api.tenant_id, created_by=by, finished_at=at
    )
    target = Target(endpoint_id or new_id(), URL, QUICK_SECONDS, endpoint_id)
    about = {"job_id": job_id} | data
    event = Told(message_id(job_id, 3, event_type), api.tenant_id, event_type, about, by, [target], job_id, 3)
    d = models.webhook_deliveries
    held = {"lease_owner": new_id()} if status == "sending" else {}
    done = {"delivered_at": at} if status == "delivered" else {}
    if age_hours:
        done["id"] = first_id(at)  # as old as its row
    with api.database.write() as connection:
        record(connection, [event], now=at)
        changed = sa.update(d).where(d.c.message_id == event.id).values(status=status, **held, **done)
        connection.execute(changed)
        delivery_id = connection.execute(sa.select(d.c.id).where(d.c.message_id == event.id)).scalar_one()
    return job_id, str(delivery_id)


@pytest.fixture
def olga(each_api: LocalApi) -> str:
    return each_api.key(Role.OPERATOR, subject="olga")


def endpoint(api: LocalApi, key: str, **fields: Any) -> str:
    made = api.post("/webhooks/endpoints", key=key, json={"url": URL} | fields)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def ids_of(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [each["id"] for each in answer.json()["data"]]


def hours_ago(hours: float) -> str:
    return (SystemClock().now() - timedelta(hours=hours)).isoformat()


# Looking


def test_each_filter_is_taken(each_api: LocalApi, olga: str) -> None:
    to = endpoint(each_api, olga)
    _, old = told(each_api, age_hours=0.01)
    job_id, wanted = told(each_api, "delivered", endpoint_id=to, event_type="job.failed", age_hours=0.005)
    _, young = told(each_api, "skipped")
    for query, found in (
        ({}, [young, wanted, old]),
        ({"status": "delivered"}, [wanted]),
        ({"status": ["dead", "delivered"]}, [wanted, old]),
        ({"event_type": "job.failed"}, [wanted]),
        ({"endpoint_id": to}, [wanted]),
        ({"job_id": job_id}, [wanted]),
        ({"endpoint_id": to, "status": "dead"}, []),
        ({"job_id": new_id()}, []),
        ({"created_after": hours_ago(0.0025)}, [young]),
        ({"created_before": hours_ago(0.0075)}, [old]),
        ({"created_after": hours_ago(0.0075), "created_before": hours_ago(0.0025)}, [wanted]),
    ):
        assert ids_of(each_api.get("/webhooks/deliveries", params=query)) == found, query


@pytest.mark.parametrize(
    "query", ["status=lost", "event_type=job.ended", "endpoint_id=x", "limit=0", "limit=201", "stat=dead"]
)
def test_a_filter_that_is_none_is_refused(api: LocalApi, query: str) -> None:
    assert api.get(f"/webhooks/deliveries?{query}").status_code == 422


def test_pages_are_followed_by_their_link(each_api: LocalApi) -> None:
    ids = [told(each_api)[1] for _ in range(3)]
    told(each_api, "delivered")
    first = each_api.get("/webhooks/deliveries?limit=2&status=dead")
    assert (ids_of(first), first.json()["has_more"]) == ([ids[2], ids[1]], True)
    following = first.headers["link"].removeprefix("<").partition(">")[0].removeprefix("/api/v1")
    second = each_api.get(following)
    assert (ids_of(second), second.json()["next_cursor"]) == ([ids[0]], None)
    cursor = first.json()["next_cursor"]
    for other in (f"?cursor={cursor}", f"?status=dead&cursor={cursor[:-2]}AA"):
        assert each_api.get(f"/webhooks/deliveries{other}").json()["code"] == "invalid_cursor"


def test_a_jobs_webhooks_are_listed(each_api: LocalApi) -> None:
    job_id, delivery_id = told(each_api)
    told(each_api)
    assert ids_of(each_api.get(f"/jobs/{job_id}/webhooks")) == [delivery_id]
    assert each_api.get(f"/jobs/{job_id}/webhooks?limit=1").json()["has_more"] is False
    assert each_api.get(f"/jobs/{new_id()}/webhooks").json()["code"] == "job_not_found"


def test_a_user_sees_what_it_made_and_a_tenant_its_own(each_api: LocalApi, olga: str) -> None:
    mine, (job_id, bobs) = told(each_api)[1], told(each_api, by="bob")
    strange = each_api.key(Role.ADMIN, tenant="strange")
    assert ids_of(each_api.get("/webhooks/deliveries")) == [mine]
    assert ids_of(each_api.get("/webhooks/deliveries", key=olga)) == [bobs, mine]
    assert ids_of(each_api.get("/webhooks/deliveries", key=strange)) == []
    for key in (each_api.alice, strange):
        assert each_api.get(f"/webhooks/deliveries/{bobs}", key=key).json()["code"] == "delivery_not_found"
        assert each_api.post(f"/webhooks/deliveries/{bobs}/redeliver", key=key).status_code == 404
        assert each_api.get(f"/jobs/{job_id}/webhooks", key=key).status_code == 404
    assert each_api.get(f"/webhooks/deliveries/{bobs}", key=olga).status_code == 200


def test_a_delivery_shows_what_is_sent_and_how_each_try_went(each_api: LocalApi) -> None:
    """A real courier, a receiver that fails once, the same bytes again when it is asked for."""
    office = Office(each_api.database)
    with Receiver(in_turn(500, 200, Retry_After="1", Content_Type="text/plain")) as receiver:
        job_id = office.post(receiver.url(), text="grüße")
        with office.open():
            office.wait(job_id, status="retrying", attempts=1)
            office.clock.advance(seconds=70)
            office.wait(job_id, status="delivered", attempts=2)
            d = models.webhook_deliveries
            with each_api.database.write() as connection:  # Alice's tenant asks for it
                for table in (d, models.webhook_messages, models.webhook_attempts):
                    connection.execute(sa.update(table).values(tenant_id=each_api.tenant_id))
            delivery_id = office.delivery(job_id)["id"]
            shown = each_api.get(f"/webhooks/deliveries/{delivery_id}").json()
            with each_api.database.write() as connection:
                connection.execute(sa.update(d).values(tenant_id=office.tenant_id))
        first, second = receiver.requests
    assert shown["payload"].encode() == first.body == second.body
    assert (shown["status"], shown["attempt_count"], shown["last_status_code"]) == ("delivered", 2, 200)
    failed, took = shown["attempts"]
    assert (failed["number"], failed["status_code"], failed["error_class"]) == (1, 500, "http_5xx")
    assert failed["response_headers"] == {"content-type": "text/plain", "retry-after": "1"}
    assert (took["number"], took["error_class"]) == (2, None)
    for each in (failed, took):
        assert 0 <= each["first_byte_ms"] <= each["total_ms"]
        assert {"dns_ms", "connect_ms", "request_bytes", "response_body", "trigger"} <= set(each)


# Sending again


@pytest.mark.parametrize("status", ["delivered", "dead", "cancelled", "skipped", "superseded"])
def test_a_delivery_that_ended_is_sent_again(each_api: LocalApi, status: str) -> None:
    _, delivery_id = told(each_api, status)
    before = each_api.get(f"/webhooks/deliveries/{delivery_id}").json()
    answer = each_api.post(f"/webhooks/deliveries/{delivery_id}/redeliver")
    assert (answer.status_code, answer.json()["status"]) == (202, "pending")
    assert answer.headers["location"].endswith(f"/api/v1/webhooks/deliveries/{delivery_id}")
    kept = ("message_id", "payload", "event_type", "url", "job_id")
    assert {name: answer.json()[name] for name in kept} == {name: before[name] for name in kept}
    second = each_api.post(f"/webhooks/deliveries/{delivery_id}/redeliver")
    assert (second.status_code, second.json()["facts"]) == (409, {"current_status": "pending"})


def test_the_same_bytes_arrive_again_under_the_same_id(each_api: LocalApi) -> None:
    office = Office(each_api.database)
    with Receiver() as receiver:
        job_id = office.post(receiver.url(), text="grüße")
        with office.open():
            office.wait(job_id, status="delivered", attempts=1)
            with each_api.database.write() as connection:
                webhook_ledger.send_again(
                    connection,
                    office.delivery(job_id),
                    trigger="manual",
                    url=receiver.url(),
                    due=office.clock.now(),
                    now=office.clock.now(),
                )
            office.wait(job_id, status="delivered", attempts=2)
        first, second = receiver.requests
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert [row["trigger"] for row in office.attempts(job_id)] == ["auto", "manual"]


# Recovering


def test_a_recovery_is_counted_then_started_looked_at_and_cancelled(each_api: LocalApi, olga: str) -> None:
    to = endpoint(each_api, olga)
    for _ in range(3):
        told(each_api, endpoint_id=to, age_hours=1)
    path = f"/webhooks/endpoints/{to}/recover"
    asked = {"since": hours_ago(2)}
    dry = each_api.post(path, key=olga, json=asked | {"dry_run": True})
    assert (dry.status_code, dry.json()) == (200, {"dry_run": True, "count": 3})
    made = each_api.post(path, key=olga, json=asked)
    assert made.status_code == 202
    recovery = made.json()
    assert made.headers["location"].endswith(f"/api/v1/webhooks/recoveries/{recovery['id']}")
    assert (recovery["status"], recovery["mode"], recovery["per_second"]) == ("running", "failed", 10)
    assert recovery["created_by"] == "olga"
    assert each_api.post(path, key=olga, json=asked).json()["facts"] == {"recovery_id": recovery["id"]}
    recoveries.sweep(each_api.database, now=SystemClock().now())
    seen = each_api.get(f"/webhooks/recoveries/{recovery['id']}", key=olga).json()
    assert (seen["status"], seen["queued"]) == ("running", 3)
    ended = each_api.post(f"/webhooks/recoveries/{recovery['id']}/cancel", key=olga)
    assert (ended.status_code, ended.json()["status"]) == (200, "cancelled")
    assert len(ids_of(each_api.get("/webhooks/deliveries?status=cancelled"))) == 3


def test_a_moment_in_the_future_is_now(each_api: LocalApi, olga: str) -> None:
    """What is made later is told as it happens."""
    to = endpoint(each_api, olga)
    body = {"since": hours_ago(1), "until": hours_ago(-1)}
    recovery = each_api.post(f"/webhooks/endpoints/{to}/recover", key=olga, json=body).json()
    assert recovery["until"] == recovery["created_at"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"since": "yesterday"},
        {"since": "2026-01-01T12:00:00"},
        {"since": "2026-01-01T12:00:00Z", "until": "2026-01-01T12:00:00Z"},
        {"mode": "some"},
        {"per_second": 0.009},
        {"per_second": 100.1},
        {"speed": 1},
    ],
)
def test_a_wish_that_is_none_is_refused(each_api: LocalApi, olga: str, wrong: dict[str, Any]) -> None:
    path = f"/webhooks/endpoints/{endpoint(each_api, olga)}/recover"
    refused = each_api.post(path, key=olga, json={"since": hours_ago(1)} | wrong)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("per_second", [0.01, 100])
def test_the_slowest_and_the_fastest_rate_are_taken(each_api: LocalApi, olga: str, per_second: float) -> None:
    path = f"/webhooks/endpoints/{endpoint(each_api, olga)}/recover"
    made = each_api.post(path, key=olga, json={"since": hours_ago(1), "per_second": per_second})
    assert (made.status_code, made.json()["per_second"]) == (202, per_second)


def test_recoveries_are_for_operators_of_the_tenant(each_api: LocalApi, olga: str) -> None:
    to = endpoint(each_api, olga)
    strange = each_api.key(Role.ADMIN, tenant="strange")
    body = {"since": hours_ago(1)}
    recovery = each_api.post(f"/webhooks/endpoints/{to}/recover", key=olga, json=body).json()["id"]
    for key, status in ((each_api.alice, 403), (strange, 404)):
        for dry_run in (True, False):
            asked = each_api.post(
                f"/webhooks/endpoints/{to}/recover", key=key, json=body | {"dry_run": dry_run}
            )
            assert asked.status_code == status
        assert each_api.get(f"/webhooks/recoveries/{recovery}", key=key).status_code == status
        assert each_api.post(f"/webhooks/recoveries/{recovery}/cancel", key=key).status_code == status
