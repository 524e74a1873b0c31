"""The ledger of deliveries: sending again one, or all that an endpoint did not get."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, OTHER_TENANT, TENANT, add_job, at_once, change, rows_of
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import recoveries, webhook_ledger
from laneway.engine.queries import Scope
from laneway.engine.recoveries import AHEAD, BATCH_MESSAGES, Mode, Wish
from laneway.errors import Conflict, DeliveryNotFound, EndpointNotFound, NotFound
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.scheduler.ticker import Ticker
from laneway.settings import Settings
from laneway.webhooks.deliveries import Deliveries, Room
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.retries import UNDONE, DeliveryStatus

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)
ALICE, ALL_OF_TENANT = Scope(TENANT, "alice"), Scope(TENANT)
ENDED = sorted(frozenset(DeliveryStatus) - UNDONE)


def add_endpoint(database: Database, **columns: Any) -> str:
    """The id of an endpoint that hears of the ends of jobs."""
    row: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "alice",
        "url": "https://example.org/all",
        "event_types": ["job.completed"],
        "filters": {},
        "format": "standard",
        "status": "enabled",
        "enabled_at": NOW,
        "secret": "sealed",
        "old_secrets": [],
        "sign_with": "v1",
        "timeout_seconds": 10,
        "retry_schedule": [5.0, 300.0],
        "max_in_flight": 8,
        "in_order": False,
    } | columns
    with database.write() as connection:
        connection.execute(sa.insert(models.webhook_endpoints).values(row))
    return str(row["id"])


def tell(
    database: Database,
    endpoint_id: str | None,
    status: str = "dead",
    *,
    age: timedelta = HOUR,
    event_type: str = "job.completed",
    tried: int | None = None,
    **job: Any,
) -> str:
    """The id of a message about a job that ended `age` ago; to the endpoint it has a delivery in `status`."""
    at = NOW - age
    job_id = add_job(database, JobStatus.COMPLETED, **({"finished_at": at} | job))
    url = "https://example.org/all" if endpoint_id else "https://example.org/own"
    target = Target(endpoint_id or new_id(), url, [5.0, 300.0], endpoint_id)
    told = Told(
        message_id(job_id, 3, event_type),
        TENANT,
        event_type,
        {"job_id": job_id, "text": "grüße"},
        "alice",
        [target],
        job_id,
        3,
    )
    with database.write() as connection:
        record(connection, [told], now=at)
        d = models.webhook_deliveries
        done = {"delivered_at": at} if status == "delivered" else {}
        if tried is None:
            tried = int(status in ("dead", "delivered"))
        connection.execute(
            sa.update(d).where(d.c.message_id == told.id).values(status=status, attempt_count=tried, **done)
        )
    return told.id


def wish(mode: Mode = Mode.FAILED, *, since: timedelta = 2 * HOUR, until: timedelta = timedelta()) -> Wish:
    return Wish(mode, NOW - since, NOW - until)


def start(database: Database, endpoint_id: str, asked: Wish | None = None, *, rate: float = 100.0) -> str:
    with database.write() as connection:
        made = recoveries.start(
            connection, TENANT, endpoint_id, asked or wish(), per_second=rate, by="olga", now=NOW
        )
    return str(made["id"])


def count(database: Database, endpoint_id: str, asked: Wish | None = None) -> int:
    with database.read() as connection:
        return recoveries.count(connection, TENANT, endpoint_id, asked or wish())


def get(database: Database, recovery_id: str) -> dict[str, Any]:
    with database.read() as connection:
        return recoveries.get(connection, TENANT, recovery_id)


def carry_on(database: Database, *, now: Any = NOW) -> int:
    """Sweep until there is nothing to do at `now`; how many were queued."""
    queued, more = recoveries.sweep(database, now=now)
    while more:
        some, more = recoveries.sweep(database, now=now)
        queued += some
    return queued


def deliveries(database: Database, status: str = "pending") -> list[sa.RowMapping]:
    """In the order in which they fall due."""
    found = [row for row in rows_of(database, models.webhook_deliveries) if row["status"] == status]
    return sorted(found, key=lambda row: (row["next_at"], row["id"]))


def only_delivery(database: Database) -> sa.RowMapping:
    (row,) = rows_of(database, models.webhook_deliveries)
    return row


def payloads(database: Database) -> dict[str, bytes]:
    return {row["id"]: row["payload"] for row in rows_of(database, models.webhook_messages)}


def redeliver(database: Database, delivery_id: str, scope: Scope = ALICE) -> dict[str, Any]:
    with database.write() as connection:
        return webhook_ledger.redeliver(connection, scope, delivery_id, now=NOW)


# One


@pytest.mark.parametrize("status", ENDED)
def test_whatever_became_of_a_delivery_it_is_sent_again(database: Database, status: str) -> None:
    said = tell(database, add_endpoint(database), status, tried=3)
    before, was = payloads(database), only_delivery(database)
    answer = redeliver(database, was["id"])
    row = only_delivery(database)
    assert (row["status"], row["trigger"], row["message_id"]) == ("pending", "manual", said)
    assert (row["attempt_count"], row["max_attempts"], row["delivered_at"]) == (3, 3 + 3, None)
    assert (row["next_at"], row["version"]) == (NOW, was["version"] + 1)
    assert payloads(database) == before
    assert answer["payload"].encode() == before[said]
    assert (answer["status"], answer["id"]) == ("pending", was["id"])


@pytest.mark.parametrize("status", sorted(UNDONE))
def test_what_is_on_its_way_is_not_sent_twice(database: Database, status: str) -> None:
    tell(database, add_endpoint(database))
    delivery_id = only_delivery(database)["id"]
    held = {"lease_owner": new_id()} if status == "sending" else {}
    change(database, models.webhook_deliveries, delivery_id, status=status, **held)
    before = only_delivery(database)
    with pytest.raises(Conflict, match="on its way"):
        redeliver(database, delivery_id)
    assert only_delivery(database) == before


def test_two_redeliveries_at_once_have_one_winner(database: Database) -> None:
    tell(database, add_endpoint(database))
    delivery_id = only_delivery(database)["id"]
    answers = at_once([lambda: redeliver(database, delivery_id)] * 4)
    assert sum(isinstance(answer, Conflict) for answer in answers) == 3
    assert only_delivery(database)["max_attempts"] == 1 + 3


def test_an_endpoint_that_moved_gets_it_at_its_new_url(database: Database) -> None:
    endpoint_id = add_endpoint(database)
    tell(database, endpoint_id)
    change(database, models.webhook_endpoints, endpoint_id, url="https://example.org/moved")
    redeliver(database, only_delivery(database)["id"])
    assert only_delivery(database)["url"] == "https://example.org/moved"


def test_nothing_goes_to_an_endpoint_that_is_disabled_or_gone(database: Database) -> None:
    endpoint_id = add_endpoint(database, status="disabled", disabled_at=NOW)
    tell(database, endpoint_id)
    delivery_id = only_delivery(database)["id"]
    with pytest.raises(Conflict, match="disabled; enable it first"):
        redeliver(database, delivery_id)
    with database.write() as connection:
        connection.execute(sa.delete(models.webhook_endpoints))
    with pytest.raises(Conflict, match="deleted"):
        redeliver(database, delivery_id)
    assert only_delivery(database)["status"] == "dead"


def test_without_its_payload_nothing_is_left_to_send(database: Database) -> None:
    said = tell(database, add_endpoint(database))
    change(database, models.webhook_messages, said, payload=None)
    with pytest.raises(Conflict, match="pruned"):
        redeliver(database, only_delivery(database)["id"])


@pytest.mark.parametrize("scope", [Scope(TENANT, "bob"), Scope(OTHER_TENANT), Scope(OTHER_TENANT, "alice")])
def test_a_delivery_of_others_is_not_there(database: Database, scope: Scope) -> None:
    tell(database, add_endpoint(database))
    delivery_id = only_delivery(database)["id"]
    with pytest.raises(DeliveryNotFound):
        redeliver(database, delivery_id, scope)
    assert redeliver(database, delivery_id, ALL_OF_TENANT)["status"] == "pending"


# Many


def test_failed_are_those_that_were_tried_in_vain(database: Database) -> None:
    endpoint_id = add_endpoint(database)
    wanted = {
        tell(database, endpoint_id),
        tell(database, endpoint_id, tried=0),  # blocked until its time was over
        tell(database, endpoint_id, "cancelled", tried=2),
    }
    tell(database, endpoint_id, "cancelled")
    tell(database, endpoint_id, "skipped")
    tell(database, endpoint_id, "delivered")
    tell(database, endpoint_id, "retrying", tried=1)
    tell(database, None)
    before = payloads(database)
    assert count(database, endpoint_id) == 3
    recovery_id = start(database, endpoint_id)
    assert carry_on(database) == 3
    queued = deliveries(database)
    assert {row["message_id"] for row in queued} == wanted
    assert {(row["trigger"], row["priority"]) for row in queued} == {("recover", 1)}
    assert payloads(database) == before
    done = get(database, recovery_id)
    assert (done["status"], done["queued"], done["finished_at"]) == ("done", 3, "2026-01-01T12:00:00.000000Z")


def test_missing_are_the_skipped_and_those_from_before_the_endpoint_was_there(database: Database) -> None:
    endpoint_id = add_endpoint(database, filters={"queues": ["emails"], "tags": ["a", "b"]})
    mine = {"queue": "emails", "tags": ["b"]}
    wanted = {
        tell(database, endpoint_id, "skipped"),
        tell(database, endpoint_id, "cancelled"),
        tell(database, None, "delivered", **mine),
        tell(database, add_endpoint(database), **mine),
    }
    tell(database, endpoint_id)
    tell(database, endpoint_id, "delivered")
    tell(database, None, "delivered")  # of another queue
    tell(database, None, "delivered", **mine, event_type="job.failed")
    asked = wish(Mode.MISSING)
    assert count(database, endpoint_id, asked) == 4
    start(database, endpoint_id, asked)
    assert carry_on(database) == 4
    queued = deliveries(database)
    assert {row["message_id"] for row in queued} == wanted
    assert {(row["target_id"], row["endpoint_id"], row["created_by"]) for row in queued} == {
        (endpoint_id, endpoint_id, "alice")
    }
    assert count(database, endpoint_id, asked) == 0


def test_all_is_both_and_what_was_delivered_but_nothing_on_its_way(database: Database) -> None:
    endpoint_id = add_endpoint(database, event_types=["*"])
    for status in ("dead", "skipped", "cancelled", "delivered", "retrying", "pending"):
        tell(database, endpoint_id, status)
    tell(database, None)
    for passing in ("job.progress", "endpoint.test"):
        tell(database, endpoint_id, event_type=passing)
        tell(database, None, event_type=passing)
    asked = wish(Mode.ALL)
    assert count(database, endpoint_id, asked) == 5
    start(database, endpoint_id, asked)
    assert carry_on(database) == 5


def test_since_counts_and_until_does_not(database: Database) -> None:
    endpoint_id = add_endpoint(database)
    ages = [2 * HOUR + MICROSECOND, 2 * HOUR, HOUR + MICROSECOND, HOUR]
    messages = [tell(database, endpoint_id, age=age) for age in ages]
    asked = wish(until=HOUR)
    assert count(database, endpoint_id, asked) == 2
    start(database, endpoint_id, asked)
    carry_on(database)
    assert [row["message_id"] for row in deliveries(database)] == messages[1:3]


def test_they_fall_due_one_after_the_other_across_batches(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the sweeps come late, and oldest first whether the endpoint was told or not."""
    monkeypatch.setattr(recoveries, "BATCH_MESSAGES", 3)
    endpoint_id = add_endpoint(database)
    wanted = [
        tell(database, endpoint_id if n % 2 else None, age=HOUR - timedelta(seconds=n)) for n in range(8)
    ]
    start(database, endpoint_id, wish(Mode.ALL), rate=2)
    late = NOW + 10 * SECOND
    assert carry_on(database, now=late) == 8
    queued = deliveries(database)
    assert [row["message_id"] for row in queued] == wanted
    assert [row["next_at"] for row in queued] == [late + n * SECOND / 2 for n in range(8)]
    assert {row["updated_at"] for row in queued} == {late}


def test_the_walk_is_never_far_ahead_of_the_sending(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoveries, "BATCH_MESSAGES", 10)
    endpoint_id = add_endpoint(database)
    for n in range(60):
        tell(database, endpoint_id, age=HOUR - timedelta(seconds=n))
    recovery_id = start(database, endpoint_id, rate=1)
    assert AHEAD.total_seconds() == 30
    assert carry_on(database) == 40  # 30 seconds, and the batch that passes them
    assert get(database, recovery_id)["status"] == "running"
    assert recoveries.sweep(database, now=NOW + 8 * SECOND) == (0, False)
    assert carry_on(database, now=NOW + 9 * SECOND) == 10
    assert carry_on(database, now=NOW + 60 * SECOND) == 10
    dues = [row["next_at"] for row in deliveries(database)]
    assert dues[:50] == [NOW + n * SECOND for n in range(50)]
    assert dues[50] == NOW + 60 * SECOND
    assert (get(database, recovery_id)["status"], get(database, recovery_id)["queued"]) == ("done", 60)


def test_whoever_dies_between_batches_the_next_goes_on_from_there(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that dies within a batch: nothing of it is there."""
    monkeypatch.setattr(recoveries, "BATCH_MESSAGES", 10)
    endpoint_id = add_endpoint(database)
    for _ in range(25):
        tell(database, endpoint_id)  # all at one moment: the place tells them apart
    recovery_id = start(database, endpoint_id)
    assert recoveries.sweep(database, now=NOW) == (10, True)

    queue, left = recoveries._queue, iter(range(4))

    def dies(*arguments: Any, **how: Any) -> bool:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return queue(*arguments, **how)

    with monkeypatch.context() as patched:
        patched.setattr(recoveries, "_queue", dies)
        with pytest.raises(KeyboardInterrupt):
            recoveries.sweep(database, now=NOW)
    assert (len(deliveries(database)), get(database, recovery_id)["queued"]) == (10, 10)
    assert carry_on(database) == 15
    assert (len(deliveries(database)), get(database, recovery_id)["queued"]) == (25, 25)
    assert {row["max_attempts"] for row in deliveries(database)} == {1 + 3}


def test_of_many_schedulers_each_message_is_queued_by_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoveries, "BATCH_MESSAGES", 5)
    endpoint_id = add_endpoint(database)
    for n in range(60):
        tell(database, endpoint_id if n % 2 else None)
    recovery_id = start(database, endpoint_id, wish(Mode.ALL))
    results = at_once([lambda: carry_on(database)] * 4)
    assert sum(result for result in results if isinstance(result, int)) + carry_on(database) == 60
    assert (get(database, recovery_id)["queued"], len(deliveries(database))) == (60, 60)
    dues = [row["next_at"] for row in deliveries(database)]
    assert dues == [NOW + n * SECOND / 100 for n in range(60)]


def test_live_messages_go_first(database: Database) -> None:
    endpoint_id = add_endpoint(database)
    old = tell(database, endpoint_id)
    start(database, endpoint_id)
    carry_on(database)
    live = tell(database, endpoint_id, "pending", age=timedelta(), tried=0)
    couriers = Deliveries(database, owner=new_id(), lease_seconds=30)
    room = Room(rows=1)
    first = couriers.turn([], [], room, now=NOW + SECOND)
    second = couriers.turn([], [], room, now=NOW + SECOND)
    assert [_claimed(first), _claimed(second)] == [[live], [old]]


def _claimed(turn: Any) -> list[str]:
    claimed = turn.claimed if hasattr(turn, "claimed") else turn[0]
    return [each.message_id for each in claimed]


def test_an_endpoint_has_one_recovery_at_a_time(database: Database) -> None:
    endpoint_id, other = add_endpoint(database), add_endpoint(database)
    tell(database, endpoint_id)
    calls: list[Callable[[], str]] = [lambda: start(database, endpoint_id)] * 4
    answers = at_once(calls)
    assert sum(isinstance(answer, Conflict) for answer in answers) == 3
    start(database, other)
    carry_on(database)
    start(database, endpoint_id)


def test_a_paused_endpoint_holds_its_recovery_up(database: Database) -> None:
    endpoint_id = add_endpoint(database)
    tell(database, endpoint_id)
    recovery_id = start(database, endpoint_id)
    change(database, models.webhook_endpoints, endpoint_id, status="paused")
    assert recoveries.sweep(database, now=NOW) == (0, False)
    change(database, models.webhook_endpoints, endpoint_id, status="enabled")
    assert carry_on(database) == 1
    assert get(database, recovery_id)["status"] == "done"


def test_a_recovery_ends_with_its_endpoint(database: Database) -> None:
    for gone in (False, True):
        endpoint_id = add_endpoint(database)
        tell(database, endpoint_id)
        recovery_id = start(database, endpoint_id)
        if gone:
            with database.write() as connection:
                e = models.webhook_endpoints
                connection.execute(sa.delete(e).where(e.c.id == endpoint_id))
        else:
            change(database, models.webhook_endpoints, endpoint_id, status="disabled", disabled_at=NOW)
        assert carry_on(database) == 0
        assert get(database, recovery_id)["status"] == "cancelled"
        with pytest.raises(EndpointNotFound if gone else Conflict):
            start(database, endpoint_id)
    assert deliveries(database) == []


def test_a_cancelled_recovery_takes_back_what_nobody_began_to_send(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoveries, "BATCH_MESSAGES", 3)
    endpoint_id = add_endpoint(database)
    for _ in range(5):
        tell(database, endpoint_id)
    live = tell(database, endpoint_id, "pending", tried=0)
    recovery_id = start(database, endpoint_id)
    recoveries.sweep(database, now=NOW)
    sending = next(row["id"] for row in deliveries(database) if row["trigger"] == "recover")
    change(database, models.webhook_deliveries, sending, status="sending", lease_owner=new_id())

    def cancel() -> dict[str, Any]:
        with database.write() as connection:
            return recoveries.cancel(connection, TENANT, recovery_id, now=NOW)

    queued = cancel()["queued"]
    assert queued <= 3
    assert cancel()["status"] == "cancelled"  # a second time changes nothing
    assert carry_on(database) == 0
    assert [row["message_id"] for row in deliveries(database)] == [live]
    assert len(deliveries(database, "cancelled")) == queued - 1
    assert count(database, endpoint_id) == 4  # they were tried in vain before


def test_a_done_recovery_cannot_be_cancelled_and_another_tenants_is_not_there(database: Database) -> None:
    endpoint_id = add_endpoint(database)
    recovery_id = start(database, endpoint_id)
    with database.write() as connection:
        for ask in (
            lambda: recoveries.get(connection, OTHER_TENANT, recovery_id),
            lambda: recoveries.cancel(connection, OTHER_TENANT, recovery_id, now=NOW),
        ):
            with pytest.raises(NotFound):
                ask()
        for of_endpoint in (
            lambda: recoveries.count(connection, OTHER_TENANT, endpoint_id, wish()),
            lambda: recoveries.start(
                connection, OTHER_TENANT, endpoint_id, wish(), per_second=1, by="x", now=NOW
            ),
        ):
            with pytest.raises(EndpointNotFound):
                of_endpoint()
    carry_on(database)
    with database.write() as connection, pytest.raises(Conflict, match="done"):
        recoveries.cancel(connection, TENANT, recovery_id, now=NOW)


def test_an_idle_sweep_takes_no_write_lock(sqlite_url: str) -> None:
    holder, database = Database(sqlite_url), Database(sqlite_url)
    endpoint_id = add_endpoint(database, status="paused")
    start(database, endpoint_id)
    with holder.write():
        assert recoveries.sweep(database, now=NOW) == (0, False)
    for store in (holder, database):
        store.dispose()


def test_a_round_of_the_scheduler_carries_recoveries_on(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BATCH_MESSAGES == 200
    monkeypatch.setattr(recoveries, "BATCH_MESSAGES", 2)
    endpoint_id = add_endpoint(database)
    for _ in range(5):
        tell(database, endpoint_id)
    recovery_id = start(database, endpoint_id)
    assert Ticker(database, MemoryLanes(), Settings(), clock=clock).tick()
    assert (get(database, recovery_id)["queued"], get(database, recovery_id)["status"]) == (5, "done")
