"""The nursery: a process of one thread, with the task modules loaded, that forks the pool's children.

Forking from a process with threads or connections is how locks are inherited locked and connections are
shared by accident; this process has neither. It starts as a fresh interpreter
(`python -m laneway.worker.nursery FD PARENT MEMORY_MIB MODULE…`), dies with the pool, and its children
die with it.

Nothing that a handler started outlives its child. A child leads a process group, which is killed with it.
On Linux it is also the reaper of what it started (prctl(2), PR_SET_CHILD_SUBREAPER), and the nursery that
of the children: a daemon, gone into a session of its own, becomes the nursery's when its child has died,
and is killed then.

Messages on the control socket (SOCK_SEQPACKET, JSON): to the nursery `"spawn"`; from it
`{"ready": [job types], "forked": [those whose jobs get a process each]}`, `{"failed": text}`,
`{"child": pid}` with the child's socket attached, and
`{"exit": pid, "status": wait status, "begun": jobs it started, "peak_memory_mib": largest resident set}`.
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
from contextlib import suppress
from pathlib import Path

from laneway.engine.registry import Registry, load
from laneway.worker import child
from laneway.worker.memory import Count

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_MESSAGE = 1 << 16
PEAK_UNITS_A_MIB = 1 << 20 if sys.platform == "darwin" else 1 << 10  # getrusage(2): bytes or KiB


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux). Leaves at once if it already has."""
    _on_parents_death(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _on_parents_death(number: int) -> None:
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (Linux)."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


class NurseryLoop:
    """What the nursery process does, from when the task modules are loaded."""

    def __init__(self, control: socket.socket, registry: Registry, *, memory_mib: int) -> None:
        self._control = control
        self._registry = registry
        self._memory_mib = memory_mib  # of one child, beyond what it is born with; 0: no limit
        self._children: dict[int, Count] = {}  # how many jobs each has started
        self._loaded = set(_own_processes())  # what a task module started when it was loaded
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
            _end_all()

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
        begun = Count()
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(me)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for stream in (self._control, ours, *inherited):
                    stream.close()
                adopt_orphans()
                child.live(theirs, self._registry, begun, memory_mib=self._memory_mib)
            finally:
                os._exit(child.BROKEN)
        theirs.close()
        self._children[pid] = begun
        try:
            os.setpgid(pid, pid)  # here and in the child: whoever is first, a kill finds the group
        except (PermissionError, ProcessLookupError):
            pass  # it has died already
        socket.send_fds(self._control, [json.dumps({"child": pid}).encode()], [ours.fileno()])
        ours.close()

    def _report_exits(self) -> None:
        """Reap whoever died, kill what that left behind, and report the children among them."""
        while (dead := _dead()) is not None:
            if dead in self._children:
                _kill_group(dead)  # before it is reaped: until then nobody else can get its number
            _, status, usage = os.wait4(dead, 0)
            for orphan in {*_own_processes()} - self._children.keys() - self._loaded:
                os.kill(orphan, signal.SIGKILL)  # its own children come to us when it is reaped
            if (begun := self._children.pop(dead, None)) is not None:
                peak = usage.ru_maxrss // PEAK_UNITS_A_MIB
                report = {"exit": dead, "status": status, "begun": begun.read(), "peak_memory_mib": peak}
                self._control.send(json.dumps(report).encode())


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in it that this user may kill


def _dead() -> int | None:
    """A process of ours that has died and is not reaped yet."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None  # there is none at all
    return found.si_pid if found else None


def _end_all() -> None:
    """Kill and reap all that is ours, and what becomes ours by that."""
    while True:
        for pid in _own_processes():
            os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def _own_processes() -> list[int]:
    """Our children, dead ones that are not reaped yet included (Linux; elsewhere none)."""
    try:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:
        return []  # not Linux, or built without CONFIG_PROC_CHILDREN
    return [int(pid) for pid in listed.split()]


def main() -> None:
    """`python -m laneway.worker.nursery FD PARENT MEMORY_MIB MODULE…`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    try:
        registry = load(sys.argv[4:])
    except Exception:
        control.send(json.dumps({"failed": traceback.format_exc()[-8000:]}).encode())
        raise SystemExit(1) from None
    for job_type in registry:
        with suppress(Exception):  # a bad signature is told of by the jobs that it fails
            _ = job_type.model  # made here once, and not in each child
    gc.collect()
    gc.freeze()  # what is loaded now stays shared between all children (copy on write)
    adopt_orphans()
    control.send(json.dumps({"ready": registry.names, "forked": registry.forked}).encode())
    NurseryLoop(control, registry, memory_mib=int(sys.argv[3])).serve()


if __name__ == "__main__":
    main()
