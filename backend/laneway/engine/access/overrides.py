"""Rate limits of single tenants and callers, in place of those that the settings name.

Each change moves a counter on in its own transaction, and whoever changes something holds the counter's row
until it has committed. So whoever has seen the counter at n has seen every change up to n, and one
look-up by key tells an API process that nothing is new.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import sqlalchemy as sa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.dialects import postgresql, sqlite

from laneway import models
from laneway.errors import Conflict, FieldError, NotFound, TenantNotFound, Unprocessable
from laneway.limits.rule_book import Override
from laneway.limits.rules import MAX_QUOTA, MAX_WINDOW_SECONDS, Policy

MAX_OVERRIDES = 1000  # of a tenant
MAX_SUBJECT = 100

_SUBJECT = re.compile(rf"[^\x00]{{1,{MAX_SUBJECT}}}", re.S)
_COUNTER = "rate_limit_overrides"
_WHOLE_TENANT = ""  # in the column, so that it may stand in the key

o = models.rate_limit_overrides.c
c = models.change_counters.c


class OverrideSpec(BaseModel):
    """A rate limit as an admin sets it. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quota: Annotated[int, Field(ge=0, le=MAX_QUOTA)] | None = Field(
        description="Units in any window; 0 blocks, null lets everything pass."
    )
    window_seconds: Annotated[int, Field(ge=1, le=MAX_WINDOW_SECONDS)] | None = Field(
        None, description="Length of the window; null with quota null, and only then."
    )
    mode: Literal["enforce", "shadow"] = Field(
        "enforce", description="`shadow` counts and logs, and refuses nothing."
    )
    reason: str = Field(
        min_length=1, max_length=500, pattern=r"^[^\x00]*$", description="Why, for whoever finds it later."
    )
    expires_at: AwareDatetime | None = Field(
        None, description="When the settings' rules hold again; null: never."
    )

    @model_validator(mode="after")
    def _a_quota_has_a_window(self) -> Self:
        if (self.quota is None) != (self.window_seconds is None):
            raise ValueError("a quota needs window_seconds, and quota null has none")
        return self


def put(
    connection: sa.Connection,
    tenant_id: str,
    policy: Policy,
    spec: OverrideSpec,
    *,
    subject: str | None = None,
    by: str,
    now: datetime,
) -> dict[str, Any]:
    """Set the limit of a tenant (subject None) or of one caller of it; returns it as `get` does.

    Every API process goes by it within a second after the commit. What expired is deleted on the way.
    Raises TenantNotFound, Unprocessable for a caller's share of a tenant's budget and for
    an end that is past, Conflict when the tenant has MAX_OVERRIDES already.
    """
    _check(policy, subject, spec, now=now)
    _count_up(connection)
    tenant = sa.select(models.tenants.c.id).where(models.tenants.c.id == tenant_id)
    if connection.execute(tenant).first() is None:
        raise TenantNotFound()
    expired = sa.and_(o.tenant_id == tenant_id, o.expires_at <= now)
    connection.execute(sa.delete(models.rate_limit_overrides).where(expired))
    values = {
        "quota": spec.quota,
        "window_seconds": spec.window_seconds,
        "mode": spec.mode,
        "reason": spec.reason,
        "expires_at": spec.expires_at,
        "updated_by": by,
        "updated_at": now,
    }
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(
        insert(models.rate_limit_overrides)
        .values(
            tenant_id=tenant_id,
            policy=policy.value,
            subject=subject or _WHOLE_TENANT,
            created_by=by,
            created_at=now,
            **values,
        )
        .on_conflict_do_update(
            index_elements=[o.tenant_id, o.policy, o.subject], set_=values | {"version": o.version + 1}
        )
    )
    count = sa.select(sa.func.count()).where(o.tenant_id == tenant_id)
    if connection.execute(count).scalar_one() > MAX_OVERRIDES:
        raise Conflict(f"a tenant has at most {MAX_OVERRIDES} rate limits of its own; delete some")
    return get(connection, tenant_id, policy, subject=subject)


def get(
    connection: sa.Connection, tenant_id: str, policy: Policy, *, subject: str | None = None
) -> dict[str, Any]:
    """The limit that was set, also when it has expired. Raises NotFound where none was."""
    query = sa.select(models.rate_limit_overrides).where(*_key(tenant_id, policy, subject))
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(f"no rate limit {policy.value!r} was set here; the settings' holds")
    return _shown(row)


def delete(connection: sa.Connection, tenant_id: str, policy: Policy, *, subject: str | None = None) -> None:
    """Back to the settings' rules, within a second after the commit. Raises NotFound where none was set."""
    _count_up(connection)
    gone = sa.delete(models.rate_limit_overrides).where(*_key(tenant_id, policy, subject))
    if not connection.execute(gone).rowcount:
        raise NotFound(f"no rate limit {policy.value!r} was set here; the settings' holds")


def listed(connection: sa.Connection, tenant_id: str) -> list[dict[str, Any]]:
    """All limits that were set for a tenant and its callers, at most MAX_OVERRIDES, the expired ones too."""
    query = sa.select(models.rate_limit_overrides).where(o.tenant_id == tenant_id)
    return [_shown(row) for row in connection.execute(query.order_by(o.policy, o.subject)).mappings()]


def changes(connection: sa.Connection) -> int:
    """How often something was changed: the same number, the same overrides."""
    query = sa.select(c.value).where(c.name == _COUNTER)
    return int(connection.execute(query).scalar() or 0)


def in_force(connection: sa.Connection, *, now: datetime) -> list[Override]:
    """The overrides of all tenants that have not expired."""
    query = sa.select(models.rate_limit_overrides).where(
        sa.or_(o.expires_at.is_(None), o.expires_at > now),
        o.policy.in_(list(Policy)),  # a newer release may know more
    )
    return [
        Override(
            row.tenant_id,
            row.subject or None,
            Policy(row.policy),
            row.quota,
            row.window_seconds,
            row.mode == "shadow",
            row.expires_at,
        )
        for row in connection.execute(query)
    ]


def _check(policy: Policy, subject: str | None, spec: OverrideSpec, *, now: datetime) -> None:
    if subject is not None and policy.budget:
        detail = f"{policy.value!r} is the whole tenant's; it has no subject"
        raise Unprocessable(detail, errors=(FieldError("query/subject", detail, "no_subject"),))
    if subject is not None and not re.fullmatch(_SUBJECT, subject):
        detail = f"a subject has 1 to {MAX_SUBJECT} characters, and no NUL"
        raise Unprocessable(detail, errors=(FieldError("query/subject", detail, "subject_form"),))
    if spec.expires_at is not None and spec.expires_at <= now:
        detail = "expires_at must be in the future"
        raise Unprocessable(detail, errors=(FieldError("/expires_at", detail, "in_the_past"),))


def _count_up(connection: sa.Connection) -> None:
    """One more change; others that change something wait here until this transaction has ended."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    one = insert(models.change_counters).values(name=_COUNTER, value=1)
    connection.execute(one.on_conflict_do_update(index_elements=[c.name], set_={"value": c.value + 1}))


def _key(tenant_id: str, policy: Policy, subject: str | None) -> tuple[sa.ColumnElement[bool], ...]:
    return o.tenant_id == tenant_id, o.policy == policy.value, o.subject == (subject or _WHOLE_TENANT)


def _shown(row: sa.RowMapping) -> dict[str, Any]:
    names = (
        *("tenant_id", "subject", "policy", "quota", "window_seconds", "mode", "reason", "expires_at"),
        *("created_by", "created_at", "updated_by", "updated_at"),
    )
    return {name: row[name] for name in names} | {"subject": row["subject"] or None}
