"""A child of the pool: runs the handlers it is sent, one at a time, and talks over one socket.

To the child:   {"run": [[job_id, attempt, job_type, parameters, timeout_seconds], …]}
                {"cancel": job_id}
From the child: ["end", job_id, kind, values…, run_ms]   kind names a class of `engine/endings.py`
                ["progress", job_id, percent, message, details]
                ["back", [job_id, …]]                     the rest of a round, not started

Children hold no connection and no lock: killing one at any instant breaks nothing but its own job. Each
ending is written before the next job starts, so the first job of a round without an ending is the one
that ran when a child died.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from dataclasses import astuple
from typing import Any

from laneway.engine.context import Progress
from laneway.engine.endings import Raised
from laneway.engine.registry import Registry
from laneway.worker.running import Runner
from laneway.worker.wire import Frames, pack

HAND_BACK_SECONDS = 0.02
REPORT_SECONDS = 0.05


class Child:
    """The child's side of the socket, and the `Line` of the job that runs."""

    def __init__(self, stream: socket.socket, registry: Registry) -> None:
        self._stream = stream
        self._frames = Frames(stream)
        self._registry = registry
        self._runner = Runner()
        self._sending = False
        self._job_id = ""
        self._cancelled = False
        self._round: list[list[Any]] = []
        self._reported_at = 0.0
        self._unsent: Progress | None = None

    def serve(self) -> None:
        """Run rounds until the pool closes the socket."""
        while not self._frames.ended:
            for message in self._frames.read():
                self._round += message.get("run", ())
            if len(self._round) > 1:
                self._runner.alarm.nudge(self._hand_back, after=HAND_BACK_SECONDS)
            while self._round:
                self._run(self._round.pop(0))
            self._runner.alarm.nudge(None, after=0)
            self._runner.alarm.clear()

    def _run(self, job: list[Any]) -> None:
        job_id, attempt, name, parameters, timeout_seconds = job
        self._job_id, self._cancelled, self._unsent = job_id, False, None
        started = time.perf_counter()
        job_type = self._registry.get(name)
        if job_type is None:
            ending: Any = Raised("UnknownJobType", f"this worker does not know {name!r}")
        else:
            ending = self._runner.run(
                job_type,
                job_id=job_id,
                attempt=attempt,
                parameters=parameters,
                timeout_seconds=timeout_seconds,
                line=self,
            )
        if self._unsent is not None:
            self._send_progress(self._unsent)
        run_ms = (time.perf_counter() - started) * 1000
        self._send(["end", job_id, type(ending).__name__, *astuple(ending), run_ms])
        self._job_id = ""

    def _send(self, message: list[Any]) -> None:
        self._sending = True
        try:
            self._stream.sendall(pack(message))
        finally:
            self._sending = False

    def _hand_back(self) -> bool:
        """Called by the alarm when a job of a round takes long: let others run the rest."""
        if self._sending:
            return False
        if self._round and self._job_id:
            rest, self._round = [job[0] for job in self._round], []
            self._send(["back", rest])
        return True

    # The line of the running job

    def report(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._reported_at < REPORT_SECONDS and progress.percent < 100:
            self._unsent = progress
            return
        self._reported_at = now
        self._unsent = None
        self._send_progress(progress)

    def _send_progress(self, progress: Progress) -> None:
        self._send(["progress", self._job_id, progress.percent, progress.message, progress.details])

    def cancelled(self) -> bool:
        if not self._cancelled:
            self._stream.setblocking(False)
            try:
                for message in self._frames.read():
                    self._cancelled |= message.get("cancel") == self._job_id
                    self._round += message.get("run", ())
            finally:
                self._stream.setblocking(True)
        return self._cancelled


def live(stream: socket.socket, registry: Registry) -> None:
    """The whole life of a forked child; does not return."""
    status = 0
    try:
        os.setpgid(0, 0)  # a kill takes what the handler started with it
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(
                name, lambda *_: None
            )  # the pool decides; unlike SIG_IGN this is not inherited by exec
        gc.enable()
        Child(stream, registry).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the pool has gone
    except BaseException:
        status = 70
        raise
    finally:
        os._exit(status)
