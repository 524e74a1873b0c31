"""What the jobs of both sides do: write one 16-byte record, and nothing else.

The file is opened when this module is imported, which every worker does before it forks, so a record
costs one `write` on either side. Appends of one write each do not mix (open(2), O_APPEND). The time is
CLOCK_MONOTONIC, which all processes of one machine share.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "BENCH_RECORDS"
_RECORD = struct.Struct("<qq")
_file = (
    os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT) if VARIABLE in os.environ else -1
)


def record(number: int) -> None:
    """The handler: says that job `number` has begun."""
    os.write(_file, _RECORD.pack(number, time.monotonic_ns()))


@dataclass(frozen=True, slots=True)
class Records:
    """What the handlers of one run wrote: `(job number, monotonic nanoseconds)`, in the order of writing."""

    entries: Sequence[tuple[int, int]]

    @classmethod
    def read(cls, path: Path) -> Records:
        return cls(list(_RECORD.iter_unpack(path.read_bytes())))

    @property
    def rate(self) -> float:
        """Jobs a second from the first to the last record; what starts and stops is left out."""
        times = [at for _, at in self.entries]
        return (len(times) - 1) / (max(times) - min(times)) * 1e9

    def need_each_once(self, count: int) -> None:
        """Raise AssertionError unless jobs 0 to `count` - 1 each began exactly once."""
        begun = sorted(number for number, _ in self.entries)
        assert begun == list(range(count)), f"{len(begun)} of {count} jobs began, {len(set(begun))} different"


def count_records(path: Path) -> int:
    """How many records there are, without reading them."""
    return path.stat().st_size // _RECORD.size
