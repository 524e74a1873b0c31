"""What happened in a run, written down by everybody who saw it, and everything the checker reads.

A history is a folder of JSON Lines, one file per process: `O_APPEND`, one `write` a line, no fsync, since
what a `write` took outlives a SIGKILL. A line is one `Record`:

    {"i": "driver-71-4", "t": 912345678901234, "p": "driver", "f": "submit", "ph": "invoke", "v": {…}}

`i` names the operation, `t` is CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share, so
that lines of different files have one order. An operation begins with `invoke` and ends with `ok`, `fail`
(it certainly did nothing) or `info` (nobody knows: a timeout, a reset). `info` stays open for ever, as in
Jepsen, and so does an operation whose process was killed. What the operations are called and say:

    f         who       invoke               ok                                 fail
    submit    driver    tenant, unique_key?  tenant, status, job_id             status, retry_after
    cancel    driver    tenant, job_id       tenant, job_id, done, attempt      status, retry_after
    read      driver    tenant               tenant, ids, foreign               status, retry_after
    progress  watcher   -                    tenant, job_id, attempt, percent   -
    run       handler   job_id, attempt, pid job_id, attempt, digest            job_id, attempt, error
    receive   receiver  -                    webhook_id, job_id, verified       -
    outage    driver    what                 what                               -

- `status` is the HTTP status, `retry_after` the header or None. `done` and `attempt` of a cancel are of the
  job that was answered. A connection that was refused is a `fail` without a status.
- `ids` are all job ids that a reply named, `foreign` all canaries of other tenants found in it.
- `progress` is written once per thing seen, all lines of one watcher of one job under one `i`.
- `run` is the execution ledger: `digest` is `digest(result)`. `receive` is one line per arrival.
- `outage`: `what` ("database") is out of everybody's reach from a moment before `invoke` until a moment
  after `ok`: write `invoke` after the fault holds, and `ok` before it is healed.

Other operations (`fault`, `note`, …) are welcome: no check reads them, timelines show them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from laneway import models
from laneway.db import Database

MAX_LINE_BYTES = 16 * 1024
FOLDER_VARIABLE = "CHAOS_HISTORY"

Row = Mapping[str, Any]
"""A row of the store: column names as in `models`, moments aware, JSON decoded."""


class Phase(StrEnum):
    """How far an operation was when its line was written."""

    INVOKE = "invoke"
    OK = "ok"
    FAIL = "fail"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a history."""

    i: str
    t: int
    p: str
    f: str
    ph: Phase
    v: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Op:
    """An operation that was invoked: end it with one of these, or leave it open."""

    i: str
    f: str
    _write: Callable[[str, str, Phase, Mapping[str, Any]], None]

    def ok(self, **v: Any) -> None:
        self._write(self.i, self.f, Phase.OK, v)

    def fail(self, **v: Any) -> None:
        self._write(self.i, self.f, Phase.FAIL, v)

    def info(self, **v: Any) -> None:
        self._write(self.i, self.f, Phase.INFO, v)


class History:
    """Writes this process's file. Safe in threads, and after a fork: the child opens its own file."""

    def __init__(self, folder: Path, process: str) -> None:
        self._folder = folder
        self._process = process
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._count = itertools.count()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._process}-{self._pid}-{time.monotonic_ns()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def op(self, f: str) -> Op:
        """An operation without an `invoke` line: something that is only seen."""
        if os.getpid() != self._pid:
            os.close(self._file)
            self._open()
        return Op(f"{self._process}-{self._pid}-{next(self._count)}", f, self._write)

    def invoke(self, f: str, **v: Any) -> Op:
        """Begin an operation; written before this returns."""
        op = self.op(f)
        self._write(op.i, f, Phase.INVOKE, v)
        return op

    def note(self, f: str, **v: Any) -> None:
        """One `ok` line under an id of its own."""
        self.op(f).ok(**v)

    def _write(self, i: str, f: str, ph: Phase, v: Mapping[str, Any]) -> None:
        record = {"i": i, "t": time.monotonic_ns(), "p": self._process, "f": f, "ph": ph, "v": v}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a line of {f!r} has {len(line)} bytes; {MAX_LINE_BYTES} are allowed: say less")
        os.write(self._file, line)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_ledger: History | None = None


@contextmanager
def execution(job_id: str, attempt: int) -> Iterator[Callable[[Any], Any]]:
    """The execution ledger's lines of one run of a handler, in the folder that `CHAOS_HISTORY` names.

        with execution(job.id, job.attempt) as finished:
            …
            return finished(result)

    `finished` writes the digest and returns `result`. An exception is a `fail`; a killed process is silent.
    """
    global _ledger  # noqa: PLW0603 - one file per process
    if _ledger is None:
        _ledger = History(Path(os.environ[FOLDER_VARIABLE]), "ledger")
    who = {"job_id": job_id, "attempt": attempt}
    op = _ledger.invoke("run", **who, pid=os.getpid())

    def finished(result: Any) -> Any:
        op.ok(**who, digest=digest(result))
        return result

    try:
        yield finished
    except BaseException as error:
        op.fail(**who, error=type(error).__name__)
        raise


def digest(result: Any) -> str:
    """The same for equal JSON values, whatever the order of their keys."""
    text = json.dumps(result, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_history(folder: Path) -> list[Record]:
    """All records of a folder, oldest first. A last line that its process did not finish is left out.

    Raises ValueError for any other line that is no record.
    """
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                said = json.loads(line)
                records.append(
                    Record(said["i"], said["t"], said["p"], said["f"], Phase(said["ph"]), said["v"])
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.name}:{number} is no record: {line[:80]!r}") from error
    return sorted(records, key=lambda record: record.t)


@dataclass(frozen=True, slots=True)
class Series:
    """Something measured again and again: `points` are (seconds of any clock, value), oldest first.

    `most` is the bound on each value. `growth_percent_per_hour` bounds the slope of the straight line fitted
    to the points, as a share of their mean; None where the run was too short to say. A line that rises by no
    more than `slack` from its first point to its last is flat: pools open connections when they need them.
    """

    name: str  # "api-1 rss bytes", "redis used_memory bytes", "worker-2 fds", "database connections"
    points: Sequence[tuple[float, float]]
    most: float | None = None
    growth_percent_per_hour: float | None = None
    slack: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What the harness knows of its own run, and how long things may take in it.

    `calm`: from/to in wall time, when every fault was healed and workers for every job type and lane were
    alive. In a calm stretch with jobs queued, some claim happens every `stall_seconds`, which must be longer
    than the longest handler. A job whose cancel was answered has ended `cancel_seconds` later, unless that
    moment was not in a calm stretch. `clock_error_seconds`: by how much any process's wall clock may have
    been wrong; None when clocks were set wrong on purpose, which leaves out what only wall clocks can say.
    `counters`: what GET /queue/stats answered each tenant after the end, `{tenant id: {status: count}}`.
    """

    crash_limit: int = 3
    stall_seconds: float = 30.0
    cancel_seconds: float = 30.0
    clock_error_seconds: float | None = 0.05
    calm: Sequence[tuple[datetime, datetime]] = ()
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    series: Sequence[Series] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the checker reads: the history, and the store's rows after the run came to rest.

    `events` are by job id, in the order of `seq`. `wall_offset` is the wall time at CLOCK_MONOTONIC 0. Times
    of operations and of rows are compared through it.
    """

    history: Sequence[Record]
    jobs: Mapping[str, Row]
    events: Mapping[str, Sequence[Row]]
    messages: Sequence[Row] = ()
    deliveries: Sequence[Row] = ()
    batches: Sequence[Row] = ()
    chain_runs: Sequence[Row] = ()
    facts: Facts = Facts()
    wall_offset: datetime = datetime(1970, 1, 1, tzinfo=UTC)

    @classmethod
    def read(cls, database: Database, folder: Path, facts: Facts) -> Run:
        """From the store and the folder of the history. Wait until the jobs came to rest first."""
        with database.read() as connection:
            rows = {
                table.name: _rows(connection, table)
                for table in (
                    models.jobs,
                    models.job_events,
                    models.webhook_messages,
                    models.webhook_deliveries,
                    models.batches,
                    models.chain_runs,
                )
            }
        offset = datetime.now(UTC) - timedelta(microseconds=time.monotonic_ns() / 1000)
        return cls(
            history=read_history(folder),
            jobs={row["id"]: row for row in rows["jobs"]},
            events=by_job(rows["job_events"]),
            messages=rows["webhook_messages"],
            deliveries=rows["webhook_deliveries"],
            batches=rows["batches"],
            chain_runs=rows["chain_runs"],
            facts=facts,
            wall_offset=offset,
        )

    def at(self, record: Record) -> datetime:
        """The wall time of a record."""
        return self.wall_offset + timedelta(microseconds=record.t / 1000)


def _rows(connection: sa.Connection, table: sa.Table) -> list[Row]:
    columns = [column for column in table.c if column.name not in ("payload", "parameters")]
    found = connection.execute(sa.select(*columns))
    names = list(found.keys())
    return [dict(zip(names, row, strict=True)) for row in found]


def by_job(events: Sequence[Row]) -> dict[str, list[Row]]:
    """The events of each job, in the order of `seq`."""
    jobs: dict[str, list[Row]] = defaultdict(list)
    for event in sorted(events, key=lambda row: row["seq"]):
        jobs[event["job_id"]].append(event)
    return dict(jobs)


def timeline(run: Run, job_id: str) -> list[str]:
    """All that is known of a job, oldest first: its events and the history's records that name it."""
    lines = [
        (
            event["at"],
            f"event {event['seq']} {event['action']} -> {event['status']}"
            f" attempt {event['attempt']} by {event['actor']} {event['reason'] or ''}",
        )
        for event in run.events.get(job_id, ())
    ]
    lines += [
        (run.at(record), f"{record.p} {record.f} {record.ph} {dict(record.v)}")
        for record in run.history
        if job_id in (record.v.get("job_id"), *record.v.get("ids", ())) or record.f in ("fault", "outage")
    ]
    return [f"{at:%H:%M:%S.%f} {what}" for at, what in sorted(lines)]
