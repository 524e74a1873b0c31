import json
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.events import EventType
from laneway.models import webhook_deliveries, webhook_messages
from laneway.webhooks.messages import Target, Told, message_id, record

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ended(job_seq: int = 3, **fields: object) -> Told:
    tenant_id, job_id = new_id(), new_id()
    values = {
        "id": message_id(job_id, job_seq, "job.completed"),
        "tenant_id": tenant_id,
        "job_id": job_id,
        "job_seq": job_seq,
        "event_type": EventType.JOB_COMPLETED,
        "targets": [Target.own(tenant_id, "https://example.com/hook")],
        "data": {"result": {"text": "\u00fc"}},
        "created_by": "alice",
    }
    return Told(**values | fields)  # type: ignore[arg-type]


def rows(database: Database, table: sa.Table) -> list[sa.RowMapping]:
    with database.read() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c.id)).mappings())


def test_an_end_becomes_one_message_and_one_delivery_that_is_due(database: Database) -> None:
    end = ended()
    with database.write() as connection:
        assert record(connection, [end], now=NOW) == 1
    [message] = rows(database, webhook_messages)
    [delivery] = rows(database, webhook_deliveries)
    assert message["id"] == delivery["message_id"] == message_id(end.job_id, 3, "job.completed")
    assert message["event_type"] == "job.completed"
    assert json.loads(message["payload"]) == {
        "type": "job.completed",
        "timestamp": "2026-01-01T12:00:00.000000Z",
        "data": end.data,
    }
    for row in (message, delivery):
        assert (row["tenant_id"], row["job_id"], row["created_by"]) == (end.tenant_id, end.job_id, "alice")
    assert (delivery["url"], delivery["status"], delivery["next_at"]) == (end.targets[0].url, "pending", NOW)
    assert (delivery["attempt_count"], delivery["max_attempts"]) == (0, 3)


def test_a_batch_is_written_whole_and_counts_what_is_new(database: Database) -> None:
    ends = [ended() for _ in range(100)]
    with database.write() as connection:
        assert record(connection, ends[:60], now=NOW) == 60
        assert record(connection, ends, now=NOW) == 40
        assert record(connection, [], now=NOW) == 0
    assert len(rows(database, webhook_messages)) == len(rows(database, webhook_deliveries)) == 100


def test_the_same_end_told_again_changes_nothing(database: Database) -> None:
    end = ended()
    with database.write() as connection:
        record(connection, [end], now=NOW)
    before = rows(database, webhook_messages), rows(database, webhook_deliveries)
    with database.write() as connection:
        assert record(connection, [end], now=NOW) == 0
    assert (rows(database, webhook_messages), rows(database, webhook_deliveries)) == before


def test_a_later_end_of_the_same_job_is_another_message(database: Database) -> None:
    end = ended(event_type="job.failed")
    with database.write() as connection:
        record(connection, [end, ended(5, tenant_id=end.tenant_id, job_id=end.job_id)], now=NOW)
    assert {row["event_type"] for row in rows(database, webhook_messages)} == {"job.failed", "job.completed"}


def test_a_transaction_that_fails_tells_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            record(connection, [ended()], now=NOW)
            raise RuntimeError("the job did not end after all")

    with pytest.raises(RuntimeError):
        fail()
    assert rows(database, webhook_messages) == rows(database, webhook_deliveries) == []
