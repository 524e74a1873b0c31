"""The commands that look at dead letters and do something about them, over HTTP.

What concerns many is only said, unless `--yes` stands there too.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any
from urllib.parse import quote

import typer

from laneway.cli import show
from laneway.cli.client import Client, Job
from laneway.cli.jobs import AsJson, JobId, retry_at

dlq = typer.Typer(help="Dead letters: jobs that failed for good.", no_args_is_help=True)

JobType = Annotated[str | None, typer.Option("--type", help="Of this job type.")]
Queue = Annotated[str | None, typer.Option(help="Of this queue.")]
Reason = Annotated[str | None, typer.Option(help="exhausted, permanent, timeout or poison.")]
After = Annotated[
    str | None, typer.Option("--after", metavar="TIME", help="That ended after it: 2026-01-01T12:00:00Z.")
]
Before = Annotated[str | None, typer.Option("--before", metavar="TIME", help="That ended before it.")]
Every = Annotated[bool, typer.Option("--all", help="All of them.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without, only say what would be done.")]


@dlq.command()
def ls(
    job_type: JobType = None,
    queue: Queue = None,
    reason: Reason = None,
    after: After = None,
    before: Before = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first."""
    choice = _choice(job_type, queue, reason, after, before)
    with Client.from_environment() as client:
        found = client.pages("/dead-letters", limit=limit, **choice)
    if show.for_eyes(as_json=as_json):
        found = [each | {"error": _short(each["error"])} for each in found]
    columns = {
        "id": "id",
        "job_type": "type",
        "dead_letter_reason": "reason",
        "attempt": "attempts",
        "finished_at": "ended",
        "error": "error",
    }
    show.rows(found, columns, as_json=as_json)


def _short(error: Job | None) -> str:
    return f"{error['type']}: {error['message']}".partition("\n")[0][:80] if error else ""


@dlq.command("show")
def show_one(job_id: JobId, as_json: AsJson = False) -> None:
    """Print a dead letter as JSON, with its last error."""
    with Client.from_environment() as client:
        show.result(client.get(_path(job_id)), as_json=as_json)


@dlq.command()
def retry(
    job_id: Annotated[str | None, typer.Argument(metavar="ID", help="One, at once.")] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=TEXT | KEY:=JSON]...", help="In place of its own parameters."),
    ] = None,
    job_type: JobType = None,
    queue: Queue = None,
    reason: Reason = None,
    after: After = None,
    before: Before = None,
    every: Every = False,
    rate: Annotated[float | None, typer.Option(metavar="N", help="Spread them: N jobs a second.")] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Retry one dead letter, or those that the options choose."""
    choice = _choice(job_type, queue, reason, after, before)
    if job_id is None:
        body = {"filter": _need(choice, every=every), "rate": rate, "dry_run": not yes}
        _many("/dead-letters/retry", body, "retried", as_json=as_json)
        return
    if choice or every or rate is not None:
        raise typer.BadParameter("give an ID or options that choose many, not both")
    retry_at(_path(job_id), parameters, as_json=as_json)


@dlq.command()
def purge(
    job_type: JobType = None,
    queue: Queue = None,
    reason: Reason = None,
    after: After = None,
    before: Before = None,
    every: Every = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete the dead letters that the options choose, with their events and webhooks."""
    choice = _need(_choice(job_type, queue, reason, after, before), every=every)
    _many("/dead-letters/purge", {"filter": choice, "dry_run": not yes}, "deleted", as_json=as_json)


def _choice(
    job_type: str | None, queue: str | None, reason: str | None, after: str | None, before: str | None
) -> dict[str, Any]:
    said = {
        "job_type": job_type,
        "queue": queue,
        "reason": reason,
        "finished_after": after,
        "finished_before": before,
    }
    return {name: value for name, value in said.items() if value is not None}


def _need(choice: dict[str, Any], *, every: bool) -> dict[str, Any]:
    if every == bool(choice):
        raise typer.BadParameter(
            "choose some by --type, --queue, --reason, --after or --before, or say --all"
        )
    return choice


def _many(path: str, body: dict[str, Any], done: str, *, as_json: bool) -> None:
    with Client.from_environment() as client:
        answer = client.post(path, body)
    if show.for_eyes(as_json=as_json):
        would = "would be " if answer["dry_run"] else ""
        print(f"{answer['count']} {would}{done}, {answer['skipped']} skipped, {answer['remaining']} remain")
    else:
        show.result(answer, as_json=True)
    if answer["dry_run"]:
        print("laneway: nothing was done; repeat it with --yes", file=sys.stderr)
    elif answer["remaining"]:
        when = f" from {answer['last_due_at']} on" if answer["last_due_at"] else ""
        print(f"laneway: {answer['remaining']} remain; repeat it{when}", file=sys.stderr)


def _path(job_id: str) -> str:
    return f"/dead-letters/{quote(job_id, safe='')}"
