"""The pool's side of its child processes: rounds out, endings in, kills."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from laneway.engine.context import Progress
from laneway.engine.outcomes import Claimed
from laneway.worker.memory import private_mib
from laneway.worker.nursery import MAX_MESSAGE
from laneway.worker.wire import MAX_FROM_CHILD, Frames, pack

START_SECONDS = 60.0
STOP_SECONDS = 2.0  # for a process that was told to leave; then it is killed
SEND_SECONDS = 2.0  # an idle child that does not read for so long will never do


class NurseryFailed(RuntimeError):
    """The task modules could not be loaded, or the nursery died; the message says why."""


class Doom(Enum):
    """Why the pool ended a child."""

    TIMEOUT = auto()
    CANCEL = auto()
    DRAIN = auto()
    LOST = auto()  # the lease
    STUCK = auto()
    BABBLE = auto()  # it sent what is no message
    LET_GO = auto()  # it was asked to leave: it is worn out, or was for one job


@dataclass(eq=False)
class ChildProcess:
    """One child. `jobs` is its round in order: the first is the one that runs."""

    pid: int
    stream: socket.socket
    frames: Frames
    jobs: dict[str, Claimed] = field(default_factory=dict)
    since: float = 0.0  # monotonic: when the first of `jobs` started, at the latest
    served: int = 0
    ended: int = 0  # of those served, those whose ending was heard
    doom: Doom | None = None
    doomed_job: str = ""  # the job that ran when it was killed
    cancel_at: float | None = None  # monotonic: when the grace of a cancel is over
    leave_at: float | None = None  # monotonic: when it must have gone, once it was let go
    progress: Progress | None = None  # the last that was heard of the job that runs
    born_with_mib: int | None = None  # private memory; None where that is not watched
    for_one_job: bool = False

    @property
    def idle(self) -> bool:
        return not self.jobs and self.doom is None

    @property
    def current(self) -> Claimed | None:
        return next(iter(self.jobs.values()), None)

    def send(self, jobs: Sequence[Claimed], *, now: float) -> None:
        """Start a round."""
        self.jobs = {job.job_id: job for job in jobs}
        self.since = now
        self.progress = None
        self.served += len(jobs)
        self._write(
            {"run": [[j.job_id, j.attempt, j.job_type, j.parameters, j.timeout_seconds] for j in jobs]}
        )

    def kept_mib(self) -> int:
        """How much more memory it has than it was born with."""
        now = None if self.born_with_mib is None else private_mib(self.pid)
        return 0 if self.born_with_mib is None or now is None else now - self.born_with_mib

    def ask_to_stop(self, job_id: str) -> None:
        self._write({"cancel": job_id})

    def _write(self, message: Any) -> None:
        try:
            self.stream.settimeout(SEND_SECONDS)
            self.stream.sendall(pack(message))
        except TimeoutError:
            self.kill(Doom.STUCK)
        except OSError:
            pass  # it is dead; its exit is on the way
        finally:
            self.stream.setblocking(False)

    def kill(self, why: Doom) -> None:
        """SIGKILL for the child and all it started."""
        if self.doom is None:
            self.doom = why
            self.doomed_job = self.current.job_id if self.current else ""
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
                return
            except ProcessLookupError:
                continue  # not its own group's leader yet, or gone

    def let_go(self, *, now: float) -> None:
        """Close the socket: an idle child leaves."""
        self.doom = self.doom or Doom.LET_GO
        self.leave_at = now + STOP_SECONDS
        self.stream.close()


class Nursery:
    """Starts the nursery process and speaks with it."""

    def __init__(self, tasks: Sequence[str], *, child_memory_mib: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [
            sys.executable,
            "-m",
            "laneway.worker.nursery",
            str(theirs.fileno()),
            str(os.getpid()),
            str(child_memory_mib),
            *tasks,
        ]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: S603
        theirs.close()
        self.control = ours

    def wait_until_ready(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The job types it loaded, and those of them whose jobs get a process each.

        Raises NurseryFailed with the traceback of a broken task module.
        """
        ready, _, _ = select.select([self.control], [], [], START_SECONDS)
        reason = "it did not start"
        try:
            message = self.read() if ready else None
        except NurseryFailed as error:
            message, reason = None, str(error)
        if message and "ready" in message:
            self.control.setblocking(False)
            return tuple(message["ready"]), tuple(message["forked"])
        self.stop()
        if message:
            reason = message["failed"]
        raise NurseryFailed(f"the job types could not be loaded (LANEWAY_TASKS):\n{reason}")

    def ask_for_child(self) -> bool:
        """Whether the wish for one more child was heard; it may have too many of them to hear at once.

        Raises NurseryFailed when the nursery has died.
        """
        try:
            self.control.send(b'"spawn"')
        except BlockingIOError:
            return False
        except OSError as error:
            raise NurseryFailed("the nursery process died") from error
        return True

    def read(self) -> dict[str, Any] | None:
        """The next message, a new child as `{"child": ChildProcess}`; None when there is none.

        Raises NurseryFailed when the nursery has died.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self.control, MAX_MESSAGE, 1)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            raise NurseryFailed("the nursery process died")
        message: dict[str, Any] = json.loads(data)
        if descriptors:
            stream = socket.socket(fileno=descriptors[0])
            stream.setblocking(False)
            message["child"] = ChildProcess(message["child"], stream, Frames(stream, limit=MAX_FROM_CHILD))
        return message

    def stop(self) -> None:
        """End it; it kills its children first, and the kernel does if it cannot."""
        self.control.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
