"""Keys: what they look like, whom they speak for, and when they stop to."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from factories import NOW, TENANT, at_once, change, rows_of
from laneway import models
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.engine.access import callers, credentials
from laneway.engine.access.callers import (
    ADMIN_KEY_FILE,
    DEFAULT_TENANT,
    Caller,
    Role,
    create_key,
    ensure_admin_key,
    ensure_tenant,
    key_id_of,
    make_key,
    webhook_secret,
)
from laneway.engine.access.credentials import CACHE_SECONDS, CACHE_SIZE, Callers
from laneway.errors import Forbidden, LanewayError, NotFound, Unauthenticated
from laneway.webhooks.secrets import KEY_BYTES, SecretBox, tenant_context

BOX = SecretBox({"k": b"\1" * KEY_BYTES})


@pytest.fixture
def door(database: Database, clock: FrozenClock) -> Callers:
    return Callers(database, clock)


def key(database: Database, role: Role = Role.USER, **fields: object) -> str:
    return create_key(database, tenant_id=TENANT, role=role, **fields)  # type: ignore[arg-type]


def refuses(call: Callable[[str], object], text: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        call(text)
    return str(caught.value)


def test_a_key_names_itself_and_carries_256_bits() -> None:
    text = make_key()
    assert re.fullmatch(r"lw_live_[a-z0-9]{12}_[0-9A-Za-z]{49}", text)
    assert key_id_of(text) == text[8:20]
    assert len({make_key() for _ in range(100)}) == 100
    assert 62**43 > 2**256


def test_a_changed_character_anywhere_is_seen_without_a_look_up() -> None:
    text = make_key()
    for place in range(len(text)):
        changed = text[:place] + ("a" if text[place] != "a" else "b") + text[place + 1 :]
        refuses(key_id_of, changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: "",
        lambda t: t[:-1],
        lambda t: t + "a",
        lambda t: t + "\n",
        lambda t: t[:-1] + "é",
        lambda t: "\0" + t[1:],
        lambda t: t.upper(),
        lambda t: " " + t,
    ],
)
def test_junk_is_refused_without_a_look_up(change: Callable[[str], str]) -> None:
    assert refuses(key_id_of, change(make_key())) == "the API key is malformed"


def test_a_key_with_a_right_checksum_and_a_strange_id_never_reaches_the_database() -> None:
    body = make_key()[:-6]
    for odd in ("\0", "_", "A", "'"):
        strange = body[:10] + odd + body[11:]
        refuses(key_id_of, strange + callers._check(strange))


@pytest.mark.parametrize("role", Role)
def test_a_key_speaks_for_its_subject_with_its_role(database: Database, door: Callers, role: Role) -> None:
    text = key(database, role, subject="alice")
    assert door.authenticate(text) == Caller(TENANT, "alice", role, key_id_of(text))
    nameless = key(database, role)
    assert door.authenticate(nameless).subject == f"key:{key_id_of(nameless)}"


def test_the_store_never_holds_a_secret(database: Database) -> None:
    text = key(database)
    [row] = rows_of(database, models.api_keys)
    assert text[21:-6] not in str(dict(row))
    assert len(row["digest"]) == 32


def test_an_unknown_key_and_a_wrong_secret_get_the_same_answer(database: Database, door: Callers) -> None:
    text = key(database)
    body = text[:21] + make_key()[21:-6]
    wrong = body + callers._check(body)
    unknown = refuses(door.authenticate, make_key())
    assert refuses(door.authenticate, wrong) == unknown
    door.authenticate(text)
    assert door.remembered(wrong) is None, "a wrong secret takes the long way, also when the key is known"
    assert refuses(door.authenticate, wrong) == unknown


def test_a_key_ends_at_the_moment_it_expires_also_for_those_who_remember_it(
    database: Database, door: Callers, clock: FrozenClock
) -> None:
    text = key(database, expires_at=NOW + timedelta(seconds=5))
    clock.advance(seconds=4.999999)
    door.authenticate(text)
    assert door.remembered(text) is not None
    clock.advance(microseconds=1)
    assert door.remembered(text) is None
    assert "expired" in refuses(door.authenticate, text)


def test_a_revoked_key_is_refused_at_the_next_look_and_forgotten_after_the_cache_time(
    database: Database, door: Callers, clock: FrozenClock
) -> None:
    text = key(database)
    assert door.remembered(text) is None
    door.authenticate(text)
    change(database, models.api_keys, key_id_of(text), revoked_at=NOW)
    clock.advance(seconds=CACHE_SECONDS)
    assert door.remembered(text) is not None
    clock.advance(microseconds=1)
    assert door.remembered(text) is None
    assert "revoked" in refuses(door.authenticate, text)
    assert "revoked" in refuses(Callers(database, clock).authenticate, text)


def test_the_cache_forgets_the_oldest_past_its_size(
    database: Database, door: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CACHE_SIZE == 10_000
    monkeypatch.setattr(credentials, "CACHE_SIZE", 3)
    texts = [key(database) for _ in range(4)]
    for text in texts[:3]:
        door.authenticate(text)
    assert all(door.remembered(text) for text in texts[:3])
    door.authenticate(texts[0])  # now the newest
    door.authenticate(texts[3])
    assert [door.remembered(text) is not None for text in texts] == [True, False, True, True]


def test_many_threads_may_ask_at_once(database: Database, door: Callers) -> None:
    texts = [key(database, subject=f"s{n}") for n in range(8)]

    def ask(text: str) -> set[str]:
        return {(door.remembered(text) or door.authenticate(text)).subject for _ in range(20)}

    assert at_once([lambda t=t: ask(t) for t in texts]) == [{f"s{n}"} for n in range(8)]  # type: ignore[misc]


@pytest.mark.parametrize("role", Role)
def test_a_role_includes_the_weaker_ones(role: Role) -> None:
    caller = Caller(TENANT, "s", role)
    order = [Role.USER, Role.OPERATOR, Role.ADMIN]
    for needed in order:
        if order.index(needed) <= order.index(role):
            caller.need(needed)
        else:
            with pytest.raises(Forbidden) as caught:
                caller.need(needed)
            assert caught.value.facts == {"needed_role": needed.value}


def test_a_tenant_is_made_once_however_many_ask(database: Database) -> None:
    ids = at_once([lambda: ensure_tenant(database, BOX, "acme")] * 8)
    assert len(set(ids)) == 1, ids
    [row] = rows_of(database, models.tenants)
    assert (row["id"], row["name"], row["created_by"]) == (ids[0], "acme", "cli")


def test_a_tenants_webhook_secret_opens_where_the_courier_opens_it(database: Database) -> None:
    tenant_id = ensure_tenant(database, BOX, "acme")
    [row] = rows_of(database, models.tenants)
    secret = BOX.open(row["webhook_secret"], tenant_context(tenant_id))
    assert webhook_secret(database, BOX, tenant_id) == secret
    assert secret.startswith("whsec_")
    with pytest.raises(NotFound):
        webhook_secret(database, BOX, TENANT)


# The first key


def test_the_admin_key_file_is_the_owners_alone_and_opens_the_door(
    database: Database, door: Callers, tmp_path: Path
) -> None:
    path = ensure_admin_key(database, BOX, tmp_path / "new" / "data")
    assert path == tmp_path / "new" / "data" / ADMIN_KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    caller = door.authenticate(path.read_text().strip())
    assert (caller.role, caller.subject) == (Role.ADMIN, "admin")
    assert caller.tenant_id == ensure_tenant(database, BOX, DEFAULT_TENANT)
    assert [p.name for p in path.parent.iterdir()] == [ADMIN_KEY_FILE]


def test_the_admin_key_is_made_once_when_eight_threads_start_together(
    database: Database, door: Callers, tmp_path: Path
) -> None:
    paths = at_once([lambda: ensure_admin_key(database, BOX, tmp_path)] * 8)
    assert paths == [tmp_path / ADMIN_KEY_FILE] * 8
    assert len(rows_of(database, models.api_keys)) == 1
    door.authenticate((tmp_path / ADMIN_KEY_FILE).read_text().strip())
    ensure_admin_key(database, BOX, tmp_path)
    assert len(rows_of(database, models.api_keys)) == 1


def start_first(url: str, data_dir: Path, barrier: multiprocessing.synchronize.Barrier) -> None:
    database = Database(url)
    barrier.wait(30)
    ensure_admin_key(database, BOX, data_dir)
    database.dispose()


def test_the_admin_key_is_made_once_when_eight_processes_start_together(
    database_url: str, clock: FrozenClock, tmp_path: Path
) -> None:
    forks = multiprocessing.get_context("fork")
    barrier = forks.Barrier(8)
    starters = [forks.Process(target=start_first, args=(database_url, tmp_path, barrier)) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(30)
    assert [starter.exitcode for starter in starters] == [0] * 8
    database = Database(database_url)
    assert len(rows_of(database, models.api_keys)) == 1
    Callers(database, clock).authenticate((tmp_path / ADMIN_KEY_FILE).read_text().strip())
    database.dispose()


def test_a_start_that_died_before_the_row_leaves_a_key_that_works_from_the_next_start_on(
    database: Database, door: Callers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    ensure_tenant(database, BOX, DEFAULT_TENANT)
    with monkeypatch.context() as patch:
        patch.setattr(sa, "insert", die)
        with pytest.raises(Died):
            ensure_admin_key(database, BOX, tmp_path)
    text = (tmp_path / ADMIN_KEY_FILE).read_text().strip()
    refuses(door.authenticate, text)
    ensure_admin_key(database, BOX, tmp_path)
    assert door.authenticate(text).role is Role.ADMIN


def test_a_start_that_died_while_writing_leaves_no_file_under_the_keys_name(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            ensure_admin_key(database, BOX, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    assert ensure_admin_key(database, BOX, tmp_path / "data").read_text().startswith("lw_live_")


def test_a_revoked_admin_key_stays_revoked(database: Database, door: Callers, tmp_path: Path) -> None:
    text = ensure_admin_key(database, BOX, tmp_path).read_text().strip()
    change(database, models.api_keys, key_id_of(text), revoked_at=NOW)
    ensure_admin_key(database, BOX, tmp_path)
    refuses(door.authenticate, text)


@pytest.mark.parametrize("content", ["", "junk\n"])
def test_a_file_that_holds_no_key_is_named_in_the_error(
    database: Database, tmp_path: Path, content: str
) -> None:
    (tmp_path / ADMIN_KEY_FILE).write_text(content)
    with pytest.raises(LanewayError, match=r"admin\.key holds no API key"):
        ensure_admin_key(database, BOX, tmp_path)
