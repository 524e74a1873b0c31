"""Who asks: clients that post, cancel, retry and force jobs, and the API processes that answer them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from factories import new_job
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.transitions import Applied, Cancel, ForceComplete, NewJob, Retry
from simulation.kernel import Process, Thread
from simulation.store import Down, Unknown

if TYPE_CHECKING:
    from simulation.world import World

PATIENCE_SECONDS = 6.0
GROUP = 8  # requests a transaction
KINDS = {
    "ok": 8,
    "slow": 1,  # three leases long
    "flaky": 3,  # its first attempt fails
    "fails": 1,
    "permanent": 1,
    "snoozes": 1,  # comes back later, once
    "hangs": 1,
    "crashes": 1,  # takes its child down
    "bombs": 1,  # takes its worker down
}


@dataclass(eq=False, slots=True)
class Request:
    """A POST that waits for its answer: 202 with an id, or 503."""

    job: NewJob
    posted_at: float
    answer: str | None = None
    job_id: str | None = None


@dataclass(eq=False, slots=True)
class Api:
    """An API process and the requests that have reached it."""

    process: Process
    inbox: deque[Request] = field(default_factory=deque)


def start_api(world: World, number: int, *, after: float = 0.0) -> None:
    api = Api(Process(f"api{number}", healthy_since=world.kernel.now + after))
    world.apis = [a for a in world.apis if a.process.alive] + [api]
    world.kernel.start(api.process, _serve(world, api), after=after)


def _serve(world: World, api: Api) -> Thread:
    """Group commit: what waits is one transaction, then one push, then the answers."""
    while True:
        yield 0.05 if api.inbox else 0.3
        group = [api.inbox.popleft() for _ in range(min(GROUP, len(api.inbox)))]
        if not group:
            continue
        now = world.kernel.clock(api.process)
        jobs = [replace(r.job, queued_at=now) if r.job.scheduled_for is None else r.job for r in group]
        if not world.design.answer_after_commit:
            _answer(world, group, [job.id for job in jobs])
            yield 0.05
        if not world.design.unique_index:
            keyed = [(job, world.store.holder_of(job.unique_key)) for job in jobs]
            yield 0.05
            jobs = [replace(job, id=holder) if holder else job for job, holder in keyed]
        try:
            new = [job for job in jobs if job.id not in world.store.jobs]
            ids = {job.id: made for job, made in zip(new, _create(world, api, new), strict=True)}
        except (Down, Unknown):
            for request in group:
                request.answer = request.answer or "503"
            continue
        yield 0.01
        world.lanes.push(
            [(job.lane, job.id) for job in new if ids[job.id] == job.id and job.scheduled_for is None]
        )
        yield 0.01
        _answer(world, group, [ids.get(job.id, job.id) for job in jobs])


def _create(world: World, api: Api, jobs: list[NewJob]) -> list[str]:
    now = world.kernel.clock(api.process)
    return world.store.transaction(api.process, lambda: world.store.create(jobs, now=now))


def _answer(world: World, group: list[Request], ids: list[str]) -> None:
    for request, job_id in zip(group, ids, strict=True):
        if request.answer is None:
            request.answer, request.job_id = "202", job_id


def start_clients(world: World, count: int) -> None:
    internet = Process("clients")
    for number in range(count):
        world.seen.waiting_clients += 1
        world.kernel.start(internet, _post(world, number, internet), after=world.rng.uniform(0, 40))
    for _ in range(4):
        world.kernel.start(internet, _meddle(world, internet), after=world.rng.uniform(5, 50))


def _post(world: World, number: int, internet: Process) -> Thread:
    job = _job(world, number, internet)
    tries = 0
    while True:
        api = world.rng.choice(world.apis)
        request = Request(replace(job, id=f"{job.id}.{tries}" if tries else job.id), world.kernel.now)
        api.inbox.append(request)
        while request.answer is None and world.kernel.now < request.posted_at + PATIENCE_SECONDS:
            yield 0.4
        if request.answer == "202":
            break
        request.answer = "gave up"
        tries += 1
        yield 1.0
    job_id = request.job_id or ""
    world.note("client", "was answered 202", job_id)
    world.seen.answered[job_id] = world.kernel.now
    world.seen.waiting_clients -= 1
    if job_id not in world.store.jobs:
        world.complain("I1 durable", "answered 202 and not in the store", job_id)
    if world.store.down_until > world.kernel.now and world.store.down_since < request.posted_at:
        world.complain("I20 backpressure", "answered 202 while the store was away", job_id)


def _job(world: World, number: int, internet: Process) -> NewJob:
    rng, now = world.rng, world.kernel.clock(internet)
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    starts_at = now + timedelta(seconds=rng.uniform(1, 20)) if rng.random() < 0.2 else None
    expires_at = now + timedelta(seconds=rng.uniform(1, 60)) if rng.random() < 0.1 else None
    return new_job(
        id=f"j{number}",
        job_type=kind,
        lane=rng.choice(("high", "normal", "normal")),
        scheduled_for=starts_at,
        expires_at=expires_at,
        status=JobStatus.SCHEDULED if starts_at else JobStatus.QUEUED,
        timeout_seconds=4 if kind == "hangs" else 60,
        max_retries=2,
        retry_delay_seconds=4.0,
        retry_backoff=2.0,
        retry_max_delay_seconds=6.0,
        retry_jitter=True,
        unique_key=f"key{number % 2}" if rng.random() < 0.25 else None,
        webhook_url="https://receiver.example/" if rng.random() < 0.7 else None,
    )


def _meddle(world: World, internet: Process) -> Thread:
    """Cancels, mostly; also retries of what ended, and an admin who ends a job by force."""
    for _ in range(3):
        yield world.rng.uniform(0.1, 4)
        known = [job_id for job_id in world.seen.answered if job_id in world.store.jobs]
        if not known:
            continue
        job_id = world.rng.choice(known)
        act = world.rng.choices((_cancel, _retry, _force), (7, 2, 1))[0]
        try:
            act(world, internet, job_id)
        except (Down, Unknown):
            pass  # nothing was answered


def _cancel(world: World, internet: Process, job_id: str) -> None:
    now = world.kernel.clock(internet)

    def work() -> bool:
        store = world.store
        [outcome] = store.carry_out([Cancel(job_id, by="client")], now=now, actor="client")
        if not isinstance(outcome, Applied) and outcome.status is JobStatus.RUNNING:
            store.wish(job_id, now=now)
        return store.jobs[job_id]["status"] not in FINAL - {JobStatus.CANCELLED}

    if world.store.transaction(internet, work):
        world.seen.cancelled.setdefault(job_id, world.kernel.now)
        world.note("client", "was answered that it is, or will be, cancelled", job_id)


def _retry(world: World, internet: Process, job_id: str) -> None:
    now = world.kernel.clock(internet)
    outcomes = world.store.transaction(
        internet, lambda: world.store.carry_out([Retry(job_id)], now=now, actor="client")
    )
    if isinstance(outcomes[0], Applied):
        world.lanes.push([(outcomes[0].row["lane"], job_id)])


def _force(world: World, internet: Process, job_id: str) -> None:
    now = world.kernel.clock(internet)
    world.store.transaction(
        internet, lambda: world.store.carry_out([ForceComplete(job_id)], now=now, actor="client")
    )
