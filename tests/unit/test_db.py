"""What laneway.db does without a server. What the stores then do with it: contract/test_stores.py."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from laneway.db import Database, Rows, stored

MOMENT = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)


def test_a_moment_is_written_for_sqlite_as_utc_with_microseconds_even_when_they_are_zero() -> None:
    assert stored(MOMENT) == "2026-03-01 12:30:15.123456"
    assert stored(MOMENT.replace(microsecond=0)) == "2026-03-01 12:30:15.000000"
    assert stored(MOMENT.astimezone(timezone(timedelta(hours=-5)))) == stored(MOMENT)
    assert stored(None) is None


def test_moments_written_for_sqlite_sort_as_text_in_the_order_of_time() -> None:
    moments = [MOMENT + timedelta(microseconds=step) for step in (-1_000_000, -1, 0, 1, 999_999, 10**12)]
    assert sorted(map(stored, moments), key=str) == list(map(stored, moments))


def test_a_moment_without_a_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        stored(MOMENT.replace(tzinfo=None))


def test_rows_are_one_json_text_that_each_store_opens_as_a_table() -> None:
    rows = Rows(id="id", attempt="int", at="moment")
    assert rows.sql("postgresql") == (
        "jsonb_to_recordset(CAST(:u AS jsonb)) AS u(id uuid, attempt integer, at timestamptz)"
    )
    bound, keys = rows.bind("postgresql", [("a", 1, MOMENT), ("b", 2, None)]).values()
    assert keys == "{a,b}"
    assert json.loads(bound) == [
        {"id": "a", "attempt": 1, "at": "2026-03-01 12:30:15.123456+00:00"},
        {"id": "b", "attempt": 2, "at": None},
    ]
    assert "json_each(:u)" in rows.sql("sqlite")
    (bound,) = rows.bind("sqlite", [("a", 1, MOMENT)]).values()
    assert json.loads(bound) == [["a", 1, "2026-03-01 12:30:15.123456"]]


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
def test_no_rows_are_bound_as_nothing(dialect: str) -> None:
    assert Rows(n="int").bind(dialect, []) == {"u": "[]"}


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
@pytest.mark.parametrize("row", [("a",), ("a", 1, 2)])
def test_a_row_of_the_wrong_width_is_refused(row: tuple[Any, ...], dialect: str) -> None:
    with pytest.raises(ValueError, match="needs the 2 values id, n"):
        Rows(id="id", n="int").bind(dialect, [row])


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
def test_what_is_no_parameter_is_refused(dialect: str) -> None:
    with pytest.raises(TypeError, match="set cannot be a statement parameter"):
        Rows(id="id").bind(dialect, [({1},)])


@pytest.mark.parametrize("url", ["mysql://h/d", "oracle://h/d"])
def test_another_kind_of_store_is_refused_with_the_name_of_the_setting(url: str) -> None:
    with pytest.raises(ValueError, match="LANEWAY_DATABASE_URL"):
        Database(url).engine  # noqa: B018 - building it is the test


def test_a_database_connects_to_nothing_before_it_is_used() -> None:
    store = Database("postgresql+psycopg://nobody@192.0.2.1/nothing")
    assert store.dialect == "postgresql"
    store.dispose()
    assert isinstance(store.engine, sa.Engine)
    store.dispose()
