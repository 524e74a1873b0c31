"""`laneway doctor`: what is wrong here, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laneway.cli import show
from laneway.cli.embedded import OLDEST_REDIS, answers_ping
from laneway.cli.environment import read_settings
from laneway.cli.exits import ExitCode
from laneway.cli.store import need_migrated, reaching_store
from laneway.errors import LanewayError

if TYPE_CHECKING:
    import redis

    from laneway.db import Database
    from laneway.settings import Settings


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: `remedy` says what to do when it is not `ok`."""

    check: str
    ok: bool
    detail: str
    remedy: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, also on a terminal.")] = False,
) -> None:
    """Look at the settings, the stores, the workers and the jobs. Exit code 0 healthy, 1 not."""
    from laneway.clock import SystemClock

    settings = read_settings()
    checks = list(examine(settings, now=SystemClock().now()))
    healthy = all(check.ok for check in checks)
    if show.for_eyes(as_json=as_json):
        _print(checks)
    else:
        for check in checks:
            show.result(asdict(check) if not check.ok else asdict(check) | {"remedy": None}, as_json=True)
    raise typer.Exit(ExitCode.OK if healthy else ExitCode.FAILED)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for check in checks:
        mark = Text("ok     ", "green") if check.ok else Text("trouble", "bold red")
        console.print(mark, Text(f"{check.check}: {check.detail}"))
        if not check.ok:
            console.print(Text(f"        do: {check.remedy}"))
    wrong = sum(not check.ok for check in checks)
    console.print(f"{wrong} of {len(checks)} checks found trouble" if wrong else "healthy")


def examine(settings: Settings, *, now: datetime) -> Iterator[Check]:
    """Everything that is looked at, one after the other; what cannot be reached ends its own part only."""
    yield from _variables()
    yield from _store(settings, now)
    yield from _redis(settings)


def _variables() -> Iterator[Check]:
    from laneway.settings import unknown_variables

    unknown = list(unknown_variables(os.environ))
    for name, nearest in unknown:
        remedy = (
            f"it may be meant for {nearest}" if nearest else "remove it; docs/reference lists the settings"
        )
        yield Check("settings", False, f"{name} sets nothing", remedy)
    if not unknown:
        yield Check("settings", True, "every LANEWAY_ variable is known")


def _store(settings: Settings, now: datetime) -> Iterator[Check]:
    from laneway.db import Database
    from laneway.engine import doctor as sentences

    try:
        need_migrated(settings)
    except LanewayError as error:
        what, _, remedy = str(error).rpartition("; ")
        yield Check("database", False, what or str(error), remedy)
        return
    database = Database(settings.database, pool_size=1)
    try:
        yield Check("database", True, f"{database.dialect}, migrated")
        with reaching_store(settings):
            yield from _workers(database, settings, now)
            findings = sentences.examine(database, now=now)
        for finding in findings:
            yield Check(
                "jobs", False, f"not so: {finding.sentence} ({', '.join(finding.ids)})", finding.remedy
            )
        if not findings:
            yield Check("jobs", True, "every sentence that must hold holds")
    except LanewayError as error:
        yield Check("database", False, str(error), "try again when it is reachable")
    finally:
        database.dispose()


def _workers(database: Database, settings: Settings, now: datetime) -> Iterator[Check]:
    """Per queue, how many workers drain it; a queue where jobs wait and nobody listens is trouble."""
    from datetime import timedelta

    import sqlalchemy as sa

    from laneway import models
    from laneway.domain.spec import DEFAULT_QUEUE, queue_of
    from laneway.domain.states import JobStatus

    w, j = models.workers.c, models.jobs.c
    with database.read() as connection:
        lanes = connection.execute(
            sa.select(w.lanes).where(
                w.state == "active", w.beat_at > now - timedelta(seconds=settings.lease_seconds)
            )
        ).scalars()
        drained = [{queue_of(lane) for lane in each} for each in lanes]
        waiting = set(
            connection.execute(sa.select(j.queue).where(j.status == JobStatus.QUEUED).distinct()).scalars()
        )
    for queue in sorted({DEFAULT_QUEUE} | waiting | set().union(*drained)):
        alive = sum(queue in each for each in drained)
        detail = f"queue {queue}: {alive} alive" + (", jobs wait" if queue in waiting and not alive else "")
        yield Check("workers", alive > 0, detail, f"start one: `laneway worker --queues {queue}`")


def _redis(settings: Settings) -> Iterator[Check]:
    import redis

    from laneway.lanes.rq_lanes import connect

    embedded = settings.data_dir.absolute() / "redis.sock"
    url = settings.redis_url
    if "redis_url" not in settings.model_fields_set and answers_ping(embedded):
        url = f"unix://{embedded}"  # `laneway dev` runs here
    try:
        client = connect(url)
    except ValueError:
        yield Check(
            "redis", False, "LANEWAY_REDIS_URL is no Redis URL", "write redis://, rediss:// or unix://"
        )
        return
    with client:
        try:
            yield from _inside_redis(client)
        except redis.RedisError as error:
            remedy = "start Redis, or check LANEWAY_REDIS_URL; jobs are kept, and run slowly without it"
            yield Check("redis", False, f"cannot be reached ({error})", remedy)


def _inside_redis(client: redis.Redis) -> Iterator[Check]:
    said: Any = client.info()
    version = str(said.get("valkey_version") or said["redis_version"])
    recent = tuple(map(int, version.split(".")[:2])) >= OLDEST_REDIS
    yield Check("redis", recent, f"version {version}", "Laneway needs Redis 6.2, or Valkey")
    yield Check(
        "redis",
        said.get("aof_enabled") == 1,
        "append-only file " + ("on" if said.get("aof_enabled") == 1 else "off"),
        "CONFIG SET appendonly yes, or a restart of Redis makes every queued job wait for the reconciler",
    )
    policy = str(said.get("maxmemory_policy", "noeviction"))
    yield Check(
        "redis",
        policy == "noeviction",
        f"maxmemory-policy {policy}",
        "CONFIG SET maxmemory-policy noeviction",
    )
