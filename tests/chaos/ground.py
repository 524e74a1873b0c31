"""What one run stands on: real servers, proxies before them, and Laneway's processes, kept alive.

Everything that runs is a descendant of this process, carries a mark in its environment, and is gone when
the ground is left; a test asks for that.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import psycopg
import redis

from chaos import failpoints, handlers, history, mutants, program
from chaos.history import History
from chaos.plan import LEASE_SECONDS, QUEUES, TENANTS
from fault_proxy import FaultProxy
from laneway.cli import migrate
from laneway.cli.embedded import die_with_parent
from laneway.cli.environment import listen
from laneway.clock import new_id
from laneway.db import Database
from laneway.engine.access.callers import Role, create_key, ensure_tenant, webhook_secret
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox
from servers import PostgresServer, RedisServer, Server

WORKERS, CHILDREN = 3, 2
RESTART_SECONDS = 0.3
TICK_SECONDS = 0.5
STOP_SECONDS = 20.0
MARK_VARIABLE = "CHAOS_RUN"
PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "backend")]
PROFILE = {
    "LANEWAY_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "LANEWAY_BEAT_SECONDS": "0.5",
    "LANEWAY_TICK_SECONDS": f"{TICK_SECONDS:g}",
    "LANEWAY_POLL_SECONDS": "0.5",
    "LANEWAY_DRAIN_SECONDS": "3",
    "LANEWAY_CANCEL_GRACE_SECONDS": "1",
    "LANEWAY_TIMEOUT_GRACE_SECONDS": "0.5",
    "LANEWAY_WEBHOOK_TIMEOUT_SECONDS": "3",
    "LANEWAY_WEBHOOK_ALLOW_HTTP": "1",
    "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
    "LANEWAY_WEBHOOK_ALLOWED_PORTS": "*",
    "LANEWAY_LANE_WINDOW": "200",
    "LANEWAY_RATE_LIMITS": "off",
    "LANEWAY_LOG_FORMAT": "json",
    "LANEWAY_TASKS": handlers.__name__,
}


class Mortal(Server):
    """A server that may be found dead, and whose disk can be full."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def limit_files(self, most_bytes: int) -> None:
        """Let none of its files be written past `most_bytes`; -1 lifts the limit.

        By prlimit(1) in the name of the server's user: nobody else's limits may be changed without a
        capability that containers lack.
        """
        soft = "unlimited" if most_bytes < 0 else str(most_bytes)
        for pid in (self.pid, *_children(self.pid)):
            command = ["prlimit", "--pid", str(pid), f"--fsize={soft}:unlimited"]
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL, **self.identity())

    def identity(self) -> dict[str, Any]:
        """Whose process it is, for Popen; empty for one of ours."""
        return {}


class ChaosRedis(Mortal, RedisServer):
    """Keeps its data, and hears of a full disk as an error instead of dying of SIGXFSZ."""

    def __init__(self) -> None:
        super().__init__(durable=True)

    def run(self, command: Sequence[str | Path], **how: Any) -> None:
        super().run(command, restore_signals=False, **how)


class ChaosPostgres(Mortal, PostgresServer):
    """As in the tests, under libfaketime where it is installed, so that its clock can be set."""

    clock: Path

    def start(self) -> None:
        self.clock = self.folder / "clock"
        library = _libfaketime()
        if library is not None:
            here = self.folder / "libfaketime.so.1"
            if not here.exists():
                shutil.copy(library, here)
                here.chmod(0o755)
                self.set_clock(0)
            self._as["env"] = os.environ | {
                "LD_PRELOAD": str(here),
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_CACHE_DURATION": "1",
                "DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_DISABLE_SHM": "1",
            }
        super().start()

    @property
    def has_clock(self) -> bool:
        return "env" in self._as

    def set_clock(self, seconds: float) -> None:
        """Let the server's clock be wrong by so much, within two seconds."""
        self.clock.write_text(f"{seconds:+.0f}")
        self.clock.chmod(0o644)

    def identity(self) -> dict[str, Any]:
        return {name: self._as[name] for name in ("user", "group", "extra_groups") if name in self._as}

    def connect(self, url: str) -> psycopg.Connection[Any]:
        """A connection past all proxies, to the database of `url`."""
        name = Database(url).url.database
        return psycopg.connect(host=str(self.folder), user="postgres", dbname=name, autocommit=True)


def _libfaketime() -> Path | None:
    spec = find_spec("libfaketime")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    return library if library.exists() else None


class Member:
    """One of Laneway's processes: started again whenever it has ended, as a service manager would."""

    def __init__(self, name: str, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.role = arguments[0]
        self.clock = Path(env[program.CLOCK_VARIABLE])
        self._command = [sys.executable, "-m", program.__name__, *arguments]
        self._env = dict(env)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.ended_at = 0.0

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509
            )
        self.starts += 1

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def ended(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.poll() if self._process is not None else None

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time."""
        try:
            assert self._process is not None
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


class Ground:
    """Servers, proxies and members between `with` and its end."""

    def __init__(self, folder: Path, *, store: str, mutant: str = "") -> None:
        self.folder = folder
        self.store = store
        self.board = failpoints.Board(folder / "failpoints")
        self.history_folder = folder / "history"
        self.history = History(self.history_folder, "harness")
        self.mark = new_id()
        self._mutant = mutant
        self._cleanup = ExitStack()
        self.members: list[Member] = []
        self.proxies: dict[str, FaultProxy] = {}
        self.keys: dict[str, str] = {}
        self.tenant_ids: dict[str, str] = {}
        self.secrets: dict[str, str] = {}
        self.postgres: ChaosPostgres | None = None
        self._stopping = False
        self._minding = threading.Lock()
        self._over = threading.Event()
        self._minder = threading.Thread(target=self._mind, name="minder", daemon=True)
        self.restarts = 0

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.callback(self.history.close)
            self.redis = cleanup.enter_context(ChaosRedis())
            self._proxy(cleanup, "redis", self.redis.socket)
            self.url = self._make_store(cleanup)
            self.database = Database(self.url, pool_size=4)
            cleanup.callback(self.database.dispose)
            self._make_tenants()
            cleanup.callback(self._leave)
            for name, arguments, url in self._cast():
                env = self._env | {
                    "LANEWAY_DATABASE_URL": url,
                    program.CLOCK_VARIABLE: str(self.folder / f"{name}.clock"),
                }
                self.members.append(Member(name, arguments, env, self.folder / f"{name}.log"))
            for member in self.members:
                member.start()
            self._minder.start()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    # Making it

    def _make_store(self, cleanup: ExitStack) -> str:
        if self.store == "sqlite":
            url = f"sqlite:///{self.folder / 'laneway.db'}"
            migrate.upgrade(url)
            return url
        self.postgres = cleanup.enter_context(ChaosPostgres())
        socket = self.postgres.folder / ".s.PGSQL.5432"
        for name in ("api-pg", "worker-pg", "upkeep-pg"):
            self._proxy(cleanup, name, socket)
        return self.postgres.fresh()

    def _proxy(self, cleanup: ExitStack, name: str, upstream: Path) -> None:
        self.proxies[name] = cleanup.enter_context(FaultProxy(upstream))

    def _through(self, name: str) -> str:
        """The URL of the store through a proxy."""
        if self.store == "sqlite":
            return self.url
        database = Database(self.url).url.database
        port = self.proxies[name].port
        return f"postgresql+psycopg://postgres@127.0.0.1:{port}/{database}?sslmode=disable&gssencmode=disable"

    def _make_tenants(self) -> None:
        data = self.folder / "data"
        self.settings = Settings(database_url=self.url, redis_url=self.redis.url, data_dir=data)
        box = SecretBox.from_settings(self.settings)
        for name in TENANTS:
            tenant_id = ensure_tenant(self.database, box, name)
            self.tenant_ids[name] = tenant_id
            self.keys[name] = create_key(self.database, tenant_id=tenant_id, role=Role.OPERATOR, subject=name)
            self.secrets[tenant_id] = webhook_secret(self.database, box, tenant_id)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LANEWAY_")}
        self._env = {
            **inherited,
            **PROFILE,
            "PYTHONPATH": os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "LANEWAY_REDIS_URL": f"redis://127.0.0.1:{self.proxies['redis'].port}/0",
            "LANEWAY_DATA_DIR": str(data),
            MARK_VARIABLE: self.mark,
            history.FOLDER_VARIABLE: str(self.history_folder),
            failpoints.FOLDER_VARIABLE: str(self.board.folder),
            mutants.VARIABLE: self._mutant,
        }

    def _cast(self) -> list[tuple[str, list[str], str]]:
        """Name, arguments and store URL of each member."""
        few = self.store == "sqlite"
        worker = ["worker", "--no-courier", "--concurrency", str(CHILDREN), "--queues", ",".join(QUEUES)]
        cast = []
        self.ports = [_free_port() for _ in range(1 if few else 2)]
        for n, port in enumerate(self.ports):
            cast.append((f"api-{n}", ["api", "--port", str(port)], self._through("api-pg")))
        for n in range(2 if few else WORKERS):
            cast.append((f"worker-{n}", worker, self._through("worker-pg")))
        for role in ("scheduler", "courier"):
            for n in range(1 if few else 2):
                cast.append((f"{role}-{n}", [role], self._through("upkeep-pg")))
        return cast

    # Keeping it alive

    def _mind(self) -> None:
        # Lives until the end: what a thread starts is killed by the kernel when that thread ends.
        while not self._over.wait(0.05):
            with self._minding:
                for member in self.members if not self._stopping else ():
                    self._look_after(member)

    def _look_after(self, member: Member) -> None:
        status = member.ended()
        if status is None:
            member.ended_at = 0.0
        elif not member.ended_at:
            member.ended_at = time.monotonic()
            self.history.note("death", member=member.name, pid=member.pid, status=status)
        elif time.monotonic() - member.ended_at > RESTART_SECONDS:
            member.start()
            self.restarts += 1
            self.history.note("start", member=member.name, pid=member.pid)

    def _stop_restarting(self) -> None:
        with self._minding:
            self._stopping = True

    def of_role(self, role: str) -> list[Member]:
        return [member for member in self.members if member.role == role]

    def nursery(self, member: Member) -> int | None:
        """The process that forks the children of a worker, if it is there."""
        return next(
            (p for p in _children(member.pid) if b"laneway.worker.nursery" in _read(p, "cmdline")), None
        )

    def children(self, member: Member) -> list[int]:
        """The processes that run the jobs of a worker."""
        nursery = self.nursery(member)
        return _children(nursery) if nursery is not None else []

    def pids(self) -> list[int]:
        """All living processes that members are or ever started."""
        wanted = f"{MARK_VARIABLE}={self.mark}".encode()
        return [pid for pid in _all_pids() if wanted in _read(pid, "environ").split(b"\0")]

    # Ending it

    def stop_members(self) -> list[str]:
        """Stop all with SIGTERM; who did not leave within STOP_SECONDS, or left a process behind."""
        self._stop_restarting()
        for pid in self.pids():
            _signal(pid, signal.SIGCONT)
        for member in self.members:
            member.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        late = [m.name for m in self.members if not m.wait(max(0.1, deadline - time.monotonic()))]
        left = [pid for pid in self.pids() if _state(pid) != "Z"]
        words = [f"{name} did not stop within {STOP_SECONDS:g} s of SIGTERM" for name in late]
        if not late:
            words += [
                f"pid {pid} outlived what started it: {_read(pid, 'cmdline').decode(errors='replace')}"
                for pid in left
            ]
        return words

    def _leave(self) -> None:
        self._stop_restarting()
        deadline = time.monotonic() + STOP_SECONDS
        while (left := self.pids()) and time.monotonic() < deadline:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            for member in self.members:
                member.ended()
            threading.Event().wait(0.02)
        self._over.set()

    # Servers

    def redis_client(self) -> redis.Redis:
        return self.redis.client(socket_timeout=5, decode_responses=True)

    def servers_up(self) -> None:
        """Start what a fault left dead."""
        servers: list[Mortal] = [self.redis, *([self.postgres] if self.postgres else [])]
        for server in servers:
            if not server.alive():
                server.kill()
                server.start()


def _free_port() -> int:
    with listen("127.0.0.1", 0) as socket:
        return int(socket.getsockname()[1])


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has gone already


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _state(pid: int) -> str:
    return (_read(pid, "stat").rpartition(b")")[2].split() or [b"Z"])[0].decode()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in _read(pid, f"task/{pid}/children").split()]
    except ValueError:
        return []
