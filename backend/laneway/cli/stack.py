"""All of Laneway on this machine, as children of this process: what `laneway dev` and `laneway demo` run.

The children die with this process, whatever ends it: the kernel sends them SIGTERM (prctl(2)). They run
in sessions of their own, so that Ctrl-C reaches this process alone, which stops them in order.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from laneway.cli import migrate
from laneway.cli.embedded import EmbeddedRedis, die_with_parent
from laneway.cli.environment import api_url, listen
from laneway.cli.processes import COURIER_MARGIN_SECONDS, StopSignals
from laneway.cli.store import migrated_store, reaching_store, secret_box
from laneway.errors import LanewayError
from laneway.settings import PREFIX, Settings

READY_SECONDS = 60.0
LOOK_SECONDS = 0.1
STOP_MARGIN_SECONDS = 10.0

LOOPBACK_WEBHOOKS = {
    "LANEWAY_WEBHOOK_ALLOW_HTTP": "1",
    "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8,::1/128",
}
"""Lets a receiver on this machine be called, which a service for others must not do."""


class StackFailed(LanewayError):
    """Something of the stack ended by itself, or did not come up; the rest was stopped."""

    code, title = "stack_failed", "The stack failed"


@dataclass
class Stack:
    """What runs. `members` are in the order in which they are stopped."""

    settings: Settings
    key_file: Path
    redis: EmbeddedRedis | None
    stop: StopSignals
    stop_seconds: float
    members: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where the API listens."""
        return api_url(self.settings.model_copy(update={"url": ""}))

    def death(self) -> str | None:
        """None while everything lives; else which member ended, and how."""
        for name, process in self.members.items():
            if (code := process.poll()) is not None:
                return f"the {name} ended with exit code {code}"
        return self.redis.death() if self.redis is not None else None

    def run_until(
        self, done: Callable[[], bool], *, seconds: float | None = None, look_seconds: float = LOOK_SECONDS
    ) -> bool:
        """True once `done()`; False when a signal came or `seconds` are over. A death raises StackFailed."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not done():
            if (death := self.death()) is not None:
                raise StackFailed(f"{death}; everything is stopped")
            if self.stop.event.wait(look_seconds) or (deadline is not None and time.monotonic() > deadline):
                return False
        return True

    def halt(self) -> None:
        """Stop the members in order. A further Ctrl-C makes those that drain hurry."""
        for process in self.members.values():
            heard = self.stop.count
            process.terminate()
            deadline = time.monotonic() + self.stop_seconds
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                if self.stop.count > heard:
                    heard = self.stop.count
                    process.terminate()
                threading.Event().wait(LOOK_SECONDS / 2)


@contextmanager
def running(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    children: int | None = None,
    redis_port: int = 0,
    output: IO[bytes] | None = None,
) -> Iterator[Stack]:
    """A stack that accepts jobs, stopped in order when the block ends.

    `environ` is the members' environment but for what is decided here: port, stores, folder. A store that
    the settings name is used; else there is a SQLite file and a Redis in the data folder. `output` takes
    the members' logs. Raises Conflict when the port or the folder is taken, StackFailed when a member dies.
    """
    with ExitStack() as cleanup:
        stop = cleanup.enter_context(StopSignals())
        with listen(settings.host, settings.port) as free:
            settings = settings.model_copy(
                update={"port": free.getsockname()[1], "data_dir": settings.data_dir.absolute()}
            )
        redis = None
        if "redis_url" not in settings.model_fields_set:
            redis = cleanup.enter_context(EmbeddedRedis(settings.data_dir, port=redis_port))
            settings = settings.model_copy(update={"redis_url": redis.url})
        with reaching_store(settings):
            migrate.upgrade(settings.database)
        from laneway.engine.access.callers import ensure_admin_key

        with migrated_store(settings) as database:
            key_file = ensure_admin_key(database, secret_box(settings), settings.data_dir)

        # What the slowest takes, which is a worker: its own drain, then its courier's.
        slowest = settings.drain_seconds + settings.webhook_timeout_seconds + COURIER_MARGIN_SECONDS
        stack = Stack(settings, key_file, redis, stop, slowest + STOP_MARGIN_SECONDS)
        cleanup.callback(stack.halt)
        own = {
            f"{PREFIX}{name.upper()}": str(getattr(settings, name))
            for name in ("data_dir", "host", "port", "redis_url")
        }
        worker = ["worker", *(["--concurrency", str(children)] if children else [])]
        for command in (["api"], worker, ["scheduler"]):
            stack.members[command[0]] = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "laneway", *command],
                env={f"{PREFIX}UNREADY_SECONDS": "0", **environ, **own},  # there is no balancer
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509
            )
        if stack.run_until(lambda: _ready(stack), seconds=READY_SECONDS):
            yield stack
        elif not stop.count:
            raise StackFailed(f"the API was not ready after {READY_SECONDS:g} s")
        else:
            raise KeyboardInterrupt


def _ready(stack: Stack) -> bool:
    """Whether the API accepts jobs."""
    import http.client

    connection = http.client.HTTPConnection(stack.url.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
