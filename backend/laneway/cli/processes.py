"""The commands that run one process of the service until it is told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Annotated, Any, Self

import typer

from laneway.cli.embedded import die_with_parent
from laneway.cli.environment import listen, read_settings, start_process
from laneway.cli.store import migrated_store, need_migrated, secret_box
from laneway.errors import LanewayError

OPEN_CONNECTIONS_SECONDS = 10  # what a stopping API leaves to requests and streams under way
COURIER_MARGIN_SECONDS = 10.0  # past the webhook that a stopping courier still waits for
RESTART_SECONDS, LONGEST_RESTART_SECONDS = 1.0, 30.0


class StopSignals:
    """SIGINT and SIGTERM as something to wait for: `event`, and how many came.

    The event is set by a thread: a handler runs inside of whatever the main thread does, which may be
    `event.wait()` with the event's own lock held.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.count = 0

    def __enter__(self) -> Self:
        self._before = {n: signal.signal(n, self._came) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, *_: Any) -> None:
        self.count += 1
        threading.Thread(target=self.event.set, daemon=True).start()


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: LANEWAY_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 takes a free one; default: LANEWAY_PORT.")
    ] = None,
) -> None:
    """Run the HTTP API. The first start makes the tenant `default` and an admin key in the data folder."""
    import uvicorn

    from laneway.api.app import create_app
    from laneway.api.connections import Connection
    from laneway.api.leaving import Leaving, Server
    from laneway.engine.access.callers import ensure_admin_key
    from laneway.log import get_logger

    settings = read_settings(host=host, port=port)
    start_process(settings, api=True)
    log = get_logger("api")
    with migrated_store(settings) as database:
        key_file = ensure_admin_key(database, secret_box(settings), settings.data_dir)
    leaving = Leaving()
    with listen(settings.host, settings.port) as listener:
        config = uvicorn.Config(
            create_app(settings, leaving=leaving),
            loop="uvloop",
            http=Connection.of(max_connections=settings.max_connections),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=OPEN_CONNECTIONS_SECONDS,
        )
        with StopSignals():  # uvicorn raises the signal again when it is done: here it ends in nothing
            log.info("api_starting", address=listener.getsockname()[:2], key_file=str(key_file.absolute()))
            server = Server(config, leaving=leaving, unready_seconds=settings.unready_seconds)
            server.run(sockets=[listener])
    if not server.started:
        raise LanewayError("the API did not start; the log says why")


def worker(
    queues: Annotated[str, typer.Option(help="Queues to drain, separated by commas.")] = "default",
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Child processes; default: LANEWAY_CONCURRENCY, else one a CPU."),
    ] = None,
    courier: Annotated[bool, typer.Option("--courier/--no-courier", help="Also deliver webhooks.")] = True,
    burst: Annotated[bool, typer.Option("--burst", help="Leave once no job waits.")] = False,
) -> None:
    """Run jobs: drains the lanes of its queues, all critical ones first."""
    settings = read_settings()
    names = _queue_names(queues)
    start_process(settings)
    need_migrated(settings)

    from laneway.worker.children import NurseryFailed
    from laneway.worker.pool import PoolWorker

    try:
        pool = PoolWorker(settings, queues=names, concurrency=concurrency, burst=burst)
    except NurseryFailed as error:
        raise LanewayError(str(error)) from None
    with ExitStack() as children:
        if courier:
            stop_seconds = settings.webhook_timeout_seconds + COURIER_MARGIN_SECONDS
            children.enter_context(CourierChild(stop_seconds=stop_seconds))
        status = pool.run()
    raise typer.Exit(status)


def _queue_names(text: str) -> tuple[str, ...]:
    import re

    from laneway.domain.spec import QUEUE_PATTERN

    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if not re.fullmatch(QUEUE_PATTERN, name):
            raise typer.BadParameter(f"{name!r} is no queue; a name is like 'emails'", param_hint="--queues")
    if not names:
        raise typer.BadParameter("name at least one queue", param_hint="--queues")
    return names


def scheduler() -> None:
    """Run what falls due: schedules, delayed jobs, retries, jobs of dead workers. Any number may run."""
    settings = read_settings()
    start_process(settings)
    need_migrated(settings)

    from laneway.clock import SystemClock
    from laneway.db import Database
    from laneway.engine.registry import load
    from laneway.engine.service import JobService
    from laneway.lanes.live import RedisNews
    from laneway.lanes.rq_lanes import RqLanes
    from laneway.log import get_logger
    from laneway.scheduler.ticker import Ticker
    from laneway.sdk.declared import Declared
    from laneway.webhooks.messages import WAKE_CHANNEL

    clock = SystemClock()
    with ExitStack() as cleanup, StopSignals() as stop:
        # One a thread, and two to count what waits.
        database = Database(settings.database, pool_size=4, statement_seconds=settings.statement_seconds)
        cleanup.callback(database.dispose)
        lanes = RqLanes(settings.redis_url, clock=clock, window=settings.lane_window)
        cleanup.callback(lanes.close)
        news = RedisNews(settings.redis_url, courier_channel=WAKE_CHANNEL)
        cleanup.callback(news.close)
        declared = None
        try:
            service = JobService(database, lanes, settings, load(settings.tasks), news=news, clock=clock)
            declared = Declared(service)
        except Exception as error:  # a module that is broken here must not keep retries waiting
            get_logger("scheduler").exception("tasks_not_loaded", error=type(error).__name__)
        Ticker(database, lanes, settings, clock=clock, news=news, declared=declared).run(stop.event)


def courier() -> None:
    """Deliver webhooks. Any number may run; each worker runs one."""
    settings = read_settings()
    start_process(settings)
    need_migrated(settings)
    secret_box(settings)  # a bad key is one line here, and a traceback further down

    from laneway.webhooks.courier import main

    main(settings)


class CourierChild:
    """`laneway courier` beside a worker: started again when it dies, gone when this process is.

    In a session of its own, so that Ctrl-C stops the worker first. The kernel ends it with the thread
    that started it (prctl(2), PR_SET_PDEATHSIG), which lives until `__exit__`.
    """

    def __init__(self, *, stop_seconds: float) -> None:
        self._stop_seconds = stop_seconds
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="laneway-courier")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join(self._stop_seconds)
        if self._process is not None and self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    def _keep(self) -> None:
        from laneway.log import get_logger

        log = get_logger("worker")
        pause = RESTART_SECONDS
        while not self._stopping.is_set():
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = process = subprocess.Popen(
                    [sys.executable, "-m", "laneway", "courier"],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509
                )
            started = time.monotonic()
            code = process.wait()
            if time.monotonic() - started > LONGEST_RESTART_SECONDS:
                pause = RESTART_SECONDS
            if not self._stopping.is_set():
                log.error("courier_died", exit_code=code, next_start_seconds=pause)
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_RESTART_SECONDS)
