"""`laneway doctor`: what is wrong here, and what to do about it."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Generator, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from laneway.cli import show
from laneway.cli.embedded import OLDEST_REDIS, answers_ping
from laneway.cli.environment import read_settings
from laneway.cli.exits import ExitCode
from laneway.cli.store import need_migrated, reaching_store
from laneway.errors import LanewayError

if TYPE_CHECKING:
    import redis

    from laneway.clock import Clock
    from laneway.db import Database
    from laneway.settings import Settings

MAX_CLOCK_ERROR_SECONDS = 1.0
MAX_MEMORY_PERCENT = 80
SECOND_LOOK_SECONDS = 0.5  # what a worker took and has not claimed yet is nowhere for a moment


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
    checks = list(examine(settings, clock=SystemClock()))
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


def examine(settings: Settings, *, clock: Clock) -> Iterator[Check]:
    """Everything that is looked at, one after the other; what cannot be reached ends its own part only."""
    from laneway.db import Database

    yield from _variables()
    yield from _production(settings)
    job_types = yield from _job_types(settings)
    try:
        need_migrated(settings)
    except LanewayError as error:
        what, _, remedy = str(error).rpartition("; ")
        yield Check("database", False, what or str(error), remedy)
        yield from _redis(settings, None, clock)
        return
    database = Database(settings.database, pool_size=1)
    try:
        yield from _store(settings, database, job_types, clock)
        yield from _redis(settings, database, clock)
    finally:
        database.dispose()


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


def _production(settings: Settings) -> Iterator[Check]:
    """What production refuses; on a developer's machine only what would have to be done first."""
    from laneway.engine.access.production import troubles

    found = list(troubles(settings))
    if settings.environment != "production":
        missing = ", ".join(dict.fromkeys(each.setting for each in found))
        detail = "development" + (f"; production would want {missing}" if missing else "")
        yield Check("production", True, detail)
        return
    for each in found:
        yield Check("production", False, f"{each.setting}: {each.detail}", each.remedy)
    if not found:
        yield Check("production", True, "fit for production")


def _job_types(settings: Settings) -> Generator[Check, None, Collection[str] | None]:
    """Returns the names of the job types that workers with these settings know; None: they cannot start."""
    from laneway.engine.registry import load

    try:
        names = load(settings.tasks).names
    except Exception as error:
        detail = f"LANEWAY_TASKS cannot be imported ({type(error).__name__}: {error})"
        yield Check("job_types", False, detail, "workers cannot start like this: mend the import")
        return None
    yield Check("job_types", True, f"{len(names)} known")
    return names


def _store(
    settings: Settings, database: Database, job_types: Collection[str] | None, clock: Clock
) -> Iterator[Check]:
    from laneway.engine import doctor as sentences

    try:
        with reaching_store(settings):
            yield Check("database", True, f"{database.dialect}, migrated")
            yield _clock("the database", sentences.clock_ahead(database, now=clock.now))
            yield from _workers(database, settings)
            findings = sentences.examine(
                database, now=clock.now(), lease_seconds=settings.lease_seconds, job_types=job_types
            )
    except LanewayError as error:
        yield Check("database", False, str(error), "try again when it is reachable")
        return
    broken = {finding.name: finding for finding in findings}
    for each in sentences.CHECKS:
        if (finding := broken.get(each.name)) is None:
            yield Check(each.name, True, each.sentence)
        else:
            detail = f"not so: {finding.sentence} ({', '.join(finding.ids)})"
            yield Check(each.name, False, detail, finding.remedy)


def _clock(whose: str, ahead: float) -> Check:
    side = "ahead of" if ahead > 0 else "behind"
    return Check(
        "clocks",
        abs(ahead) <= MAX_CLOCK_ERROR_SECONDS,
        f"{whose} is {abs(ahead):.1f} s {side} this machine",
        "run a time service (chrony, systemd-timesyncd) on both machines",
    )


def _workers(database: Database, settings: Settings) -> Iterator[Check]:
    """Per queue, how many workers drain it; a queue where jobs wait and nobody listens is trouble."""
    from laneway.domain.spec import DEFAULT_QUEUE, queue_of
    from laneway.engine.pauses import open_lanes, paused_queues
    from laneway.engine.queries import lanes_with_work, living_workers

    with database.read() as connection:
        workers = living_workers(connection, within_seconds=settings.lease_seconds)
        waiting = {
            queue_of(lane) for lane in open_lanes(lanes_with_work(connection), paused_queues(connection))
        }
    drained = [{queue_of(lane) for lane in each["lanes"]} for each in workers if each["state"] == "active"]
    for queue in sorted({DEFAULT_QUEUE} | waiting | set().union(*drained)):
        alive = sum(queue in each for each in drained)
        detail = f"queue {queue}: {alive} alive" + (", jobs wait" if queue in waiting and not alive else "")
        yield Check("workers", alive > 0, detail, f"start one: `laneway worker --queues {queue}`")


def _redis(settings: Settings, database: Database | None, clock: Clock) -> Iterator[Check]:
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
            yield _clock("Redis", _redis_ahead(client, clock))
            if database is not None:
                with reaching_store(settings):
                    yield from _lanes(client, database, clock, window=settings.lane_window)
        except redis.RedisError as error:
            remedy = "start Redis, or check LANEWAY_REDIS_URL; jobs are kept, and run slowly without it"
            yield Check("redis", False, f"cannot be reached ({error})", remedy)
        except LanewayError as error:
            yield Check("lanes", False, str(error), "try again when it is reachable")


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
    writes = str(said.get("aof_last_write_status", "ok"))
    yield Check("redis", writes == "ok", f"last write of it: {writes}", "make room on the disk of Redis")
    policy = str(said.get("maxmemory_policy", "noeviction"))
    yield Check(
        "redis",
        policy == "noeviction",
        f"maxmemory-policy {policy}",
        "CONFIG SET maxmemory-policy noeviction",
    )
    yield _memory(int(said["used_memory"]), int(said.get("maxmemory") or 0))


def _memory(used: int, most: int) -> Check:
    """Bytes used of `most`; 0: as many as there are."""
    return Check(
        "redis",
        not most or 100 * used <= MAX_MEMORY_PERCENT * most,
        f"{used >> 20} MiB used" + (f", {100 * used // most} % of maxmemory" if most else ""),
        "raise maxmemory, or lower LANEWAY_LANE_WINDOW: what does not fit waits in the database",
    )


def _redis_ahead(client: redis.Redis, clock: Clock) -> float:
    client.ping()  # connected
    before = clock.now()
    seconds, microseconds = client.time()
    after = clock.now()
    theirs = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)
    return (theirs - (before + (after - before) / 2)).total_seconds()


def _lanes(client: redis.Redis, database: Database, clock: Clock, *, window: int) -> Iterator[Check]:
    """Whether the lists hold what waits, and nothing else: judged twice, since both change meanwhile."""
    from laneway.engine.doctor import SHOWN, missing_from
    from laneway.engine.queries import lanes_with_work
    from laneway.lanes.rq_lanes import queue_key

    known = cast("set[str]", client.smembers("rq:queues"))
    with database.read() as connection:
        keys = known | {queue_key(lane) for lane in lanes_with_work(connection)}

    def look() -> tuple[set[str], set[str]]:
        lacking: set[str] = set()
        useless: set[str] = set()
        for key in keys:
            present = cast("list[str]", client.lrange(key, 0, window - 1))
            lane = key.removeprefix(queue_key(""))
            for found, ids in zip(
                (lacking, useless), missing_from(database, lane, present, now=clock.now()), strict=True
            ):
                found.update(ids)
        return lacking, useless

    lacking, useless = look()
    if lacking or useless:
        threading.Event().wait(SECOND_LOOK_SECONDS)
        again = look()
        lacking, useless = lacking & again[0], useless & again[1]
    for name, sentence, ids, remedy in (
        (
            "lanes",
            "a job that waits is in its lane within a minute",
            lacking,
            "run a scheduler (`laneway scheduler`): it rings again for what is missing",
        ),
        (
            "lanes",
            "a lane holds no ids of jobs that have ended",
            useless,
            "they do no harm, the next worker drops them: start one for these lanes",
        ),
    ):
        some = ", ".join(sorted(ids)[:SHOWN])
        yield Check(name, not ids, f"not so: {sentence} ({some})" if ids else sentence, remedy)
