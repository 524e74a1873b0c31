"""A seed becomes a plan: which jobs come when, and what goes wrong when. Pure, so that a seed says it all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from chaos.failpoints import PLACES

TENANTS = ("north", "south", "west")
QUEUES = ("default", "mail")
LEASE_SECONDS = 4.0
CALM_SECONDS = 3.0  # at the start, before the first fault
STRUCK = "struck_at_place"
SELDOM = ("reap.", "drain.", "cancel.", "reconcile.")  # places that are struck on the first pass
STRUCK_SECONDS = (5.5, 8.0)  # an order that nobody has met by then is withdrawn


@dataclass(frozen=True, slots=True)
class PlannedCancel:
    """A cancel so many seconds after the job was accepted."""

    after_seconds: float
    terminate: bool


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """One submission. `body` is what is posted, but for what only the run knows (the receiver's URL)."""

    at: float
    number: int
    tenant: str
    body: Mapping[str, Any]
    webhook: bool
    cancel: PlannedCancel | None = None
    doubled: bool = False  # posted twice at the same moment, under one unique key


@dataclass(frozen=True, slots=True)
class PlannedFlow:
    """Jobs that belong together, by one call: a batch, or a chain that starts at once."""

    at: float
    number: int
    tenant: str
    kind: str  # batch or chain
    body: Mapping[str, Any]
    cancel_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """`name` is one of the menu (`faults.MENU`). `pick` chooses among what there is, by remainder."""

    at: float
    name: str
    seconds: float
    pick: int
    place: str = ""  # of a failpoint
    strike: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a run."""

    seed: int
    store: str
    seconds: float
    jobs: Sequence[PlannedJob]
    flows: Sequence[PlannedFlow]
    faults: Sequence[PlannedFault]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def canary(tenant: str, number: int) -> str:
    """A string that only this tenant may ever see again."""
    return f"canary-{tenant}-{number}"


CANARY = re.compile(r"canary-([a-z]+)-\d+")

Body = Callable[[Random, int], dict[str, Any]]


def _body(job_type: str, number: int, **parameters: Any) -> dict[str, Any]:
    return {"job_type": f"chaos.{job_type}", "parameters": {"number": number, **parameters}}


def _ok(rng: Random, number: int) -> dict[str, Any]:
    return _body("ok", number, seconds=round(rng.uniform(0.0, 0.1), 3))


def _flaky(rng: Random, number: int) -> dict[str, Any]:
    return _body("flaky", number, times=rng.randint(1, 2)) | {"max_retries": 4}


def _long(rng: Random, number: int) -> dict[str, Any]:
    seconds = round(rng.uniform(0.4, 2.2) * LEASE_SECONDS, 2)
    return _body("long", number, seconds=seconds, busy=rng.random() < 0.3)


def _fail(rng: Random, number: int) -> dict[str, Any]:
    return _body("fail", number, permanent=rng.random() < 0.3) | {"max_retries": 1}


def _delayed(rng: Random, number: int) -> dict[str, Any]:
    return _ok(rng, number) | {"delay_seconds": round(rng.uniform(0.5, 8.0), 2)}


def _deaf(rng: Random, number: int) -> dict[str, Any]:
    return _body("deaf", number, seconds=round(rng.uniform(1.0, 4.0), 2))


def _keyed(rng: Random, number: int) -> dict[str, Any]:
    seconds = round(rng.uniform(0.2, 1.0), 3)
    return _body("ok", number, seconds=seconds) | {"concurrency_key": "one at a time"}


POISONS = ("kill", "segv", "exit", "memory", "huge", "unstorable", "close", "grandchild", "hang")


def _poison(rng: Random, number: int) -> dict[str, Any]:
    how = rng.choice(POISONS)
    return _body("poison", number, how=how) | {"max_retries": 1, "timeout_seconds": 2}


MIX: Mapping[str, tuple[float, Body]] = {
    # Share of the jobs, and what they are.
    "ok": (0.52, _ok),
    "keyed": (0.12, _keyed),
    "flaky": (0.15, _flaky),
    "long": (0.03, _long),
    "fail": (0.06, _fail),
    "delayed": (0.08, _delayed),
    "deaf": (0.03, _deaf),
    "poison": (0.01, _poison),
}
CANCELLED_SHARE = 0.05
FLOW_SHARE = 0.03  # of the number of single jobs, so many batches and chains beside them
STEPS: Mapping[str, tuple[float, Body]] = {"ok": (0.75, _ok), "flaky": (0.15, _flaky), "fail": (0.1, _fail)}
WEBHOOK_SHARE = 0.4
UNIQUE_SHARE = 0.1
RETRY: Mapping[str, Any] = {"retry_delay_seconds": 1.0, "retry_backoff": 1.5, "retry_max_delay_seconds": 3.0}

FAULTS: Mapping[str, tuple[tuple[float, float], frozenset[str]]] = {
    # How long each holds, at least and at most, and the stores it can be done on.
    name: (span, frozenset(stores.split("+")))
    for name, span, stores in (
        ("worker_killed", (0.5, 1.0), "pg+sqlite"),
        ("nursery_killed", (0.5, 1.0), "pg+sqlite"),
        ("child_killed", (0.2, 0.5), "pg+sqlite"),
        ("worker_frozen_briefly", (1.0, 1.5), "pg+sqlite"),
        ("worker_frozen", (5.5, 8.0), "pg+sqlite"),
        ("worker_parent_frozen", (5.5, 8.0), "pg"),
        ("child_frozen", (5.5, 7.0), "pg+sqlite"),
        ("api_killed", (0.5, 1.0), "pg+sqlite"),
        ("scheduler_killed", (0.5, 1.0), "pg+sqlite"),
        ("scheduler_frozen", (2.0, 6.0), "pg+sqlite"),
        ("courier_killed", (0.5, 1.0), "pg+sqlite"),
        ("courier_frozen", (3.0, 7.0), "pg"),
        ("redis_killed", (0.2, 5.0), "pg+sqlite"),
        ("redis_frozen", (1.0, 5.0), "pg"),
        ("redis_flushed", (0.1, 0.2), "pg+sqlite"),
        ("redis_rolled_back", (1.0, 3.0), "pg"),
        ("redis_out_of_memory", (2.0, 5.0), "pg+sqlite"),
        ("redis_disk_full", (2.0, 4.0), "pg"),
        ("postgres_killed", (0.2, 5.0), "pg"),
        ("backends_terminated", (0.2, 0.5), "pg"),
        ("postgres_read_only", (1.0, 3.0), "pg"),
        ("connections_exhausted", (2.0, 4.0), "pg"),
        ("table_locked", (2.0, 6.0), "pg"),
        ("postgres_disk_full", (2.0, 4.0), "pg"),
        ("postgres_clock_wrong", (4.0, 8.0), "pg"),
        ("network_slow", (3.0, 6.0), "pg"),
        ("network_thin", (3.0, 6.0), "pg"),
        ("network_silent", (1.0, 8.0), "pg"),
        ("network_reset", (0.2, 2.0), "pg"),
        ("network_refused", (0.5, 4.0), "pg"),
        ("reply_lost", (1.0, 3.0), "pg"),
        ("claims_unheard", (1.0, 2.0), "pg"),
        ("replies_cut", (1.0, 3.0), "pg"),
        ("workers_cut_off", (5.5, 8.0), "pg"),
        ("clock_wrong", (3.0, 6.0), "pg"),
        ("receiver_misbehaves", (3.0, 6.0), "pg+sqlite"),
        ("ids_doubled", (0.1, 0.3), "pg+sqlite"),
        ("rolling_deploy", (1.0, 2.0), "pg"),
        ("reader_holds_snapshot", (5.0, 10.0), "sqlite"),
    )
}


def make(
    seed: int,
    *,
    store: str,
    seconds: float,
    jobs_per_second: float,
    faults: int,
    only: Sequence[str] = (),
) -> Plan:
    """The plan of a seed: `faults` different ones of the menu, one after the other, evenly spread, and
    between them as many processes struck at a failpoint.

    Which ones is not left to chance alone: consecutive seeds walk through the menu and the failpoints, so
    that a few of them have had all of it. `only` narrows the menu.
    """
    rng = Random(f"chaos {seed}")
    return Plan(
        seed=seed,
        store=store,
        seconds=seconds,
        jobs=_jobs(rng, seconds=seconds, count=round(seconds * jobs_per_second)),
        flows=_flows(rng, seconds=seconds, count=round(seconds * jobs_per_second * FLOW_SHARE)),
        faults=_faults(rng, seed, store=store, seconds=seconds, count=faults, only=only),
    )


def _jobs(rng: Random, *, seconds: float, count: int) -> list[PlannedJob]:
    kinds = list(MIX)
    weights = [MIX[kind][0] for kind in kinds]
    planned = []
    for number, at in enumerate(sorted(rng.uniform(0, seconds) for _ in range(count))):
        kind = rng.choices(kinds, weights)[0]
        tenant = rng.choice(TENANTS)
        body = MIX[kind][1](rng, number) | {
            "queue": rng.choice(QUEUES),
            "priority": rng.choice(("critical", "high", "normal", "low")),
            "tags": [canary(tenant, number)],
        }
        body = {**RETRY, "max_retries": 3, **body}
        unique = rng.random() < UNIQUE_SHARE
        if unique:
            body["unique_key"] = f"key-{number}"
        cancel = None
        if rng.random() < CANCELLED_SHARE or kind == "deaf":
            after = rng.choice((0.0, rng.uniform(0, 0.5), rng.uniform(0.5, 4.0)))
            cancel = PlannedCancel(round(after, 3), rng.random() < 0.3)
        planned.append(
            PlannedJob(
                at=round(at, 3),
                number=number,
                tenant=tenant,
                body=body,
                webhook=rng.random() < WEBHOOK_SHARE,
                cancel=cancel,
                doubled=unique and rng.random() < 0.5,
            )
        )
    return planned


def _flows(rng: Random, *, seconds: float, count: int) -> list[PlannedFlow]:
    planned = []
    for number, at in enumerate(sorted(rng.uniform(0, seconds) for _ in range(count))):
        kind, make_body = rng.choice((("batch", _batch), ("chain", _chain)))
        tenant = rng.choice(TENANTS)
        planned.append(
            PlannedFlow(
                at=round(at, 3),
                number=number,
                tenant=tenant,
                kind=kind,
                body=make_body(rng, number, tenant),
                cancel_after_seconds=round(rng.uniform(0, 3), 2) if rng.random() < 0.1 else None,
            )
        )
    return planned


def _batch(rng: Random, number: int, tenant: str) -> dict[str, Any]:
    callbacks = {
        name: _part(_ok(rng, number), tenant, number, callback_tag(number, name))
        for name in ("on_complete", "on_success", "on_failure")
    }
    return {"jobs": [_step(rng, number, tenant) for _ in range(rng.randint(3, 9))], **callbacks}


def _chain(rng: Random, number: int, tenant: str) -> dict[str, Any]:
    """A step, two side by side, and two more; the last takes a result of the first."""
    first, *side_by_side, fourth, last = (_step(rng, number, tenant) for _ in range(5))
    last["parameters"] |= {"number": {"$result": "step_0.number"}}
    return {
        "name": f"chain {number}",
        "execute": True,
        "stop_on_failure": rng.random() < 0.7,
        "chain_definition": [first, side_by_side, fourth, last],
    }


def _step(rng: Random, number: int, tenant: str) -> dict[str, Any]:
    kind = rng.choices(list(STEPS), [share for share, _ in STEPS.values()])[0]
    return _part(STEPS[kind][1](rng, number), tenant, number)


def _part(body: dict[str, Any], tenant: str, number: int, *tags: str) -> dict[str, Any]:
    return {**RETRY, "max_retries": 3, **body, "tags": [canary(tenant, number), *tags]}


def callback_tag(number: int, name: str) -> str:
    """What the jobs that a batch's end makes are known by."""
    return f"{name}-{number}"


def _faults(
    rng: Random, seed: int, *, store: str, seconds: float, count: int, only: Sequence[str]
) -> list[PlannedFault]:
    if not count:
        return []
    possible = [name for name, (_, stores) in FAULTS.items() if store in stores and name in (only or FAULTS)]
    menu = _turn(possible, seed * count, count)
    places = _turn(list(PLACES), seed * count, count)
    rng.shuffle(menu)
    rng.shuffle(places)
    slot = (seconds - CALM_SECONDS) / count
    planned = []
    for n, (name, place) in enumerate(zip(menu, places, strict=True)):
        at = CALM_SECONDS + (n + rng.uniform(0, 0.2)) * slot
        span = FAULTS[name][0]
        planned.append(PlannedFault(round(at, 2), name, round(rng.uniform(*span), 2), rng.randrange(1 << 16)))
        planned.append(
            PlannedFault(
                at=round(at + rng.uniform(0.1, 0.7) * slot, 2),
                name=STRUCK,
                seconds=round(rng.uniform(*STRUCK_SECONDS), 2),
                pick=rng.randrange(1, 2 if place.startswith(SELDOM) else 4),
                place=place,
                strike=rng.choice(PLACES[place].strikes).value,
            )
        )
    return sorted(planned, key=lambda fault: fault.at)


def _turn(names: list[str], start: int, count: int) -> list[str]:
    """`count` of the names, beginning at `start` of an order that never changes."""
    Random("the order of the menu").shuffle(names)
    return [names[(start + n) % len(names)] for n in range(count)]


FLAT_SECONDS = 600.0


def smoke() -> list[Plan]:
    """What CI runs: two seeds on PostgreSQL and one on SQLite."""
    on_pg = [make(seed, store="pg", seconds=35, jobs_per_second=12, faults=7) for seed in (1, 2)]
    return [*on_pg, make(3, store="sqlite", seconds=25, jobs_per_second=8, faults=5)]


def soak() -> list[Plan]:
    """What a release runs: 20 seeds under faults, then ten minutes of load without any."""
    under_faults = [
        make(seed, store="pg", seconds=120, jobs_per_second=9, faults=8) for seed in range(101, 121)
    ]
    return [*under_faults, make(200, store="pg", seconds=FLAT_SECONDS, jobs_per_second=9, faults=0)]
