"""Receivers that hang, fail or crowd, beside one that answers: whose messages wait, and whose do not.

Order and shares, not time: `python -m bench.webhooks isolation` measures the time.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database
from laneway.models import webhook_deliveries, webhook_health
from laneway.webhooks import courier as courier_module
from laneway.webhooks import pace as pace_module
from laneway.webhooks.deliveries import Claimed, Deliveries, Postponed, Room
from laneway.webhooks.health import FIRST_CAP
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.pace import MAX_IN_FLIGHT, MAX_PER_TARGET, Pace
from laneway.webhooks.retries import QUICK_SECONDS
from servers import wait_until
from webhook_office import Office
from webhook_receiver import Receiver, hang

PER_TARGET = 20


@pytest.fixture
def office(database: Database) -> Office:
    return Office(database)


def fill(office: Office, urls: Sequence[str], *, count: int, ago_seconds: float = 0.0) -> None:
    """So many messages, for these URLs in turn."""
    told = []
    for number in range(count):
        job_id, url = new_id(), urls[number % len(urls)]
        target = Target.own(office.tenant_id, url)
        identity = message_id(job_id, 1, "job.completed")
        told.append(Told(identity, office.tenant_id, "job.completed", {}, "a", [target], job_id, 1))
    with office.database.write() as connection:
        record(connection, told, now=office.clock.now() - timedelta(seconds=ago_seconds))


def urls_of(name: str, count: int) -> list[str]:
    return [f"http://127.0.0.1:{9000 + number}/{name}" for number in range(count)]


class Sitting:
    """A courier that claims by its pace and sends nothing: every attempt hangs."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
        self.pace = Pace(office.clock.monotonic)
        self.held: list[Claimed] = []

    def turn(self) -> list[Claimed]:
        turn = self._deliveries.turn([], [], self.pace.room(), now=self._office.clock.now())
        for delivery in turn.claimed:
            self.pace.began(delivery)
        self.held += turn.claimed
        return list(turn.claimed)

    def fill_up(self) -> Counter[str]:
        """Claims until there is no more to claim; by URL, what it holds."""
        while self.turn():
            pass
        return Counter(delivery.url for delivery in self.held)


def test_a_healthy_receiver_behind_thousands_is_claimed_in_the_next_turns(office: Office) -> None:
    bad = urls_of("hang", 50)
    fill(office, bad, count=50 * PER_TARGET, ago_seconds=60)
    sitting = Sitting(office)
    held = sitting.fill_up()
    assert held == dict.fromkeys(bad, FIRST_CAP)
    healthy = "http://127.0.0.1:8999/healthy"
    fill(office, [healthy], count=1)
    assert [delivery.url for delivery in sitting.turn()] == [healthy]


def test_without_shares_it_is_not_claimed(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: a fixed cap of eight, and nothing reserved."""
    monkeypatch.setattr(pace_module, "FIRST_CAP", MAX_PER_TARGET)
    monkeypatch.setattr(pace_module, "RESERVED_SHARE", 0.0)
    fill(office, urls_of("hang", 50), count=500, ago_seconds=60)
    sitting = Sitting(office)
    sitting.fill_up()
    assert len(sitting.held) == MAX_IN_FLIGHT
    fill(office, ["http://127.0.0.1:8999/healthy"], count=1)
    assert sitting.turn() == []


def test_targets_known_to_fail_share_a_quarter_and_are_passed_over(office: Office) -> None:
    bad = urls_of("bad", 100)
    fill(office, bad, count=300, ago_seconds=60)
    targets = [Target.own(office.tenant_id, url).id for url in bad]
    with office.database.write() as connection:
        for target_id in targets:
            values: dict[str, Any] = {"target_id": target_id, "tenant_id": office.tenant_id}
            values |= {"created_by": "test", "consecutive_failures": 3, "opened": 0, "warned_percent": 0}
            connection.execute(sa.insert(webhook_health).values(values))
    sitting = Sitting(office)
    held = sitting.fill_up()
    assert (sum(held.values()), max(held.values())) == (MAX_IN_FLIGHT // 4, 1)
    fill(office, ["http://127.0.0.1:8999/healthy"], count=5)
    assert {delivery.url for delivery in sitting.turn()} == {"http://127.0.0.1:8999/healthy"}


def test_one_crowded_origin_hides_nobody_behind_it(office: Office) -> None:
    """Sixty endpoints of one host and port: no target's own cap holds them back."""
    with office.database.write() as connection:
        told = []
        for _ in range(60):
            job_id, endpoint = new_id(), new_id()
            targets = [Target(endpoint, "http://127.0.0.1:9000/x", QUICK_SECONDS)]
            identity = message_id(job_id, 1, "job.completed")
            told.append(Told(identity, office.tenant_id, "job.completed", {}, "a", targets, job_id, 1))
        record(connection, told, now=office.clock.now() - timedelta(seconds=60))
    sitting = Sitting(office)
    assert sitting.fill_up() == {"http://127.0.0.1:9000/x": pace_module.MAX_PER_ORIGIN}
    fill(office, ["http://127.0.0.1:90/y"], count=1)
    assert [delivery.url for delivery in sitting.turn()] == ["http://127.0.0.1:90/y"]


def test_what_has_no_room_is_looked_behind_even_when_nobody_said_so(office: Office) -> None:
    """A room that refuses what it did not name as full must not hide the rest."""

    class Picky(Room):
        def admit(self, candidate: Any) -> bool:
            return str(candidate.url).endswith("/healthy")

    fill(office, urls_of("other", 3), count=150, ago_seconds=60)
    fill(office, ["http://127.0.0.1:8999/healthy"], count=1)
    deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
    turn = deliveries.turn([], [], Picky(64), now=office.clock.now())
    assert [delivery.url for delivery in turn.claimed] == ["http://127.0.0.1:8999/healthy"]


def test_what_is_given_back_may_be_claimed_again(office: Office) -> None:
    fill(office, urls_of("a", 1), count=1)
    deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
    now = office.clock.now()
    [first] = deliveries.turn([], [], Room(64), now=now).claimed
    turn = deliveries.turn([], [Postponed(first, now)], Room(64), now=now)
    assert [(each.id, each.attempt) for each in turn.claimed] == [(first.id, 1)]


def test_hanging_receivers_hold_up_no_healthy_one(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "POLL_SECONDS", 0.03)
    with ExitStack() as stack:
        hanging = [stack.enter_context(Receiver(hang)) for _ in range(20)]
        healthy = stack.enter_context(Receiver())
        fill(office, [each.url() for each in hanging], count=400, ago_seconds=60)
        with office.open():
            wait_until(
                lambda: sum(len(each.requests) for each in hanging) >= 40, what="all of them hang, twice each"
            )
            fill(office, [healthy.url()], count=50)
            healthy.wait_for(50)
            assert sum(len(each.requests) for each in hanging) == 40
            for each in hanging:
                each.let_go.set()


def test_the_claim_reads_what_is_blocked_once_and_not_row_by_row(office: Office) -> None:
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(office.database.engine, "before_cursor_execute")
    def _remember(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if "ORDER BY webhook_deliveries.priority" in statement:
            asked.append((statement, parameters))

    bad = urls_of("bad", 100)
    fill(office, bad, count=400, ago_seconds=60)
    full = [Target.own(office.tenant_id, url).id for url in bad]
    deliveries = Deliveries(office.database, owner=new_id(), lease_seconds=30)
    deliveries.turn([], [], Room(64, full=full[:50], suspects=False), now=office.clock.now())
    statement, parameters = asked[-1]
    sqlite = office.database.dialect == "sqlite"
    with office.database.write() as connection:
        connection.execute(sa.text("ANALYZE" if sqlite else "ANALYZE webhook_deliveries"))
    with office.database.read() as connection:
        if not sqlite:  # so small a table needs no index
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
            connection.execute(sa.text("SET LOCAL enable_bitmapscan = off"))
            connection.execute(sa.text("SET LOCAL enable_sort = off"))
        explain = "EXPLAIN QUERY PLAN " if sqlite else "EXPLAIN "
        plan = "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
    assert "ix_webhook_deliveries_due" in plan
    assert plan.count("LIST SUBQUERY" if sqlite else "hashed SubPlan") >= 2
    d = webhook_deliveries.c
    with office.database.read() as connection:
        sending = sa.select(sa.func.count()).where(d.status == "sending", d.target_id.in_(full[:50]))
        assert connection.execute(sending).scalar_one() == 0
