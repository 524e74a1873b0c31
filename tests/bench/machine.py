"""What the numbers were measured on, and which core ran what."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from pathlib import Path

import laneway

LIBRARIES = ("rq", "redis", "hiredis", "fastapi", "uvicorn", "uvloop", "httptools", "sqlalchemy", "psycopg")


class Placement(StrEnum):
    """Which core runs what; both sides of a comparison run alike."""

    SPLIT = "split"
    FREE = "free"

    @property
    def words(self) -> str:
        if self is Placement.FREE:
            return "free: the kernel places every process"
        client, server = _two_cores()
        return f"split: Redis and PostgreSQL on core {server}; API, workers and clients on core {client}"

    @contextmanager
    def for_servers(self) -> Iterator[None]:
        """What is started inside runs where stores run; afterwards this process is where all else runs.

        Processes inherit the cores of the thread that starts them (sched_setaffinity(2)).
        """
        if self is Placement.FREE:
            yield
            return
        client, server = _two_cores()
        os.sched_setaffinity(0, {server})
        try:
            yield
        finally:
            os.sched_setaffinity(0, {client})


@cache
def _two_cores() -> tuple[int, int]:
    cores = sorted(os.sched_getaffinity(0))  # as this process was started; later it is bound to one of them
    if len(cores) < 2:
        raise SystemExit("placement 'split' needs two cores; take --placement free")
    return cores[0], cores[1]


def facts(folder: Path) -> dict[str, object]:
    """The machine, for the results file. `folder` is where the stores keep their data."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "store_filesystem": _filesystem(folder),
    }


def versions() -> dict[str, str]:
    found = {name: version(name) for name in LIBRARIES}
    return {
        "laneway": laneway.__version__,
        "commit": _commit(),
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        **found,
    }


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _filesystem(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else "unknown"
