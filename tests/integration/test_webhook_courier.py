import json
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_py
import sqlalchemy as sa
import structlog
from standardwebhooks.webhooks import Webhook

from laneway import __version__
from laneway.clock import new_id
from laneway.db import Database
from laneway.models import tenants
from laneway.webhooks import courier as courier_module
from laneway.webhooks.deliveries import Deliveries, Finished, Room
from laneway.webhooks.health import FIRST_CAP
from laneway.webhooks.messages import GIVE_UP_AFTER, WAKE_CHANNEL
from laneway.webhooks.pace import MAX_PER_TARGET
from laneway.webhooks.retries import QUICK_SECONDS, Answer, DeliveryStatus, Timings, Verdict
from laneway.webhooks.secrets import SecretBox, new_webhook_secret, tenant_context
from servers import PostgresServer, RedisServer, wait_until
from webhook_office import Office
from webhook_receiver import Receiver, hang, in_turn

ROOM = Room(64)


@pytest.fixture
def office(database: Database) -> Office:
    return Office(database)


def test_an_end_arrives_once_signed_and_is_written_down(office: Office) -> None:
    with Receiver() as receiver:
        job_id = office.post(receiver.url("/hook?a=1"), result={"text": "\u00fc"})
        before = office.job(job_id)
        with office.open():
            delivery = office.wait(job_id, status="delivered")
    [request] = receiver.requests
    assert request.line == "POST /hook?a=1 HTTP/1.1"
    assert Webhook(office.secret).verify(request.body, request.headers) == json.loads(request.body)
    assert json.loads(request.body)["data"] == {"job_id": job_id, "result": {"text": "\u00fc"}}
    expected = {
        "host": f"127.0.0.1:{receiver.port}",
        "user-agent": f"laneway/{__version__}",
        "content-type": "application/json",
        "webhook-id": delivery["message_id"],
        "webhook-event": "job.completed",
        "webhook-attempt": "1",
        "webhook-timestamp": str(int(office.clock.now().timestamp())),
        "accept-encoding": "identity",
        "content-length": str(len(request.body)),
        "accept": "*/*",
    }
    assert request.headers.keys() == expected.keys() | {"webhook-signature"}
    assert request.headers.items() >= expected.items()
    assert (delivery["last_status_code"], delivery["delivered_at"]) == (200, office.clock.now())
    assert delivery["lease_owner"] is None
    [attempt] = office.attempts(job_id)
    assert (attempt["number"], attempt["status_code"], attempt["response_body"]) == (1, 200, "thanks")
    assert (attempt["error_class"], attempt["tenant_id"]) == (None, office.tenant_id)
    assert (attempt["remote_ip"], attempt["request_bytes"]) == ("127.0.0.1", len(request.body))
    after = office.job(job_id)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"webhook_attempts", "webhook_delivered", "version", "updated_at"}
    assert (after["webhook_attempts"], after["webhook_delivered"]) == (1, True)
    assert after["version"] == before["version"] + 1


def test_a_receiver_that_is_down_for_a_moment_is_told_again(office: Office) -> None:
    with Receiver(in_turn(503, 200)) as receiver, office.open():
        job_id = office.post(receiver.url())
        waiting = office.wait(job_id, status="retrying")
        assert 4 <= (waiting["next_at"] - office.clock.now()).total_seconds() <= 6
        assert (waiting["last_status_code"], waiting["last_error"]) == (503, "answered 503")
        assert office.job(job_id)["webhook_attempts"] == 1
        office.clock.advance(seconds=7)
        office.wait(job_id, status="delivered")
    first, second = receiver.requests
    assert (first.headers["webhook-attempt"], second.headers["webhook-attempt"]) == ("1", "2")
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert int(second.headers["webhook-timestamp"]) == int(first.headers["webhook-timestamp"]) + 7
    for request in (first, second):
        Webhook(office.secret).verify(request.body, request.headers)
    assert [row["error_class"] for row in office.attempts(job_id)] == ["http_5xx", None]
    assert office.job(job_id)["webhook_attempts"] == 2


def test_after_three_failures_nobody_tries_again(office: Office) -> None:
    with Receiver(in_turn(500)) as receiver, office.open():
        job_id = office.post(receiver.url())
        office.wait(job_id, status="retrying", attempts=1)
        office.clock.advance(seconds=7)
        office.wait(job_id, status="retrying", attempts=2)
        office.clock.advance(seconds=73)
        office.wait(job_id, status="dead", attempts=3)
    job = office.job(job_id)
    assert (job["webhook_attempts"], job["webhook_delivered"], job["status"]) == (3, False, "completed")
    assert len(receiver.requests) == 3


def test_retry_after_is_waited_for(office: Office) -> None:
    with Receiver(in_turn(503, 200, Retry_After="3600")) as receiver, office.open():
        job_id = office.post(receiver.url())
        waiting = office.wait(job_id, status="retrying")
        assert waiting["next_at"] == office.clock.now() + timedelta(hours=1)
        office.clock.advance(seconds=3601)
        office.wait(job_id, status="delivered")
    assert len(receiver.requests) == 2


def test_410_ends_it_at_once(office: Office) -> None:
    with Receiver(in_turn(410)) as receiver, office.open():
        job_id = office.post(receiver.url())
        assert office.wait(job_id, status="dead")["attempt_count"] == 1
    assert len(receiver.requests) == 1


def test_what_a_dead_courier_held_is_sent_again_under_the_same_id(office: Office) -> None:
    with Receiver() as receiver:
        job_id = office.post(receiver.url())
        dead = Deliveries(office.database, owner=new_id(), lease_seconds=30)
        [claimed] = dead.turn([], [], ROOM, now=office.clock.now()).claimed
        with office.open():
            other = office.post(receiver.url())
            office.wait(other, status="delivered")
            assert office.delivery(job_id)["status"] == "sending"  # the lease still runs
            office.clock.advance(seconds=31)
            office.wait(job_id, status="delivered")
        again = receiver.requests[-1]
        assert (again.headers["webhook-id"], again.headers["webhook-attempt"]) == (claimed.message_id, "2")
        assert len(receiver.requests) == 2


def test_nothing_is_sent_once_its_time_is_over(office: Office) -> None:
    office.post("http://127.0.0.1:9000/")
    deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
    over = office.clock.now() + timedelta(seconds=sum(QUICK_SECONDS)) + GIVE_UP_AFTER
    assert not deliveries.turn([], [], ROOM, now=over).claimed
    assert len(deliveries.turn([], [], ROOM, now=over - timedelta(seconds=1)).claimed) == 1


def test_a_courier_that_lost_its_lease_changes_no_outcome(office: Office) -> None:
    job_id = office.post("http://127.0.0.1:9000/")
    now = office.clock.now()
    late, heir = (Deliveries(office.database, owner=new_id(), lease_seconds=30) for _ in range(2))
    [first] = late.turn([], [], ROOM, now=now).claimed
    later = office.clock.advance(seconds=31)
    assert heir.reclaim(now=later) == 1
    [second] = heir.turn([], [], ROOM, now=later).claimed
    assert (first.attempt, second.attempt) == (1, 2)
    no_room = Room(0)
    delivered = Finished(first, Answer(now, Timings(1), status_code=200), Verdict(DeliveryStatus.DELIVERED))
    late.turn([delivered], [], no_room, now=later)
    assert (office.delivery(job_id)["status"], office.delivery(job_id)["attempt_count"]) == ("sending", 2)
    assert office.job(job_id)["webhook_delivered"] is False
    assert [row["number"] for row in office.attempts(job_id)] == [1]  # it did happen, and is told


def test_settling_twice_counts_once(office: Office) -> None:
    job_id = office.post("http://127.0.0.1:9000/")
    now = office.clock.now()
    deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
    [claimed] = deliveries.turn([], [], ROOM, now=now).claimed
    finished = Finished(claimed, Answer(now, Timings(1), status_code=200), Verdict(DeliveryStatus.DELIVERED))
    deliveries.turn([finished], [], ROOM, now=now)
    once = office.job(job_id), office.delivery(job_id), office.attempts(job_id)
    deliveries.turn([finished], [], ROOM, now=now)
    assert (office.job(job_id), office.delivery(job_id), office.attempts(job_id)) == once
    assert (once[0]["webhook_attempts"], once[0]["webhook_delivered"]) == (1, True)


def test_a_receiver_that_hangs_holds_up_nobody_else(office: Office) -> None:
    with Receiver(hang) as hanging, Receiver() as healthy:
        stuck = [office.post(hanging.url()) for _ in range(100)]
        others = [office.post(healthy.url()) for _ in range(20)]
        with office.open():
            healthy.wait_for(20)
            for job_id in others:
                office.wait(job_id, status="delivered")
            hanging.wait_for(FIRST_CAP)
            assert hanging.most_at_once == len(hanging.requests) == FIRST_CAP
            hanging.let_go.set()
            for job_id in stuck:
                office.wait(job_id, status="delivered")
        assert hanging.most_at_once <= MAX_PER_TARGET


def test_couriers_share_the_work_and_send_nothing_twice(office: Office) -> None:
    with Receiver() as receiver:
        posted = [office.post(receiver.url()) for _ in range(60)]
        with office.open(), office.open():
            receiver.wait_for(60)
            for job_id in posted:
                office.wait(job_id, status="delivered")
    assert set(Counter(request.headers["webhook-id"] for request in receiver.requests).values()) == {1}


def test_stopping_finishes_what_is_in_flight(office: Office) -> None:
    with Receiver(hang) as receiver:
        sent = office.post(receiver.url())
        with office.open() as courier:
            receiver.wait_for(1)
            courier.stop()
            unsent = office.post(receiver.url())
            receiver.let_go.set()
            office.wait(sent, status="delivered")
        assert office.delivery(unsent)["status"] == "pending"
    assert len(receiver.requests) == 1


def test_a_courier_stopped_before_it_ran_sends_nothing(office: Office) -> None:
    with Receiver() as receiver:
        job_id = office.post(receiver.url())
        courier = office.courier()
        courier.stop()
        with office.open(courier):
            pass
        assert office.delivery(job_id)["status"] == "pending"
    assert receiver.requests == []


def test_without_its_key_a_secret_costs_no_attempt(office: Office) -> None:
    with Receiver() as receiver:
        job_id = office.post(receiver.url())
        other_key = office.courier(box=SecretBox({"k2": bytes(32)}))
        with structlog.testing.capture_logs() as logs, office.open(other_key):
            wait_until(
                lambda: office.delivery(job_id)["next_at"] > office.clock.now(),
                what="the delivery is put off",
                evidence=lambda: str(logs),
            )
        delivery = office.delivery(job_id)
        assert (delivery["status"], delivery["attempt_count"]) == ("pending", 0)
        assert delivery["next_at"] == office.clock.now() + timedelta(seconds=60)
        assert [entry["log_level"] for entry in logs if entry["event"] == "webhook_key_unusable"] == ["error"]
        office.clock.advance(seconds=61)
        with office.open():
            office.wait(job_id, status="delivered")
    assert [request.headers["webhook-attempt"] for request in receiver.requests] == ["1"]


def test_a_new_secret_signs_from_the_next_attempt_on(office: Office) -> None:
    with Receiver(in_turn(503, 200)) as receiver, office.open():
        job_id = office.post(receiver.url())
        office.wait(job_id, status="retrying")
        rotated = new_webhook_secret()
        with office.database.write() as connection:
            sealed = office.box.seal(rotated, tenant_context(office.tenant_id))
            connection.execute(sa.update(tenants).values(webhook_secret=sealed))
        office.clock.advance(seconds=7)
        office.wait(job_id, status="delivered")
    Webhook(office.secret).verify(receiver.requests[0].body, receiver.requests[0].headers)
    Webhook(rotated).verify(receiver.requests[1].body, receiver.requests[1].headers)


def test_no_log_line_holds_a_secret_a_url_or_a_body(
    office: Office, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    with (
        structlog.testing.capture_logs() as logs,
        Receiver(in_turn(200, 503, 410)) as receiver,
        office.open(),
    ):
        for _ in range(3):
            office.post(receiver.url("/hook?key=URL-TOKEN"), result="BODY-TEXT")
        wait_until(
            lambda: sum("delivery_id" in entry for entry in logs) >= 3,
            what="three outcomes are logged",
            evidence=lambda: str(logs),
        )
    events = {entry["event"] for entry in logs}
    assert events >= {"webhook_delivered", "webhook_attempt_failed", "webhook_dead"}
    printed = "".join(capfd.readouterr())
    told = f"{logs} {caplog.text} {printed}"
    for secret in (office.secret, office.secret.removeprefix("whsec_"), "URL-TOKEN", "BODY-TEXT", "v1,"):
        assert secret not in told


def test_redis_wakes_a_sleeping_courier(
    sqlite_url: str, redis_url: str, redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "POLL_SECONDS", 3600.0)
    office = Office(Database(sqlite_url), redis_url=redis_url)
    with Receiver() as receiver, office.open():
        wait_until(lambda: redis.pubsub_numsub(WAKE_CHANNEL)[0][1] == 1, what="the courier listens")
        for count in (1, 2):
            job_id = office.post(receiver.url())
            redis.publish(WAKE_CHANNEL, "")
            receiver.wait_for(count)
            office.wait(job_id, status="delivered")
    office.database.dispose()


def test_redis_may_go_and_come_back(sqlite_url: str, own_redis_server: RedisServer) -> None:
    office = Office(Database(sqlite_url), redis_url=own_redis_server.url)

    def listeners() -> int:
        with own_redis_server.client() as client:
            return int(client.pubsub_numsub(WAKE_CHANNEL)[0][1])

    with Receiver() as receiver, office.open():
        wait_until(lambda: listeners() == 1, what="the courier listens")
        own_redis_server.kill()
        office.wait(office.post(receiver.url()), status="delivered")  # by the poll
        own_redis_server.start()
        wait_until(lambda: listeners() == 1, what="the courier listens again")
        office.wait(office.post(receiver.url()), status="delivered")
    office.database.dispose()


def test_a_result_outlives_an_outage_of_the_database(own_postgres_server: PostgresServer) -> None:
    office = Office(Database(own_postgres_server.fresh()))
    with Receiver(hang) as receiver, office.open():
        job_id = office.post(receiver.url())
        receiver.wait_for(1)
        own_postgres_server.stop()
        receiver.let_go.set()
        own_postgres_server.start()
        office.database.dispose()
        office.wait(job_id, status="delivered")
        assert len(receiver.requests) == 1
        assert office.job(job_id)["webhook_attempts"] == 1
    office.database.dispose()


def test_what_is_due_is_found_by_its_index(office: Office) -> None:
    asked = []

    @sa.event.listens_for(office.database.engine, "before_cursor_execute")
    def _remember(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if "ORDER BY webhook_deliveries.priority" in statement:
            asked.append((statement, parameters))

    office.post("http://127.0.0.1:9000/")
    deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
    deliveries.turn([], [], Room(64, full=[new_id()], suspects=False), now=office.clock.now())
    [(statement, parameters)] = asked
    is_sqlite = office.database.dialect == "sqlite"
    with office.database.read() as connection:
        if not is_sqlite:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # a table of one row needs no index
        explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN "
        plan = connection.exec_driver_sql(explain + statement, parameters).fetchall()
    assert "ix_webhook_deliveries_due" in str(plan)
