"""Managing API keys, on both stores: nobody gets more than they have, and what changes is heard of."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from bench.key_timing import Steps, bad_keys
from factories import NOW, OTHER_TENANT, TENANT, change, rows_of
from laneway import models
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.engine.access import keys as keys_module
from laneway.engine.access.callers import ROLE_SCOPES, AccessScope, Caller, Role, create_key, key_id_of
from laneway.engine.access.credentials import LAST_USED_SECONDS, Callers
from laneway.engine.access.keys import MAX_CIDRS, MAX_KEYS, KeyChange, Keys, NewKey, tenant_of
from laneway.engine.access.watch import OVERLAP_SECONDS, KeyLooks, Watch
from laneway.errors import Conflict, Forbidden, KeyNotFound, Unauthenticated, Unprocessable

ROOT = Caller(TENANT, "root", Role.ADMIN)
OLGA = Caller(TENANT, "olga", Role.OPERATOR)


@pytest.fixture
def door(database: Database, clock: FrozenClock) -> Callers:
    return Callers(database, clock)


def managed(database: Database, caller: Caller = ROOT) -> Keys:
    return Keys(database, caller, now=NOW)


def new(**fields: Any) -> NewKey:
    return NewKey.model_validate({"role": "user"} | fields)


def actions(database: Database) -> list[str]:
    return [row["action"] for row in rows_of(database, models.audit_log)]


def opens(door: Callers, text: str, **where: Any) -> bool:
    try:
        return (door.remembered(text, **where) or door.authenticate(text, **where)) is not None
    except Unauthenticated:
        return False


# Making and showing


def test_a_key_is_made_shown_without_its_secret_and_opens_the_door(database: Database, door: Callers) -> None:
    made, text = managed(database, OLGA).create(
        new(
            name="ci",
            subject="alice",
            scopes=["jobs:read"],
            allowed_cidrs=["192.0.2.0/24"],
            expires_at=NOW + timedelta(days=1),
        )
    )
    assert made["id"] == key_id_of(text)
    assert text[21:-6] not in str(made)
    assert "digest" not in made
    assert (made["name"], made["role"], made["scopes"]) == ("ci", "user", ["jobs:read"])
    assert (made["allowed_cidrs"], made["created_by"]) == (["192.0.2.0/24"], "olga")
    caller = door.authenticate(text, address="192.0.2.9")
    assert (caller.subject, caller.scopes) == ("alice", {AccessScope.JOBS_READ})
    assert caller.expires_at == NOW + timedelta(days=1)
    assert managed(database).all() == [made] == [managed(database).get(made["id"])]
    assert tenant_of(database, made["id"]) == TENANT
    [entry] = rows_of(database, models.audit_log)
    assert (entry["action"], entry["actor"], entry["target"]) == ("key.created", "olga", f"key:{made['id']}")
    assert text[21:-6] not in str(dict(entry))


def test_a_key_without_bounds_may_all_that_its_role_may(database: Database, door: Callers) -> None:
    _, text = managed(database).create(new(role="operator"))
    assert door.authenticate(text, address=None).scopes == ROLE_SCOPES[Role.OPERATOR]


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "king"},
        {"role": "user", "scopes": []},
        {"role": "user", "scopes": ["jobs:all"]},
        {"role": "user", "scopes": ["keys:manage"]},
        {"role": "operator", "scopes": ["admin"]},
        {"role": "operator", "scopes": ["queues:manage"]},
        {"role": "user", "allowed_cidrs": []},
        {"role": "user", "allowed_cidrs": ["192.0.2.1/24"]},
        {"role": "user", "allowed_cidrs": ["everywhere"]},
        {"role": "user", "allowed_cidrs": ["10.0.0.0/8"] * (MAX_CIDRS + 1)},
        {"role": "user", "expires_at": "2026-01-01T00:00:00"},
        {"role": "user", "name": ""},
        {"role": "user", "name": "x" * 101},
        {"role": "user", "name": "a\0b"},
        {"role": "user", "subject": "a\nb"},
        {"role": "user", "tenant_id": OTHER_TENANT},
        {"role": "user", "digest": "x"},
    ],
)
def test_a_key_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NewKey.model_validate(fields)


def test_the_limits_of_a_key_may_be_reached() -> None:
    wanted = new(name="x" * 100, allowed_cidrs=["10.0.0.0/8"] * MAX_CIDRS, scopes=["jobs:read"])
    assert len(wanted.allowed_cidrs or ()) == MAX_CIDRS


def test_a_key_may_not_be_over_before_it_begins(database: Database) -> None:
    for change_it in (
        lambda: managed(database).create(new(expires_at=NOW)),
        lambda: managed(database).change("x", KeyChange(expires_at=NOW)),
    ):
        with pytest.raises(Unprocessable):
            change_it()


def test_a_tenant_has_so_many_keys_and_not_one_more(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_KEYS == 500
    monkeypatch.setattr(keys_module, "MAX_KEYS", 3)
    made = [managed(database).create(new())[0]["id"] for _ in range(3)]
    for refused in (lambda: managed(database).create(new()), lambda: rotate(database, made[0])):
        with pytest.raises(Conflict, match="3 keys"):
            refused()
    managed(database, Caller(OTHER_TENANT, "else", Role.ADMIN)).create(new())
    managed(database).revoke(made[0])
    managed(database).create(new())
    assert len(managed(database).all()) == 3


def rotate(database: Database, key_id: str, **how: int) -> tuple[dict[str, Any], str]:
    return managed(database).rotate(key_id, **({"overlap_seconds": 60} | how))


# Nobody gets more than they have


def caller_with(database: Database, role: Role, **bounds: Any) -> Caller:
    """A caller with a key of its own."""
    made, _ = managed(database).create(new(role=role.value, **bounds))
    return Caller(
        TENANT,
        made["subject"],
        role,
        made["id"],
        allowed=frozenset(map(AccessScope, bounds["scopes"])) if "scopes" in bounds else None,
    )


FEW = ["jobs:read", "keys:manage"]


@pytest.mark.parametrize(
    ("bounds", "wanted", "passes"),
    [
        ({}, {"role": "operator"}, True),
        ({}, {"role": "admin"}, False),
        ({"scopes": FEW}, {"role": "user"}, False),
        ({"scopes": FEW}, {"role": "user", "scopes": ["jobs:read"]}, True),
        ({"scopes": FEW}, {"role": "user", "scopes": ["jobs:write"]}, False),
        ({"allowed_cidrs": ["10.0.0.0/8"]}, {"role": "user"}, False),
        ({"allowed_cidrs": ["10.0.0.0/8"]}, {"role": "user", "allowed_cidrs": ["10.1.0.0/16"]}, True),
        ({"allowed_cidrs": ["10.0.0.0/8"]}, {"role": "user", "allowed_cidrs": ["10.0.0.0/7"]}, False),
        ({"allowed_cidrs": ["10.0.0.0/8"]}, {"role": "user", "allowed_cidrs": ["::/0"]}, False),
        (
            {"allowed_cidrs": ["10.0.0.0/8", "::1/128"]},
            {"role": "user", "allowed_cidrs": ["10.0.0.1/32", "::1/128"]},
            True,
        ),
        ({"expires_at": NOW + timedelta(days=2)}, {"role": "user"}, False),
        (
            {"expires_at": NOW + timedelta(days=2)},
            {"role": "user", "expires_at": NOW + timedelta(days=2)},
            True,
        ),
        (
            {"expires_at": NOW + timedelta(days=2)},
            {"role": "user", "expires_at": NOW + timedelta(days=3)},
            False,
        ),
    ],
)
def test_nobody_makes_or_gets_hold_of_a_stronger_key(
    database: Database, bounds: dict[str, Any], wanted: dict[str, Any], passes: bool
) -> None:
    operator = caller_with(database, Role.OPERATOR, **bounds)
    there = managed(database).create(NewKey.model_validate(wanted))[0]["id"]
    others = managed(database, operator)
    acts: list[Callable[[], object]] = [
        lambda: others.create(NewKey.model_validate(wanted)),
        lambda: others.change(there, KeyChange(name="mine")),
        lambda: others.rotate(there, overlap_seconds=0),
        lambda: others.revoke(there),
    ]
    for act in acts:
        if passes:
            act()
        else:
            with pytest.raises(Forbidden):
                act()


def test_nobody_widens_their_own_key(database: Database) -> None:
    bounds = {
        "scopes": FEW,
        "allowed_cidrs": ["10.0.0.0/8"],
        "expires_at": NOW + timedelta(days=1),
    }
    operator = caller_with(database, Role.OPERATOR, **bounds)
    mine = managed(database, operator)
    for wider in (
        {"scopes": None},
        {"scopes": [*FEW, "jobs:write"]},
        {"allowed_cidrs": None},
        {"allowed_cidrs": ["0.0.0.0/0"]},
        {"expires_at": None},
        {"expires_at": NOW + timedelta(days=2)},
    ):
        with pytest.raises(Forbidden):
            mine.change(operator.key_id, KeyChange.model_validate(wider))
    assert mine.change(operator.key_id, KeyChange(scopes=[AccessScope.KEYS_MANAGE]))["scopes"] == [
        "keys:manage"
    ]


def test_another_tenants_key_is_one_that_does_not_exist(database: Database) -> None:
    theirs = key_id_of(create_key(database, tenant_id=OTHER_TENANT, role=Role.USER))
    here = managed(database)
    answers = set()
    for key_id in (theirs, "nobodyskey12"):
        for act in (
            here.get,
            lambda k: here.change(k, KeyChange(name="x")),
            lambda k: here.rotate(k, overlap_seconds=0),
            here.revoke,
        ):
            with pytest.raises(KeyNotFound) as caught:
                act(key_id)
            answers.add(str(caught.value).replace(key_id, "ID"))
    assert len(answers) == 1
    assert here.all() == []


# Changing, rotating, revoking


def test_a_change_touches_only_what_is_given_and_null_takes_a_bound_away(
    database: Database, door: Callers
) -> None:
    made, text = managed(database).create(new(name="a", scopes=["jobs:read"], allowed_cidrs=["10.0.0.0/8"]))
    changed = managed(database).change(made["id"], KeyChange(name="b"))
    assert changed | {"name": "a", "updated_at": 0} == made | {"updated_at": 0}
    changed = managed(database).change(
        made["id"], KeyChange.model_validate({"scopes": None, "allowed_cidrs": None})
    )
    assert (changed["scopes"], changed["allowed_cidrs"]) == (None, None)
    assert door.authenticate(text, address="192.0.2.1").scopes == ROLE_SCOPES[Role.USER]
    with pytest.raises(Unprocessable):
        managed(database).change(made["id"], KeyChange(scopes=[AccessScope.ADMIN]))
    assert actions(database) == ["key.created", "key.changed", "key.changed"]


def test_a_rotated_key_and_its_successor_both_open_until_the_overlap_is_over(
    database: Database, door: Callers, clock: FrozenClock
) -> None:
    old, old_text = managed(database).create(new(subject="alice", scopes=["jobs:read"]))
    made, text = rotate(database, old["id"], overlap_seconds=60)
    assert made["replaces"] == old["id"]
    same = ("subject", "role", "scopes", "allowed_cidrs", "expires_at", "name")
    assert {name: made[name] for name in same} == {name: old[name] for name in same}
    clock.advance(seconds=59.999)
    assert opens(door, old_text)
    assert opens(door, text)
    clock.advance(seconds=0.001)
    assert not opens(door, old_text)
    assert opens(door, text)
    assert actions(database) == ["key.created", "key.rotated"]


def test_a_rotation_does_not_prolong_what_ends_sooner(database: Database) -> None:
    soon = NOW + timedelta(seconds=30)
    old, _ = managed(database).create(new(expires_at=soon))
    made, _ = rotate(database, old["id"], overlap_seconds=3600)
    ends = managed(database).get(old["id"])["expires_at"]
    assert ends == made["expires_at"] == "2026-01-01T12:00:30.000000Z"


def test_without_an_overlap_the_old_key_ends_at_once(database: Database, door: Callers) -> None:
    old, old_text = managed(database).create(new())
    rotate(database, old["id"], overlap_seconds=0)
    assert not opens(door, old_text)
    with pytest.raises(Conflict, match="expired"):
        rotate(database, old["id"])


def test_a_revoked_key_is_no_more_changed_and_still_shown(database: Database, door: Callers) -> None:
    made, text = managed(database).create(new())
    for _ in range(2):
        managed(database, OLGA).revoke(made["id"])
    assert not opens(door, text)
    assert managed(database).all() == []
    assert managed(database).get(made["id"])["revoked_at"] == "2026-01-01T12:00:00.000000Z"
    for act in (
        lambda: managed(database).change(made["id"], KeyChange(name="x")),
        lambda: rotate(database, made["id"]),
    ):
        with pytest.raises(Conflict, match="revoked"):
            act()
    assert actions(database) == ["key.created", "key.revoked"], "once, however often it is asked for"


# From where


def test_a_key_for_a_network_opens_from_there_only(database: Database, door: Callers) -> None:
    _, text = managed(database).create(new(allowed_cidrs=["192.0.2.0/24", "2001:db8::/32"]))
    for address, passes in {
        "192.0.2.255": True,
        "192.0.3.0": False,
        "2001:db8::1": True,
        "::1": False,
        None: False,
        "nonsense": False,
    }.items():
        assert opens(door, text, address=address) is passes, address


# What other processes hear, and what they write


def test_a_change_by_another_process_is_seen_at_the_next_look(
    database: Database, door: Callers, clock: FrozenClock
) -> None:
    """Time stands still for the cache here: it is the look that finds out, not the end of its 30 s."""
    watch = KeyLooks(database, door)
    watch.look()
    made, text = managed(database).create(new())
    assert opens(door, text)
    managed(database).change(made["id"], KeyChange(scopes=[AccessScope.JOBS_READ]))
    watch.look()
    assert door.remembered(text) is None
    assert door.authenticate(text).scopes == {AccessScope.JOBS_READ}
    managed(database).revoke(made["id"])
    assert opens(door, text), "this process has not heard of it yet"
    watch.look()
    assert not opens(door, text)


def test_a_look_sees_what_was_committed_late(database: Database, door: Callers) -> None:
    watch = KeyLooks(database, door)
    made, text = managed(database).create(new())
    watch.look()
    assert opens(door, text)
    late = sa.text(
        "UPDATE api_keys SET revoked_at = created_at, version = version + 1, updated_at = :then"
        " WHERE id = :id"
    ).bindparams(sa.bindparam("then", type_=models.api_keys.c.updated_at.type))
    [row] = rows_of(database, models.api_keys)
    with database.write() as connection:  # begun before the look before this one, committed after it
        begun = row["updated_at"] - timedelta(seconds=OVERLAP_SECONDS / 2)
        connection.execute(late, {"then": begun, "id": made["id"]})
    watch.look()
    assert not opens(door, text)


def test_a_key_that_was_read_before_it_was_revoked_is_not_remembered_after(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Callers(database, clock)
    text = create_key(database, tenant_id=TENANT, role=Role.USER)
    keep = door._keys.keep

    def revoked_in_between(name: str, value: Any, mark: int) -> None:
        managed(database).revoke(name)
        door.forget([name])
        keep(name, value, mark)

    monkeypatch.setattr(door._keys, "keep", revoked_in_between)
    door.authenticate(text)
    assert door.remembered(text) is None


def test_the_last_use_is_written_once_a_minute_a_key_and_is_no_change_of_it(
    database: Database, clock: FrozenClock
) -> None:
    doors = [Callers(database, clock) for _ in range(2)]  # of two processes
    watches = [KeyLooks(database, door) for door in doors]
    text = create_key(database, tenant_id=TENANT, role=Role.USER)

    def use_and_write(address: str) -> tuple[object, object]:
        for door, watch in zip(doors, watches, strict=True):
            for _ in range(3):
                opens(door, text, address=address)
            watch.write_used()
        [row] = rows_of(database, models.api_keys)
        return row["last_used_at"], row["last_used_ip"]

    [before] = rows_of(database, models.api_keys)
    assert (before["last_used_at"], before["last_used_ip"]) == (None, None)
    assert use_and_write("192.0.2.1") == (clock.now(), "192.0.2.1")
    first = clock.now()
    clock.advance(seconds=LAST_USED_SECONDS - 0.001)
    assert use_and_write("192.0.2.2") == (first, "192.0.2.1")
    clock.advance(seconds=0.001)
    assert use_and_write("192.0.2.3") == (clock.now(), "192.0.2.3")
    [after] = rows_of(database, models.api_keys)
    assert (after["updated_at"], after["version"]) == (before["updated_at"], before["version"])


def test_a_store_that_is_away_does_not_end_the_watch(
    database: Database, door: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(*KeyLooks(database, door).looks)
    watch.look()
    text = create_key(database, tenant_id=TENANT, role=Role.USER)
    opens(door, text)
    with monkeypatch.context() as patch:
        patch.setattr(database, "read", lambda: (_ for _ in ()).throw(sa.exc.TimeoutError()))
        watch.look()
    managed(database).revoke(key_id_of(text))
    watch.look()
    assert not opens(door, text)


def test_a_scope_that_this_release_does_not_know_opens_nothing(database: Database, door: Callers) -> None:
    text = create_key(database, tenant_id=TENANT, role=Role.USER)
    change(database, models.api_keys, key_id_of(text), scopes=["jobs:read", "moons:write"])
    assert door.authenticate(text).scopes == {AccessScope.JOBS_READ}


def test_known_and_unknown_keys_take_the_same_way(
    database: Database, door: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same statements, same comparisons, for a key that is unknown, wrong, revoked, expired or elsewhere.

    `python -m bench.key_timing` measures it.
    """
    here = "192.0.2.1"
    steps = Steps(database, monkeypatch)
    ways = {}
    for name, bad in bad_keys(database).items():
        for remembered in (False, True):
            if remembered and bad.good is not None:
                assert opens(door, bad.good, address=here), name
            steps.clear()
            assert not opens(door, bad.text, address=here), name
            ways[name, remembered] = tuple(steps)
    assert len(set(ways.values())) == 1, ways
    assert ("compare", 32) in next(iter(ways.values()))
