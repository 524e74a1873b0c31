"""Real processes of Laneway on one store and one Redis, with short timings, and what tests ask of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import redis as redis_py
import sqlalchemy as sa

from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.engine.access.callers import Caller, Role
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.lanes.live import RedisNews
from laneway.lanes.rq_lanes import RqLanes
from laneway.models import job_events, jobs, webhook_deliveries, webhook_messages, workers
from laneway.settings import Settings
from laneway.webhooks.messages import WAKE_CHANNEL
from servers import wait_until

TASKS = "process.tasks_for_tests"
PROGRAMS = Path(sys.executable).parent
SHORT = {
    "LANEWAY_LEASE_SECONDS": "20",
    "LANEWAY_BEAT_SECONDS": "0.3",
    "LANEWAY_POLL_SECONDS": "0.2",
    "LANEWAY_TICK_SECONDS": "0.2",
    "LANEWAY_DRAIN_SECONDS": "20",
    "LANEWAY_CANCEL_GRACE_SECONDS": "20",
    "LANEWAY_TIMEOUT_GRACE_SECONDS": "0.3",
    "LANEWAY_LOG_FORMAT": "json",
    "LANEWAY_TASKS": TASKS,
}
SHORT_LEASE = {"LANEWAY_LEASE_SECONDS": "3", "LANEWAY_BEAT_SECONDS": "0.4"}


class Process:
    """One process of a stack, its log beside it."""

    def __init__(self, name: str, command: Iterable[object], *, log: Path, env: dict[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def send(self, how: signal.Signals) -> None:
        self._popen.send_signal(how)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait(20)

    def wait(self, seconds: float = 20) -> int:
        """The exit status, as soon as it has ended."""
        wait_until(self.ended, what=f"{self.name} ended", seconds=seconds, evidence=self.said)
        return self._popen.wait()

    def ended(self) -> bool:
        return self._popen.poll() is not None

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def wait_for(self, text: str, *, times: int = 1) -> None:
        """Until its log holds `text` so often."""
        wait_until(
            lambda: self.log.read_text(errors="replace").count(text) >= times or self.ended(),
            what=f"{self.name} says {text!r}",
            evidence=self.said,
        )
        assert self.log.read_text(errors="replace").count(text) >= times, self.said()


class Stack:
    """Starts processes, makes jobs, looks at rows. Everything it started is gone when it closes."""

    def __init__(self, database_url: str, redis_url: str, folder: Path) -> None:
        self.folder = folder
        self.mark = new_id()
        self.processes: list[Process] = []
        self.env = os.environ | SHORT
        self.env |= {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "LANEWAY_DATABASE_URL": database_url,
            "LANEWAY_REDIS_URL": redis_url,
            "LANEWAY_DATA_DIR": str(folder / "data"),
            "STACK_OF_A_TEST": self.mark,  # every descendant carries it: see `pids`
        }
        self.redis_url = redis_url
        self.database = Database(database_url)
        self.settings = Settings(
            database_url=database_url, redis_url=redis_url, data_dir=folder / "data", webhook_allow_http=True
        )
        self.lanes = RqLanes(redis_url, clock=SystemClock())
        self._news = RedisNews(redis_url, courier_channel=WAKE_CHANNEL)
        self.service = JobService(self.database, self.lanes, self.settings, load([TASKS]), news=self._news)
        self.caller = Caller(new_id(), "tester", Role.OPERATOR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        wait_until(self._killed, what="no process is left", evidence=lambda: str(self.pids()))
        self.lanes.close()
        self._news.close()
        self.database.dispose()

    def _killed(self) -> bool:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not self.pids()

    # Processes

    def start(self, name: str, *command: object, **env: str) -> Process:
        number = len(self.processes)
        log = self.folder / f"{number}-{name}.log"
        process = Process(name, command, log=log, env=self.env | env)
        self.processes.append(process)
        return process

    def worker(self, *options: str, concurrency: int = 1, ready: bool = True, **env: str) -> Process:
        """`laneway worker`, ready: its children are there."""
        command = [sys.executable, "-m", "laneway", "worker", "--no-courier"]
        process = self.start("worker", *command, "--concurrency", concurrency, *options, **env)
        if ready:
            process.wait_for("worker_started")
            wait_until(
                lambda: len(self.children(process)) == concurrency,
                what="the children are there",
                evidence=process.said,
            )
        return process

    def scheduler(self, **env: str) -> Process:
        process = self.start("scheduler", sys.executable, "-m", "laneway", "scheduler", **env)
        process.wait_for("scheduler_started")
        return process

    def stock_worker(self, *lanes: str, burst: bool = False) -> Process:
        """The command `rq worker`, with nothing of ours on its command line."""
        how = ["--burst"] if burst else []
        return self.start("rq-worker", PROGRAMS / "rq", "worker", "--url", self.redis_url, *how, *lanes)

    def rq(self, *arguments: str) -> str:
        """What a stock `rq` command prints."""
        command = [PROGRAMS / "rq", arguments[0], "--url", self.redis_url, *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def redis_cli(self, *arguments: str) -> str:
        program = shutil.which("redis-cli") or PROGRAMS / "redis-cli"
        where = ["-s", self.redis_url.removeprefix("unix://")]
        done = subprocess.run([program, *where, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def redis(self) -> redis_py.Redis:
        return redis_py.Redis.from_url(self.redis_url, decode_responses=True)

    def pids(self) -> list[int]:
        """Everything alive that the stack's processes are or ever started."""
        wanted = f"STACK_OF_A_TEST={self.mark}".encode()
        return [pid for pid in _all_pids() if wanted in _read(pid, "environ") and is_alive(pid)]

    def nursery(self, worker: Process) -> int:
        (pid,) = (p for p in _children(worker.pid) if b"laneway.worker.nursery" in _read(p, "cmdline"))
        return pid

    def children(self, worker: Process, *, dead: bool = False) -> list[int]:
        """The children that wait for jobs or run them; with `dead` those too that nobody has reaped."""
        return [pid for pid in _children(self.nursery(worker)) if dead or is_alive(pid)]

    # Jobs

    def enqueue(self, job_type: str, parameters: dict[str, Any] | None = None, **spec: Any) -> str:
        return self.enqueue_all([(job_type, parameters or {})], **spec)[0]

    def enqueue_all(self, wanted: Iterable[tuple[str, dict[str, Any]]], **spec: Any) -> list[str]:
        """The ids of new jobs, queued in their order."""
        fast = {"retry_delay_seconds": 0.05, "retry_jitter": False}
        prepared = [
            self.service.prepare(JobSpec(job_type=name, parameters=given, **fast | spec), self.caller)
            for name, given in wanted
        ]
        answers = self.service.enqueue(prepared)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer["id"] for answer in answers if isinstance(answer, dict)]

    def cancel(self, job_id: str, **how: Any) -> None:
        self.service.cancel(job_id, self.caller, **how)

    def row(self, job_id: str) -> sa.RowMapping:
        return self.rows(sa.select(jobs).where(jobs.c.id == job_id))[0]

    def rows(self, query: sa.Select[Any]) -> list[sa.RowMapping]:
        with self.database.read() as connection:
            return list(connection.execute(query).mappings())

    def events(self, job_id: str) -> list[str]:
        """The job's actions, in order."""
        query = sa.select(job_events.c.action).where(job_events.c.job_id == job_id)
        return [row["action"] for row in self.rows(query.order_by(job_events.c.seq))]

    def errors(self, job_id: str) -> list[dict[str, Any]]:
        """The errors that its attempts ended with, in order."""
        e = job_events.c
        query = sa.select(e.error).where(e.job_id == job_id, e.error.is_not(None)).order_by(e.seq)
        return [row["error"] for row in self.rows(query)]

    def webhooks(self) -> list[tuple[str, str]]:
        """`(job id, event)` of every message that waits to be delivered."""
        m, d = webhook_messages.c, webhook_deliveries.c
        query = sa.select(m.job_id, m.event_type).join(webhook_deliveries, d.message_id == m.id)
        return [(row["job_id"], row["event_type"]) for row in self.rows(query.order_by(m.job_id))]

    def worker_rows(self) -> list[sa.RowMapping]:
        return self.rows(sa.select(workers).order_by(workers.c.started_at, workers.c.id))

    def statuses(self) -> dict[str, int]:
        count = sa.select(jobs.c.status, sa.func.count().label("n")).group_by(jobs.c.status)
        return {row["status"]: row["n"] for row in self.rows(count)}

    def hurry(self) -> None:
        """Let every job that waits for its next attempt be due now."""
        waiting = sa.update(jobs).where(jobs.c.status == "retrying")
        with self.database.write() as connection:
            connection.execute(waiting.values(next_retry_at=SystemClock().now()))

    # Waiting

    def until(self, condition: Callable[[], Any], *, what: str, seconds: float = 20) -> Any:
        return wait_until(condition, what=what, seconds=seconds, evidence=self.evidence)

    def wait_named(self, job_id: str) -> None:
        """Wait for a beat that says that the job has begun: only then is its worker's death blamed on it."""

        def named() -> bool:
            token = self.row(job_id)["lease_token"]
            return any(token in (row["begun"] or ()) for row in self.worker_rows())

        self.until(named, what="a beat names the job")

    def wait(self, job_id: str, *statuses: str, seconds: float = 20) -> sa.RowMapping:
        """The job's row, as soon as it has one of the statuses (default: `completed`)."""
        wanted = statuses or ("completed",)

        def reached() -> sa.RowMapping | None:
            row = self.row(job_id)
            return row if row["status"] in wanted else None

        row: sa.RowMapping = self.until(reached, what=f"{job_id} is {'/'.join(wanted)}", seconds=seconds)
        return row

    def wait_all(self, job_ids: Iterable[str], status: str = "completed", *, seconds: float = 30) -> None:
        wanted = list(job_ids)
        query = sa.select(sa.func.count().label("n")).where(jobs.c.id.in_(wanted), jobs.c.status == status)
        self.until(
            lambda: self.rows(query)[0]["n"] == len(wanted),
            what=f"{len(wanted)} jobs are {status}",
            seconds=seconds,
        )

    def wait_for_file(self, path: Path, *, lines: int = 1) -> list[str]:
        """The file's lines, as soon as there are so many."""
        self.until(
            lambda: path.exists() and len(path.read_text().splitlines()) >= lines,
            what=f"{path.name} has {lines} lines",
        )
        return path.read_text().splitlines()

    def evidence(self) -> str:
        parts = [f"statuses {self.statuses()}"]
        unfinished = sa.select(jobs).where(jobs.c.status != "completed").order_by(jobs.c.id).limit(5)
        for row in self.rows(unfinished):
            told = {name: row[name] for name in ("id", "job_type", "status", "lane", "attempt", "error")}
            parts += [str(told), f"    events {self.events(row['id'])}"]
        parts += [str({k: r[k] for k in ("id", "pid", "state", "beat")}) for r in self.worker_rows()]
        parts += [f"--- {process.log.name}\n{process.said()}" for process in self.processes]
        return "\n".join(parts)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[str]:
    """What follows the name in /proc/PID/stat: state, parent, … (proc(5)); nothing once it is gone."""
    return _read(pid, "stat").rpartition(b")")[2].decode().split()


def _state(pid: int) -> str:
    return (_stat(pid) or "X")[0]


def is_alive(pid: int) -> bool:
    return _state(pid) not in "ZX"


def descriptors(pid: int) -> int:
    """How many it has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _children(parent: int) -> list[int]:
    return sorted(pid for pid in _all_pids() if _stat(pid)[1:2] == [str(parent)])
