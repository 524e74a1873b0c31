"""SQLite and PostgreSQL behind laneway.db keep the same promises."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laneway.clock import new_id
from laneway.db import Database, Id, Json, Moment, Rows, utc_now
from servers import wait_until

MOMENT = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
BOX = sa.Table(
    "box",
    sa.MetaData(),
    sa.Column("id", Id, primary_key=True),
    sa.Column("at", Moment),
    sa.Column("made_at", Moment, server_default=utc_now()),
    sa.Column("data", Json),
    sa.Column("number", sa.Integer),
)
KINDS = Rows(id="id", text="text", int="int", float="float", bool="bool", moment="moment")
many = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # one store serves all examples of a test


@pytest.fixture
def box(database: Database) -> Database:
    with database.write() as connection:
        BOX.create(connection)
    return database


def put(store: Database, **values: Any) -> str:
    identifier = new_id()
    with store.write() as connection:
        connection.execute(BOX.insert().values(id=identifier, **values))
    return identifier


def get(store: Database, identifier: str, column: str) -> Any:
    with store.read() as connection:
        return connection.scalar(sa.select(BOX.c[column]).where(BOX.c.id == identifier))


@many
@given(st.datetimes(datetime(1970, 1, 2), datetime(9998, 1, 1), timezones=st.timezones()))  # noqa: DTZ001
def test_a_moment_comes_back_the_same_and_in_utc(box: Database, moment: datetime) -> None:
    back = get(box, put(box, at=moment), "at")
    assert back == moment.astimezone(UTC)  # a time that a change of clocks leaves out equals nothing else
    assert back.tzinfo is UTC


def test_a_moment_without_a_time_zone_is_refused(box: Database) -> None:
    with pytest.raises(sa.exc.StatementError, match="a moment needs a time zone"):
        put(box, at=MOMENT.replace(tzinfo=None))


def test_moments_are_compared_and_sorted_by_time_whatever_zone_they_came_in(box: Database) -> None:
    east, west = timezone(timedelta(hours=9)), timezone(timedelta(hours=-8))
    moments = [
        MOMENT.astimezone(east),
        (MOMENT + timedelta(microseconds=1)).astimezone(west),
        MOMENT.replace(microsecond=0),
    ]
    for moment in moments:
        put(box, at=moment)
    with box.read() as connection:
        assert list(connection.scalars(sa.select(BOX.c.at).order_by(BOX.c.at))) == sorted(moments)
        later = sa.select(sa.func.count()).where(BOX.c.at > MOMENT)
        assert connection.scalar(later) == 1


def test_the_servers_own_clock_is_utc_and_compares_with_ours(box: Database) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    identifier = put(box)
    made = get(box, identifier, "made_at")
    assert before < made < datetime.now(UTC) + timedelta(seconds=1)
    with box.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(BOX.c.made_at > before)) == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=10,
)


@many
@given(JSON)
def test_json_comes_back_the_same_and_in_the_same_order(box: Database, value: Any) -> None:
    back = get(box, put(box, data=value), "data")
    assert back == value
    if isinstance(value, dict):
        assert list(back) == list(value)


def test_an_id_is_text_and_compares_as_what_it_is(box: Database) -> None:
    identifier = put(box)
    assert get(box, identifier, "id") == identifier
    made = [identifier, *(put(box) for _ in range(5))]
    with box.read() as connection:
        assert list(connection.scalars(sa.select(BOX.c.id).order_by(BOX.c.id))) == made


def test_rows_carry_every_kind_and_nulls_in_one_statement(database: Database) -> None:
    identifier = new_id()
    rows = [
        (identifier, "é\n'\"", 2**31 - 1, 0.1, True, MOMENT),
        (new_id(), "", -(2**31), -1e300, False, MOMENT.replace(microsecond=0)),
        (None, None, None, None, None, None),
    ]
    statement = sa.text(f"SELECT {', '.join(KINDS.columns)} FROM {KINDS.sql(database.dialect)}").columns(
        id=Id, text=sa.Text, int=sa.Integer, float=sa.Float, bool=sa.Boolean, moment=Moment
    )
    with database.read() as connection:
        back = [tuple(row) for row in connection.execute(statement, KINDS.bind(database.dialect, rows))]
    assert back == rows


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_rows_may_be_none_or_many(database: Database, count: int) -> None:
    numbers = Rows(n="int")
    with database.read() as connection:
        back = connection.execute(
            sa.text(f"SELECT count(*), coalesce(sum(n), 0) FROM {numbers.sql(database.dialect)}"),
            numbers.bind(database.dialect, [(n,) for n in range(count)]),
        ).one()
    assert tuple(back) == (count, sum(range(count)))


def test_rows_update_each_its_own_row(box: Database) -> None:
    first, second, third = (put(box, number=0) for _ in range(3))
    numbers = Rows(id="id", number="int")
    with box.write() as connection:
        changed = connection.execute(
            sa.text(
                f"UPDATE box SET number = u.number FROM {numbers.sql(box.dialect)} "
                "WHERE box.id = u.id RETURNING box.id"
            ),
            numbers.bind(box.dialect, [(first, 1), (third, 3)]),
        ).all()
    assert len(changed) == 2
    assert [get(box, identifier, "number") for identifier in (first, second, third)] == [1, 0, 3]


def test_a_write_is_kept_when_its_block_ends_and_undone_when_it_raises(box: Database) -> None:
    kept = put(box, number=1)
    with pytest.raises(sa.exc.IntegrityError), box.write() as connection:
        connection.execute(sa.insert(BOX), [{"id": new_id(), "number": 2}, {"id": kept, "number": 2}])
    with box.read() as connection:
        assert list(connection.scalars(sa.select(BOX.c.number))) == [1]


def test_writers_that_read_first_lose_no_update(box: Database) -> None:
    """Each adds one to what it has read. On SQLite a deferred transaction would be refused here."""
    counter, barrier = put(box, number=0), threading.Barrier(4)
    failures: list[BaseException] = []

    def add() -> None:
        barrier.wait(10)
        try:
            for _ in range(10):
                with box.write() as connection:
                    query = sa.select(BOX.c.number).where(BOX.c.id == counter).with_for_update()
                    number = connection.scalar(query)
                    connection.execute(BOX.update().where(BOX.c.id == counter).values(number=number + 1))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert get(box, counter, "number") == 40


def test_a_reader_is_not_held_up_by_a_writer_and_does_not_see_its_half_done_work(box: Database) -> None:
    row = put(box, number=1)
    with box.write() as writer:
        writer.execute(BOX.update().values(number=2))
        assert get(box, row, "number") == 1
    assert get(box, row, "number") == 2


def test_a_pool_of_one_hands_its_connection_on(database_url: str) -> None:
    store = Database(database_url, pool_size=1)
    with store.read() as connection:
        held = threading.Thread(target=_read_once, args=(store,))
        held.start()
        assert connection.scalar(sa.text("SELECT 1")) == 1
    held.join(10)
    assert not held.is_alive()
    store.dispose()


def _read_once(store: Database) -> None:
    with store.read() as connection:
        connection.scalar(sa.text("SELECT 1"))


def test_sqlite_is_safe_against_power_loss_and_holds_foreign_keys(sqlite_url: str) -> None:
    store = Database(sqlite_url)
    with store.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    store.dispose()


def test_postgresql_gives_up_on_what_takes_too_long_and_speaks_utc(postgres_url: str) -> None:
    store = Database(postgres_url)
    with store.read() as connection:
        shown = {
            name: connection.scalar(sa.text(f"SHOW {name}"))
            for name in ("statement_timeout", "lock_timeout", "TimeZone", "application_name")
        }
    assert shown == {
        "statement_timeout": "10s",
        "lock_timeout": "5s",
        "TimeZone": "UTC",
        "application_name": "laneway",
    }
    store.dispose()


def test_a_store_that_comes_back_is_used_again(own_postgres_server: Any) -> None:
    store = Database(own_postgres_server.fresh())
    _read_once(store)
    own_postgres_server.kill()
    with pytest.raises(sa.exc.OperationalError):
        _read_once(store)
    own_postgres_server.start()
    wait_until(lambda: _reads(store), what="the store is read again")
    store.dispose()


def _reads(store: Database) -> bool:
    try:
        _read_once(store)
    except sa.exc.OperationalError:
        return False
    return True
