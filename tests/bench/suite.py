"""The benchmarks: what each compares, in which numbers, with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from bench import batches, drain, forks, limiter, over_http, recovery
from bench.figures import Metric
from bench.ground import STORES, Stores

RECOVERY_ROUNDS = 3
DRAIN_COUNTS = {"RQ Worker": 120, "RQ SimpleWorker": 600, "RQ pool of 2": 2_000}
BARE = "FastAPI + RQ"

Run = Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Bench:
    """One comparison. Each round runs every case once; `references` are cases that others are set against."""

    name: str
    title: str
    metrics: tuple[Metric, ...]
    cases: Mapping[str, Run]
    references: tuple[str, ...] = ()
    rounds: int = 5


def benches(stores: Stores, *, rounds: int, scale: float) -> list[Bench]:
    """All of them, with counts and times multiplied by `scale`."""

    def scaled(count: int) -> int:
        return max(10, round(count * scale))

    seconds = 4.0 * scale
    on = {f"Laneway, {title}": store for title, store in STORES.items()}
    return [
        Bench(
            "drain",
            "Drain of no-op jobs (2 children; more is better)",
            (Metric("rate", "worker", "jobs/s"),),
            {case: partial(drain.laneway, stores, s, count=scaled(20_000)) for case, s in on.items()}
            | {
                case: partial(drain.stock_rq, stores, case, count=scaled(count))
                for case, count in DRAIN_COUNTS.items()
            },
            tuple(DRAIN_COUNTS),
            rounds,
        ),
        Bench(
            "post",
            "POST of a job (1 API process, 32 connections)",
            (
                Metric("rate", "API (more is better)", "requests/s"),
                Metric("p50_ms", "API, median wait (less is better)", "ms"),
                Metric("p99_ms", "API, 99th percentile (less is better)", "ms"),
            ),
            {
                case: partial(over_http.laneway_throughput, stores, s, seconds=seconds)
                for case, s in on.items()
            }
            | {BARE: partial(over_http.bare_throughput, stores, seconds=seconds)},
            (BARE,),
            rounds,
        ),
        Bench(
            "latency",
            "From POST to the handler's first line, all idle (less is better)",
            (
                Metric("p50_ms", "median", "ms"),
                Metric("p99_ms", "99th percentile", "ms"),
            ),
            {case: partial(over_http.laneway_latency, stores, s, count=scaled(100)) for case, s in on.items()}
            | {f"{BARE} Worker": partial(over_http.bare_latency, stores, count=scaled(100))},
            (f"{BARE} Worker",),
            rounds,
        ),
        Bench(
            "memory",
            "Memory of a worker with 2 children after 1,000 jobs (less is better)",
            (Metric("rss", "RSS, summed", "MiB"), Metric("pss", "PSS, summed", "MiB")),
            {case: partial(drain.laneway, stores, s, count=scaled(1_000)) for case, s in on.items()}
            | {"RQ pool of 2": partial(drain.stock_rq, stores, "RQ pool of 2", count=scaled(1_000))},
            ("RQ pool of 2",),
            rounds,
        ),
        Bench(
            "recovery",
            "From kill -9 of a worker, mid-job, to the re-run's first line (less is better)",
            (Metric("seconds", "default lease of 30 s", "s"),),
            {
                case: partial(recovery.recovery, stores, store)
                for case, store in on.items()
                if store == "postgresql"
            },
            rounds=min(rounds, RECOVERY_ROUNDS),
        ),
        Bench(
            "batches",
            "Accepting 10,000 jobs: one batch against single posts (1 API process; more is better)",
            (Metric("rate", "committed when answered", "jobs/s"),),
            {
                f"{case}, a batch": partial(batches.accepted, stores, s, jobs=min(10_000, scaled(10_000)))
                for case, s in on.items()
            }
            | {
                f"{case}, posts": partial(batches.posted, stores, s, seconds=seconds)
                for case, s in on.items()
            },
            tuple(f"{case}, posts" for case in on),
            rounds,
        ),
        Bench(
            "batch-drain",
            "Drain of one batch against loose jobs (2 children; more is better)",
            (Metric("rate", "worker", "jobs/s"),),
            {
                f"{case}, {'a batch' if together else 'loose'}": partial(
                    batches.drained, stores, s, jobs=min(10_000, scaled(10_000)), together=together
                )
                for case, s in on.items()
                for together in (True, False)
            },
            tuple(f"{case}, loose" for case in on),
            rounds,
        ),
        Bench(
            "fork",
            "No-op jobs, each in a process of its own against many in a child (2 children)",
            (
                Metric("rate", "drain (more is better)", "jobs/s"),
                Metric("p50_ms", "from the call to the first line, all idle, median (less is better)", "ms"),
            ),
            {
                f"{case}, {how}": partial(
                    forks.cost,
                    stores,
                    s,
                    how,
                    count=scaled(20_000 if how == "child" else 1_000),
                    alone=scaled(100),
                )
                for case, s in on.items()
                for how in ("fork", "child")
            },
            tuple(f"{case}, child" for case in on),
            rounds,
        ),
        *[_limiter(stores, rules, rounds=rounds, count=scaled(20_000)) for rules in limiter.QUOTAS],
    ]


def _limiter(stores: Stores, rules: int, *, rounds: int, count: int) -> Bench:
    first, *others = limiter.CONTENDERS
    return Bench(
        f"limiter-{rules}",
        f"A decision of the rate limiter, {'1 rule' if rules == 1 else f'{rules} rules'} (less is better)",
        (
            Metric("admit_us", "Redis' time, admitted", "us"),
            Metric("refuse_us", "Redis' time, refused", "us"),
            Metric("idle_bytes", "keys of a caller after one request", "bytes"),
            Metric("full_bytes", "keys of a caller at its limit", "bytes"),
        ),
        {name: partial(limiter.cost, stores, name, rules=rules, count=count) for name in (first, *others)},
        tuple(others),
        rounds,
    )
