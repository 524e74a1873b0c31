"""A tenant's events as one stream: none is lost, none is told twice, whoever commits when; on both stores."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, OTHER_TENANT, TENANT, WORKER, at_once, new_job
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.engine import happenings
from laneway.engine.happenings import MAX_REPLAYED, PAGE_ROWS, REPLAYED_FOR, Place, place_of
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import Scope
from laneway.engine.transitions import Applied, Cancel, Claim, Complete, create
from servers import wait_until

SCOPE = Scope(TENANT)
Told = tuple[str, int]


def make(database: Database, count: int = 1, **fields: Any) -> list[str]:
    """The ids of new jobs, made in one transaction."""
    jobs = [new_job(**fields) for _ in range(count)]
    with database.write_once() as connection:
        create(connection, jobs, now=NOW)
    return [job.id for job in jobs]


def here(database: Database, scope: Scope = SCOPE) -> Place:
    with database.read() as connection:
        return happenings.begin(connection, scope, None, now=NOW)[0]


def resume(database: Database, text: str, *, scope: Scope = SCOPE, now: Any = NOW) -> tuple[Place, bool]:
    with database.read() as connection:
        return happenings.begin(connection, scope, text, now=now)


def read_on(
    database: Database, place: Place, scope: Scope = SCOPE, *, count: int = 0
) -> tuple[list[sa.RowMapping], Place]:
    """All that comes after `place`, page by page, once there are `count` events.

    On PostgreSQL a transaction of anybody's, of an autovacuum say, may hold them back for a moment.
    """
    told: list[sa.RowMapping] = []

    def look() -> bool:
        nonlocal place
        with database.read() as connection:
            page = happenings.after(connection, scope, place)
        told.extend(page.events)
        place = page.place
        return not page.more and len(told) >= count

    wait_until(look, what=f"{count} events are told")
    return told, place


def names(events: Sequence[sa.RowMapping]) -> list[Told]:
    return [(event["job_id"], event["seq"]) for event in events]


def all_events(database: Database) -> set[Told]:
    e = models.job_events.c
    with database.read() as connection:
        return {tuple(row) for row in connection.execute(sa.select(e.job_id, e.seq))}  # type: ignore[misc]


def end(database: Database, job_id: str) -> None:
    token = new_id()
    for moves in ([Claim(job_id, token, WORKER, NOW)], [Complete(job_id, 1, token, result="1")]):
        with database.write() as connection:
            [outcome] = carry_out(connection, moves, now=NOW, actor="worker:w")
        assert isinstance(outcome, Applied)


def test_what_happens_is_told_in_order_with_what_it_is_about(database: Database) -> None:
    place = here(database)
    [job_id] = make(database, title="T", queue="emails")
    end(database, job_id)
    events, after = read_on(database, place, count=3)
    assert names(events) == [(job_id, 1), (job_id, 2), (job_id, 3)]
    assert [event["action"] for event in events] == ["create", "claim", "complete"]
    assert {(event["title"], event["queue"], event["job_type"]) for event in events} == {
        ("T", "emails", "demo.echo")
    }
    assert (place_of(events[-1]), read_on(database, after)) == (after, ([], after))


def test_a_new_stream_begins_now(database: Database) -> None:
    make(database, 3)
    place = here(database)
    assert read_on(database, place)[0] == []
    [job_id] = make(database)
    assert names(read_on(database, place, count=1)[0]) == [(job_id, 1)]


def test_whoever_resumes_at_any_event_is_told_the_rest(database: Database) -> None:
    place = here(database)
    ids = make(database, 3)
    for job_id in ids:
        end(database, job_id)
    events, _ = read_on(database, place, count=9)
    assert len(events) == 9
    for number, event in enumerate(events):
        back, gap = resume(database, str(place_of(event)))
        assert not gap
        assert names(read_on(database, back)[0]) == names(events)[number + 1 :]


def test_a_user_is_told_of_its_own_jobs_and_nobody_of_another_tenants(database: Database) -> None:
    place = here(database)
    [mine] = make(database)
    [bobs] = make(database, created_by="bob")
    [theirs] = make(database, tenant_id=OTHER_TENANT)
    assert names(read_on(database, place, Scope(TENANT, "alice"), count=1)[0]) == [(mine, 1)]
    assert names(read_on(database, place, Scope(TENANT, "bob"), count=1)[0]) == [(bobs, 1)]
    assert names(read_on(database, place, count=2)[0]) == [(mine, 1), (bobs, 1)]
    assert names(read_on(database, place, Scope(OTHER_TENANT), count=1)[0]) == [(theirs, 1)]


def test_more_than_a_page_is_read_in_pages(database: Database) -> None:
    place = here(database)
    ids = make(database, PAGE_ROWS + 1)
    read_on(database, place, count=PAGE_ROWS + 1)
    with database.read() as connection:
        first = happenings.after(connection, SCOPE, place)
        second = happenings.after(connection, SCOPE, first.place)
    assert (len(first.events), first.more, len(second.events), second.more) == (PAGE_ROWS, True, 1, False)
    assert sorted(names([*first.events, *second.events])) == sorted((job_id, 1) for job_id in ids)


def test_the_numbers_of_transactions_grow_also_when_events_are_deleted(database: Database) -> None:
    place = here(database)
    make(database)
    _, place = read_on(database, place, count=1)
    with database.write() as connection:
        connection.execute(sa.delete(models.job_events))
        connection.execute(sa.delete(models.jobs))
    [job_id] = make(database)
    assert names(read_on(database, place, count=1)[0]) == [(job_id, 1)]


# Who comes late


def test_what_commits_late_is_told_and_nothing_is_told_before_it(postgres_url: str) -> None:
    """The slow transaction has the smaller number, and commits after the quick one."""
    database = Database(postgres_url)
    place = here(database)
    slow, quick = new_job(), new_job()
    with database.write() as connection:
        create(connection, [slow], now=NOW)
        with database.write() as other:
            create(other, [quick], now=NOW)
        assert read_on(database, place) == ([], place), "the slow one could still come"
    events, place = read_on(database, place, count=2)
    assert names(events) == [(slow.id, 1), (quick.id, 1)]
    assert read_on(database, place)[0] == []
    database.dispose()


def test_what_is_rolled_back_holds_nobody_up(postgres_url: str) -> None:
    database = Database(postgres_url)
    place = here(database)
    with database.engine.connect() as connection:
        create(connection, [new_job()], now=NOW)
        connection.rollback()
    [job_id] = make(database)
    assert names(read_on(database, place, count=1)[0]) == [(job_id, 1)]
    database.dispose()


class Reader:
    """A follower that is cut off again and again: after any event, it comes back with the id of that one."""

    def __init__(self, database: Database, *, seed: int, scope: Scope = SCOPE) -> None:
        self._database = database
        self._rng = random.Random(seed)
        self._scope = scope
        self._last = str(here(database, scope))
        self.told: list[Told] = []

    def look(self) -> None:
        place, gap = resume(self._database, self._last, scope=self._scope)
        assert not gap
        with self._database.read() as connection:
            page = happenings.after(connection, self._scope, place)
        some = self._rng.randint(0, len(page.events))
        for event in page.events[:some]:
            self.told.append((event["job_id"], event["seq"]))
            self._last = str(place_of(event))

    def finish(self, wanted: set[Told]) -> None:
        wait_until(lambda: (self.look(), set(self.told) >= wanted)[1], what="every event was told")
        self.look()


def test_readers_that_are_cut_off_lose_and_double_nothing_while_jobs_run(database: Database) -> None:
    readers = [Reader(database, seed=seed) for seed in range(3)]
    done = threading.Event()

    def write(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            ids = make(database, rng.randint(1, 4))
            for job_id in ids[1:]:
                end(database, job_id)
            with database.write() as connection:  # a transaction of several statements
                create(connection, [new_job()], now=NOW)
                carry_out(connection, [Cancel(ids[0], by="alice")], now=NOW, actor="alice")

    def follow(reader: Reader) -> None:
        while not done.is_set():
            reader.look()

    followers = [threading.Thread(target=follow, args=(reader,)) for reader in readers]
    for thread in followers:
        thread.start()
    outcomes = at_once([partial(write, seed) for seed in range(4)])
    done.set()
    for thread in followers:
        thread.join()
    assert outcomes == [None] * 4
    happened = all_events(database)
    for reader in readers:
        reader.finish(happened)
        assert len(reader.told) == len(happened), "each once"
        assert set(reader.told) == happened


# How far back


def test_an_hour_is_told_and_past_it_there_is_a_gap(database: Database) -> None:
    place = here(database)
    make(database)
    read_on(database, place, count=1)
    assert resume(database, str(place), now=NOW + REPLAYED_FOR) == (place, False)
    back, gap = resume(database, str(place), now=NOW + REPLAYED_FOR + timedelta(microseconds=1))
    assert (gap, read_on(database, back)[0]) == (True, [])


@pytest.fixture
def many(database: Database) -> tuple[Place, Place]:
    """Places before and after as many events as are told."""
    make(database)
    _, before = read_on(database, Place(0), count=1)
    columns = "job_id, {0}, tenant_id, action, status, attempt, at, actor"
    names, values = columns.format("seq"), columns.format("n.i")
    if database.dialect == "sqlite":
        names, values = f"{names}, tx", f"{values}, tx + 1"
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i <= {MAX_REPLAYED})"
    with database.write() as connection:  # by one statement
        connection.exec_driver_sql(
            f"{numbers} INSERT INTO job_events ({names}) SELECT {values} FROM job_events, n WHERE seq = 1"
        )
    return before, read_on(database, before, count=MAX_REPLAYED)[1]


def test_so_many_events_are_told_and_one_past_them_is_a_gap(
    database: Database, many: tuple[Place, Place]
) -> None:
    place, last = many
    assert resume(database, str(place)) == (place, False)
    make(database)
    read_on(database, last, count=1)
    back, gap = resume(database, str(place))
    assert (gap, read_on(database, back)[0]) == (True, [])


def test_an_id_that_is_none_of_this_store_is_a_gap(database: Database) -> None:
    make(database)
    for text in ("x", "", "-1", "1.2", "1.x.3", "9" * 18, "9" * 30, f"1.{new_id()}", "²", f"1.{new_id()}.x"):
        assert resume(database, text)[1], text


def test_a_place_survives_its_text() -> None:
    for place in (Place(7), Place(7, new_id(), 3)):
        assert Place.parse(str(place)) == place
