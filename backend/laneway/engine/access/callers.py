"""Who is calling: callers, what their roles and scopes let them do, and the API keys that they carry.

A key reads `lw_live_<id>_<secret><check>`: 12 characters of id, 43 of secret (256 bits), 6 of CRC-32 so
that junk is refused without a look-up. Only the SHA-256 of the secret is kept; a slow hash would add
nothing to 256 random bits and would make every request cost tens of milliseconds.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import string
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sa

from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.errors import Forbidden, LanewayError, NotFound, Unauthenticated
from laneway.webhooks.secrets import SecretBox, keep_old, new_webhook_secret, tenant_context

DEFAULT_TENANT = "default"
ADMIN_KEY_FILE = "admin.key"

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_KEY = re.compile(r"lw_(live|test)_[a-z0-9]{12}_[0-9A-Za-z]{49}")


class Role(StrEnum):
    """What a key may do: a user its own, an operator its tenant's, an admin everything."""

    USER = "user"
    OPERATOR = "operator"
    ADMIN = "admin"


class AccessScope(StrEnum):
    """One kind of operations. `…:read` looks, `…:write` changes."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    SCHEDULES_READ = "schedules:read"
    SCHEDULES_WRITE = "schedules:write"
    CHAINS_READ = "chains:read"
    CHAINS_WRITE = "chains:write"
    BATCHES_READ = "batches:read"
    BATCHES_WRITE = "batches:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    QUEUES_READ = "queues:read"
    QUEUES_MANAGE = "queues:manage"
    KEYS_MANAGE = "keys:manage"
    ADMIN = "admin"


_OPERATOR = frozenset(AccessScope) - {AccessScope.QUEUES_MANAGE, AccessScope.ADMIN}

ROLE_SCOPES: dict[Role, frozenset[AccessScope]] = {
    Role.USER: _OPERATOR - {AccessScope.KEYS_MANAGE},
    Role.OPERATOR: _OPERATOR,
    Role.ADMIN: frozenset(AccessScope),
}
"""The scopes of each role. Where a route names a role as well, both are needed."""


def at_least(role: Role, needed: Role) -> bool:
    """Whether `role` is `needed` or a stronger one."""
    order = list(Role)
    return order.index(role) >= order.index(needed)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request speaks for. Everything below the API sees only this."""

    tenant_id: str
    subject: str
    role: Role
    key_id: str = ""  # empty: a JWT
    allowed: frozenset[AccessScope] | None = None  # None: all scopes of the role
    expires_at: datetime | None = None
    job_id: str | None = None  # a token that is bound to this job
    is_token: bool = False  # of `POST /auth/tokens`, or of an HTTP job
    attempt: int | None = None  # of its job: a target that reports about it
    address: str | None = field(default=None, compare=False)  # where from, and in which request
    request_id: str | None = field(default=None, compare=False)

    @property
    def scopes(self) -> frozenset[AccessScope]:
        """What the caller may do: never more than its role."""
        of_role = ROLE_SCOPES[self.role]
        return of_role if self.allowed is None else of_role & self.allowed

    def need(self, role: Role) -> None:
        """Raise Forbidden unless the caller has `role` or a stronger one."""
        if not at_least(self.role, role):
            raise Forbidden(f"this needs the role {role}", needed_role=role.value)

    def need_scope(self, scope: AccessScope) -> None:
        """Raise Forbidden unless the caller has `scope`."""
        if scope not in ROLE_SCOPES[self.role] or (self.allowed is not None and scope not in self.allowed):
            raise Forbidden(f"this needs the scope {scope}", needed_scope=scope.value)


def make_key() -> str:
    """A new key."""
    key_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12))
    body = f"lw_live_{key_id}_{''.join(secrets.choice(_DIGITS) for _ in range(43))}"
    return body + _check(body)


def key_id_of(text: str) -> str:
    """The id inside a key, or Unauthenticated when the text cannot be one."""
    if not _KEY.fullmatch(text) or not hmac.compare_digest(_check(text[:-6]), text[-6:]):
        raise Unauthenticated("the API key is malformed")
    return text[8:20]


def _check(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits


def digest_of(text: str) -> bytes:
    """What is kept of a key: the SHA-256 of its secret."""
    return hashlib.sha256(text[21:-6].encode()).digest()


def ensure_tenant(database: Database, box: SecretBox, name: str, *, created_by: str = "cli") -> str:
    """The id of the tenant called `name`, made with a fresh webhook secret if there is none."""
    t = models.tenants.c
    for _ in range(2):
        with database.read() as connection:
            found = connection.execute(sa.select(t.id).where(t.name == name)).scalar()
        if found is not None:
            return str(found)
        tenant_id = new_id()
        values = {
            "id": tenant_id,
            "name": name,
            "webhook_secret": box.seal(new_webhook_secret(), tenant_context(tenant_id)),
            "created_by": created_by,
        }
        try:
            with database.write() as connection:
                connection.execute(sa.insert(models.tenants).values(values))
        except sa.exc.IntegrityError:
            continue  # another process was first
        return tenant_id
    raise LanewayError(f"tenant {name!r} can neither be found nor made")


def create_key(
    database: Database,
    *,
    tenant_id: str,
    role: Role,
    subject: str | None = None,
    expires_at: datetime | None = None,
    created_by: str = "cli",
) -> str:
    """Make an API key and return its text, which is shown this once and kept nowhere."""
    text = make_key()
    row = key_row(text, tenant_id=tenant_id, role=role, subject=subject, created_by=created_by)
    with database.write() as connection:
        connection.execute(sa.insert(models.api_keys).values(row | {"expires_at": expires_at}))
    return text


def key_row(
    text: str, *, tenant_id: str, role: Role, subject: str | None = None, created_by: str = "cli"
) -> dict[str, object]:
    """The row of `api_keys` that lets the key `text` in."""
    key_id = key_id_of(text)
    return {
        "id": key_id,
        "tenant_id": tenant_id,
        "created_by": created_by,
        "subject": subject or f"key:{key_id}",
        "role": role.value,
        "digest": digest_of(text),
    }


def ensure_admin_key(database: Database, box: SecretBox, data_dir: Path) -> Path:
    """The file with the first admin key, made (mode 0600) at the first start; the command line reads it.

    The file appears first and whole, made by whichever process is faster; the row follows from what it
    says. So a process that dies in between leaves a key that works from the next start on. A key that was
    revoked stays revoked. Raises LanewayError when the file holds something else.
    """
    path = data_dir / ADMIN_KEY_FILE
    tenant_id = ensure_tenant(database, box, DEFAULT_TENANT)
    if not path.exists():
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_once(path, make_key() + "\n")
    try:
        row = key_row(path.read_text().strip(), tenant_id=tenant_id, role=Role.ADMIN, subject="admin")
    except Unauthenticated:
        raise LanewayError(f"{path} holds no API key; delete it, and a new one is made") from None
    with database.read() as connection:
        known = sa.select(models.api_keys.c.id).where(models.api_keys.c.id == row["id"])
        if connection.execute(known).first() is not None:
            return path
    with suppress(sa.exc.IntegrityError), database.write() as connection:  # or another process was first
        connection.execute(sa.insert(models.api_keys).values(row))
    return path


def _write_once(path: Path, text: str) -> None:
    """Make the file whole under its name (mode 0600), unless another process was faster."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def webhook_secret(database: Database, box: SecretBox, tenant_id: str) -> str:
    """The tenant's own webhook secret, in clear. Raises NotFound for an unknown tenant."""
    t = models.tenants.c
    with database.read() as connection:
        sealed = connection.execute(sa.select(t.webhook_secret).where(t.id == tenant_id)).scalar()
    if sealed is None:
        raise NotFound("there is no such tenant")
    return box.open(sealed, tenant_context(tenant_id))


def rotate_webhook_secret(
    database: Database,
    box: SecretBox,
    tenant_id: str,
    *,
    grace_seconds: int,
    secret: str | None,
    now: datetime,
) -> str:
    """A new webhook secret of the tenant; for the grace the old ones sign beside it (webhooks/secrets.py).

    Raises NotFound for an unknown tenant.
    """
    t = models.tenants.c
    fresh = secret or new_webhook_secret()
    with database.write() as connection:
        query = sa.select(t.webhook_secret, t.old_webhook_secrets).where(t.id == tenant_id)
        row = connection.execute(query.with_for_update()).first()
        if row is None:
            raise NotFound("there is no such tenant")
        values = {
            "webhook_secret": box.seal(fresh, tenant_context(tenant_id)),
            "old_webhook_secrets": keep_old(
                row.webhook_secret, row.old_webhook_secrets, grace_seconds=grace_seconds, now=now
            ),
            "version": t.version + 1,
            "updated_at": now,
        }
        connection.execute(sa.update(models.tenants).where(t.id == tenant_id).values(values))
    return fresh
