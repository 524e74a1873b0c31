"""Finding jobs in lists: by tag, by what their titles and tags say, by the start of their ids; cursors."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, OTHER_TENANT, TENANT, add_job, rows_of
from laneway import models
from laneway.clock import FrozenClock, first_id, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import JobStatus
from laneway.engine import queries
from laneway.engine.access.callers import Caller, Role
from laneway.engine.queries import MAX_SEARCHED, JobFilter, Scope, decode_cursor, encode_cursor, sign_cursors
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import JobService
from laneway.errors import InvalidCursor
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox

ALICE = Caller(TENANT, "alice", Role.USER)
OLGA = Caller(TENANT, "olga", Role.OPERATOR)
STRANGER = Caller(OTHER_TENANT, "alice", Role.ADMIN)


@pytest.fixture
def service(database: Database, clock: FrozenClock) -> JobService:
    registry = Registry()
    registry.add(JobType("demo.greet", lambda: None))
    return JobService(database, MemoryLanes(), Settings(), registry, clock=clock)


def make(service: JobService, *specs: dict[str, Any], caller: Caller = ALICE) -> list[str]:
    """The ids of new jobs, made in one transaction."""
    wanted = [service.prepare(JobSpec(**({"job_type": "demo.greet"} | fields)), caller) for fields in specs]
    return [answer["id"] for answer in service.enqueue(wanted)]  # type: ignore[index]


def ids_of(
    service: JobService, caller: Caller = OLGA, *, q: str | None = None, limit: int = 50, **wanted: Any
) -> list[str]:
    """The whole list, page by page."""
    found: list[str] = []
    cursor = None
    while True:
        page, cursor = service.page(caller, JobFilter(**wanted), limit=limit, cursor=cursor, mine=False, q=q)
        assert len(page) <= limit
        found += [job["id"] for job in page]
        if cursor is None:
            return found


# Tags


def test_a_tag_finds_the_jobs_that_have_exactly_it(service: JobService) -> None:
    one, two, _ = make(service, {"tags": ["a", "b"]}, {"tags": ["b", "b", "é"]}, {})
    make(service, {"tags": ["b"]}, caller=STRANGER)
    assert ids_of(service, tag="a") == [one]
    assert ids_of(service, tag="b") == [two, one]
    assert ids_of(service, tag="b", limit=1) == [two, one]
    assert ids_of(service, tag="é") == [two]
    for other in ("B", "", "a%", "c"):
        assert ids_of(service, tag=other) == [], other


def test_a_tag_goes_with_other_filters_and_with_whose_jobs_they_are(service: JobService) -> None:
    [mine] = make(service, {"tags": ["a"], "priority": "high"})
    [bobs] = make(service, {"tags": ["a"]}, caller=Caller(TENANT, "bob", Role.USER))
    assert ids_of(service, ALICE, tag="a") == [mine]
    assert ids_of(service, tag="a") == [bobs, mine]
    assert ids_of(service, tag="a", priority="high") == [mine]
    service.cancel(mine, ALICE)
    assert ids_of(service, tag="a", statuses=(JobStatus.CANCELLED,)) == [mine]


def test_the_tags_of_a_refused_job_find_nothing_and_those_of_a_deleted_one_are_gone(
    service: JobService,
) -> None:
    [first] = make(service, {"unique_key": "k", "tags": ["a"]})
    assert make(service, {"unique_key": "k", "tags": ["b"]}) == [first]
    assert ids_of(service, tag="b") == []
    service.cancel(first, ALICE)
    service.delete(first, OLGA)
    with service.database.read() as connection:
        assert connection.execute(sa.select(models.job_tags)).all() == []


def test_jobs_without_tags_cost_no_statement(service: JobService) -> None:
    said: list[str] = []

    def hear(_c: Any, _u: Any, statement: str, *_: Any) -> None:
        said.append(statement)

    sa.event.listen(service.database.engine, "before_cursor_execute", hear)
    make(service, {}, {})
    assert not [each for each in said if "job_tags" in each]
    make(service, {}, {"tags": ["a"]})
    assert len([each for each in said if "job_tags" in each]) == 1


def test_a_page_by_tag_walks_the_index_on_tags(service: JobService) -> None:
    make(service, *({"tags": ["rare" if n == 7 else "often"]} for n in range(50)))
    scope, said = Scope(TENANT), []

    def hear(_c: Any, _u: Any, statement: str, parameters: Any, *_: Any) -> None:
        said.append((statement, parameters))

    with service.database.read() as connection:
        if service.database.dialect == "postgresql":  # a table so small is read whole unless this forbids it
            connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
        sa.event.listen(service.database.engine, "before_cursor_execute", hear)
        queries.page_of_jobs(connection, scope, JobFilter(tag="rare"), limit=5, before=None)
        sa.event.remove(service.database.engine, "before_cursor_execute", hear)
        explain = "EXPLAIN QUERY PLAN " if service.database.dialect == "sqlite" else "EXPLAIN "
        plan = connection.exec_driver_sql(explain + said[-1][0], said[-1][1]).all()
    assert "ix_job_tags_tenant_id_tag_job_id" in str(plan), plan


# Search


def test_q_finds_titles_tags_and_ids_whatever_their_case(service: JobService) -> None:
    report, strasse, tagged, _ = make(
        service,
        {"title": "Quarterly Report ÄÖ"},
        {"title": "straße 100%_x"},
        {"tags": ["Customer:Ärger", "x"]},
        {"title": None, "description": "report"},
    )
    for q, wanted in [
        ("report", [report]),
        (" QUARTERLY rEPORT äö ", [report]),
        ("STRASSE", [strasse]),
        ("100%_", [strasse]),
        ("0%x", []),
        ("customer:ä", [tagged]),
        ("r", [tagged, strasse, report]),
        (report, [report]),
        (report.upper(), [report]),
        (report[:30], [report]),
        ("nothing", []),
    ]:
        assert ids_of(service, q=q) == wanted, q
    assert report in ids_of(service, q=report[:8])
    assert ids_of(service, STRANGER, q="report") == []
    assert ids_of(service, Caller(TENANT, "bob", Role.USER), q=report) == []
    assert ids_of(service, q="report", priority="low") == []


def test_pages_of_a_search_show_every_job_once(service: JobService) -> None:
    made = make(service, *({"title": f"report {n}"} for n in range(7)), {"title": "other"})
    assert ids_of(service, q="report", limit=3) == made[6::-1]
    assert ids_of(service, q="report", limit=7) == made[6::-1]


def fill(database: Database, count: int, **columns: Any) -> list[str]:
    """The ids of so many jobs, made in the same moment, in one statement."""
    template = add_job(database)
    row = next(dict(row) for row in rows_of(database, models.jobs) if row["id"] == template)
    ids = sorted(new_id() for _ in range(count))
    with database.write() as connection:
        connection.execute(sa.insert(models.jobs), [row | columns | {"id": each} for each in ids])
    return [template, *ids]


def test_a_search_looks_at_so_many_rows_a_page_and_goes_on_from_there(service: JobService) -> None:
    oldest, *others = fill(service.database, MAX_SEARCHED)
    with service.database.write() as connection:
        here = models.jobs.c.id.in_([oldest, others[0]])
        connection.execute(sa.update(models.jobs).where(here).values(title="needle"))
    page, cursor = service.page(OLGA, JobFilter(), limit=5, cursor=None, mine=False, q="needle")
    assert ([job["id"] for job in page], cursor is None) == ([others[0]], False), "it is the 5,000th"
    page, cursor = service.page(OLGA, JobFilter(), limit=5, cursor=cursor, mine=False, q="needle")
    assert ([job["id"] for job in page], cursor) == ([oldest], None), "the one past it"


def test_an_id_is_found_however_old_it_is(service: JobService) -> None:
    old = add_job(service.database, id=first_id(NOW - timedelta(days=400)))
    fill(service.database, MAX_SEARCHED)
    for q in (old, old[:13], old[:20]):
        page, _ = service.page(OLGA, JobFilter(), limit=5, cursor=None, mine=False, q=q)
        assert [job["id"] for job in page] == [old], q
    page, cursor = service.page(OLGA, JobFilter(), limit=5, cursor=None, mine=False, q=old[:12])
    assert (page, cursor is None) == ([], False), "what is shorter may be a word"


# Cursors

SCOPE = Scope(TENANT)
PLACE = "01980000-0000-7000-8000-000000000001"


@pytest.fixture
def two_keys() -> Iterator[tuple[bytes, bytes]]:
    old, new = b"o" * 32, b"n" * 32
    yield old, new
    sign_cursors([])


def test_a_cursor_is_short_and_stands_for_its_place(two_keys: tuple[bytes, bytes]) -> None:
    sign_cursors(two_keys)
    cursor = encode_cursor(PLACE, SCOPE, JobFilter(tag="é" * 100))
    assert len(cursor) == 36
    assert decode_cursor(cursor, SCOPE, JobFilter(tag="é" * 100)) == PLACE


def test_all_keys_verify_and_the_first_one_signs(two_keys: tuple[bytes, bytes]) -> None:
    old, new = two_keys
    sign_cursors([old])
    given = encode_cursor(PLACE, SCOPE, ())
    sign_cursors([new, old])
    assert decode_cursor(given, SCOPE, ()) == PLACE
    newer = encode_cursor(PLACE, SCOPE, ())
    assert newer != given
    sign_cursors([new])
    assert decode_cursor(newer, SCOPE, ()) == PLACE
    with pytest.raises(InvalidCursor):
        decode_cursor(given, SCOPE, ())


def test_keys_of_cursors_come_from_the_encryption_keys_and_are_no_others() -> None:
    keys = {"a": b"1" * 32, "b": b"2" * 32}
    derived = SecretBox(keys).derived("cursors")
    assert list(derived) == ["a", "b"]
    assert not set(derived.values()) & {*keys.values(), *SecretBox(keys).derived("tokens").values()}


FOREIGN = [
    (Scope(OTHER_TENANT), ()),
    (Scope(TENANT, "alice"), ()),
    (SCOPE, JobFilter()),
    (SCOPE, (JobFilter(), "q")),
    (SCOPE, ("timeline", "x")),
]


@pytest.mark.parametrize(("scope", "wanted"), FOREIGN)
def test_a_cursor_of_another_list_is_refused(scope: Scope, wanted: object) -> None:
    with pytest.raises(InvalidCursor):
        decode_cursor(encode_cursor(PLACE, scope, wanted), SCOPE, ())


def test_no_forged_cursor_is_taken() -> None:
    cursor = encode_cursor(PLACE, SCOPE, ())
    raw = base64.urlsafe_b64decode(cursor)
    forged = [
        b"",
        raw[:16],  # no signature
        raw[:-1],
        raw + b"\0",
        raw[:16] + bytes(11),
        raw[:16] * 2,
        *(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :] for at in range(27) for bit in range(8)),
    ]
    texts = [base64.urlsafe_b64encode(each).decode() for each in forged]
    for text in (*texts, "=", "é", cursor[:-1], f"{cursor} ", cursor.lower(), "null", PLACE):
        with pytest.raises(InvalidCursor):
            decode_cursor(text, SCOPE, ())
    digest = hashlib.sha256(raw[:16] + repr((SCOPE, ())).encode()).digest()[:11]  # which anybody can make
    with pytest.raises(InvalidCursor):
        decode_cursor(base64.urlsafe_b64encode(raw[:16] + digest).decode(), SCOPE, ())
