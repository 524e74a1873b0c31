"""The commands that speak to the API about jobs."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from typing import Annotated, Any, NoReturn

import typer

from laneway.cli import show
from laneway.cli.client import Client, Job, job_path
from laneway.cli.exits import ExitCode, exit_code_of_end

AsJson = Annotated[bool, typer.Option("--json", help="JSON lines, also on a terminal.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]

_PARAMETER = re.compile(r"(.+?)(:=|=)(.*)", re.DOTALL)


def enqueue(
    job_type: Annotated[str, typer.Argument(metavar="TYPE", help="See `laneway types`.")],
    parameters: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=TEXT | KEY:=JSON]...", help="The job's parameters.")
    ] = None,
    priority: Annotated[str | None, typer.Option(help="critical, high, normal or low.")] = None,
    queue: Annotated[str | None, typer.Option(help="Default: the type's own.")] = None,
    delay: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Start so much later.")
    ] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Where to tell how it ended.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show its progress, then print its result.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Print its result once it has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Queue a job and print its id; with --watch or --wait its result instead.

    The exit code tells how the job ended: 0 completed, 1 failed, 4 timed out or expired, 5 cancelled.
    """
    asked = {
        "job_type": job_type,
        "parameters": parse_parameters(parameters or []),
        "priority": priority,
        "queue": queue,
        "delay_seconds": delay,
        "webhook_url": webhook_url,
    }
    with Client.from_environment() as client:
        job = client.post("/jobs", {name: value for name, value in asked.items() if value is not None})
        if watch or wait:
            _follow(client, job["id"], bar=watch, as_json=as_json)
    if as_json:
        show.result(job, as_json=True)
    else:
        print(job["id"])


def parse_parameters(words: list[str]) -> Job:
    """`key=text` and `key:=json` as an object. BadParameter for anything else, and for a key given twice."""
    parsed: dict[str, Any] = {}
    for word in words:
        found = _PARAMETER.fullmatch(word)
        if found is None:
            raise typer.BadParameter(f"{word!r} is neither KEY=TEXT nor KEY:=JSON")
        key, form, text = found.groups()
        if key in parsed:
            raise typer.BadParameter(f"{key!r} is given twice")
        try:
            parsed[key] = text if form == "=" else json.loads(text, parse_constant=_no_constant)
        except ValueError as error:
            raise typer.BadParameter(f"{word!r}: {text!r} is not JSON ({error})") from None
    return parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def get(job_id: JobId, as_json: AsJson = False) -> None:
    """Print a job as JSON."""
    with Client.from_environment() as client:
        show.result(client.get(job_path(job_id)), as_json=as_json)


def watch(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job's progress until it ends, then print its result. The exit code tells how it ended."""
    with Client.from_environment() as client:
        _follow(client, job_id, bar=True, as_json=as_json)


def cancel(
    job_id: JobId,
    terminate: Annotated[bool, typer.Option("--terminate", help="Kill a running handler at once.")] = False,
    as_json: AsJson = False,
) -> None:
    """Cancel a job. One that runs is asked to stop, and killed if it does not within the grace."""
    with Client.from_environment() as client:
        job = client.post(f"{job_path(job_id)}/cancel", {"terminate": terminate})
    if show.for_eyes(as_json=as_json):
        print("asked to stop" if job["cancelling"] else job["status"])
    else:
        show.result(job, as_json=True)


def retry(
    job_id: JobId,
    parameters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=TEXT | KEY:=JSON]...", help="In place of its own parameters."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job again that failed, timed out, expired or was cancelled."""
    retry_at(job_path(job_id), parameters, as_json=as_json)


def retry_at(path: str, parameters: list[str] | None, *, as_json: bool) -> None:
    """Retry the job or dead letter at `path`, with other parameters where they are given."""
    new = {"parameters": parse_parameters(parameters)} if parameters else {}
    with Client.from_environment() as client:
        job = client.post(f"{path}/retry", new)
    if show.for_eyes(as_json=as_json):
        print(job["status"])
    else:
        show.result(job, as_json=True)


def types(as_json: AsJson = False) -> None:
    """List the job types that may be asked for."""
    with Client.from_environment() as client:
        known = client.get("/job-types")["data"]
    if show.for_eyes(as_json=as_json):
        known = [each | {"parameters": _signature(each["parameters_schema"])} for each in known]
    columns = {"name": "type", "parameters": "parameters", "description": "does"}
    show.rows(known, columns, as_json=as_json)


def _signature(schema: Job) -> str:
    required = schema.get("required", ())
    return " ".join(name if name in required else f"[{name}]" for name in schema.get("properties", {}))


def stats(as_json: AsJson = False) -> None:
    """Show how many jobs wait, in which lanes, and for how long."""
    with Client.from_environment() as client:
        found = client.get("/queues/stats")
    if not show.for_eyes(as_json=as_json):
        show.result(found, as_json=True)
        return
    lanes = [{"queue": queue["name"], **lane} for queue in found["queues"] for lane in queue["lanes"]]
    columns = {
        "queue": "queue",
        "lane": "lane",
        "queued": "queued",
        "depth": "in Redis",
        "oldest_age_seconds": "oldest, seconds",
    }
    show.rows(lanes, columns)
    print("jobs: " + ", ".join(f"{count} {status}" for status, count in found["jobs"].items()))


def _follow(client: Client, job_id: str, *, bar: bool, as_json: bool) -> NoReturn:
    """Watch the job to its end, print its result, and leave with the code for that end."""
    last: Job = {}
    try:
        with show.JobBar(as_json=as_json) if bar else nullcontext() as progress:
            for news in client.follow(job_id):
                last = news
                if progress is not None:
                    progress.show(news)
    except KeyboardInterrupt:
        print(f"laneway: the job goes on; `laneway watch {job_id}` looks again", file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if last["status"] == "completed":
        show.result(last["result"], as_json=as_json)
    else:
        error = last.get("error") or {}
        reason = f": {error['type']}: {error['message']}" if error else ""
        print(f"laneway: job {job_id} is {last['status']}{reason}", file=sys.stderr)
    raise typer.Exit(exit_code_of_end(last["status"]))
