"""Couriers and workers killed (SIGKILL) while jobs end: is each end told, and under one id?

`python -m process.webhook_kills` is the whole run: 1,000 jobs on PostgreSQL, at least 150 kills, then the
same with a mutant that writes messages after the commit, which must lose some. With a role, it is that role
of `laneway` with leases short enough for such a run.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import sqlalchemy as sa

from chaos import mutants
from laneway.domain.events import EVENT_OF
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.models import jobs, tenants, webhook_deliveries
from laneway.webhooks.secrets import SecretBox, new_webhook_secret, tenant_context
from process.stack import SHORT_LEASE, TASKS, Process, Stack
from servers import PostgresServer, RedisServer
from webhook_receiver import Exchange, Receiver

MUTANT = "WEBHOOK_KILLS_MUTANT"
OUTSTANDING = 40
READY = {"courier": "courier_started", "worker": "worker_started", "scheduler": "scheduler_started"}
ANSWER_SECONDS = 0.01
SENDING_SECONDS = 0.05  # what the mutant needs between the commit and the message


@dataclass(slots=True)
class Report:
    """What came of a run. `lost` and `strange` must be empty."""

    kills: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    requests: int = 0
    duplicates: int = 0
    lost: list[str] = field(default_factory=list)  # ended jobs nobody was told of
    strange: list[str] = field(default_factory=list)  # jobs whose end came under two ids or with two bodies

    def __str__(self) -> str:
        kills = ", ".join(f"{count} of {name}s" for name, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kills}), {self.ended} jobs ended, {self.requests} requests, "
            f"{self.duplicates} of them repeated under the same webhook-id, "
            f"{len(self.strange)} under another, {len(self.lost)} messages lost"
        )


class Ground:
    """A stack whose couriers and workers die, and the receiver of what their jobs tell."""

    def __init__(self, stack: Stack, receiver: Receiver, *, rng: Random, mutant: str = "") -> None:
        self._stack, self._receiver, self._rng = stack, receiver, rng
        self._env = SHORT_LEASE | {
            "LANEWAY_WEBHOOK_ALLOW_HTTP": "1",
            "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
            "LANEWAY_WEBHOOK_TIMEOUT_SECONDS": "1",
            "LANEWAY_DRAIN_SECONDS": "5",
            "LANEWAY_ENCRYPTION_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}",
            MUTANT: mutant,
        }
        self._ids: list[str] = []
        self.report = Report()
        open_settings = stack.settings.model_copy(update={"webhook_allowed_cidrs": ("127.0.0.0/8",)})
        stack.service = JobService(stack.database, stack.lanes, open_settings, load([TASKS]))
        tenant_id = stack.caller.tenant_id
        sealed = SecretBox({"k1": bytes(32)}).seal(new_webhook_secret(), tenant_context(tenant_id))
        with stack.database.write() as connection:
            connection.execute(
                sa.insert(tenants).values(
                    id=tenant_id, name=tenant_id, webhook_secret=sealed, created_by="test"
                )
            )

    def run(self, *, count: int, kills: int) -> Report:
        """Ends `count` jobs or more, kills so often, lets the rest come to its end, and looks."""
        self._start("scheduler")
        mortal = [self._start(name) for name in ("courier", "worker", "courier", "worker")]
        while self.report.kills.total() < kills or self._ended() < count:
            self._feed(count, more=self.report.kills.total() < kills)
            ready = [process for process in mortal if READY[process.name] in process.said()]
            if not ready or self.report.kills.total() >= kills:
                self._receiver.let_go.wait(0.05)
                continue
            self._receiver.let_go.wait(self._rng.uniform(0.0, 0.3))
            victim = self._rng.choice(ready)
            victim.kill()
            self.report.kills[victim.name] += 1
            mortal[mortal.index(victim)] = self._start(victim.name)
        self._stack.until(lambda: self._ended() == len(self._ids), what="every job ended", seconds=90)
        self._stack.until(lambda: not self._undone(), what="every message was delivered", seconds=60)
        return self._look()

    def _start(self, name: str) -> Process:
        options = ["--no-courier", "--concurrency", "2"] if name == "worker" else []
        command = [sys.executable, "-m", "process.webhook_kills", name, *options]
        return self._stack.start(name, *command, **self._env)

    def _feed(self, count: int, *, more: bool) -> None:
        """Keep some jobs waiting: `count` in all, and beyond that while there is killing."""
        wanted = OUTSTANDING - (len(self._ids) - self._ended())
        wanted = min(wanted, wanted if more else count - len(self._ids))
        if wanted > 0:
            note = {"ledger": str(self._stack.folder / "ledger"), "text": "x", "seconds": 0.02}
            url = self._receiver.url()
            self._ids += self._stack.enqueue_all([("test.note", note)] * wanted, webhook_url=url)

    def _ended(self) -> int:
        statuses = self._stack.statuses()
        return sum(statuses.get(status.value, 0) for status in FINAL)

    def _undone(self) -> int:
        d = webhook_deliveries.c
        query = sa.select(sa.func.count().label("n")).where(d.status.not_in(("delivered", "dead")))
        return int(self._stack.rows(query)[0]["n"])

    def _look(self) -> Report:
        seen: defaultdict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)
        for request in list(self._receiver.requests):
            body = json.loads(request.body)
            told = (body["data"]["job_id"], body["type"])
            seen[told].append((request.headers["webhook-id"], request.body))
        report = self.report
        for row in self._stack.rows(sa.select(jobs.c.id, jobs.c.status)):
            report.ended += 1
            if (row["id"], EVENT_OF[JobStatus(row["status"])].value) not in seen:
                report.lost.append(row["id"])
        report.requests = sum(map(len, seen.values()))
        report.duplicates = report.requests - len(seen)
        report.strange = [job_id for (job_id, _), sent in seen.items() if len(set(sent)) > 1]
        return report


def slow_ok(exchange: Exchange) -> None:
    exchange.receiver.let_go.wait(ANSWER_SECONDS)
    exchange.answer(200)


def kill(stack: Stack, *, count: int, kills: int, seed: int, mutant: str = "") -> Report:
    """Run it on this stack."""
    with Receiver(slow_ok) as receiver:
        return Ground(stack, receiver, rng=Random(seed), mutant=mutant).run(count=count, kills=kills)


def message_after_commit() -> None:
    """The mutant of the chaos suite, with as long between the commit and the message as a sending takes."""
    from laneway.engine import outcomes
    from laneway.worker import ledger  # noqa: F401 - what the mutant changes

    tell = outcomes.tell

    def slowly(*args: Any, **kwargs: Any) -> set[str]:
        threading.Event().wait(SENDING_SECONDS)
        return tell(*args, **kwargs)

    outcomes.tell = slowly
    mutants.MUTANTS["message_after_commit"]()


def role() -> None:
    """`laneway ROLE …` whose couriers hold a lease for two seconds."""
    from laneway.cli import main as laneway
    from laneway.webhooks import courier

    courier.MAX_TIMEOUT_SECONDS = 1.0
    courier.LEASE_MARGIN_SECONDS = 1.0
    if os.environ.get(MUTANT):
        message_after_commit()
    laneway(sys.argv[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m process.webhook_kills", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("outbox", "mutant"))
    options = parser.parse_args()
    for name in ("outbox", "mutant"):
        if options.only not in (None, name):
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            PostgresServer() as postgres,
            RedisServer() as redis,
            Stack(postgres.fresh(), redis.url, Path(folder)) as stack,
        ):
            mutant = name if name == "mutant" else ""
            report = kill(stack, count=options.jobs, kills=options.kills, seed=options.seed, mutant=mutant)
            print(f"{name}: {report}", flush=True)


if __name__ == "__main__":
    role() if len(sys.argv) > 1 and sys.argv[1] in READY else main()
