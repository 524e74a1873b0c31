"""Rate limits of single tenants and callers: set, read, taken back, and heard of by every process."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError
from structlog.testing import capture_logs

from factories import NOW, OTHER_TENANT, TENANT
from laneway import models
from laneway.clock import FrozenClock, SystemClock
from laneway.db import Database
from laneway.engine.access import overrides
from laneway.engine.access.overrides import MAX_OVERRIDES, MAX_SUBJECT, OverrideSpec
from laneway.engine.access.watch import OverrideLook, Watch
from laneway.errors import Conflict, NotFound, TenantNotFound, Unprocessable
from laneway.limits.rule_book import Override
from laneway.limits.rules import Policy
from servers import wait_until


@pytest.fixture(autouse=True)
def _tenants(database: Database) -> None:
    with database.write() as connection:
        for tenant_id in (TENANT, OTHER_TENANT):
            connection.execute(
                sa.insert(models.tenants).values(
                    id=tenant_id, name=tenant_id, webhook_secret="sealed", created_by="test"
                )
            )


def spec(quota: int | None = 20, **more: Any) -> OverrideSpec:
    window = None if quota is None else 60
    return OverrideSpec(**({"quota": quota, "window_seconds": window, "reason": "they pay"} | more))


def put(database: Database, policy: Policy = Policy.QUEUE, **how: Any) -> dict[str, Any]:
    said = {"tenant_id": TENANT, "spec": spec(), "subject": None, "by": "root", "now": NOW} | how
    with database.write() as connection:
        return overrides.put(connection, said.pop("tenant_id"), policy, said.pop("spec"), **said)


def in_force(database: Database) -> dict[tuple[str, str | None, str], int | None]:
    with database.read() as connection:
        found = overrides.in_force(connection, now=NOW)
    return {(each.tenant_id, each.subject, each.policy.value): each.quota for each in found}


def changes(database: Database) -> int:
    with database.read() as connection:
        return overrides.changes(connection)


def test_what_was_set_is_read_as_it_was_set(database: Database) -> None:
    end = NOW + timedelta(days=1)
    made = put(database, subject="ada", spec=spec(0, mode="shadow", expires_at=end))
    with database.read() as connection:
        found = overrides.get(connection, TENANT, Policy.QUEUE, subject="ada")
        assert overrides.listed(connection, TENANT) == [found]
        assert overrides.listed(connection, OTHER_TENANT) == []
        with pytest.raises(NotFound):
            overrides.get(connection, TENANT, Policy.QUEUE)
        assert overrides.in_force(connection, now=NOW) == [
            Override(TENANT, "ada", Policy.QUEUE, 0, 60, True, end)
        ]
    assert made == found
    assert {name: found[name] for name in ("subject", "policy", "quota", "mode", "updated_by")} == {
        "subject": "ada",
        "policy": "queue",
        "quota": 0,
        "mode": "shadow",
        "updated_by": "root",
    }


def test_setting_it_again_replaces_it(database: Database) -> None:
    put(database)
    put(database, subject="ada")
    again = put(database, spec=spec(None), by="eve", now=NOW + timedelta(seconds=5))
    assert (again["quota"], again["window_seconds"]) == (None, None)
    assert (again["created_by"], again["created_at"]) == ("root", NOW)
    assert (again["updated_by"], again["updated_at"]) == ("eve", NOW + timedelta(seconds=5))
    assert in_force(database) == {(TENANT, None, "queue"): None, (TENANT, "ada", "queue"): 20}


def test_what_is_taken_back_is_gone_and_cannot_be_taken_back_twice(database: Database) -> None:
    put(database)
    put(database, subject="ada")
    with database.write() as connection:
        overrides.delete(connection, TENANT, Policy.QUEUE)
    assert in_force(database) == {(TENANT, "ada", "queue"): 20}
    before = changes(database)
    for tenant, subject in ((TENANT, None), (OTHER_TENANT, "ada")):
        with pytest.raises(NotFound), database.write() as connection:
            overrides.delete(connection, tenant, Policy.QUEUE, subject=subject)
    assert changes(database) == before


def test_only_a_tenant_that_exists_has_limits(database: Database) -> None:
    with pytest.raises(TenantNotFound):
        put(database, tenant_id="01980000-0000-7000-8000-00000000dead")
    assert changes(database) == 0


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        (Policy.TENANT, {"subject": "ada"}),
        (Policy.JOBS, {"subject": "ada"}),
        (Policy.QUEUE, {"subject": ""}),
        (Policy.QUEUE, {"subject": "a" * (MAX_SUBJECT + 1)}),
        (Policy.QUEUE, {"subject": "a\0"}),
        (Policy.QUEUE, {"spec": spec(expires_at=NOW)}),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    database: Database, policy: Policy, how: dict[str, Any]
) -> None:
    with pytest.raises(Unprocessable) as refused:
        put(database, policy, **how)
    assert refused.value.errors
    assert (in_force(database), changes(database)) == ({}, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"quota": -1},
        {"quota": 100_000_000},
        {"quota": 1.5},
        {"quota": 10, "window_seconds": None},
        {"quota": None, "window_seconds": 60},
        {"window_seconds": 0},
        {"window_seconds": 30 * 24 * 3600 + 1},
        {"mode": "off"},
        {"reason": ""},
        {"reason": "x" * 501},
        {"reason": "a\0b"},
        {"reason": "\ud800"},
        {"expires_at": "2026-01-01T00:00:00"},
        {"policy": "queue"},
    ],
)
def test_a_limit_that_is_none_cannot_be_said(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**fields)


def test_the_largest_numbers_and_names_are_kept(database: Database) -> None:
    largest = spec(99_999_999, window_seconds=30 * 24 * 3600, reason="x" * 500)
    put(database, subject="\N{PILE OF POO}" * MAX_SUBJECT, spec=largest)
    (found,) = in_force(database).values()
    assert found == 99_999_999


def test_a_tenant_has_at_most_so_many_and_the_expired_make_room(database: Database) -> None:
    with database.write() as connection:
        rows = [
            {
                "tenant_id": TENANT,
                "policy": "queue",
                "subject": f"user-{n}",
                "quota": 1,
                "window_seconds": 1,
                "mode": "enforce",
                "reason": "many",
                "created_by": "root",
                "updated_by": "root",
                "expires_at": NOW + timedelta(seconds=1) if n == 0 else None,
            }
            for n in range(MAX_OVERRIDES - 1)
        ]
        connection.execute(sa.insert(models.rate_limit_overrides), rows)
    put(database, subject="the last one that fits")
    put(database, subject="the last one that fits")
    before = changes(database)
    with pytest.raises(Conflict):
        put(database, subject="one more")
    assert changes(database) == before
    put(database, subject="one more", tenant_id=OTHER_TENANT)
    put(database, subject="one more", now=NOW + timedelta(seconds=1))
    with database.read() as connection:
        assert len(overrides.listed(connection, TENANT)) == MAX_OVERRIDES


def test_the_expired_and_what_a_newer_release_knows_are_not_in_force(database: Database) -> None:
    put(database, spec=spec(expires_at=NOW + timedelta(microseconds=1)))
    put(database, Policy.BATCH)
    with database.write() as connection:
        o = models.rate_limit_overrides
        renamed = sa.update(o).where(o.c.policy == "batch").values(policy="tomorrow")
        connection.execute(renamed)
        assert len(overrides.in_force(connection, now=NOW)) == 1
        assert overrides.in_force(connection, now=NOW + timedelta(microseconds=1)) == []


def test_every_change_is_counted_in_its_own_transaction(database: Database) -> None:
    assert changes(database) == 0
    put(database)
    put(database, subject="ada")
    assert changes(database) == 2
    with database.write() as connection:
        overrides.delete(connection, TENANT, Policy.QUEUE)
        connection.rollback()
    assert changes(database) == 2
    with database.write() as connection:
        overrides.delete(connection, TENANT, Policy.QUEUE)
    assert changes(database) == 3


def test_who_changes_something_waits_for_whoever_does_so_already(database: Database) -> None:
    """Else a reader could see the later number, and miss what the earlier one stands for."""
    put(database, Policy.BATCH)
    with database.write() as connection:
        overrides.put(connection, TENANT, Policy.QUEUE, spec(), by="first", now=NOW)
        second = threading.Thread(target=put, args=(database,), kwargs={"subject": "ada"})
        second.start()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        here = " AND datname = current_database()"
        if database.dialect == "postgresql":  # on SQLite nobody else may write now anyhow
            wait_until(lambda: _scalar(database, waiting + here), what="the second waits for a lock")
        assert changes(database) == 1
    second.join(20)
    assert changes(database) == 3


def _scalar(database: Database, query: str) -> Any:
    with database.read() as connection:
        return connection.execute(sa.text(query)).scalar()


class Taken:
    """What a watch handed over, each time."""

    def __init__(self) -> None:
        self.times: list[dict[str, int | None]] = []

    def __call__(self, found: Any) -> None:
        self.times.append({each.policy.value: each.quota for each in found})


def test_a_watch_hands_over_what_is_in_force_and_again_when_it_has_changed(
    database: Database, clock: FrozenClock
) -> None:
    taken = Taken()
    watch = OverrideLook(database, taken, clock=clock)
    put(database)
    for _ in range(3):
        watch.look()
    assert taken.times == [{"queue": 20}]
    put(database, Policy.BATCH)
    with database.write() as connection:
        overrides.delete(connection, TENANT, Policy.QUEUE)
    watch.look()
    assert taken.times == [{"queue": 20}, {"batch": 20}]


def test_a_change_in_the_middle_of_a_look_is_found_by_the_next(
    database: Database, clock: FrozenClock
) -> None:
    taken = Taken()

    def take(found: Any) -> None:
        taken(found)
        if len(taken.times) == 1:
            put(database)

    watch = OverrideLook(database, take, clock=clock)
    watch.look()
    watch.look()
    assert taken.times == [{}, {"queue": 20}]


def test_another_process_hears_of_a_change_without_being_told(database: Database) -> None:
    taken = Taken()
    watch = Watch(*OverrideLook(database, taken, clock=SystemClock()).looks)
    watch.look()
    watch.start()
    try:
        assert taken.times == [{}]
        put(database)
        wait_until(lambda: taken.times[-1] == {"queue": 20}, what="the change is heard of")
    finally:
        watch.close()


def test_while_the_database_is_away_what_was_known_stays(database: Database, clock: FrozenClock) -> None:
    taken = Taken()
    put(database)
    watch = Watch(*OverrideLook(database, taken, clock=clock).looks)
    watch.look()
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE change_counters RENAME TO away"))
    with capture_logs() as logs:
        for _ in range(3):
            watch.look()
    assert taken.times == [{"queue": 20}]
    assert [line["event"] for line in logs] == ["look_failed"], "told once"
    with database.write() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO change_counters"))
    put(database, Policy.BATCH)
    watch.look()
    assert taken.times[-1] == {"queue": 20, "batch": 20}
