"""Sealing again, under the first of the keys, what older ones sealed: after it they may be forgotten.

Batch by batch, a transaction each, while everything runs. What has the first key already is passed over,
so a run that was cut short is continued by the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from laneway.db import Database
from laneway.domain.http_target import HTTP_REQUEST
from laneway.models import jobs, tenants, webhook_endpoints
from laneway.webhooks.papers import endpoint_context, signing_key_context
from laneway.webhooks.secrets import SecretBox, target_headers_context, tenant_context

BATCH = 100


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """What a run did: rows it sealed again, and why others were left (`tenants <id>: reason`)."""

    tenants: int
    endpoints: int
    unreadable: tuple[str, ...]
    jobs: int = 0  # HTTP jobs, for the headers of their targets


def rekey(database: Database, box: SecretBox, *, now: datetime) -> Rekeyed:
    """Seal every secret, signing key, header and certificate with the box's first key."""
    of_tenants, left = _rekey(database, box, tenants, now=now)
    of_endpoints, left_too = _rekey(database, box, webhook_endpoints, now=now)
    of_jobs, left_last = _rekey(database, box, jobs, jobs.c.job_type == HTTP_REQUEST, now=now)
    return Rekeyed(of_tenants, of_endpoints, (*left, *left_too, *left_last), of_jobs)


def _rekey(
    database: Database, box: SecretBox, table: sa.Table, *which: sa.ColumnElement[bool], now: datetime
) -> tuple[int, list[str]]:
    changed, unreadable, after = 0, list[str](), None
    query = sa.select(table).where(*which).order_by(table.c.id).limit(BATCH).with_for_update()
    while True:
        with database.write() as connection:
            batch = query if after is None else query.where(table.c.id > after)
            rows = connection.execute(batch).mappings().all()
            for row in rows:
                try:
                    values = _resealed(box, table, row)
                except ValueError as error:
                    unreadable.append(f"{table.name} {row['id']}: {error}")
                    continue
                if values:
                    values |= {"version": table.c.version + 1, "updated_at": now}
                    connection.execute(sa.update(table).where(table.c.id == row["id"]).values(values))
                    changed += 1
        if len(rows) < BATCH:
            return changed, unreadable
        after = rows[-1]["id"]


def _resealed(box: SecretBox, table: sa.Table, row: Mapping[Any, Any]) -> dict[str, Any]:
    """The columns that change. Raises ValueError when one of the row's texts does not open."""
    if table is jobs:
        private = row["parameters"].get("private", {})
        if "headers" not in private:
            return {}
        sealed = box.reseal(private["headers"], target_headers_context(row["tenant_id"]))
        if sealed == private["headers"]:
            return {}
        return {"parameters": row["parameters"] | {"private": private | {"headers": sealed}}}
    if table is tenants:
        contexts = {
            "webhook_secret": tenant_context(row["id"]),
            "webhook_signing_key": signing_key_context(row["id"]),
        }
        old, old_context = "old_webhook_secrets", contexts["webhook_secret"]
    else:
        old, old_context = "old_secrets", endpoint_context(row["id"])
        contexts = dict.fromkeys(("secret", "headers", "client_certificate"), old_context)
    values: dict[str, Any] = {
        name: box.reseal(row[name], context) for name, context in contexts.items() if row[name] is not None
    }
    values[old] = [each | {"sealed": box.reseal(each["sealed"], old_context)} for each in row[old]]
    return {name: value for name, value in values.items() if value != row[name]}
