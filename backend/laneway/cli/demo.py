"""`laneway demo`: the example application, from a batch of summaries to the last signed webhook.

Everything is real: the processes are those of production, the summaries are asked for over HTTP, and a
receiver on this machine checks each webhook's signature. Only the pace is set, so that there is something
to watch.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laneway.cli.environment import api_key, read_settings
from laneway.cli.exits import ExitCode
from laneway.errors import RateLimited

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from laneway.cli.client import Client, Job
    from laneway.cli.receiver import Deliveries, Receiver
    from laneway.cli.stack import Stack

EVALUATIONS = (101, 102, 103, 104, 105, 106, 107, 123)
STUDENTS = 13  # in each of them
CHILDREN = 4
PACE_SECONDS = 2.0  # of one summary, which takes a few milliseconds by itself
LONGEST_SECONDS = 300.0
LOOK_SECONDS = 0.4
LINE_SECONDS = 5.0  # between two lines where there is no terminal
SHOWN = 12
ENVIRONMENT = {
    "LANEWAY_TASKS": "feedback_summaries",
    # As they ship, but for looking at the jobs twice a second.
    "LANEWAY_RATE_LIMITS": "queue=10/60@user,batch=5/60@user,default=1000/60@user",
    "LANEWAY_LOG_FORMAT": "json",
}


def demo(
    summaries: Annotated[
        int,
        typer.Option(
            min=60, max=STUDENTS * len(EVALUATIONS), help="At least so many; whole evaluations are asked for."
        ),
    ] = 60,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the data folder for looking into it.")] = False,
) -> None:
    """Queue feedback summaries on a service of their own, watch them run, verify their webhooks.

    Exit code 0 when every summary was completed and every webhook arrived and was verified, else 1.
    """
    for name in [name for name in os.environ if name.startswith("LANEWAY_")]:
        del os.environ[name]  # the stores and limits of something else
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("FEEDBACK_SUMMARIES_PACE_SECONDS", str(PACE_SECONDS))
    folder = Path(tempfile.mkdtemp(prefix="laneway-demo-"))
    try:
        missing = _run(folder, batches=-(-summaries // STUDENTS))
    except KeyboardInterrupt:
        print("laneway: stopped", file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    finally:
        if keep:
            print(f"kept: {folder}; look again with LANEWAY_TASKS=feedback_summaries "
                  f"laneway dev --data-dir {folder}")  # fmt: skip
        else:
            shutil.rmtree(folder)
    for sentence in missing:
        print(f"laneway: {sentence}", file=sys.stderr)
    raise typer.Exit(ExitCode.FAILED if missing else ExitCode.OK)


def _run(folder: Path, *, batches: int) -> list[str]:
    """Do it all in `folder`; what is missing in the end, as sentences."""
    from laneway.cli import stack
    from laneway.cli.client import Client
    from laneway.cli.receiver import Receiver

    environ = stack.LOOPBACK_WEBHOOKS | os.environ
    log = folder / "processes.log"
    try:
        with log.open("wb") as output:
            parts = f"an API, a worker with {CHILDREN} children, a scheduler and a Redis"
            print(f"starting {parts}", file=sys.stderr)
            settings = read_settings(data_dir=folder, port=0)
            with (
                stack.running(settings, environ, children=CHILDREN, output=output) as running,
                Client(running.url, api_key(running.settings)) as api,
                Receiver(api.get("/webhooks/secret")["secret"]) as receiver,
            ):
                total = _queue(api, receiver, running, batches=batches)
                jobs = _watch(api, receiver.deliveries, running, total=total)
                return _report(jobs, receiver, total=total)
    except stack.StackFailed as error:
        last = log.read_text(errors="replace").splitlines()[-20:]
        raise stack.StackFailed("\n".join([f"{error}; the end of the log:", *last])) from None


def plan(batches: int) -> Iterator[tuple[int, str]]:
    """The evaluations to ask for with their priority, the least urgent first."""
    high = max(1, batches // 4)
    low = (batches - high + 1) // 2
    priorities = ["low"] * low + ["normal"] * (batches - low - high) + ["high"] * high
    return zip(EVALUATIONS, priorities, strict=False)


def _queue(api: Client, receiver: Receiver, running: Stack, *, batches: int) -> int:
    """Ask for the summaries, low before high; how many were queued."""
    total = 0
    for evaluation_id, priority in plan(batches):
        path = f"/feedback-summaries/evaluation/{evaluation_id}/batch-queue"
        wanted = {"student_ids": None, "priority": priority, "webhook_url": receiver.url, "max_retries": 3}
        answer = _post_when_allowed(api, path, wanted, running)
        total += answer["enqueued"]
        print(f"queued evaluation {evaluation_id}: {answer['enqueued']} x {priority}", file=sys.stderr)
    return total


def _post_when_allowed(api: Client, path: str, body: Job, running: Stack) -> Any:
    """The answer, after the wait that a 429 asks for."""
    while True:
        try:
            return api.post(path, body)
        except RateLimited as error:
            seconds = error.retry_after_seconds or 1
            print(f"the rate limit holds for {seconds} s more: {error}", file=sys.stderr)
        running.run_until(lambda: False, seconds=seconds)
        if running.stop.count:
            raise KeyboardInterrupt


def _watch(api: Client, deliveries: Deliveries, running: Stack, *, total: int) -> list[Job]:
    """The jobs once all have ended and told so, or when the time is over; meanwhile shows them."""
    jobs: list[Job] = []
    with _shown(total) as show:

        def done() -> bool:
            jobs[:] = api.get("/jobs", limit=200)["data"]
            show(jobs, deliveries)
            ended = sum(job["finished_at"] is not None for job in jobs)
            return ended >= total and len(deliveries.verified) + len(deliveries.refused) >= total

        running.run_until(done, seconds=LONGEST_SECONDS, look_seconds=LOOK_SECONDS)
    if running.stop.count:
        raise KeyboardInterrupt
    return jobs


@contextmanager
def _shown(total: int) -> Iterator[Any]:
    """A function that shows the jobs: live bars on a terminal, elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines(total).show
        return
    from laneway.cli.show import job_bars

    with job_bars() as progress:
        yield _Bars(progress, total).show


class _Bars:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._whole = progress.add_task("all summaries", total=total, status="", message="")
        self._running: dict[str, TaskID] = {}

    def show(self, jobs: Sequence[Job], deliveries: Deliveries) -> None:
        running = {job["id"]: job for job in jobs if job["status"] == "running"}
        for job_id in self._running.keys() - running.keys():
            self._progress.remove_task(self._running.pop(job_id))
        for job_id, job in running.items():
            message = job["progress_message"] or ""
            if job_id not in self._running:
                asked = job["parameters"]
                self._running[job_id] = self._progress.add_task(
                    f"evaluation {asked['evaluation_id']}, student {asked['student_id']}",
                    total=100,
                    status=job["priority"],
                    message=message,
                )
            self._progress.update(self._running[job_id], completed=job["progress"], message=message)
        self._progress.update(
            self._whole,
            completed=sum(job["status"] == "completed" for job in jobs),
            message=f"{len(deliveries.verified)} webhooks verified",
        )


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._next_at = 0.0

    def show(self, jobs: Sequence[Job], deliveries: Deliveries) -> None:
        completed = sum(job["status"] == "completed" for job in jobs)
        if completed < self._total and time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + LINE_SECONDS
        running = ", ".join(
            f"{job['parameters']['student_id']} at {job['progress']} %"
            for job in jobs
            if job["status"] == "running"
        )
        print(
            f"{completed} of {self._total} summaries, {len(deliveries.verified)} webhooks verified"
            + (f"; running: {running}" if running else ""),
            file=sys.stderr,
            flush=True,
        )


def _report(jobs: Sequence[Job], receiver: Receiver, *, total: int) -> list[str]:
    """Print what came of it; what is missing, as sentences."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    completed = [job for job in jobs if job["status"] == "completed"]
    started = sorted((job for job in jobs if job["started_at"]), key=lambda job: str(job["started_at"]))

    table = Table(box=None, pad_edge=False)
    for heading in ("evaluation", "student"):
        table.add_column(heading, no_wrap=True, min_width=len(heading))
    table.add_column("summary", no_wrap=True, overflow="ellipsis")
    for job in sorted(completed, key=lambda job: str(job["id"]))[:SHOWN]:
        result = job["result"]
        summary = " ".join(str(result["summary"]).split())
        table.add_row(str(result["evaluation_id"]), str(result["student_id"]), summary)
    console.print(table)
    if len(completed) > SHOWN:
        console.print(f"and {len(completed) - SHOWN} more")

    console.print(f"\nqueued low, then normal, then high; started {drained(started)}")
    deliveries = receiver.deliveries
    checkers = "laneway" + (" and standardwebhooks" if receiver.by_reference else "")
    console.print(
        f"webhooks: {deliveries.received} received, {len(deliveries.verified)} verified by {checkers}, "
        f"{deliveries.duplicates} duplicates, {len(deliveries.refused)} refused"
    )
    console.print(f"summaries: {len(completed)} of {total} completed")
    return missing_from(jobs, deliveries, total=total)


def drained(started: Sequence[Job]) -> str:
    """The lanes in the order in which their jobs started: `2 low, 13 high, …`."""
    runs = [(name, len(list(run))) for name, run in groupby(job["priority"] for job in started)]
    return ", ".join(f"{length} {name}" for name, length in runs)


def missing_from(jobs: Sequence[Job], deliveries: Deliveries, *, total: int) -> list[str]:
    """What keeps the demo from having worked; empty when it has."""
    completed = {job["id"] for job in jobs if job["status"] == "completed"}
    missing = []
    if len(completed) < total:
        others = ", ".join(f"{job['id']} is {job['status']}" for job in jobs if job["id"] not in completed)
        missing.append(f"{total - len(completed)} of {total} summaries were not completed: {others}")
    unheard = sorted(completed - deliveries.verified.keys())
    if unheard:
        missing.append(f"{len(unheard)} webhooks did not arrive, the first of job {unheard[0]}")
    if deliveries.refused:
        missing.append(f"{len(deliveries.refused)} webhooks were refused: {deliveries.refused[0]}")
    return missing
