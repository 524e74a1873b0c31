"""The nursery: a process of one thread, with the task modules loaded, that forks the pool's children.

Forking from a process with threads or connections is how locks are inherited locked and connections are
shared by accident; this process has neither. It starts as a fresh interpreter
(`python -m laneway.worker.nursery FD PARENT MODULE…`), dies with the pool, and its children die with it.
A child is the leader of a process group: what a handler starts is killed when its child has died, unless
it went into a session of its own.

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

from laneway.engine.registry import Registry, load
from laneway.worker import child

PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 1 << 16


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux). Leaves at once if it already has."""
    _on_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _on_parents_death(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


class Nursery:
    """The loop of the nursery process."""

    def __init__(self, control: socket.socket, registry: Registry) -> None:
        self._control = control
        self._registry = registry
        self._children: set[int] = set()
        self._wake = socket.socketpair()  # as long-lived as this: signals come when the loop has ended too

    def serve(self) -> None:
        """Fork on request and report exits until the pool has gone; then kill what is left."""
        _on_parents_death(0)  # from here on the end of the control socket says so, and leaves time to kill
        try:
            self._serve()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the pool has gone
        finally:
            signal.set_wakeup_fd(-1)  # the children die now, and nobody is to be woken
            for pid in self._children:
                _kill_group(pid)

    def _serve(self) -> None:
        wake_in, wake_out = self._wake
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
            try:
                die_with_parent(me)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for stream in (self._control, ours, *inherited):
                    stream.close()
                child.live(theirs, self._registry)
            finally:
                os._exit(child.BROKEN)
        theirs.close()
        self._children.add(pid)
        try:
            os.setpgid(pid, pid)  # here and in the child: whoever is first, a kill finds the group
        except (PermissionError, ProcessLookupError):
            pass  # it has died already
        socket.send_fds(self._control, [json.dumps({"child": pid}).encode()], [ours.fileno()])
        ours.close()

    def _report_exits(self) -> None:
        while self._children:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                return
            _kill_group(dead.si_pid)  # before it is reaped: until then nobody else can get its number
            pid, status = os.waitpid(dead.si_pid, 0)
            self._children.discard(pid)
            self._control.send(json.dumps({"exit": pid, "status": status}).encode())


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it that this user may kill


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
    Nursery(control, registry).serve()


if __name__ == "__main__":
    main()
