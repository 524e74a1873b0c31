"""`laneway dev`: everything on this machine, with one Ctrl-C to stop it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laneway.cli.environment import read_settings
from laneway.cli.exits import ExitCode
from laneway.errors import Unprocessable

if TYPE_CHECKING:
    from laneway.cli.stack import Stack


def dev(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="The API's; 0 takes a free one; default: LANEWAY_PORT."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the stores and the keys are; default: LANEWAY_DATA_DIR.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Child processes of the worker; default: one a CPU.")
    ] = None,
    redis_port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Also open the embedded Redis here, to every user of this machine; 0: not."
        ),
    ] = 0,
) -> None:
    """Run everything here: API, worker, scheduler, SQLite and a Redis of its own. Ctrl-C stops it all.

    LANEWAY_DATABASE_URL and LANEWAY_REDIS_URL, when set, are used instead of the embedded stores.
    """
    from laneway.cli import stack
    from laneway.settings import is_loopback

    environ = stack.LOOPBACK_WEBHOOKS | os.environ
    settings = read_settings(port=port, data_dir=data_dir)
    if not is_loopback(settings.host):
        raise Unprocessable(
            f"laneway dev serves this machine only, and LANEWAY_HOST is {settings.host}; for others run "
            "`laneway api`, `laneway worker` and `laneway scheduler`"
        )
    try:
        with stack.running(settings, environ, children=workers, redis_port=redis_port) as running:
            _say(running, opened=[n for n in stack.LOOPBACK_WEBHOOKS if n not in os.environ])
            running.run_until(lambda: False)
            print("stopping: running jobs may end first; Ctrl-C again to release them", flush=True)
    except KeyboardInterrupt:  # before it was ready
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _say(running: Stack, *, opened: list[str]) -> None:
    lines = {
        "API": f"{running.url}  (docs at {running.url}/docs)",
        "key": str(running.key_file),
    }
    if running.redis is not None:
        lines["Redis"] = f"redis-cli -s {shlex.quote(str(running.redis.socket))}"
    if opened:
        lines["note"] = f"webhooks may go to this machine over http:// ({', '.join(opened)})"
    for name, text in lines.items():
        print(f"  {name:<6}{text}")
    print("\nQueue a job:\n")
    print(curl_line(running.url, running.key_file), end="\n\n", flush=True)


def curl_line(url: str, key_file: Path) -> str:
    """A line for a shell that queues a job of ten seconds. It reads the key, and so does not show it."""
    body = '{"job_type":"demo.sleep","parameters":{"seconds":10}}'
    return (
        f"curl -sS {shlex.quote(f'{url}/api/v1/jobs')}"
        f' -H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})"'
        f" -H 'Content-Type: application/json' -d '{body}'"
    )
