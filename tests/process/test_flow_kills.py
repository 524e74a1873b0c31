"""Workers killed while chains, batches and dependencies go on: no step is lost, none starts too early.

Four kills; as many as FLOW_KILLS says for a longer run.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import sqlalchemy as sa

from factories import add_endpoint, change
from laneway.domain.flow import ChainSpec
from laneway.engine import batches, chains
from laneway.engine.batches import BatchSpec
from laneway.models import (
    batches as batch_rows,
)
from laneway.models import (
    chain_runs,
    job_dependencies,
    job_events,
    jobs,
    unfollowed,
    webhook_endpoints,
    webhook_messages,
)
from process.stack import SHORT_LEASE, Process, Stack

KILLS = int(os.environ.get("FLOW_KILLS", "4"))
CHAINS = 5
FAST = {"retry_delay_seconds": 0.05, "retry_jitter": False}


def test_what_hangs_together_outlives_its_workers(either_stack: Stack, tmp_path: Path) -> None:
    stack, ledger, rng = either_stack, tmp_path / "ledger", Random(7)
    stack.scheduler(**SHORT_LEASE)
    workers = [start_worker(stack) for _ in range(2)]
    listen(stack)
    chain_ids = [make_chain(stack, ledger, number) for number in range(CHAINS)]
    batch_id = make_batch(stack, ledger)
    graph = make_graph(stack, ledger, rng)
    for _ in range(KILLS):
        before = ended(stack)
        stack.until(
            lambda seen=before: ended(stack) > seen + 5 or all_ended(stack),
            what="some more ended",
            seconds=60,
        )
        workers.pop(rng.randrange(len(workers))).kill()
        workers.append(start_worker(stack))
    stack.until(lambda: all_ended(stack), what="all has ended", seconds=90)

    assert stack.statuses() == {"completed": sum(stack.statuses().values())}
    assert stack.rows(sa.select(job_dependencies)) == []
    started, finished = moments(stack)
    for child, parents in graph.items():
        assert all(finished[parent] <= started[child] for parent in parents)
    for chain_id in chain_ids:
        steps = chains.get(stack.service, chain_id, stack.caller)
        assert steps["status"] == "completed"
        assert steps["results"]["step_3"] == steps["results"]["step_0"]
        one, two, three, four = (step["job_id"] for step in steps["steps"])
        assert finished[one] <= min(started[two], started[three])
        assert max(finished[two], finished[three]) <= started[four]
    batch = batches.get(stack.service, batch_id, stack.caller)
    assert (batch["status"], batch["counts"]["completed"]) == ("completed", 60)
    m = webhook_messages.c
    told = Counter(row["event_type"] for row in stack.rows(sa.select(m.event_type)))
    assert told == {"chain.completed": CHAINS, "batch.completed": 1}
    texts = Counter(ledger.read_text().splitlines())
    assert texts["callback"] >= 1
    callback = sa.select(jobs.c.id).where(jobs.c.queue == "after")
    assert len(stack.rows(callback)) == 1


def start_worker(stack: Stack) -> Process:
    queues = ("--queues", "default,after")
    return stack.worker(*queues, concurrency=2, ready=False, **SHORT_LEASE)


def listen(stack: Stack) -> None:
    """An endpoint, so that the ends of chains and batches are told."""
    endpoint = add_endpoint(stack.database, "chain.*", "batch.*", status="paused")
    change(stack.database, webhook_endpoints, endpoint, tenant_id=stack.caller.tenant_id)


def note(ledger: Path, text: Any, **fields: Any) -> dict[str, Any]:
    parameters = {"ledger": str(ledger), "text": text, "seconds": 0.02}
    return {"job_type": "test.note", "parameters": parameters} | FAST | fields


def make_chain(stack: Stack, ledger: Path, number: int) -> str:
    definition = [
        note(ledger, f"chain {number}"),
        [note(ledger, "a"), note(ledger, "b")],
        note(ledger, {"$result": "step_0"}),
    ]
    spec = ChainSpec.model_validate({"name": f"c{number}", "chain_definition": definition})
    checked = chains.check(stack.service, spec, stack.caller)
    return str(chains.create(stack.service, checked, stack.caller, execute=True)["id"])


def make_batch(stack: Stack, ledger: Path) -> str:
    spec = BatchSpec.model_validate({"on_complete": note(ledger, "callback", queue="after")})
    wanted = ((f"/jobs/{number}", note(ledger, f"batch {number}")) for number in range(60))
    draft = batches.check(stack.service, spec, wanted, stack.caller)
    return str(batches.make(stack.service, draft, stack.caller)["id"])


def make_graph(stack: Stack, ledger: Path, rng: Random) -> dict[str, list[str]]:
    graph: dict[str, list[str]] = {}
    for number in range(25):
        parents = rng.sample(list(graph), min(len(graph), rng.randint(0, 3)))
        given = {"ledger": str(ledger), "text": f"graph {number}"}
        graph[stack.enqueue("test.note", given, depends_on=parents)] = parents
    return graph


def ended(stack: Stack) -> int:
    done = sa.select(sa.func.count().label("n")).where(jobs.c.finished_at.is_not(None))
    return int(stack.rows(done)[0]["n"])


def all_ended(stack: Stack) -> bool:
    still = (
        sa.select(jobs.c.id).where(jobs.c.finished_at.is_(None)),
        sa.select(jobs.c.id).where(unfollowed),
        sa.select(chain_runs.c.id).where(chain_runs.c.finished_at.is_(None)),
        sa.select(batch_rows.c.id).where(batch_rows.c.finished_at.is_(None)),
    )
    return not any(stack.rows(query.limit(1)) for query in still)


def moments(stack: Stack) -> tuple[dict[str, Any], dict[str, Any]]:
    """By job: when it was first claimed, and when it completed. Its one clock is this machine's."""
    e = job_events.c
    started: dict[str, Any] = {}
    finished: dict[str, Any] = {}
    for row in stack.rows(sa.select(e.job_id, e.action, e.at).order_by(e.job_id, e.seq)):
        if row["action"] == "claim":
            started.setdefault(row["job_id"], row["at"])
        elif row["action"] == "complete":
            assert row["job_id"] not in finished
            finished[row["job_id"]] = row["at"]
    return started, finished
