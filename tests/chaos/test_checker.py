"""The checker of the chaos suite: a right run passes, and each way to be wrong is seen, by one invariant."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from chaos.checker import CHECKS, Invariant, Violation, check
from chaos.history import (
    FOLDER_VARIABLE,
    MAX_LINE_BYTES,
    Facts,
    History,
    Phase,
    Record,
    Run,
    Series,
    by_job,
    digest,
    execution,
    read_history,
    timeline,
)
from factories import add_job, add_worker
from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.domain.events import EVENT_OF
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.outcomes import carry_out
from laneway.engine.transitions import Claim, Complete

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
NORTH, SOUTH = "tenant-north", "tenant-south"
WORKER, OTHER_WORKER = "worker:1", "worker:2"
RESULT = {"number": 1}
CRASH = {"type": "ProcessDied", "category": "crash"}
TRANSIENT = {"type": "TransientError", "category": "transient"}


@dataclass
class World:
    """A run in the making, in plain rows that a test may bend. Times are seconds after START."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    deliveries: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    chain_runs: list[dict[str, Any]] = field(default_factory=list)
    history: list[Record] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)

    def run(self) -> Run:
        return Run(
            history=sorted(self.history, key=lambda record: record.t),
            jobs=self.jobs,
            events=by_job(self.events),
            messages=self.messages,
            deliveries=self.deliveries,
            batches=self.batches,
            chain_runs=self.chain_runs,
            facts=self.facts,
            wall_offset=START,
        )

    def record(self, i: str, at: float, f: str, ph: Phase, **v: Any) -> None:
        self.history.append(Record(i, int(at * 1e9), "p", f, ph, v))

    def op(self, f: str, at: float, end: float, ph: Phase = Phase.OK, **v: Any) -> None:
        """An operation and its end, both saying the same."""
        i = f"{f}-{len(self.history)}"
        self.record(i, at, f, Phase.INVOKE, **v)
        self.record(i, end, f, ph, **v)

    def job(self, job_id: str, at: float, *, tenant: str = NORTH, **columns: Any) -> None:
        """A row with its first event, and its acknowledgement."""
        self.jobs[job_id] = {
            "id": job_id,
            "tenant_id": tenant,
            "status": "queued",
            "attempt": 0,
            "event_seq": 0,
            "retry_count": 0,
            "crash_count": 0,
            "worker_id": None,
            "max_retries": 1,
            "retry_delay_seconds": 2.0,
            "retry_backoff": 2.0,
            "retry_max_delay_seconds": 3.0,
            "retry_jitter": True,
            "scheduled_for": None,
            "unique_key": None,
            "webhook_url": None,
            "webhook_events": None,
            "result": None,
            "tags": [],
            "concurrency_key": None,
            "concurrency_limit": None,
            "batch_id": None,
            "chain_run_id": None,
            "chain_step": None,
        } | columns
        first = "scheduled" if self.jobs[job_id]["scheduled_for"] else "queued"
        self.event(job_id, at, "create", first, actor="alice")
        key = self.jobs[job_id]["unique_key"]
        self.op("submit", at, at + 0.1, tenant=tenant, status=202, job_id=job_id, unique_key=key)

    def event(
        self, job_id: str, at: float, action: str, status: str, *, actor: str = WORKER, **columns: Any
    ) -> None:
        """An event, what it does to the row, and the message that it owes."""
        row = self.jobs[job_id]
        row["event_seq"] += 1
        row["attempt"] += action == "claim"
        row["status"] = status
        event = {
            "job_id": job_id,
            "seq": row["event_seq"],
            "tenant_id": row["tenant_id"],
            "action": action,
            "status": status,
            "attempt": row["attempt"],
            "at": START + timedelta(seconds=at),
            "actor": actor,
            "reason": None,
            "error": None,
        } | columns
        self.events.append(event)
        if action == "complete":
            row["result"] = RESULT
        if action in ("retry", "retry_later"):
            row["retry_count"] = row["crash_count"] = 0
        elif (event["error"] or {}).get("category") == "crash":
            row["crash_count"] += 1
        elif action == "back_off":
            row["retry_count"] += 1
        if row["webhook_url"] and status in FINAL:
            self._tell(row, event, at)

    def _tell(self, row: dict[str, Any], event: dict[str, Any], at: float) -> None:
        message = {
            "id": f"msg_{row['id']}_{event['seq']}",
            "tenant_id": row["tenant_id"],
            "job_id": row["id"],
            "job_seq": event["seq"],
            "event_type": str(EVENT_OF[JobStatus(event["status"])]),
        }
        self.messages.append(message)
        self.deliveries.append(
            {
                "message_id": message["id"],
                "tenant_id": row["tenant_id"],
                "job_id": row["id"],
                "status": "delivered",
            }
        )
        seen = {"webhook_id": message["id"], "job_id": row["id"], "verified": True}
        self.record(f"in-{message['id']}", at + 0.2, "receive", Phase.OK, **seen)

    def attempt(self, job_id: str, at: float, end: float, how: str, status: str, **columns: Any) -> None:
        """A claim, its run, and how it ended; a crash leaves the run open."""
        self.event(job_id, at, "claim", "running")
        v = {"job_id": job_id, "attempt": self.jobs[job_id]["attempt"]}
        i = f"run-{job_id}-{v['attempt']}"
        self.record(i, at + 0.01, "run", Phase.INVOKE, **v, pid=1)
        if how == "complete":
            self.record(i, end - 0.01, "run", Phase.OK, **v, digest=digest(RESULT))
        elif (columns.get("error") or {}).get("category") != "crash":
            self.record(i, end - 0.01, "run", Phase.FAIL, **v, error="E")
        self.event(job_id, end, how, status, **columns)

    def chain(self, run_id: str, chain_id: str, status: str, stages: list[list[int]]) -> None:
        """A run that stops on failure, without its steps."""
        steps = [number for stage in stages for number in stage]
        self.chain_runs.append(
            {
                "id": run_id,
                "chain_id": chain_id,
                "status": status,
                "plan": {"stages": stages, "steps": [{} for _ in steps]},
                "stop_on_failure": True,
                "step_errors": {},
                "finished_at": START + timedelta(seconds=9),
            }
        )

    def find(self, job_id: str, action: str) -> dict[str, Any]:
        """The job's last event of that action."""
        return [e for e in self.events if (e["job_id"], e["action"]) == (job_id, action)][-1]

    def change(self, f: str, ph: Phase, job_id: str | None, *, to: Phase | None = None, **v: Any) -> None:
        """Say something else in the first such record."""
        for place, record in enumerate(self.history):
            if (record.f, record.ph) == (f, ph) and job_id in (None, record.v.get("job_id")):
                self.history[place] = replace(record, ph=to or ph, v={**record.v, **v})
                return
        raise LookupError(f"no {f} {ph} of {job_id}")

    def drop(self, f: str, ph: Phase, job_id: str) -> None:
        kept = [r for r in self.history if (r.f, r.ph, r.v.get("job_id")) != (f, ph, job_id)]
        assert len(kept) < len(self.history)
        self.history = kept


def right() -> World:
    """Every kind of life that the checks speak of, each as it should be."""
    world = World()
    world.job("plain", 1, webhook_url="https://r.example", unique_key="k")
    world.attempt("plain", 2, 4, "complete", "completed")
    for at, percent in ((2.2, 10), (2.4, 10), (2.6, 90)):
        world.record(
            "watch", at, "progress", Phase.OK, tenant=NORTH, job_id="plain", attempt=1, percent=percent
        )

    world.job("again", 5, unique_key="k")  # the key is free again
    world.attempt("again", 6, 7, "complete", "completed")

    world.job("flaky", 1)
    world.attempt("flaky", 2, 3, "back_off", "retrying", error=TRANSIENT)
    world.event("flaky", 4.5, "enqueue", "queued", actor="scheduler")
    world.attempt("flaky", 5, 6, "complete", "completed")

    world.job("hopeless", 1, webhook_url="https://r.example", webhook_events=["job.failed"])
    world.attempt("hopeless", 2, 3, "back_off", "retrying", error=TRANSIENT)
    world.event("hopeless", 5.5, "enqueue", "queued", actor="scheduler")
    world.attempt("hopeless", 6, 7, "fail", "failed", error=TRANSIENT, reason="exhausted")
    world.event("hopeless", 8, "retry", "queued", actor="alice")
    world.attempt("hopeless", 9, 10, "fail", "failed", error=TRANSIENT, reason="permanent")

    world.job("deadly", 1, tenant=SOUTH)
    world.attempt("deadly", 2, 3, "back_off", "retrying", error=CRASH)
    world.event("deadly", 8.5, "enqueue", "queued", actor="scheduler")
    world.attempt("deadly", 9, 10, "release", "queued", error=CRASH, actor="scheduler")
    world.attempt("deadly", 11, 12, "fail", "failed", error=CRASH, reason="poison")

    world.job("unwanted", 1)
    world.op("cancel", 1.5, 1.6, tenant=NORTH, job_id="unwanted", done=True, attempt=0)
    world.event("unwanted", 1.55, "cancel", "cancelled", actor="alice")

    world.job("stopped", 1)
    world.attempt("stopped", 2, 5, "stop", "cancelled")
    world.op("cancel", 3, 3.1, tenant=NORTH, job_id="stopped", done=False, attempt=1)

    world.job("later", 1, scheduled_for=START + timedelta(seconds=10))
    world.event("later", 10.1, "enqueue", "queued", actor="scheduler")
    world.attempt("later", 10.2, 11, "complete", "completed")

    for job_id, at in (("keyed", 2), ("keyed-too", 3)):
        world.job(job_id, 1, concurrency_key="key", concurrency_limit=1)
        world.attempt(job_id, at, at + 1, "complete", "completed")

    flow: dict[str, Any] = {"tenant": NORTH, "number": 7}
    world.op("flow", 1, 1.1, **flow, kind="batch", flow_id="batch")
    world.job("first", 1, batch_id="batch")
    world.attempt("first", 2, 3, "complete", "completed")
    world.job("second", 1, batch_id="batch")
    world.attempt("second", 3, 4, "fail", "failed", error=TRANSIENT, reason="permanent")
    for name in ("on_complete", "on_failure"):
        world.job(name, 4, tags=[f"{name}-7"])
        world.attempt(name, 5, 6, "complete", "completed")
    world.batches.append(
        {
            "id": "batch",
            "enqueued": 2,
            "finished_at": START + timedelta(seconds=4),
            "counts": {"completed": 1, "failed": 1},
            "callbacks": {name: {} for name in ("on_complete", "on_success", "on_failure")},
        }
    )

    world.op("flow", 1, 1.1, **flow, kind="chain", flow_id="chain")
    world.chain("well", "chain", "completed", [[0], [1, 2]])
    for step, at in ((0, 2), (1, 4), (2, 4)):
        world.job(f"well-{step}", at - 1, chain_run_id="well", chain_step=step)
        world.attempt(f"well-{step}", at, at + 1, "complete", "completed")
    world.chain("badly", "another", "failed", [[0], [1]])
    world.job("badly-0", 1, chain_run_id="badly", chain_step=0)
    world.attempt("badly-0", 2, 3, "fail", "failed", error=TRANSIENT, reason="permanent")

    world.op("read", 3, 3.2, tenant=SOUTH, ids=["deadly"], foreign=[])
    world.op("outage", 13, 20, what="database")
    world.op("submit", 14, 15, Phase.FAIL, tenant=NORTH, status=503, retry_after="2")
    world.op("submit", 14, 15, Phase.INFO, tenant=NORTH)
    steady = [(float(second), 1000.0 + second % 2) for second in range(60)]
    world.facts = Facts(
        crash_limit=3,
        stall_seconds=3,
        cancel_seconds=4,
        calm=[(START, START + timedelta(seconds=13))],
        counters={
            NORTH: {"completed": 12, "failed": 3, "cancelled": 2, "queued": 0},
            SOUTH: {"failed": 1},
        },
        series=[
            Series("api rss bytes", steady, most=1001.0, growth_percent_per_hour=5.0),
            Series("api fds", [(0, 20.0), (60, 28.0)], growth_percent_per_hour=5.0, slack=8.0),
        ],
    )
    return world


def test_a_right_run_breaks_nothing() -> None:
    assert check(right().run()) == []


Mutant = Callable[[World], None]
MUTANTS: list[tuple[Invariant, str, Mutant]] = []


def mutant(invariant: Invariant, what: str) -> Callable[[Mutant], Mutant]:
    """A way to be wrong that `invariant` alone must see."""

    def add(bend: Mutant) -> Mutant:
        MUTANTS.append((invariant, what, bend))
        return bend

    return add


I = Invariant  # noqa: E741 - a column of it follows


@mutant(I.DURABLE, "an acknowledged job has no row")
def _(world: World) -> None:
    world.op("submit", 1, 2, tenant=NORTH, status=202, job_id="nowhere")


@mutant(I.DURABLE, "a job that ran has no row")
def _(world: World) -> None:
    world.op("run", 1, 2, job_id="nowhere", attempt=1, digest="")


@mutant(I.DURABLE, "a job is still running at the end")
def _(world: World) -> None:
    world.job("stuck", 1, tenant="tenant-west")
    world.event("stuck", 2, "claim", "running")


@mutant(I.AT_LEAST_ONCE, "completed without a run that finished")
def _(world: World) -> None:
    world.drop("run", Phase.OK, "flaky")


@mutant(I.AT_LEAST_ONCE, "the result of another run is recorded")
def _(world: World) -> None:
    world.jobs["flaky"]["result"] = {"number": 2}


@mutant(I.FENCED, "a worker that does not hold the job completes it")
def _(world: World) -> None:
    world.find("plain", "complete")["actor"] = OTHER_WORKER


@mutant(I.FENCED, "a stale attempt completes the job")
def _(world: World) -> None:
    world.find("flaky", "complete")["attempt"] = 1
    world.jobs["flaky"]["attempt"] = 1
    world.change("run", Phase.FAIL, "flaky", to=Phase.OK, digest=digest(RESULT))


@mutant(I.FENCED, "a worker settles a job that waits")
def _(world: World) -> None:
    world.events.remove(world.find("later", "claim"))
    world.find("later", "complete")["seq"] = 3
    world.jobs["later"]["event_seq"] = 3
    for event in world.events:
        event["attempt"] -= event["job_id"] == "later" and event["seq"] == 3
    world.jobs["later"]["attempt"] = 0
    world.change("run", Phase.INVOKE, "later", attempt=0)
    world.change("run", Phase.OK, "later", attempt=0)


@mutant(I.FENCED, "one attempt is run twice")
def _(world: World) -> None:
    world.op("run", 2.5, 2.6, job_id="plain", attempt=1, digest=digest(RESULT))


@mutant(I.FENCED, "an attempt runs that nobody claimed")
def _(world: World) -> None:
    world.op("run", 3.5, 3.6, Phase.FAIL, job_id="flaky", attempt=3)


@mutant(I.FINAL, "the scheduler queues an ended job again")
def _(world: World) -> None:
    world.find("hopeless", "retry")["actor"] = "scheduler"


@mutant(I.FINAL, "an end is changed into another")
def _(world: World) -> None:
    world.event("unwanted", 2, "expire", "expired", actor="scheduler")
    world.facts = replace(world.facts, counters={})


@mutant(I.COMPLETED_ONCE, "a job completes twice")
def _(world: World) -> None:
    world.event("again", 7.5, "complete", "completed")


@mutant(I.ATTEMPTS, "a claim skips a number")
def _(world: World) -> None:
    for action in ("claim", "complete"):
        world.find("flaky", action)["attempt"] = 3
    world.jobs["flaky"]["attempt"] = 3
    world.history = [
        replace(r, v={**r.v, "attempt": 3}) if r.i == "run-flaky-2" else r for r in world.history
    ]


@mutant(I.ATTEMPTS, "promoting a retry changes the attempt")
def _(world: World) -> None:
    world.find("flaky", "enqueue")["attempt"] = 0


@mutant(I.PROGRESS, "progress falls within an attempt")
def _(world: World) -> None:
    world.record("watch", 2.8, "progress", Phase.OK, tenant=NORTH, job_id="plain", attempt=1, percent=80)


@mutant(I.PROGRESS, "progress of an old attempt is shown")
def _(world: World) -> None:
    for at, attempt in ((2.8, 2), (2.9, 1)):
        told = {"tenant": NORTH, "job_id": "flaky", "attempt": attempt, "percent": 10}
        world.record("other", at, "progress", Phase.OK, **told)


@mutant(I.PROGRESS, "progress beyond the whole")
def _(world: World) -> None:
    world.record("watch", 2.8, "progress", Phase.OK, tenant=NORTH, job_id="plain", attempt=1, percent=101)


@mutant(I.NOT_EARLY, "a scheduled job runs before its time")
def _(world: World) -> None:
    world.jobs["later"]["scheduled_for"] = START + timedelta(seconds=10.3)


@mutant(I.RETRIES, "a retry does not wait")
def _(world: World) -> None:
    world.find("flaky", "enqueue")["at"] = START + timedelta(seconds=3.9)  # half of 2 s is the least


@mutant(I.RETRIES, "a crash is tried again at once")
def _(world: World) -> None:
    world.find("deadly", "enqueue")["at"] = START + timedelta(seconds=7.9)


@mutant(I.RETRIES, "one retry too many")
def _(world: World) -> None:
    world.jobs["flaky"]["max_retries"] = 0


@mutant(I.RETRIES, "given up with a retry left")
def _(world: World) -> None:
    world.jobs["hopeless"]["max_retries"] = 2


@mutant(I.MESSAGES, "an end is not told")
def _(world: World) -> None:
    lost = world.messages.pop(0)["id"]
    world.deliveries.pop(0)
    world.history = [r for r in world.history if r.v.get("webhook_id") != lost]


@mutant(I.MESSAGES, "an end is told twice")
def _(world: World) -> None:
    world.messages.append(world.messages[0] | {"id": "msg_twice"})
    world.deliveries.append(world.deliveries[0] | {"message_id": "msg_twice", "status": "dead"})


@mutant(I.MESSAGES, "a message tells of an end that was not subscribed")
def _(world: World) -> None:
    world.jobs["plain"]["webhook_events"] = ["job.failed"]


@mutant(I.MESSAGES, "a message has no delivery")
def _(world: World) -> None:
    world.deliveries.pop(0)


@mutant(I.MESSAGES, "a delivery is never tried")
def _(world: World) -> None:
    world.deliveries[0]["status"] = "pending"


@mutant(I.MESSAGES, "recorded as delivered, and nobody received it")
def _(world: World) -> None:
    world.drop("receive", Phase.OK, "plain")


@mutant(I.MESSAGES, "something is received that no row knows")
def _(world: World) -> None:
    world.op("receive", 4, 5, webhook_id="msg_unknown", job_id="plain", verified=True)


@mutant(I.MESSAGES, "a signature does not verify")
def _(world: World) -> None:
    world.change("receive", Phase.OK, "plain", verified=False)


@mutant(I.UNIQUE, "two active jobs hold one key")
def _(world: World) -> None:
    for event, at in zip([e for e in world.events if e["job_id"] == "again"], (1.5, 2.5, 7), strict=True):
        event["at"] = START + timedelta(seconds=at)


@mutant(I.UNIQUE, "a key is answered with a job that does not hold it")
def _(world: World) -> None:
    world.op("submit", 2, 3, tenant=NORTH, status=202, job_id="plain", unique_key="other")


@mutant(I.CONCURRENCY, "a second job of a key begins before the first is done")
def _(world: World) -> None:
    world.history = [
        replace(r, t=r.t - 10**8) if (r.i, r.ph) == ("run-keyed-too-1", Phase.INVOKE) else r
        for r in world.history
    ]


@mutant(I.CHAIN, "an acknowledged chain has no run")
def _(world: World) -> None:
    world.op("flow", 1, 2, tenant=NORTH, number=8, kind="chain", flow_id="nowhere")


@mutant(I.CHAIN, "a run has no end")
def _(world: World) -> None:
    world.chain_runs[1]["finished_at"] = None


@mutant(I.CHAIN, "a run is called completed although a step failed")
def _(world: World) -> None:
    world.chain_runs[1]["status"] = "completed"


@mutant(I.CHAIN, "a step begins before the one before it is done")
def _(world: World) -> None:
    world.history = [
        replace(r, t=r.t + 2 * 10**9) if (r.i, r.ph) == ("run-well-0-1", Phase.OK) else r
        for r in world.history
    ]


@mutant(I.CHAIN, "a step follows a failed one that stops the run")
def _(world: World) -> None:
    world.job("badly-1", 4, chain_run_id="badly", chain_step=1)
    world.attempt("badly-1", 5, 6, "complete", "completed")
    world.facts = replace(world.facts, counters={})


@mutant(I.CHAIN, "a step is made twice")
def _(world: World) -> None:
    world.job("well-2-again", 4, chain_run_id="well", chain_step=2)
    world.attempt("well-2-again", 5, 6, "complete", "completed")
    world.facts = replace(world.facts, counters={})


@mutant(I.BATCH, "an acknowledged batch has no row")
def _(world: World) -> None:
    world.op("flow", 1, 2, tenant=NORTH, number=8, kind="batch", flow_id="nowhere")


@mutant(I.BATCH, "a job of a batch is missing")
def _(world: World) -> None:
    world.batches[0]["enqueued"] = 3


@mutant(I.BATCH, "a batch has no end")
def _(world: World) -> None:
    world.batches[0] |= {"finished_at": None, "counts": None}


@mutant(I.BATCH, "a batch ends before its last job")
def _(world: World) -> None:
    world.batches[0]["counts"] = {"completed": 1, "running": 1}


@mutant(I.BATCH, "a callback is not made")
def _(world: World) -> None:
    world.jobs["on_complete"]["tags"] = []


@mutant(I.BATCH, "a callback is made twice")
def _(world: World) -> None:
    world.jobs["on_complete"]["tags"] = ["on_failure-7"]
    world.job("more", 4, tags=["on_complete-7"])
    world.attempt("more", 5, 6, "complete", "completed")
    world.facts = replace(world.facts, counters={})


@mutant(I.BATCH, "a failed batch is followed by what a success is followed by")
def _(world: World) -> None:
    world.jobs["on_failure"]["tags"] = ["on_success-7"]


@mutant(I.TENANT, "a list shows another tenant's job")
def _(world: World) -> None:
    world.change("read", Phase.OK, None, ids=["plain"])


@mutant(I.TENANT, "a reply holds another tenant's canary")
def _(world: World) -> None:
    world.change("read", Phase.OK, None, foreign=["cx_north_7"])


@mutant(I.TENANT, "a message belongs to another tenant than its job")
def _(world: World) -> None:
    world.messages[0]["tenant_id"] = SOUTH


@mutant(I.TENANT, "an event belongs to another tenant than its job")
def _(world: World) -> None:
    world.find("plain", "claim")["tenant_id"] = SOUTH


@mutant(I.ACCOUNTING, "a row says another status than its last event")
def _(world: World) -> None:
    world.jobs["flaky"]["status"] = "failed"
    world.facts = replace(world.facts, counters={})


@mutant(I.ACCOUNTING, "an event is missing")
def _(world: World) -> None:
    world.events = [e for e in world.events if (e["job_id"], e["seq"]) != ("unwanted", 1)]


@mutant(I.ACCOUNTING, "a job has no event at all")
def _(world: World) -> None:
    world.events = [e for e in world.events if e["job_id"] != "unwanted"]


@mutant(I.ACCOUNTING, "a retry is not counted")
def _(world: World) -> None:
    world.jobs["flaky"]["retry_count"] = 0


@mutant(I.ACCOUNTING, "a job leaves a status by an action that may not")
def _(world: World) -> None:
    world.find("unwanted", "create")["status"] = "running"


@mutant(I.ACCOUNTING, "a counter is off by one")
def _(world: World) -> None:
    world.facts = replace(world.facts, counters={SOUTH: {"failed": 2}})


@mutant(I.POISON, "a job is blamed for an attempt that it never began")
def _(world: World) -> None:
    world.history = [r for r in world.history if r.i != "run-deadly-2"]


@mutant(I.POISON, "a job may take down one process more than allowed")
def _(world: World) -> None:
    world.facts = replace(world.facts, crash_limit=2)


@mutant(I.POISON, "a job is called poison too early")
def _(world: World) -> None:
    world.facts = replace(world.facts, crash_limit=4)


@mutant(I.CANCEL, "an attempt begins after the cancel of a waiting job was answered")
def _(world: World) -> None:
    world.op("cancel", 1.2, 1.3, tenant=NORTH, job_id="again", done=True, attempt=0)


@mutant(I.CANCEL, "another attempt follows the cancel of a running job")
def _(world: World) -> None:
    world.op("cancel", 2.5, 2.6, tenant=NORTH, job_id="flaky", done=False, attempt=1)


@mutant(I.CANCEL, "a cancelled job goes on past its grace")
def _(world: World) -> None:
    world.find("stopped", "stop")["at"] = START + timedelta(seconds=8)


@mutant(I.BACKPRESSURE, "a job is accepted without the database")
def _(world: World) -> None:
    world.op("submit", 14, 15, tenant=NORTH, status=202, job_id="plain")


@mutant(I.BACKPRESSURE, "503 does not say how long to wait")
def _(world: World) -> None:
    world.change("submit", Phase.FAIL, None, retry_after=None)


@mutant(I.BACKPRESSURE, "429 does not say how long to wait")
def _(world: World) -> None:
    world.change("submit", Phase.FAIL, None, status=429, retry_after=None)


@mutant(I.BACKPRESSURE, "a request breaks something")
def _(world: World) -> None:
    world.change("submit", Phase.FAIL, None, status=500)


@mutant(I.BOUNDED, "memory passes its bound")
def _(world: World) -> None:
    series = world.facts.series[0]
    world.facts = replace(world.facts, series=[replace(series, most=1000.9)])


@mutant(I.BOUNDED, "descriptors grow by one more than pools may open")
def _(world: World) -> None:
    grown = Series("api fds", [(0, 20.0), (60, 29.0)], growth_percent_per_hour=5.0, slack=8.0)
    world.facts = replace(world.facts, series=[grown])


@mutant(I.BOUNDED, "memory grows")
def _(world: World) -> None:
    points = [(float(second), 1000.0 + second / 60) for second in range(60)]  # 6 % an hour
    series = replace(world.facts.series[0], points=points)
    world.facts = replace(world.facts, series=[series])


@mutant(I.NO_STALL, "nothing is claimed while jobs wait")
def _(world: World) -> None:
    world.job("waits", 30, tenant="tenant-west")
    world.attempt("waits", 34, 35, "complete", "completed")
    calm = (START + timedelta(seconds=29), START + timedelta(seconds=40))
    world.facts = replace(world.facts, calm=[calm])


@pytest.mark.parametrize(
    ("invariant", "bend"),
    [pytest.param(invariant, bend, id=f"{invariant}-{what}") for invariant, what, bend in MUTANTS],
)
def test_each_way_to_be_wrong_is_seen_by_one_invariant(invariant: Invariant, bend: Mutant) -> None:
    world = copy.deepcopy(right())
    bend(world)
    found = check(world.run())
    assert {violation.invariant for violation in found} == {invariant}, found


def test_every_invariant_has_a_check_and_a_mutant() -> None:
    assert set(Invariant) == set(CHECKS) == {invariant for invariant, _, _ in MUTANTS}


# What else the checker is asked


def test_after_a_callers_retry_a_cancelled_job_may_run() -> None:
    world = right()
    world.event("unwanted", 3, "retry", "queued", actor="alice")
    world.attempt("unwanted", 3.5, 4, "complete", "completed")
    world.facts = replace(world.facts, counters={})
    assert check(world.run()) == []


def test_with_clocks_set_wrong_only_what_needs_no_clock_is_judged() -> None:
    world = right()
    world.jobs["later"]["scheduled_for"] = START + timedelta(hours=1)
    world.find("flaky", "enqueue")["at"] = START
    world.facts = replace(world.facts, clock_error_seconds=None)
    assert check(world.run()) == []
    world.find("plain", "complete")["actor"] = OTHER_WORKER
    assert [violation.invariant for violation in check(world.run())] == [Invariant.FENCED]


def test_an_operation_that_nobody_saw_end_is_no_acknowledgement() -> None:
    world = right()
    world.record("open", 1, "submit", Phase.INVOKE, tenant=NORTH)
    world.record("unknown", 1, "submit", Phase.INVOKE, tenant=NORTH)
    world.record("unknown", 2, "submit", Phase.INFO, tenant=NORTH, error="timeout", job_id="nowhere")
    assert check(world.run()) == []


def test_twenty_thousand_jobs_are_checked_and_one_wrong_among_them_is_found() -> None:
    world = World()
    for number in range(20_000):
        job_id, at = f"job-{number}", number / 100
        world.job(job_id, at, webhook_url="https://r.example")
        if number % 3 == 0:
            world.attempt(job_id, at + 0.1, at + 0.2, "back_off", "retrying", error=TRANSIENT)
            world.event(job_id, at + 3, "enqueue", "queued", actor="scheduler")
        world.attempt(job_id, at + 3, at + 4, "complete", "completed")
    world.facts = Facts(calm=[(START, START + timedelta(hours=1))])
    world.jobs["job-7"]["result"] = None
    began = time.process_time()
    found = check(world.run())
    print(f"{len(world.events)} events in {time.process_time() - began:.1f} s")
    assert [(violation.invariant, violation.job_id) for violation in found] == [(I.AT_LEAST_ONCE, "job-7")]


# The history itself


def test_what_each_process_writes_is_read_in_the_order_of_time(tmp_path: Path) -> None:
    with History(tmp_path, "driver") as ours:
        op = ours.invoke("submit", tenant=NORTH)
        child = os.fork()
        if not child:
            ours.note("fault", kind="none")
            os._exit(0)
        os.waitpid(child, 0)
        op.ok(job_id="a")
        lost = ours.invoke("submit", tenant=NORTH)
        lost.info(error="timeout")
    records = read_history(tmp_path)
    assert [(r.f, r.ph) for r in records] == [
        ("submit", Phase.INVOKE),
        ("fault", Phase.OK),
        ("submit", Phase.OK),
        ("submit", Phase.INVOKE),
        ("submit", Phase.INFO),
    ]
    assert len({r.i for r in records}) == 3
    assert records[0].i == records[2].i
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_that_a_killed_process_did_not_finish_is_left_out(tmp_path: Path) -> None:
    with History(tmp_path, "driver") as history:
        history.note("fault")
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b'{"i":"x","t"')
    assert len(read_history(tmp_path)) == 1
    path.write_bytes(b'{"i":"x","t"\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"jsonl:1 is no record"):
        read_history(tmp_path)


def test_a_line_has_a_longest_length(tmp_path: Path) -> None:
    with History(tmp_path, "driver") as history:
        history.note("fault", text="")
        [path] = tmp_path.iterdir()
        room = MAX_LINE_BYTES - path.stat().st_size - 8  # the clock may gain a few digits
        history.note("fault", text="x" * room)
        with pytest.raises(ValueError, match="say less"):
            history.note("fault", text="x" * (room + 16))
    assert len(read_history(tmp_path)) == 2


def test_the_ledger_tells_runs_that_finish_from_those_that_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr("chaos.history._ledger", None)
    with execution("a", 1) as finished:
        assert finished({"b": 1, "a": [None]}) == {"b": 1, "a": [None]}
    with pytest.raises(KeyError), execution("a", 2):
        raise KeyError
    assert [(r.ph, r.v["attempt"]) for r in read_history(tmp_path)] == [
        (Phase.INVOKE, 1),
        (Phase.OK, 1),
        (Phase.INVOKE, 2),
        (Phase.FAIL, 2),
    ]
    assert read_history(tmp_path)[1].v["digest"] == digest({"a": [None], "b": 1})


def test_a_run_is_read_from_the_store_and_its_folder(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "history"))
    monkeypatch.setattr("chaos.history._ledger", None)
    job_id, worker_id, token = add_job(database), add_worker(database), new_id()
    with database.write() as connection:
        now = SystemClock().now()
        actor = f"worker:{worker_id}"
        carry_out(connection, [Claim(job_id, token, worker_id, now)], now=now, actor=actor)
        with execution(job_id, 1) as finished:
            finished(RESULT)
        moves = [Complete(job_id, 1, token, json.dumps(RESULT))]
        carry_out(connection, moves, now=now + timedelta(seconds=1), actor=actor)
    run = Run.read(database, tmp_path / "history", Facts())
    assert check(run) == []
    assert [line.split(" ", 1)[1] for line in timeline(run, job_id) if "event" in line][-1] == (
        f"event 3 complete -> completed attempt 1 by {actor} "
    )
    assert abs(run.at(run.history[0]) - now) < timedelta(minutes=1)
    wrong = replace(run, history=())
    assert [type(violation) for violation in check(wrong)] == [Violation]
    assert check(wrong)[0].invariant is Invariant.AT_LEAST_ONCE
