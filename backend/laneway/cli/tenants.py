"""The commands that look at tenants and make them, over HTTP, with an admin's key."""

from __future__ import annotations

from typing import Annotated

import typer

from laneway.cli import show
from laneway.cli.client import Client
from laneway.cli.jobs import AsJson

tenants = typer.Typer(help="Tenants: whose everything is.", no_args_is_help=True)


@tenants.command()
def ls(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50, as_json: AsJson = False
) -> None:
    """List tenants, newest first."""
    with Client.from_environment() as client:
        found = client.pages("/admin/tenants", limit=limit)
    columns = {"id": "id", "name": "name", "created_by": "made by", "created_at": "made"}
    show.rows(found, columns, as_json=as_json)


@tenants.command()
def create(
    name: Annotated[str, typer.Argument(help="No other tenant has it.")], as_json: AsJson = False
) -> None:
    """Make a tenant. `laneway keys create --tenant` makes its first key."""
    with Client.from_environment() as client:
        show.result(client.post("/admin/tenants", {"name": name}), as_json=as_json)
