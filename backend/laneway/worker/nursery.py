"""The nursery: a process of one thread, with the task modules loaded, that forks the pool's children.

Forking from a process with threads or connections is how locks are inherited locked and connections are
shared by accident; this process has neither. It starts as a fresh interpreter
(`python -m laneway.worker.nursery FD`), dies with the pool, and its children die with it.

Messages on the control socket (SOCK_SEQPACKET, JSON): to the nursery `"spawn"`; from it
`{"ready": [job types]}`, `{"failed": text}`, `{"child": pid}` with the child's socket attached, and
`{"exit": pid, "status": wait status}`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

from laneway.engine.registry import load
from laneway.worker import child

PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 1 << 16


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux). Leaves at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


class Nursery:
    """The loop of the nursery process."""

    def __init__(self, control: socket.socket, registry: Any) -> None:
        self._control = control
        self._registry = registry

    def serve(self) -> None:
        """Fork on request and report exits until the pool has gone."""
        wake_in, wake_out = socket.socketpair()
        wake_in.setblocking(False)
        wake_out.setblocking(False)
        signal.set_wakeup_fd(wake_out.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, lambda *_: None)
        while True:
            readable, _, _ = select.select([self._control, wake_in], [], [])
            if wake_in in readable:
                wake_in.recv(4096)
            self._report_exits()
            if self._control in readable:
                request = self._control.recv(MAX_MESSAGE)
                if not request:
                    return
                self._spawn(inherited=(wake_in, wake_out))

    def _spawn(self, *, inherited: tuple[socket.socket, ...]) -> None:
        ours, theirs = socket.socketpair()
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(me)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for stream in (self._control, ours, *inherited):
                stream.close()
            child.live(theirs, self._registry)
        theirs.close()
        socket.send_fds(self._control, [json.dumps({"child": pid}).encode()], [ours.fileno()])
        ours.close()

    def _report_exits(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._control.send(json.dumps({"exit": pid, "status": status}).encode())


def main() -> None:
    """`python -m laneway.worker.nursery FD PARENT MODULE…`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    try:
        registry = load(sys.argv[3:])
    except Exception:
        control.send(json.dumps({"failed": traceback.format_exc()[-8000:]}).encode())
        raise SystemExit(1) from None
    gc.collect()
    gc.freeze()  # what is loaded now stays shared between all children (copy on write)
    control.send(json.dumps({"ready": registry.names}).encode())
    try:
        Nursery(control, registry).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main()
