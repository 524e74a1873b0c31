"""What couriers make of a receiver's answers: pauses, probes, warnings, the end of an endpoint."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database
from laneway.models import webhook_deliveries, webhook_endpoints, webhook_health, webhook_messages
from laneway.webhooks import courier as courier_module
from laneway.webhooks.deliveries import Claimed, Deliveries, Finished, Room
from laneway.webhooks.endpoints import EndpointChange, Endpoints, NewEndpoint
from laneway.webhooks.guard import Policy
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.retries import MAX_UNCHARGED, Answer, DeliveryStatus, ErrorClass, Timings, Verdict
from laneway.webhooks.subscriptions import subscribers
from servers import wait_until
from webhook_office import Office
from webhook_receiver import Exchange, Receiver, in_turn


class Desk:
    """An office's endpoints, and messages to all of them."""

    def __init__(self, office: Office) -> None:
        self.office = office
        self.endpoints = Endpoints(office.database, office.box, Policy.from_settings(office.settings))

    def register(self, url: str, **values: Any) -> str:
        wanted = NewEndpoint(url=url, **{"event_types": ["job.completed"]} | values)
        found, _ = self.endpoints.create(
            self.office.tenant_id, wanted, by="test", now=self.office.clock.now()
        )
        return str(found["id"])

    def tell(self, *, job_id: str | None = None, seq: int = 1, event: str = "job.completed") -> str:
        """A message for the endpoints that want it; its job's id."""
        job_id, tenant = job_id or new_id(), self.office.tenant_id
        with self.office.database.write() as connection:
            found = subscribers(connection, [tenant]).get(tenant, ())
            targets = [Target.endpoint(each) for each in found if each.wants(event)]
            identity = message_id(job_id, seq, event)
            told = Told(identity, tenant, event, {"job_id": job_id, "n": seq}, "a", targets, job_id, seq)
            record(connection, [told], now=self.office.clock.now())
        return job_id

    def endpoint(self, endpoint_id: str) -> sa.RowMapping:
        with self.office.database.read() as connection:
            query = sa.select(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
            return connection.execute(query).mappings().one()

    def health(self, target_id: str) -> sa.RowMapping | None:
        with self.office.database.read() as connection:
            query = sa.select(webhook_health).where(webhook_health.c.target_id == target_id)
            return connection.execute(query).mappings().first()

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """The `endpoint.*` events, in their order."""
        m = webhook_messages.c
        with self.office.database.read() as connection:
            rows = connection.execute(
                sa.select(m.event_type, m.payload)
                .where(m.event_type.like("endpoint.%"))
                .order_by(m.created_at)
            ).all()
        return [(event, json.loads(body)["data"]) for event, body in rows]

    def statuses(self, target_id: str) -> list[str]:
        d = webhook_deliveries.c
        with self.office.database.read() as connection:
            rows = connection.execute(sa.select(d.status).where(d.target_id == target_id).order_by(d.id))
            return list(rows.scalars())

    def deliveries(self) -> Deliveries:
        return Deliveries(self.office.database, owner=new_id(), lease_seconds=30)

    def claim(self, courier: Deliveries | None = None, *, rows: int = 64) -> list[Claimed]:
        courier = courier or self.deliveries()
        return list(courier.turn([], [], Room(rows), now=self.office.clock.now()).claimed)

    def settle(self, courier: Deliveries, delivery: Claimed, answer: Answer) -> None:
        """As the courier would, with the next try due at once."""
        now = self.office.clock.now()
        done = answer.error_class is None
        verdict = (
            Verdict(DeliveryStatus.DELIVERED)
            if done
            else Verdict(DeliveryStatus.RETRYING, now, charged=False)
        )
        courier.turn([Finished(delivery, answer, verdict)], [], Room(0), now=now)

    def answer(self, code: int) -> Answer:
        kind = None if code == 200 else ErrorClass.HTTP_5XX
        return Answer(self.office.clock.now(), Timings(1), status_code=code, error_class=kind)


@pytest.fixture
def office(database: Database, monkeypatch: pytest.MonkeyPatch) -> Office:
    """Its couriers look at the clock often: here, it jumps."""
    monkeypatch.setattr(courier_module, "POLL_SECONDS", 0.03)
    return Office(database)


@pytest.fixture
def desk(office: Office) -> Desk:
    return Desk(office)


def test_busy_then_gone_then_back_reads_as_the_docs_say(desk: Desk, office: Office) -> None:
    answers: list[Callable[[Exchange], None]] = [
        lambda exchange: exchange.answer(503, Retry_After="600"),
        lambda exchange: exchange.answer(410),
        lambda exchange: exchange.answer(200),
    ]
    with (
        Receiver(lambda exchange: answers[min(exchange.number, 3) - 1](exchange)) as receiver,
        Receiver() as watcher,
        office.open(),
    ):
        endpoint = desk.register(receiver.url(), max_in_flight=1)
        desk.register(watcher.url(), event_types=["endpoint.*"])
        first = desk.tell()
        busy = office.wait(first, status="retrying")
        assert (busy["attempt_count"], busy["max_attempts"]) == (1, 11)  # asked to wait: nothing is used up
        assert busy["next_at"] == office.clock.now() + timedelta(seconds=600)
        assert desk.endpoint(endpoint)["status"] == "enabled"
        paused = desk.health(endpoint)
        assert paused is not None
        assert (paused["blocked_until"], paused["blocked_reason"]) == (busy["next_at"], "retry_after")
        second = desk.tell()
        office.clock.advance(seconds=601)
        wait_until(
            lambda: sorted(desk.statuses(endpoint)) == ["cancelled", "dead"], what="410 ended both messages"
        )
        shown = desk.endpoint(endpoint)
        assert (shown["status"], shown["disabled_reason"]) == ("disabled", "gone_410")
        third = desk.tell()
        assert office.delivery(third)["status"] == "skipped"
        watcher.wait_for(1)
        change = EndpointChange(status="enabled")
        desk.endpoints.change(office.tenant_id, endpoint, change, now=office.clock.now())
        fourth = desk.tell()
        office.wait(fourth, status="delivered")
    assert [row["status_code"] for job in (first, second) for row in office.attempts(job)] == [503, 410]
    assert len(receiver.requests) == 3
    [(event, told)] = desk.events()
    assert (event, told["endpoint_id"], told["reason"]) == ("endpoint.disabled", endpoint, "gone_410")
    assert watcher.requests[0].headers["webhook-event"] == "endpoint.disabled"
    assert (desk.endpoint(endpoint)["status"], desk.health(endpoint)) == ("enabled", None)


def test_a_pause_that_was_asked_for_burns_20_attempts_at_most(desk: Desk, office: Office) -> None:
    with Receiver(in_turn(429, Retry_After="60")) as receiver, office.open():
        desk.register(receiver.url(), retry_schedule=[1])
        job_id = desk.tell()
        for attempt in range(1, MAX_UNCHARGED + 1):
            row = office.wait(job_id, status="retrying", attempts=attempt)
            assert row["max_attempts"] == attempt + 2
            office.clock.advance(seconds=61)
        office.wait(job_id, status="retrying", attempts=MAX_UNCHARGED + 1)
        office.clock.advance(seconds=61)
        office.wait(job_id, status="dead", attempts=MAX_UNCHARGED + 2)


def test_what_waits_for_a_paused_target_is_due_when_the_pause_ends(desk: Desk, office: Office) -> None:
    with Receiver(in_turn(503, 200, Retry_After="600")) as receiver, office.open():
        desk.register(receiver.url(), max_in_flight=1)
        jobs = [desk.tell() for _ in range(4)]
        office.wait(jobs[0], status="retrying")
        assert {office.delivery(job)["next_at"] for job in jobs} == {
            office.clock.now() + timedelta(minutes=10)
        }
        office.clock.advance(seconds=599)
        office.wait(office.post("http://127.0.0.1:1/"), status="dead")  # the courier has looked since
        assert len(receiver.requests) == 1
        office.clock.advance(seconds=2)
        for job in jobs:
            office.wait(job, status="delivered")


def test_five_days_of_failing_disable_an_endpoint_after_three_warnings(desk: Desk, office: Office) -> None:
    endpoint = desk.register("http://127.0.0.1:9000/", retry_schedule=[1] * 20)
    desk.register("http://127.0.0.1:9001/", event_types=["endpoint.*"], status="paused")
    courier = desk.deliveries()
    job_id = desk.tell()
    seen = []
    for hours in (0, 59, 1, 24, 24, 11, 1):  # since the first failure: 0, 59, 60, 84, 108, 119, 120
        office.clock.advance(hours=hours)
        with office.database.write() as connection:  # this test is not about giving up
            connection.execute(
                sa.update(webhook_deliveries).values(give_up_at=None, next_at=office.clock.now())
            )
        [delivery] = desk.claim(courier)
        desk.settle(courier, delivery, desk.answer(500))
        seen.append([(event, told.get("percent")) for event, told in desk.events()])
    failing = [("endpoint.failing", percent) for percent in (50, 70, 90)]
    counts = [len(each) for each in seen]
    assert counts == [0, 0, 1, 2, 3, 3, 4]
    assert seen[-1] == [*failing, ("endpoint.disabled", None)]
    assert desk.endpoint(endpoint)["disabled_reason"] == "failing"
    assert office.delivery(job_id)["status"] == "cancelled"


def test_a_warned_endpoint_that_answers_again_has_recovered(desk: Desk, office: Office) -> None:
    endpoint = desk.register("http://127.0.0.1:9000/")
    desk.register("http://127.0.0.1:9001/", event_types=["endpoint.*"], status="paused")
    courier = desk.deliveries()
    desk.tell()
    for hours, code in ((0, 500), (80, 500), (1, 200)):
        office.clock.advance(hours=hours)
        with office.database.write() as connection:
            connection.execute(
                sa.update(webhook_deliveries).values(give_up_at=None, next_at=office.clock.now())
            )
        [delivery] = desk.claim(courier)
        desk.settle(courier, delivery, desk.answer(code))
    assert [event for event, _ in desk.events()] == ["endpoint.failing", "endpoint.recovered"]
    health = desk.health(endpoint)
    assert health is not None
    assert (health["consecutive_failures"], health["warned_percent"]) == (0, 0)


def test_the_breaker_is_shared_and_one_probe_is_made_for_all_couriers(desk: Desk, office: Office) -> None:
    endpoint = desk.register("http://127.0.0.1:9000/")
    one, other = desk.deliveries(), desk.deliveries()
    for _ in range(8):
        desk.tell()
    for delivery in desk.claim(one, rows=5):
        desk.settle(one, delivery, desk.answer(500))
    health = desk.health(endpoint)
    assert health is not None
    assert (health["blocked_reason"], health["opened"]) == ("breaker", 1)
    assert desk.claim(other) == desk.claim(one) == []
    office.clock.advance(seconds=30)
    [probe] = desk.claim(one, rows=1)
    assert desk.claim(other) == []
    health = desk.health(endpoint)
    assert health is not None
    assert (health["blocked_reason"], health["opened"]) == ("probe", 1)
    desk.settle(one, probe, desk.answer(500))
    office.clock.advance(seconds=59)
    assert desk.claim(other) == []
    office.clock.advance(seconds=1)
    [probe] = desk.claim(other, rows=1)
    desk.settle(other, probe, desk.answer(200))
    health = desk.health(endpoint)
    assert health is not None
    assert (health["blocked_until"], health["opened"], health["consecutive_failures"]) == (None, 0, 0)
    assert len(desk.claim(one)) == 7


def test_a_courier_that_dies_probing_leaves_the_target_to_others(desk: Desk, office: Office) -> None:
    desk.register("http://127.0.0.1:9000/")
    one, other = desk.deliveries(), desk.deliveries()
    for _ in range(6):
        desk.tell()
    for delivery in desk.claim(one, rows=5):
        desk.settle(one, delivery, desk.answer(500))
    office.clock.advance(seconds=31)
    assert len(desk.claim(one, rows=1)) == 1  # and is never heard of again
    office.clock.advance(seconds=31)
    assert len(desk.claim(other, rows=1)) == 1


def test_two_couriers_at_once_make_one_probe(desk: Desk, office: Office) -> None:
    with Receiver(in_turn(500)) as receiver:
        endpoint = desk.register(receiver.url(), retry_schedule=[1] * 20)
        for _ in range(20):
            desk.tell()
        with office.open(), office.open():
            wait_until(
                lambda: (row := desk.health(endpoint)) and row["blocked_reason"] == "breaker",
                what="the breaker opens",
            )
            wait_until(lambda: "sending" not in desk.statuses(endpoint), what="nothing is in flight")
            before = len(receiver.requests)
            office.clock.advance(seconds=31)
            wait_until(
                lambda: (row := desk.health(endpoint)) and row["opened"] == 2, what="the breaker opens again"
            )
        assert len(receiver.requests) == before + 1


def test_a_test_event_reaches_a_paused_endpoint_whose_breaker_is_open(desk: Desk, office: Office) -> None:
    with Receiver() as receiver:
        endpoint = desk.register(receiver.url())
        courier = desk.deliveries()
        for _ in range(6):
            desk.tell()
        for delivery in desk.claim(courier, rows=5):
            desk.settle(courier, delivery, desk.answer(500))
        now = office.clock.now()
        desk.endpoints.change(office.tenant_id, endpoint, EndpointChange(status="paused"), now=now)
        desk.endpoints.test(office.tenant_id, endpoint, by="test", now=now)
        with office.open():
            receiver.wait_for(1)
            wait_until(
                lambda: (row := desk.health(endpoint)) and row["blocked_until"] is None,
                what="its success closes the breaker",
            )
    assert receiver.requests[0].headers["webhook-event"] == "endpoint.test"
    assert set(desk.statuses(endpoint)) == {"pending", "retrying", "delivered"}


def test_one_jobs_messages_arrive_one_after_the_other(desk: Desk, office: Office) -> None:
    with Receiver(in_turn(500, 200)) as receiver, office.open():
        desk.register(receiver.url(), in_order=True, event_types=["*"])
        job_id = new_id()
        desk.tell(job_id=job_id, seq=1, event="job.retrying")
        desk.tell(job_id=job_id, seq=2, event="job.completed")
        receiver.wait_for(1)
        other = desk.tell()
        receiver.wait_for(2)  # another job's does not wait for it
        office.wait(other, status="delivered")
        office.clock.advance(seconds=10)
        receiver.wait_for(4)
        told = [json.loads(request.body)["data"] for request in receiver.requests]
    assert [each["n"] for each in told if each["job_id"] == job_id] == [1, 1, 2]


def test_out_of_order_is_the_default(desk: Desk, office: Office) -> None:
    with Receiver(in_turn(500, 200)) as receiver, office.open():
        desk.register(receiver.url(), event_types=["*"])
        job_id = new_id()
        desk.tell(job_id=job_id, seq=1, event="job.retrying")
        receiver.wait_for(1)
        desk.tell(job_id=job_id, seq=2, event="job.completed")
        receiver.wait_for(2)
        told = [json.loads(request.body)["data"]["n"] for request in receiver.requests]
    assert told == [1, 2]


def test_a_retry_and_the_end_of_a_pause_wake_the_courier(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "POLL_SECONDS", 3600.0)
    database = Database(sqlite_url)
    office = Office(database)
    office.clock = courier_module.SystemClock()  # type: ignore[assignment]
    desk = Desk(office)
    with Receiver(in_turn(500, 503, 200, Retry_After="1")) as receiver:
        desk.register(receiver.url(), retry_schedule=[1, 1, 1])
        job_id = desk.tell()
        with office.open():
            office.wait(job_id, status="delivered", attempts=3)
    database.dispose()


def test_a_rate_wakes_the_courier_too(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "POLL_SECONDS", 3600.0)
    database = Database(sqlite_url)
    office = Office(database)
    office.clock = courier_module.SystemClock()  # type: ignore[assignment]
    desk = Desk(office)
    with Receiver() as receiver:
        desk.register(receiver.url(), max_per_second=5)
        for _ in range(4):
            desk.tell()
        with office.open():
            receiver.wait_for(4)
    database.dispose()
