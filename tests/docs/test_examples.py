"""What the pages tell people to type is typed here, against a real `laneway dev`.

A comment above a block says what it is:

    runs                        it ends with success: shell on one after the other, Python by itself
    runs in the background      it goes on until the page ends
    prints                      lines of what the block before printed, in order; `…` is anything
    the background prints       the same of the background, sooner or later
    file: NAME                  a file that is there from the beginning
    layers                      test_documented compares it with pyproject.toml
    PostgreSQL                  test_troubleshoot runs SQL on both stores, this on PostgreSQL alone

Only the port and the folder differ from what a reader has.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from redis import Redis

from docs.markdown import ROOT, Block, blocks, pages
from laneway.api.app import create_api
from laneway.cli.embedded import find_redis
from laneway.settings import Settings
from process.stack import Process
from servers import wait_until

MARKS = ("runs", "runs in the background", "prints", "the background prints", "layers", "PostgreSQL")
API = "http://127.0.0.1:8000"
RECEIVER_PORT = "9000"
EXAMPLES = {page: found for page in pages() if (found := list(blocks(page)))}
FILES = {
    block.mark.removeprefix("file: "): block.text
    for found in EXAMPLES.values()
    for block in found
    if block.mark.startswith("file: ")
}
TASKS = ("feedback_summaries", *(name.removesuffix(".py") for name in FILES if not name.endswith("_api.py")))


def shells(*languages: str) -> list[Block]:
    return [block for found in EXAMPLES.values() for block in found if block.language in languages]


@dataclass
class Reader:
    """Somebody with a checkout, a running `laneway dev` and a shell."""

    folder: Path
    url: str
    receiver_port: str
    env: dict[str, str]
    background: list[Process] = field(default_factory=list)

    def run(self, block: Block) -> str:
        """Type the block; what it printed. Variables stay for the page's next block."""
        state = self.folder / "variables"
        state.touch()
        script = (
            f"set -a\nsource {state}\nset -eu -o pipefail\n{self._here(block.text)}\nexport -p > {state}\n"
        )
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def start(self, block: Block) -> None:
        """Type the block into a terminal of its own."""
        script = f"cd {self.folder}\n{self._here(block.text)}"
        log = self.folder / f"background-{len(self.background)}.log"
        self.background.append(Process(block.place, ["bash", "-c", script], log=log, env=self.env))
        wait_until(self._receiver_answers, what=f"{block.place} listens", evidence=self.background[-1].said)

    def stop(self) -> None:
        for process in self.background:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.background.clear()
        (self.folder / "variables").unlink(missing_ok=True)

    def _here(self, text: str) -> str:
        return text.replace(API, self.url).replace(
            f"127.0.0.1:{RECEIVER_PORT}", f"127.0.0.1:{self.receiver_port}"
        )

    def _receiver_answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", int(self.receiver_port))) == 0


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader whose `make dev` runs, with the modules that the pages show."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "docs").symlink_to(ROOT / "docs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    _fill_bin(folder / ".venv" / "bin")
    env = {name: value for name, value in os.environ.items() if not name.startswith("LANEWAY_")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "backend"), str(folder)]), "PORT": _free_port()}
    dev_env = env | {"LANEWAY_TASKS": ",".join(TASKS), "LANEWAY_RATE_LIMITS": "off", "PYTHONUNBUFFERED": "1"}
    dev = Process(
        "dev",
        [sys.executable, "-m", "laneway", "dev", "--port", "0", "--data-dir", folder / ".laneway"],
        log=folder / "dev.log",
        env=dev_env,
    )
    try:
        dev.wait_for("Queue a job:")
        found = re.search(r"API +(http://\S+)", dev.log.read_text())
        assert found, dev.said()
        with Redis(unix_socket_path=str(folder / ".laneway" / "redis.sock")) as client:
            wait_until(
                lambda: client.smembers("rq:workers"), what="the worker shows itself", evidence=dev.said
            )
        yield Reader(folder, found[1], env["PORT"], env | {"LANEWAY_URL": found[1]})
    finally:
        dev.send(signal.SIGTERM)
        dev.wait(60)


def _fill_bin(folder: Path) -> None:
    """`.venv/bin` as `make` leaves it, as far as the pages use it."""
    folder.mkdir(parents=True)
    server = find_redis()
    programs = {
        "python": sys.executable,
        "laneway": f"{sys.executable} -m laneway",
        "rq": f"{sys.executable} -m rq.cli",
        "redis-cli": server.with_name(server.name.replace("-server", "-cli")),
    }
    for name, program in programs.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        path.chmod(0o755)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def lacks(wanted: str, printed: str) -> str | None:
    """The first line of `wanted` that `printed` does not hold after those before it, else None."""
    lines = iter(printed.splitlines())
    for line in wanted.splitlines():
        pattern = ".*".join(map(re.escape, line.rstrip().split("…")))
        if not any(re.search(f"^{pattern}$", each.rstrip()) for each in lines):
            return line
    return None


RUNNING = [
    page for page, found in EXAMPLES.items() if any(b.mark == "runs" and b.language == "sh" for b in found)
]


@pytest.mark.xdist_group("reader")
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_the_commands_of_a_page_do_what_it_says(page: Path, reader: Reader) -> None:
    printed = ""
    try:
        for block in EXAMPLES[page]:
            match block.mark, block.language:
                case "runs", "sh":
                    printed = reader.run(block)
                case "runs in the background", "sh":
                    reader.start(block)
                case "prints", _:
                    missing = lacks(block.text, printed)
                    assert missing is None, f"{block.place}: no line {missing!r} in\n{printed}"
                case "the background prints", _:
                    log = reader.background[-1].log
                    wait_until(
                        lambda text=block.text, log=log: lacks(text, log.read_text()) is None,
                        what=f"the background printed what {block.place} says",
                        evidence=log.read_text,
                    )
    finally:
        reader.stop()


PYTHON = shells("python")


@pytest.mark.parametrize(
    "block", [block for block in PYTHON if block.mark == "runs"], ids=lambda block: block.place
)
def test_a_python_example_runs(block: Block, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "backend")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"],
        input=block.text,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_python_example_can_be_read() -> None:
    for block in PYTHON:
        if ROOT / "docs" / "reference" not in block.page.parents:  # signatures
            compile(block.text, block.place, "exec", dont_inherit=True)


def test_every_mark_is_one_that_is_acted_on() -> None:
    marks = {block.mark: block.place for found in EXAMPLES.values() for block in found}
    assert {
        place for mark, place in marks.items() if mark and mark not in MARKS and mark[:6] != "file: "
    } == set()


def test_every_url_in_a_command_is_a_route() -> None:
    settings = Settings.model_construct(tasks=("feedback_summaries",))
    paths = [re.sub(r"\{[^}]+\}", "[^/]+", path) for path in create_api(settings).openapi()["paths"]]
    wrong = [
        f"{block.place}: {path}"
        for block in shells("sh")
        for path in re.findall(re.escape(API) + r"(/[^\s\"'?]*)", block.text)
        if not any(re.fullmatch(known, path) for known in [*paths, "/api/v1/?", "/docs", "/openapi.json"])
        and not path.startswith("/api/v1/greetings/")  # of the page that shows how to add it
    ]
    assert wrong == []
