"""What memory a process has taken for itself, and a little that two share."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


class Count:
    """A number that a process counts up, and the one that forked it can read, also after its death."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)  # shared with what is forked from now on

    def up(self) -> None:
        self._memory[:] = (self.read() + 1).to_bytes(8, "little")

    def read(self) -> int:
        return int.from_bytes(self._memory, "little")


def forget_peak() -> None:
    """Let this process's peak of resident memory, which its parent gets with its death, start from now.

    Linux only (proc(5), /proc/PID/clear_refs); elsewhere the peak stays that of its whole life.
    """
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(descriptor, b"5")
    except OSError:
        pass
    finally:
        os.close(descriptor)


def private_mib(pid: int) -> int | None:
    """MiB of private writable memory, touched or not: what RLIMIT_DATA counts, and the stack.

    None where it cannot be known: the process has gone, or this is not Linux (proc(5), /proc/PID/statm).
    """
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[5])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20
