"""Managing API keys: made, shown, changed, rotated, revoked; each act is in the audit log.

Nobody makes or gets hold of a key that is stronger than they are: not in its role or scopes and, when they
come with a key themselves, not in where it may be used from, nor for longer than theirs.

A key is rotated by making another one in its place, for the same subject; the old one opens until the
overlap is over. So `last_used_at` of the old one tells whether anybody still uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import Annotated, Any, Self

import sqlalchemy as sa
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from laneway import models
from laneway.db import Database, utc_now
from laneway.engine.access.audit import AuditAction, record
from laneway.engine.access.callers import ROLE_SCOPES, AccessScope, Caller, Role, at_least, key_row, make_key
from laneway.engine.queries import stamp
from laneway.errors import Conflict, FieldError, Forbidden, KeyNotFound, Unprocessable

MAX_KEYS = 500  # of a tenant, that are not revoked
MAX_CIDRS = 50
MAX_OVERLAP_SECONDS = 30 * 24 * 3600
OVERLAP_SECONDS = 24 * 3600

k = models.api_keys.c

_SHOWN = (
    *("id", "tenant_id", "name", "subject", "role", "scopes", "allowed_cidrs", "expires_at", "revoked_at"),
    *("replaces", "last_used_at", "last_used_ip", "created_by", "created_at", "updated_at"),
)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters")
    return text


def _network(text: str) -> str:
    return str(ip_network(text))


Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)]
Scopes = Annotated[list[AccessScope], Field(min_length=1, max_length=len(AccessScope))]
Cidrs = Annotated[
    list[Annotated[str, Field(max_length=50), AfterValidator(_network)]],
    Field(min_length=1, max_length=MAX_CIDRS),
]


class NewKey(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    name: Name | None = Field(None, description="For people.")
    subject: Name | None = Field(
        None, description="Whom it speaks for: owns the jobs, holds the limits. Default: the key itself."
    )
    scopes: Scopes | None = Field(None, description="What it may do of what its role may; null: all of it.")
    allowed_cidrs: Cidrs | None = Field(
        None, description="Networks it may be used from: `192.0.2.0/24`; null: everywhere."
    )
    expires_at: AwareDatetime | None = Field(None, description="null: never.")

    @model_validator(mode="after")
    def _within_the_role(self) -> Self:
        beyond = set(self.scopes or ()) - ROLE_SCOPES[self.role]
        if beyond:
            raise ValueError(f"the role {self.role} has not the scopes {', '.join(sorted(beyond))}")
        return self


class KeyChange(BaseModel):
    """What of a key is to be changed; what is not given stays."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    scopes: Scopes | None = None
    allowed_cidrs: Cidrs | None = None
    expires_at: AwareDatetime | None = None


class Keys:
    """The keys of one tenant, as one caller may manage them."""

    def __init__(self, database: Database, caller: Caller, *, now: datetime) -> None:
        self._database = database
        self._caller = caller
        self._now = now

    def all(self) -> list[dict[str, Any]]:
        """Those that are not revoked, oldest first: at most MAX_KEYS."""
        with self._database.read() as connection:
            query = sa.select(models.api_keys).where(self._mine, k.revoked_at.is_(None))
            rows = connection.execute(query.order_by(k.created_at, k.id).limit(MAX_KEYS)).mappings()
            return [_view(row) for row in rows]

    def get(self, key_id: str) -> dict[str, Any]:
        """One, also a revoked one. Raises KeyNotFound."""
        with self._database.read() as connection:
            return _view(self._find(connection, key_id))

    def create(self, wanted: NewKey) -> tuple[dict[str, Any], str]:
        """A new key, and its text, which is shown this once. Raises Forbidden, Conflict, Unprocessable."""
        text = make_key()
        row = key_row(
            text,
            tenant_id=self._caller.tenant_id,
            role=wanted.role,
            subject=wanted.subject,
            created_by=self._caller.subject,
        )
        row |= wanted.model_dump(include={"name", "scopes", "allowed_cidrs", "expires_at"})
        self._check_expiry(wanted.expires_at)
        with self._database.write() as connection:
            self._check_strength(connection, row)
            self._check_room(connection)
            made = self._insert(connection, row)
            self._record(connection, AuditAction.KEY_CREATED, made)
        return made, text

    def change(self, key_id: str, wanted: KeyChange) -> dict[str, Any]:
        """Change what is given. Raises KeyNotFound, Forbidden, Conflict for a revoked key, Unprocessable."""
        values = wanted.model_dump(exclude_unset=True)
        self._check_expiry(values.get("expires_at"))
        with self._database.write() as connection:
            before = self._find_living(connection, key_id)
            after = dict(before) | values
            self._check_strength(connection, before)
            self._check_strength(connection, after)
            if beyond := set(after["scopes"] or ()) - ROLE_SCOPES[Role(before["role"])]:
                detail = f"the role {before['role']} has not the scopes {', '.join(sorted(beyond))}"
                raise Unprocessable(detail, errors=(FieldError("/scopes", detail, "scope_not_possible"),))
            changed = self._update(connection, key_id, values)
            self._record(connection, AuditAction.KEY_CHANGED, changed, fields=sorted(values))
        return changed

    def rotate(self, key_id: str, *, overlap_seconds: int) -> tuple[dict[str, Any], str]:
        """A new key in the place of this one, and its text; this one opens for the overlap only.

        Raises KeyNotFound, Forbidden, Conflict for a key that is revoked or has expired.
        """
        text = make_key()
        with self._database.write() as connection:
            old = self._find_living(connection, key_id)
            if old["expires_at"] is not None and old["expires_at"] <= self._now:
                raise Conflict("the key has expired; make a new one")
            self._check_strength(connection, old)
            self._check_room(connection)
            row = key_row(
                text,
                tenant_id=old["tenant_id"],
                role=Role(old["role"]),
                subject=old["subject"],
                created_by=self._caller.subject,
            )
            kept = {name: old[name] for name in ("name", "scopes", "allowed_cidrs", "expires_at")}
            made = self._insert(connection, row | kept | {"replaces": key_id})
            end = self._now + timedelta(seconds=overlap_seconds)
            ends = end if old["expires_at"] is None else min(end, old["expires_at"])
            self._update(connection, key_id, {"expires_at": ends})
            self._record(
                connection, AuditAction.KEY_ROTATED, made, replaces=key_id, overlap_until=stamp(ends)
            )
        return made, text

    def revoke(self, key_id: str) -> None:
        """Let the key in no more. Twice is no error. Raises KeyNotFound, Forbidden."""
        with self._database.write() as connection:
            row = self._find(connection, key_id, lock=True)
            self._check_strength(connection, row)
            if row["revoked_at"] is None:
                revoked = self._update(connection, key_id, {"revoked_at": self._now})
                self._record(connection, AuditAction.KEY_REVOKED, revoked)

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        return k.tenant_id == self._caller.tenant_id

    def _find(self, connection: sa.Connection, key_id: str, *, lock: bool = False) -> sa.RowMapping:
        query = sa.select(models.api_keys).where(k.id == key_id, self._mine)
        row = connection.execute(query.with_for_update() if lock else query).mappings().first()
        if row is None:
            raise KeyNotFound(f"there is no API key {key_id}", key_id=key_id)
        return row

    def _find_living(self, connection: sa.Connection, key_id: str) -> sa.RowMapping:
        row = self._find(connection, key_id, lock=True)
        if row["revoked_at"] is not None:
            raise Conflict("the key was revoked", current_status="revoked")
        return row

    def _insert(self, connection: sa.Connection, row: Mapping[str, object]) -> dict[str, Any]:
        connection.execute(sa.insert(models.api_keys).values(dict(row)))
        return _view(self._find(connection, str(row["id"])))

    def _update(self, connection: sa.Connection, key_id: str, values: Mapping[str, object]) -> dict[str, Any]:
        """`updated_at` is of the store's clock: by it every API process hears of the change."""
        changed = dict(values) | {"version": k.version + 1, "updated_at": utc_now()}
        connection.execute(sa.update(models.api_keys).where(k.id == key_id, self._mine).values(changed))
        return _view(self._find(connection, key_id))

    def _record(
        self, connection: sa.Connection, action: AuditAction, key: Mapping[str, Any], **facts: Any
    ) -> None:
        told = {name: key[name] for name in ("subject", "role", "scopes", "allowed_cidrs", "expires_at")}
        record(connection, self._caller, action, f"key:{key['id']}", told | facts)

    def _check_expiry(self, expires_at: datetime | None) -> None:
        if expires_at is not None and expires_at <= self._now:
            detail = "expires_at must lie in the future"
            raise Unprocessable(detail, errors=(FieldError("/expires_at", detail, "in_the_past"),))

    def _check_room(self, connection: sa.Connection) -> None:
        """Counted without a lock: makers at the same moment may pass the limit by a few."""
        living = sa.select(sa.func.count()).select_from(models.api_keys)
        count = connection.execute(living.where(self._mine, k.revoked_at.is_(None))).scalar_one()
        if count >= MAX_KEYS:
            raise Conflict(f"the tenant has {count} keys; revoke those that nobody needs", limit=MAX_KEYS)

    def _check_strength(self, connection: sa.Connection, key: Mapping[Any, Any]) -> None:
        """Raise Forbidden for a key that is stronger than the caller, or than the caller's own key."""
        caller = self._caller
        role = Role(key["role"])
        if not at_least(caller.role, role):
            raise Forbidden(f"a key of the role {role} is for the role {role}", needed_role=role.value)
        scopes = ROLE_SCOPES[role] if key["scopes"] is None else ROLE_SCOPES[role] & set(key["scopes"])
        if beyond := sorted(scopes - caller.scopes):
            raise Forbidden(
                f"the key has the scope {beyond[0]}, and the caller has not", needed_scope=beyond[0]
            )
        if not caller.key_id:
            return
        own = self._find(connection, caller.key_id)
        if own["allowed_cidrs"] is not None and not _within(key["allowed_cidrs"], own["allowed_cidrs"]):
            raise Forbidden("the key may be used from where the caller's own may not")
        if own["expires_at"] is not None and (
            key["expires_at"] is None or key["expires_at"] > own["expires_at"]
        ):
            raise Forbidden("the key may be used for longer than the caller's own")


def tenant_of(database: Database, key_id: str) -> str | None:
    """Whose key that is; None when there is none with that id."""
    with database.read() as connection:
        found = connection.execute(sa.select(k.tenant_id).where(k.id == key_id)).scalar()
    return None if found is None else str(found)


def _within(inner: Sequence[str] | None, outer: Sequence[str]) -> bool:
    """Whether each network of `inner` lies in one of `outer`; None is everywhere."""
    if inner is None:
        return False
    around = [ip_network(cidr) for cidr in outer]
    return all(
        any(one.version == other.version and one.subnet_of(other) for other in around)  # type: ignore[arg-type]
        for one in map(ip_network, inner)
    )


def _view(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A key without what opens it."""
    shown = {name: row[name] for name in _SHOWN}
    return {name: stamp(v) if isinstance(v, datetime) else v for name, v in shown.items()}
