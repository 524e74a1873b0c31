"""The two stores: SQLite for one machine, PostgreSQL for the rest, behind one small face.

Statements of the hot path carry many rows each. `Rows` is how: a table-valued parameter, written
`{rows}` in the SQL and sent as one JSON text, which PostgreSQL opens with `jsonb_to_recordset` and SQLite
with `json_each`, so that one statement text serves both stores and a batch costs one round trip.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from laneway.clock import Breaker

POOL_SIZE = 10
POOL_TIMEOUT_SECONDS = 2.0
STATEMENT_SECONDS = 10.0
LOCK_SECONDS = 5.0
CONNECT_SECONDS = 3  # libpq takes whole seconds, from 2 on
SILENCE_FACTOR = 1.2  # of the statement timeout: a server that lives has cancelled the statement by then
BREAK_SECONDS = 1.0
SQLITE_BUSY_SECONDS = 10.0

TENANT_ROLE = "laneway_tenant"
"""The role, on PostgreSQL, that row-level security holds to one tenant (engine/access/row_security.py)."""

TENANT_VARIABLE = "laneway.tenant"

acting_for: ContextVar[str | None] = ContextVar("acting_for", default=None)
"""Whose rows the present work may touch where row security is on: a tenant's id; None: everybody's."""

_READ_ONLY = "25006"

Id = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
"""A UUID: native on PostgreSQL, its usual text on SQLite, `str` in Python on both."""


class Moment(sa.TypeDecorator[datetime]):
    """A timezone-aware UTC moment, with microseconds, on both stores."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment needs a time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Json(sa.TypeDecorator[Any]):
    """JSON kept as the text it came in: exact, and the same on both stores.

    `jsonb` would reorder keys, rewrite numbers and refuse what SQLite takes; nothing on the hot path
    looks inside (docs/decisions/0002).
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        if value is None:
            return None
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


class utc_now(FunctionElement[datetime]):  # noqa: N801 - used like a SQL function
    """The server's own clock, as a column default."""

    type = Moment()
    inherit_cache = True


@compiles(utc_now, "sqlite")
def _sqlite_now(_element: Any, _compiler: Any, **_: Any) -> str:
    return "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))"


@compiles(utc_now, "postgresql")
def _postgresql_now(_element: Any, _compiler: Any, **_: Any) -> str:
    return "now()"


class transaction_number(FunctionElement[int]):  # noqa: N801 - used like a SQL function
    """The number of the writing transaction, as a column default: PostgreSQL's own, which never comes back.

    SQLite has none, so there the statement that writes the row says it.
    """

    type = sa.BigInteger()
    inherit_cache = True


@compiles(transaction_number, "sqlite")
def _sqlite_transaction(_element: Any, _compiler: Any, **_: Any) -> str:
    return "NULL"


@compiles(transaction_number, "postgresql")
def _postgresql_transaction(_element: Any, _compiler: Any, **_: Any) -> str:
    return "CAST(CAST(pg_current_xact_id() AS text) AS bigint)"


def stored(moment: datetime | None) -> str | None:
    """A moment as SQLite keeps it, for parameters inside JSON."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise ValueError("a moment needs a time zone")
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


_NARROW = sa.text(
    f"SELECT set_config('{TENANT_VARIABLE}', :tenant, true), set_config('role', '{TENANT_ROLE}', true)"
)

_POSTGRES_TYPES = {
    "id": "uuid",
    "text": "text",
    "int": "integer",
    "float": "double precision",
    "bool": "boolean",
    "moment": "timestamptz",
}


@dataclass(frozen=True)
class Rows:
    """A table-valued parameter: `Rows(id="id", attempt="int")` is `u(id, attempt)` in the statement.

    Kinds: id, text, int, float, bool, moment. `sql(dialect)` is the FROM item; `bind(dialect, rows)` the
    statement's parameters for rows given as tuples in the order of the columns.
    """

    columns: dict[str, str]

    def __init__(self, **columns: str) -> None:
        object.__setattr__(self, "columns", columns)

    def sql(self, dialect: str) -> str:
        if dialect == "postgresql":
            columns = ", ".join(f"{name} {_POSTGRES_TYPES[kind]}" for name, kind in self.columns.items())
            return f"jsonb_to_recordset(CAST(:u AS jsonb)) AS u({columns})"
        picks = ", ".join(f"json_extract(value, '$[{i}]') AS {name}" for i, name in enumerate(self.columns))
        return f"(SELECT {picks} FROM json_each(:u)) AS u"  # noqa: S608 - names of ours

    def match(self, dialect: str, column: str) -> str:
        """The condition that joins a table's key to the first column, which must be an id.

        On PostgreSQL the keys are given once more, as an array: the planner then reads these rows by their
        key and no others. From the join alone it would choose by its statistics, and right after a burst
        those say that hardly a row is queued: it read all of them for each batch (docs/decisions/0003).
        """
        join = f"{column} = u.{next(iter(self.columns))}"
        return f"{join} AND {column} = ANY(CAST(:u_keys AS uuid[]))" if dialect == "postgresql" else join

    def bind(self, dialect: str, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        if any(len(row) != len(self.columns) for row in rows):
            raise ValueError(f"each row needs the {len(self.columns)} values {', '.join(self.columns)}")
        if dialect == "postgresql":
            named = [dict(zip(self.columns, row, strict=True)) for row in rows]
            bound = {"u": json.dumps(named, default=_zoned)}
            if next(iter(self.columns.values())) == "id":
                bound["u_keys"] = f"{{{','.join(str(row[0]) for row in rows)}}}"
            return bound
        return {"u": json.dumps(rows, default=_encode)}


def any_of(dialect: str, name: str, *, kind: str = "text") -> str:
    """The right side of `column IN …` for one parameter that holds a list: `any_of(d, "ids")`."""
    if dialect == "postgresql":
        return f"(SELECT unnest(CAST(:{name} AS {_POSTGRES_TYPES[kind]}[])))"
    return f"(SELECT value FROM json_each(:{name}))"  # noqa: S608 - a name of ours


def listed(dialect: str, values: Sequence[Any]) -> Any:
    """The parameter that `any_of` names."""
    return list(values) if dialect == "postgresql" else json.dumps(list(values), default=_encode)


def _zoned(value: object) -> object:
    return str(value) if isinstance(value, datetime) and value.tzinfo is not None else _encode(value)


def _encode(value: object) -> object:
    if isinstance(value, datetime):
        return stored(value)
    raise TypeError(f"{type(value).__name__} cannot be a statement parameter")


class Database:
    """One store: `read()` and `write()` are its transactions.

    `statement_seconds` bounds each statement on PostgreSQL, by the server and, when that is silent, by this
    side a fifth later. A store that answers nothing, or hands out no connection for two seconds, is left
    alone for a second: everybody fails at once with sqlalchemy's TimeoutError, then one tries.

    A write transaction on SQLite begins IMMEDIATE: a deferred one that reads first and writes later is
    refused when another writer came between (SQLITE_BUSY, not retried by the busy timeout).

    With `row_security`, PostgreSQL itself keeps the transactions of whoever is `acting_for` a tenant to that
    tenant's rows, whatever their queries say.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = POOL_SIZE,
        statement_seconds: float = STATEMENT_SECONDS,
        row_security: bool = False,
    ) -> None:
        self.url = sa.make_url(url)
        self.dialect = self.url.get_backend_name()
        self._pool_size = pool_size
        self._statement_seconds = statement_seconds
        self._row_security = row_security and self.dialect == "postgresql"
        self._breaker = Breaker(time.monotonic, seconds=BREAK_SECONDS)

    @cached_property
    def engine(self) -> sa.Engine:
        if self.dialect == "sqlite":
            return _sqlite_engine(self.url, self._pool_size)
        if self.dialect == "postgresql":
            return _postgresql_engine(
                self.url, self._pool_size, self._statement_seconds, silent=self._breaker.failed
            )
        raise ValueError(
            f"LANEWAY_DATABASE_URL: {self.dialect!r} is not a store; use postgresql:// or sqlite:///"
        )

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that may change rows; commits when the block ends, rolls back when it raises."""
        with self._connected() as connection:
            if self.dialect == "sqlite":
                connection.execution_options(laneway_immediate=True)
            with connection.begin():
                self._narrow(connection)
                yield connection

    @contextmanager
    def write_once(self) -> Iterator[sa.Connection]:
        """For one writing statement and reads after it. Row security does not see them.

        On PostgreSQL the statement commits by itself: one round trip where BEGIN and COMMIT make it three.
        """
        if self.dialect == "sqlite":
            with self.write() as connection:
                yield connection
            return
        with self._connected() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only looks."""
        with self._connected() as connection, connection.begin():
            self._narrow(connection)
            yield connection

    def _narrow(self, connection: sa.Connection) -> None:
        """For the rest of the transaction: only the rows of the tenant that this work is for."""
        tenant_id = acting_for.get()
        if self._row_security and tenant_id is not None:
            connection.execute(_NARROW, {"tenant": tenant_id})

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        if not self._breaker.may_try():
            raise sa.exc.TimeoutError("the store did not answer a moment ago")
        try:
            connection = self.engine.connect()
        except sa.exc.TimeoutError:  # the pool is exhausted
            self._breaker.failed()
            raise
        with connection:
            yield connection
        self._breaker.worked()

    def dispose(self) -> None:
        if "engine" in self.__dict__:
            self.engine.dispose()


def _sqlite_engine(url: sa.URL, pool_size: int) -> sa.Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        connect_args={"check_same_thread": False, "timeout": SQLITE_BUSY_SECONDS},
        poolclass=sa.QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # this module says BEGIN itself
        _write_ahead(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        immediate = connection.get_execution_options().get("laneway_immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL. While another process does the same SQLite answers "locked" at once."""
    deadline = time.monotonic() + SQLITE_BUSY_SECONDS
    pause = threading.Event()
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            pause.wait(0.01)
        else:
            return


def _postgresql_engine(
    url: sa.URL, pool_size: int, statement_seconds: float, *, silent: Callable[[], None]
) -> sa.Engine:
    """`silent` is told when the server does not answer at all."""
    import psycopg  # who is on SQLite does not load it

    class Connection(psycopg.Connection[Any]):
        """One that gives up on a server that says nothing.

        libpq has no such timeout of its own, and TCP only notices a peer that acknowledges nothing: not a
        stopped server, nor a proxy that swallows bytes.
        """

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            if timeout is not None:
                return super().wait(gen, interval, timeout)
            try:
                return super().wait(gen, interval, statement_seconds * SILENCE_FACTOR)
            except psycopg.errors._WaitTimeout:
                self.pgconn.finish()  # whatever still comes must not answer the next statement
                silent()
                raise psycopg.OperationalError("the server is silent") from None

    statement_ms = round(statement_seconds * 1000)
    lock_ms = round(min(LOCK_SECONDS, statement_seconds) * 1000)
    engine = sa.create_engine(
        url,
        connect_args={
            "options": f"-c statement_timeout={statement_ms} -c lock_timeout={lock_ms} -c timezone=UTC",
            "connect_timeout": max(2, min(CONNECT_SECONDS, int(statement_seconds))),
            "target_session_attrs": "read-write",
            "keepalives_idle": 30,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            "application_name": "laneway",
        },
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        hide_parameters=True,  # an error that is logged must not carry what a job was given
    )

    @sa.event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, args: Any, parameters: Any) -> Any:
        try:
            return Connection.connect(*args, **parameters)
        except psycopg.errors.ConnectionTimeout:
            silent()
            raise

    @sa.event.listens_for(engine, "handle_error")
    def _leave_a_replica(context: sa.ExceptionContext) -> None:
        """After a failover the old master only reads: drop all connections; new ones look for the master."""
        if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
            context.is_disconnect = True

    return engine
