"""The processes that are measured: started, watched, weighed, and ended with all they started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from laneway.cli.embedded import die_with_parent

STOP_SECONDS = 15.0
_PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "backend")]


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `variables`, for processes that import the benchmark."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS), **variables}


class Program:
    """A role of `roles.py`, running between `with` and its end. Its words go to `log`."""

    def __init__(
        self, *role: str, variables: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()
    ) -> None:
        self._role = role
        self._variables = variables
        self._pass_fds = pass_fds
        self.log = log

    def __enter__(self) -> Self:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command("bench.roles", *self._role),
                env=environment(self._variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=self._pass_fds,
                start_new_session=True,  # Ctrl-C reaches the benchmark, which ends its programs
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509
            )
        return self

    def __exit__(self, *_: object) -> None:
        """SIGTERM first, as in a deploy; what that leaves is killed."""
        if self._process.poll() is not None:
            return
        descendants = self.tree()[1:]
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _kill(descendants)

    def tree(self) -> list[int]:
        """Its process id and those of all that descend from it, parents first."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                after_name = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
        found = [self._process.pid]
        for pid in found:
            found += children.get(pid, ())
        return found

    def kill(self) -> None:
        """SIGKILL for the whole tree at once."""
        _kill(self.tree())
        self._process.wait()

    def need_alive(self) -> None:
        """Raise AssertionError with its last words if it has ended."""
        code = self._process.poll()
        assert code is None, f"{self._role} ended with {code}:\n{self.words()}"

    def words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def memory_mib(self) -> dict[str, float]:
        """`rss` and `pss` summed over the tree, as the kernel counts them now (proc(5), smaps_rollup)."""
        sums = {"rss": 0, "pss": 0}
        for pid in self.tree():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # a work horse that ended just now
            for name in sums:
                found = re.search(rf"^{name}:\s+(\d+) kB", text, re.IGNORECASE | re.MULTILINE)
                assert found is not None, text
                sums[name] += int(found[1])
        return {name: kib / 1024 for name, kib in sums.items()}


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
