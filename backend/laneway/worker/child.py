"""A child of the pool: runs the handlers it is sent, one at a time, and talks over one socket.

To the child:   {"run": [[job_id, attempt, job_type, parameters, timeout_seconds], …]}
                {"cancel": job_id}
From the child: ["end", job_id, kind, values…, run_ms]   kind names a class of `engine/endings.py`
                ["progress", job_id, percent, message, details]
                ["back", [job_id, …]]                     the rest of a round, not started

Children hold no connection and no lock: killing one at any instant breaks nothing but its own job. Each
ending is written before the next job starts, and each start is counted in memory that outlives the child:
so the first job of a round without an ending is the one that ran when a child died, if one more was
started than ended, and else none ran.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import astuple
from typing import Any

from laneway.engine.context import Progress
from laneway.engine.endings import Ending, HandedOver, Raised
from laneway.engine.registry import Registry
from laneway.engine.running import Runner
from laneway.worker.alarm import Alarm
from laneway.worker.memory import Count, forget_peak, private_mib
from laneway.worker.wire import Frames, pack

HAND_BACK_SECONDS = 0.02
HAND_BACK_AGAIN_SECONDS = 0.002
REPORT_SECONDS = 0.05
BROKEN = 70  # EX_SOFTWARE of sysexits.h


class Child:
    """The child's side of the socket.

    A handler may report from threads, also from some that outlive it. So `wire` is held while a frame is
    written or a wish is read, and a line that is not the `current` one says no more.
    """

    def __init__(self, stream: socket.socket, registry: Registry, begun: Count) -> None:
        self._stream = stream
        self._begun = begun
        self._registry = registry
        self._round: deque[list[Any]] = deque()
        self.frames = Frames(stream)
        self.wire = threading.Lock()
        self.alarm = Alarm(put_off=self.wire.locked)
        self._runner = Runner(self.alarm)
        self.current: JobLine | None = None

    def serve(self) -> None:
        """Run rounds until the pool closes the socket."""
        while not self.frames.ended:
            for message in self.frames.read():
                self._round.extend(message.get("run", ()))
            forget_peak()  # should this process die, the figure is to be that of this round
            if len(self._round) > 1:
                self.alarm.set("share", self._hand_back, seconds=HAND_BACK_SECONDS)
            while self._round:
                self._run(self._round.popleft())
            self.alarm.clear("share")
            sys.stdout.flush()  # a child may be killed any time from here on

    def _run(self, job: list[Any]) -> None:
        job_id, attempt, name, parameters, timeout_seconds = job
        line = self.current = JobLine(self, job_id)
        self._begun.up()
        started = time.perf_counter()
        job_type = self._registry.get(name)
        ending: Ending | HandedOver
        if job_type is None:
            ending = Raised("UnknownJobType", f"this worker does not know {name!r}")
        else:
            ending = self._runner.run(
                job_type,
                job_id=job_id,
                attempt=attempt,
                parameters=parameters,
                timeout_seconds=timeout_seconds,
                line=line,
            )
        line.flush()
        run_ms = (time.perf_counter() - started) * 1000
        end = pack(["end", job_id, type(ending).__name__, *astuple(ending), run_ms])
        with self.wire:
            self.current = None
            self._stream.sendall(end)

    def send(self, message: list[Any]) -> None:
        frame = pack(message)
        with self.wire:
            self._stream.sendall(frame)

    def _hand_back(self) -> None:
        """Called by the alarm when a round takes long: let others run what has not started."""
        if self.current is None:  # between two jobs: the next one may be off the round already
            self.alarm.set("share", self._hand_back, seconds=HAND_BACK_AGAIN_SECONDS)
        elif self._round:
            rest = [job[0] for job in self._round]
            self._round.clear()
            self.send(["back", rest])


class JobLine:
    """The `Line` of one job."""

    def __init__(self, child: Child, job_id: str) -> None:
        self._child = child
        self._job_id = job_id
        self._cancelled = False
        self._reported_at = 0.0
        self._held_back: Progress | None = None

    def report(self, progress: Progress) -> None:
        """Send it; what comes within REPORT_SECONDS of the last waits, and of those the newest is sent."""
        if self._child.current is not self:
            return
        wait = self._reported_at + REPORT_SECONDS - time.monotonic()
        if wait > 0 and progress.percent < 100:
            self._held_back = progress
            self._child.alarm.set("report", self.flush, seconds=wait)
        else:
            self._held_back = None
            self._send(progress)

    def flush(self) -> None:
        """Send what was held back."""
        progress, self._held_back = self._held_back, None
        if progress is not None:
            self._send(progress)

    def _send(self, progress: Progress) -> None:
        self._reported_at = time.monotonic()
        self._child.send(["progress", self._job_id, progress.percent, progress.message, progress.details])

    def cancelled(self) -> bool:
        """Whether the pool asked this job to stop, or it is over."""
        if not self._cancelled:
            with self._child.wire:
                if self._child.current is not self:
                    return True
                for message in self._child.frames.read(wait=False):
                    self._cancelled |= message.get("cancel") == self._job_id
        return self._cancelled


def live(stream: socket.socket, registry: Registry, begun: Count, *, memory_mib: int) -> None:
    """The whole life of a forked child; does not return. `begun` counts the jobs it starts.

    It may take `memory_mib` beyond what it was born with: a handler that asks for more gets MemoryError
    (setrlimit(2), RLIMIT_DATA; what it starts has the same limit). 0 sets none.
    """
    status = 0
    try:
        os.setpgid(0, 0)  # a kill takes what the handler started with it
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # The pool decides when to stop. Unlike SIG_IGN a function is not inherited by exec.
            signal.signal(name, lambda *_: None)
        if memory_mib and (born_with := private_mib(os.getpid())) is not None:
            limit = (born_with + memory_mib) << 20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        gc.enable()
        Child(stream, registry, begun).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the pool has gone
    except BaseException:
        status = BROKEN  # first: there may be nowhere to print to
        traceback.print_exc()
    finally:
        os._exit(status)
