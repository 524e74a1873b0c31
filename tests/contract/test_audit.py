"""The audit log: in the act's own transaction, and there to stay."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from factories import OTHER_TENANT, TENANT, rows_of
from laneway import models
from laneway.db import Database
from laneway.engine.access.audit import MAX_FACTS_BYTES, AuditAction, AuditFilter, page, record
from laneway.engine.access.callers import Caller, Role
from laneway.errors import PayloadTooLarge

OLGA = Caller(TENANT, "olga", Role.OPERATOR, "k" * 12, address="192.0.2.7", request_id="r-1")
ROOT = Caller(OTHER_TENANT, "root", Role.ADMIN)


def note(
    database: Database,
    caller: Caller = OLGA,
    action: AuditAction = AuditAction.QUEUE_PAUSED,
    target: str = "q",
) -> None:
    with database.write() as connection:
        record(connection, caller, action, target, {"reason": "deploy"})


def entries(database: Database, wanted: AuditFilter | None = None) -> list[str]:
    found, _ = page(database, ROOT, wanted or AuditFilter(), limit=100, cursor=None)
    return [entry["target"] for entry in found]


def test_an_entry_says_who_did_what_when_from_where_and_in_which_request(database: Database) -> None:
    before = datetime.now(UTC)
    note(database, target="queue:emails")
    [entry], following = page(database, ROOT, AuditFilter(), limit=1, cursor=None)
    assert following is None
    made = datetime.fromisoformat(entry.pop("created_at"))
    assert abs(made - before) < timedelta(minutes=1)
    assert entry.pop("id")
    assert entry == {
        "tenant_id": TENANT,
        "actor": "olga",
        "role": "operator",
        "key_id": "k" * 12,
        "action": "queue.paused",
        "target": "queue:emails",
        "facts": {"reason": "deploy"},
        "address": "192.0.2.7",
        "request_id": "r-1",
    }


def test_what_was_rolled_back_is_not_in_the_log(database: Database) -> None:
    with database.write() as connection, suppress(ZeroDivisionError), connection.begin_nested():
        record(connection, OLGA, AuditAction.QUEUE_PURGED, "queue:emails")
        raise ZeroDivisionError
    assert rows_of(database, models.audit_log) == []


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log", "TRUNCATE audit_log"]
)
def test_the_store_refuses_to_change_or_delete_an_entry(database: Database, statement: str) -> None:
    note(database)
    with pytest.raises(sa.exc.DatabaseError), database.write() as connection:
        connection.exec_driver_sql(statement)
    assert [row["actor"] for row in rows_of(database, models.audit_log)] == ["olga"]


def test_entries_are_found_by_tenant_actor_action_target_and_time(database: Database) -> None:
    note(database, OLGA, AuditAction.KEY_CREATED, "key:1")
    note(database, ROOT, AuditAction.KEY_CREATED, "key:2")
    note(database, OLGA, AuditAction.KEY_REVOKED, "key:1")
    now = datetime.now(UTC)
    assert entries(database) == ["key:1", "key:2", "key:1"]
    for wanted, found in (
        (AuditFilter(tenant_id=OTHER_TENANT), ["key:2"]),
        (AuditFilter(actor="olga"), ["key:1", "key:1"]),
        (AuditFilter(action=AuditAction.KEY_REVOKED), ["key:1"]),
        (AuditFilter(target="key:2"), ["key:2"]),
        (AuditFilter(created_after=now + timedelta(minutes=5)), []),
        (AuditFilter(created_before=now - timedelta(minutes=5)), []),
        (AuditFilter(created_after=now - timedelta(minutes=5), actor="root"), ["key:2"]),
    ):
        assert entries(database, wanted) == found, wanted


def test_pages_are_newest_first_and_follow_each_other(database: Database) -> None:
    for number in range(5):
        note(database, target=str(number))
    seen: list[str] = []
    cursor: str | None = None
    while not seen or cursor:
        found, cursor = page(database, ROOT, AuditFilter(), limit=2, cursor=cursor)
        seen += [entry["target"] for entry in found]
    assert seen == ["4", "3", "2", "1", "0"]


def test_facts_are_small_and_targets_are_cut(database: Database) -> None:
    room = MAX_FACTS_BYTES - len('{"a":""}')
    with database.write() as connection:
        record(connection, OLGA, AuditAction.QUEUE_PAUSED, "x" * 201, {"a": "x" * room})
    with pytest.raises(PayloadTooLarge), database.write() as connection:
        record(connection, OLGA, AuditAction.QUEUE_PAUSED, "x", {"a": "x" * (room + 1)})
    assert entries(database) == ["x" * 200]
