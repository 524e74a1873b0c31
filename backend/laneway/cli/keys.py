"""The commands about API keys. They work on the store itself, of any tenant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from laneway.cli import show
from laneway.cli.environment import read_settings
from laneway.cli.jobs import AsJson
from laneway.cli.store import migrated_store, secret_box
from laneway.errors import KeyNotFound, NotFound, Unprocessable

if TYPE_CHECKING:
    from laneway.db import Database
    from laneway.engine.access.keys import Keys

ACTOR = "cli"

keys = typer.Typer(help="API keys.", no_args_is_help=True)

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The 12 characters after `lw_live_`.")]


@keys.command()
def create(
    tenant: Annotated[str, typer.Option(help="Its name; made when it is new.")],
    role: Annotated[
        Literal["user", "operator", "admin"],
        typer.Option(help="A user sees its own jobs, an operator or an admin its tenant's."),
    ],
    subject: Annotated[str | None, typer.Option(help="Whose key it is; default: the key's own id.")] = None,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="It may do only this: jobs:read; repeatable.")
    ] = None,
    cidr: Annotated[
        list[str] | None, typer.Option(help="It may be used only from there: 192.0.2.0/24; repeatable.")
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, help="Default: never.")] = None,
) -> None:
    """Make an API key and print it, this once: only its hash is kept."""
    from pydantic import ValidationError

    from laneway.clock import SystemClock
    from laneway.engine.access.callers import ensure_tenant
    from laneway.engine.access.keys import NewKey

    end = None if expires_in_days is None else SystemClock().now() + timedelta(days=expires_in_days)
    try:
        wanted = NewKey.model_validate(
            {
                "role": role,
                "subject": subject,
                "name": name,
                "scopes": scope or None,
                "allowed_cidrs": cidr or None,
                "expires_at": end,
            }
        )
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        why = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'key'}: {each['msg']}" for each in found)
        raise Unprocessable(why) from None
    settings = read_settings()
    with migrated_store(settings) as database:
        tenant_id = ensure_tenant(database, secret_box(settings), tenant)
        _, text = _managed(database, tenant_id).create(wanted)
    _print_once(text, f"{role} key of tenant {tenant}")


@keys.command()
def ls(tenant: Annotated[str, typer.Option(help="Its name.")] = "default", as_json: AsJson = False) -> None:
    """List a tenant's keys that are not revoked, oldest first."""
    with _of_tenant(tenant) as managed:
        found = managed.all()
    columns = {
        "id": "id",
        "name": "name",
        "subject": "subject",
        "role": "role",
        "scopes": "scopes",
        "expires_at": "expires",
        "last_used_at": "last used",
        "last_used_ip": "from",
    }
    show.rows(found, columns, as_json=as_json)


@keys.command()
def rotate(
    key_id: KeyId,
    overlap_hours: Annotated[
        int, typer.Option(min=0, max=720, help="So long the old key opens too; 0: not at all.")
    ] = 24,
) -> None:
    """Make a key in the place of another and print it, this once."""
    with _of_key(key_id) as managed:
        made, text = managed.rotate(key_id, overlap_seconds=overlap_hours * 3600)
    _print_once(text, f"{made['role']} key of {made['subject']}, in the place of {key_id}")


@keys.command()
def revoke(key_id: KeyId) -> None:
    """Let a key in no more, from within a second on."""
    with _of_key(key_id) as managed:
        managed.revoke(key_id)
    print(f"{key_id} is revoked")


def _print_once(text: str, what: str) -> None:
    print(f"{what}; it is not shown again:", file=sys.stderr)
    print(text)


def _managed(database: Database, tenant_id: str) -> Keys:
    from laneway.clock import SystemClock
    from laneway.engine.access.callers import Caller, Role
    from laneway.engine.access.keys import Keys

    return Keys(database, Caller(tenant_id, ACTOR, Role.ADMIN), now=SystemClock().now())


@contextmanager
def _of_tenant(name: str) -> Iterator[Keys]:
    from laneway.engine.access.credentials import find_tenant

    with migrated_store(read_settings()) as database:
        tenant_id = find_tenant(database, name)
        if tenant_id is None:
            raise NotFound(f"there is no tenant {name!r}")
        yield _managed(database, tenant_id)


@contextmanager
def _of_key(key_id: str) -> Iterator[Keys]:
    """The keys of the tenant whose key that is."""
    from laneway.engine.access.keys import tenant_of

    with migrated_store(read_settings()) as database:
        tenant_id = tenant_of(database, key_id)
        if tenant_id is None:
            raise KeyNotFound(f"there is no API key {key_id!r}")
        yield _managed(database, tenant_id)
