"""`laneway` as a process of its own: run to its end, or running until it is stopped, with all it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from laneway.settings import PREFIX
from servers import wait_until

PACKAGES = str(Path(__file__).parents[1] / "backend")


def environment(**variables: object) -> dict[str, str]:
    """This process's environment without settings of Laneway's but `variables`; None leaves one out."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    given = {name: str(value) for name, value in variables.items() if value is not None}
    return kept | {"PYTHONPATH": PACKAGES, "COLUMNS": "200"} | given


def laneway(*arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """`laneway …`, run to its end without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "laneway", *map(str, arguments)],
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Running:
    """`laneway …` between `with` and its end; killed then, if it still runs. `out` and `err` are files."""

    def __init__(self, folder: Path, *arguments: object, **variables: object) -> None:
        self._command = [sys.executable, "-m", "laneway", *map(str, arguments)]
        self._environment = environment(**variables)
        folder.mkdir(parents=True, exist_ok=True)
        self._seen: set[Process] = set()
        self._files = folder / f"{arguments[0]}.out", folder / f"{arguments[0]}.err"

    def __enter__(self) -> Self:
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._seen |= family(self.process.pid)
        self.process.kill()
        self.process.wait()
        try:
            wait_until(lambda: not alive(self._seen), what="what it started is gone", evidence=self.evidence)
        finally:
            for pid, _started in alive(self._seen):
                os.kill(pid, signal.SIGKILL)

    @property
    def out(self) -> str:
        return self._files[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._files[1].read_text(errors="replace")

    def evidence(self) -> str:
        return f"exit code {self.process.poll()}\n{self.out[-2000:]}\n{self.err[-4000:]}"

    def says(self, text: str, *, seconds: float = 60) -> None:
        """Wait until `text` stands in what it wrote."""
        wait_until(
            lambda: text in self.out + self.err or self.process.poll() is not None,
            what=f"it says {text!r}",
            seconds=seconds,
            evidence=self.evidence,
        )
        assert text in self.out + self.err, self.evidence()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send `how`; the exit code."""
        self._seen |= family(self.process.pid)
        self.process.send_signal(how)
        return self.ended()

    def ended(self) -> int:
        """The exit code, once it has one."""
        wait_until(
            lambda: self.process.poll() is not None, what="it ends", seconds=60, evidence=self.evidence
        )
        return self.process.returncode


Process = tuple[int, str]
"""A process's id and the moment it started: ids come back, the pair does not."""


def family(pid: int) -> set[Process]:
    """The process and its descendants, of those that run."""
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(stat)
        if fields is not None:
            table[int(stat.parent.name)] = (int(fields[1]), fields[19])
    found, grown = {pid}, True
    while grown:
        children = {child for child, (parent, _) in table.items() if parent in found}
        grown = not children <= found
        found |= children
    return {(each, table[each][1]) for each in found if each in table}


def alive(processes: set[Process]) -> set[Process]:
    """Those of `processes` that still run."""
    running = set()
    for pid, started in processes:
        fields = _fields(Path(f"/proc/{pid}/stat"))
        if fields is not None and fields[19] == started and fields[0] != "Z":
            running.add((pid, started))
    return running


def command_line(pid: int) -> str:
    """What the process was started as, with spaces between the words; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def member(pid: int, command: str) -> int:
    """The id of the descendant of `pid` that runs `laneway <command>`, as soon as there is one."""

    def look() -> Any:
        words = f"-m laneway {command}"
        return next((p for p, _ in family(pid) if words in command_line(p)), None)

    return int(wait_until(look, what=f"`laneway {command}` runs below {pid}"))


def _fields(stat: Path) -> list[str] | None:
    """What proc(5) says after the command's name: state, parent, …"""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
