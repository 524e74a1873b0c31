"""Idempotency keys: a request that is sent again is answered again, and does nothing twice.

The row of a key is written in the transaction that does the work, so the two are there or not there
together, whatever dies in between. What raises an error keeps nothing: the same key may be tried again.
A key holds for a day, for its tenant, caller and operation.

Two requests with one key at the same moment: one has the key, under an advisory lock that ends with its
transaction; the other does not wait for it in the database, where others of its group would wait with it,
but is told IdempotencyInProgress and asks again (api/idempotency.py), until it finds the answer. On SQLite
writers come one after the other anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Self
from uuid import UUID

import sqlalchemy as sa

from laneway import models
from laneway.db import Database, Moment, Rows
from laneway.engine.access.callers import Caller
from laneway.errors import IdempotencyInProgress, IdempotencyKeyReused

MAX_KEY_CHARACTERS = 255
KEPT_FOR = timedelta(hours=24)

k = models.idempotency_keys.c


@dataclass(frozen=True, slots=True)
class Key:
    """A caller's key for an operation (`id`), and what it asked for (`request`): digests, as UUIDs."""

    id: str
    tenant_id: str
    created_by: str
    request: str

    @classmethod
    def of(cls, caller: Caller, operation: str, key: str, *, request: bytes) -> Self:
        """`request` is all that the answer depends on: what is asked for, and of what."""
        whose = json.dumps([caller.tenant_id, caller.subject, operation, key])
        return cls(_digest(whose.encode()), caller.tenant_id, caller.subject, _digest(request))


class Replayed(dict[str, Any]):
    """An answer that was given before."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What was asked for with a key, and what was answered."""

    request: str
    answer: dict[str, Any]


def begin(connection: sa.Connection, key: Key | None, *, now: datetime) -> Replayed | None:
    """The answer that the key had, or None: then the work is this transaction's, and `keep` ends it.

    Raises IdempotencyKeyReused, and IdempotencyInProgress while another transaction works at it.
    """
    if key is None:
        return None
    known = take(connection, [(key, None)], now=now)
    return replay(key, known[key.id]) if key.id in known else None


def keep(connection: sa.Connection, key: Key | None, answer: Mapping[str, Any]) -> None:
    """Write the answer of a key that `begin` or `take` gave to this transaction."""
    if key is not None:
        connection.execute(_mine(sa.update(models.idempotency_keys), key).values(answer=dict(answer)))


def drop(connection: sa.Connection, key: Key) -> None:
    """Give a key back that `take` gave to this transaction."""
    connection.execute(_mine(sa.delete(models.idempotency_keys), key))


def take(
    connection: sa.Connection, wanted: Sequence[tuple[Key, Mapping[str, Any] | None]], *, now: datetime
) -> dict[str, Kept | None]:
    """Write these keys with what will be answered, in one statement; by id, those that others have.

    None for one that another transaction is working at. What is missing is this transaction's.
    """
    dialect = connection.dialect.name
    rows = [
        (key.id, key.tenant_id, key.created_by, key.request, None if answer is None else _text(answer))
        for key, answer in sorted(wanted, key=lambda each: each[0].id)
    ]
    bound = {"u": _ROWS.bind(dialect, rows)["u"], "now": now, "expired": now - KEPT_FOR}
    mine = set(connection.execute(_insert(dialect), bound).scalars())
    others = [key for key, _ in wanted if key.id not in mine]
    return find(connection, others, now=now) if others else {}


def answered(database: Database, key: Key | None, *, now: datetime) -> Replayed | None:
    """The answer that the key had, if there is one: before work whose cost is not charged a second time.

    Raises IdempotencyKeyReused.
    """
    if key is None:
        return None
    with database.read() as connection:
        kept = find(connection, [key], now=now)[key.id]
    return None if kept is None else replay(key, kept)


def find(connection: sa.Connection, keys: Iterable[Key], *, now: datetime) -> dict[str, Kept | None]:
    """By id, what is known of each key; None: nothing."""
    found: dict[str, Kept | None] = {key.id: None for key in keys}
    tenants = {key.tenant_id for key in keys}
    rows = sa.select(k.id, k.request, k.answer).where(
        k.id.in_(found), k.tenant_id.in_(tenants), k.created_at > now - KEPT_FOR
    )
    return found | {row.id: Kept(row.request, row.answer) for row in connection.execute(rows)}


def replay(key: Key, kept: Kept | None) -> Replayed:
    """The answer that the key had. Raises IdempotencyKeyReused, IdempotencyInProgress."""
    if kept is None:
        raise IdempotencyInProgress("try again in a moment", retry_after_seconds=1)
    if kept.request != key.request:
        raise IdempotencyKeyReused(
            "this key came with another request before: take a new one for a new request"
        )
    return Replayed(kept.answer)


def around(
    database: Database, key: Key | None, work: Callable[[], dict[str, Any]], *, now: datetime
) -> dict[str, Any]:
    """For work in many transactions that goes on where it broke off: looked up before, kept after.

    Of two at the same moment both do it. Raises IdempotencyKeyReused.
    """
    if key is None:
        return work()
    with database.read() as connection:
        known = find(connection, [key], now=now)[key.id]
    if known is not None:
        return replay(key, known)
    answer = work()
    with database.write() as connection:
        take(connection, [(key, answer)], now=now)
    return answer


def forget(connection: sa.Connection, *, now: datetime, limit: int) -> int:
    """Delete at most `limit` keys that hold no more; how many there were."""
    old = expired(now=now).limit(limit).with_for_update(skip_locked=True)
    ids = connection.execute(old).scalars().all()
    return connection.execute(sa.delete(models.idempotency_keys).where(k.id.in_(ids))).rowcount if ids else 0


def expired(*, now: datetime) -> sa.Select[str]:
    """The keys that hold no more."""
    return sa.select(k.id).where(k.created_at <= now - KEPT_FOR).order_by(k.created_at)


_ROWS = Rows(id="id", tenant_id="id", created_by="text", request="id", answer="text")


@cache
def _insert(dialect: str) -> sa.TextClause:
    columns = ", ".join(_ROWS.columns)
    lock = "pg_try_advisory_xact_lock(hashtextextended(CAST(u.id AS text), 0))"
    free = lock if dialect == "postgresql" else "true"
    return sa.text(
        f"INSERT INTO idempotency_keys ({columns}, created_at)"  # noqa: S608
        f" SELECT {columns}, :now FROM {_ROWS.sql(dialect)} WHERE {free}"
        " ON CONFLICT (id) DO UPDATE SET request = excluded.request, answer = excluded.answer,"
        " created_at = excluded.created_at WHERE idempotency_keys.created_at <= :expired"
        " RETURNING CAST(id AS text)"
    ).bindparams(sa.bindparam("now", type_=Moment), sa.bindparam("expired", type_=Moment))


def _mine(statement: Any, key: Key) -> Any:
    return statement.where(k.id == key.id, k.tenant_id == key.tenant_id)


def _text(answer: Mapping[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def _digest(data: bytes) -> str:
    return str(UUID(bytes=hashlib.sha256(data).digest()[:16]))
