"""Job types that tests watch from outside: through files, since they run in other processes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from laneway.engine.context import JobContext
from laneway.engine.registry import register_job_function
from laneway.sdk.decorators import background_job

_never = threading.Event()


def _append(path: str, line: str) -> None:
    """One line, whole, whoever else is writing."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (line + "\n").encode())
    finally:
        os.close(handle)


def _wait_for(gate: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    while not Path(gate).exists():
        meanwhile()
        _never.wait(0.01)


@background_job("test.note")
def note(ledger: str, text: str, seconds: float = 0) -> str:
    """Write a line, then take so long."""
    _append(ledger, text)
    if seconds:
        _never.wait(seconds)
    return text


@background_job("test.hold")
def hold(job: JobContext, ledger: str, gate: str, cooperative: bool = False, once: bool = False) -> int:
    """Write "attempt pid" and wait for the file `gate`; with `once` only in the first attempt."""
    _append(ledger, f"{job.attempt} {os.getpid()}")
    if not (once and job.attempt > 1):
        _wait_for(gate, job.check_cancelled if cooperative else lambda: None)
    return job.attempt


@background_job("test.endless")
def endless(job: JobContext, how: Literal["exception", "base", "c"], ledger: str, times: int = 99) -> int:
    """Ignore its timeout as `how` says: catch every Exception, every BaseException, or sit in C code."""
    if job.attempt > times:
        return job.attempt
    _append(ledger, f"{job.attempt} {os.getpid()}")
    caught = {"exception": Exception, "base": BaseException}
    if how == "c":
        mutex = ctypes.create_string_buffer(128)  # a pthread_mutex_t: locked twice, it never returns
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    while True:
        with contextlib.suppress(caught[how]):
            _never.wait(0.05)


@background_job("test.endless_async")
async def endless_async(ledger: str, how: Literal["exception", "base", "block"]) -> None:
    """The same for a coroutine, which may also block its event loop."""
    _append(ledger, str(os.getpid()))
    caught = {"exception": Exception, "base": BaseException, "block": Exception}
    while True:
        with contextlib.suppress(caught[how]):
            if how == "block":
                _never.wait(0.05)
            else:
                await asyncio.sleep(600)


@background_job("test.parent")
def parent(ledger: str, gate: str) -> None:
    """Start a program and fork a process, write both pids, and wait."""
    program = subprocess.Popen(["sleep", "600"])
    forked = os.fork()
    if not forked:
        while True:
            _never.wait(1)
    _append(ledger, f"{program.pid} {forked}")
    _wait_for(gate)


@background_job("test.leave_a_fork")
def leave_a_fork(ledger: str, die: bool = False, apart: bool = False) -> None:
    """Fork a process that outlives the job, `apart` in its own session; with `die` the job's process dies."""
    forked = os.fork()
    if not forked:
        if apart:
            os.setsid()
        while True:
            _never.wait(1)
    _append(ledger, str(forked))
    if die:
        os._exit(9)


@background_job("test.poison")
def poison(job: JobContext, how: str, ledger: str) -> Any:
    """Write a pid, take 48 MiB, be at 40 %, then do what is called `how` to the process."""
    _append(ledger, str(os.getpid()))
    taken = b"x" * (48 << 20)
    job.progress(40, "so far so good")
    return POISONS[how](len(taken))


def _close_all() -> None:
    for descriptor in range(256):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _fork_and_die() -> None:
    for number in range(20):
        if not os.fork():
            if number % 2:
                os.setsid()  # as a daemon does
            while True:
                _never.wait(1)
    os.abort()


def _be_deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        with contextlib.suppress(BaseException):
            _never.wait(0.05)


def _write_everywhere() -> None:
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"\0\0\0\x02no message")
    _never.wait(60)


def _take_all_memory() -> None:
    taken: list[bytes] = []
    while True:
        taken.append(bytes(64 << 20))  # asked for and not touched: it costs the machine nothing


def _raise_at_length() -> None:
    raise ValueError("x" * (64 << 20))


def _kill_worker() -> None:
    nursery = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    os.kill(int(nursery[1]), signal.SIGKILL)
    _never.wait(60)


POISONS: dict[str, Callable[[int], Any]] = {
    "segfault": lambda _: ctypes.string_at(0),
    "exit": lambda _: os._exit(137),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "kill worker": lambda _: _kill_worker(),
    "close all": lambda _: _close_all(),
    "fork and die": lambda _: _fork_and_die(),
    "write everywhere": lambda _: _write_everywhere(),
    "deaf": lambda _: _be_deaf(),
    "memory": lambda _: _take_all_memory(),
    "huge result": lambda _: "x" * (1 << 30),
    "no json": lambda _: {"a": object()},
    "long error": lambda _: _raise_at_length(),
}


@background_job("test.burn")
def burn(seconds: float) -> int:
    """Keep the interpreter busy for so long, without a call that lets go of its lock."""
    rounds, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        rounds += sum(range(1000)) > 0
    return rounds


_kept: list[bytes] = []


@background_job("test.keep")
def keep(mib: int) -> None:
    """Take so much memory and never let go of it."""
    _kept.append(bytes(mib << 20))


@background_job("test.progress")
def progress(job: JobContext, reports: list[list[Any]], gate: str) -> None:
    """Report each `[percent, message, details]`, then wait."""
    for percent, message, details in reports:
        job.progress(percent, message, details=details)
    _wait_for(gate)


@background_job("test.chatter")
def chatter(job: JobContext, count: int) -> None:
    """Report from several threads at once, with frames too long for one write."""

    def talk() -> None:
        for step in range(count):
            job.progress(100 * step / count, "m" * 500, details={"text": "d" * 8000})

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@background_job("test.result")
def result(kind: Literal["limit", "past_limit", "nan", "object", "surrogate"]) -> Any:
    """Return something at, or past, what a result may be."""
    match kind:
        case "limit":
            return "x" * (256 * 1024 - 2)
        case "past_limit":
            return "x" * (256 * 1024 - 1)
        case "nan":
            return [float("nan")]
        case "object":
            return {"a": object()}
        case "surrogate":
            return "\ud800"


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it cannot be said")


@background_job("test.raise_unprintable")
def raise_unprintable() -> None:
    raise _Unprintable


@background_job("test.say")
def say(text: str) -> None:
    """Print."""
    print(text)


@background_job("test.last_breath")
def last_breath(deadly: bool) -> None:
    """Ends well. If `deadly`, its process is killed as soon as that is said, before it starts another job."""

    def kill_afterwards(frame: Any, event: str, _: object) -> None:
        if event == "return" and frame.f_code.co_qualname == "Child._run":
            os.kill(os.getpid(), signal.SIGKILL)

    if deadly:
        sys.setprofile(kill_afterwards)


@background_job("test.complain")
def complain(about: str) -> None:
    """Fails, and its message tells what it was given."""
    raise ValueError(f"I do not like {about}")


_remembered: list[str] = []


@background_job("test.remember")
def remember(ledger: str) -> None:
    """Write its pid, its folder, and how many of these jobs its process has run; then go elsewhere."""
    _remembered.append("x")
    _append(ledger, f"{os.getpid()} {Path.cwd()} {len(_remembered)}")
    os.chdir("/")


@background_job("test.stay", isolation="fork")
def stay(ledger: str) -> None:
    """Take from its process the way out."""

    def never_exit(_: int) -> None:
        while True:
            _never.wait(1)

    os._exit = never_exit  # type: ignore[assignment]
    _append(ledger, str(os.getpid()))


for _job in (note, hold, endless, poison, progress, remember):
    register_job_function(f"{_job.job_type}_forked", inspect.unwrap(_job), isolation="fork")
