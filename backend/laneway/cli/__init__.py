"""The command line. This module starts it and turns errors into exit codes; each group has a module.

`laneway --help` imports none of the libraries that the commands need: those import what they use when
they are called.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line on `argv` (default: this process's); leaves with a code of `ExitCode`."""
    from laneway.cli.exits import ExitCode, exit_code
    from laneway.errors import LanewayError

    try:
        build()(args=argv, prog_name="laneway")
    except LanewayError as error:
        print(f"laneway: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more (`| head`): the interpreter need not say so
        raise SystemExit(ExitCode.OK) from None
    raise SystemExit(ExitCode.OK)


def build() -> typer.Typer:
    """All commands."""
    import typer

    from laneway.cli import (
        demo,
        dev,
        dlq,
        docs,
        doctor,
        jobs,
        keys,
        processes,
        schedules,
        store,
        tenants,
        webhooks,
    )

    app = typer.Typer(
        help="Background jobs over HTTP, in priority lanes, with signed webhooks.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("demo", rich_help_panel="Try it")(demo.demo)
    app.command("dev", rich_help_panel="Try it")(dev.dev)
    for command in (jobs.enqueue, jobs.get, jobs.watch, jobs.cancel, jobs.retry, jobs.types, jobs.stats):
        app.command(rich_help_panel="Jobs, over HTTP")(command)
    app.add_typer(dlq.dlq, name="dlq", rich_help_panel="Jobs, over HTTP")
    app.add_typer(schedules.schedules, name="schedules", rich_help_panel="Jobs, over HTTP")
    for process in (processes.api, processes.worker, processes.scheduler, processes.courier):
        app.command(rich_help_panel="Processes")(process)
    app.command("doctor", rich_help_panel="Operate")(doctor.doctor)
    app.command("migrate", hidden=True)(store.upgrade)  # what docker-compose.yml runs
    app.command("docs", hidden=True)(docs.docs)  # what `make docs` runs
    for name, group in (
        ("db", store.db),
        ("keys", keys.keys),
        ("tenants", tenants.tenants),
        ("webhooks", webhooks.webhooks),
    ):
        app.add_typer(group, name=name, rich_help_panel="Operate")
    return app
