"""`GET /metrics`: what a Prometheus scrapes, for the networks that may.

Requests are counted in this process, by operation; the rest is of the whole installation, and the same
from every process. No name that a tenant chose is a label.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from ipaddress import ip_address, ip_network

import sqlalchemy as sa
from fastapi import APIRouter, Request
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.runtime import Runtime, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.engine import gauges
from laneway.errors import Forbidden, StorageUnavailable
from laneway.limits.rules import RateClass

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter(route_class=GatedRoute, tags=["health"])
_KEYLESS: dict[str, object] = {"security": []}

Sample = tuple[dict[str, str], float]


class Requests:
    """How many requests were answered, and how long they took, by operation and class of status."""

    def __init__(self) -> None:
        self.answered: Counter[tuple[str, str]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def count(self, operation: str, *, status: int, seconds: float) -> None:
        self.answered[operation, f"{status // 100}xx"] += 1
        self.seconds[operation] += seconds


@router.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    responses={
        200: {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}},
        403: problems(403)[403],
    },
    openapi_extra=_KEYLESS,
)
@access(RateClass.FREE, None)
async def metrics(request: Request, runtime: RuntimeDep) -> Response:
    """Metrics in Prometheus' text format, for the networks of `LANEWAY_METRICS_NETWORKS`."""
    _check_network(request, runtime)
    try:
        found = await in_thread(gauges.read, runtime.service)
    except (StorageUnavailable, sa.exc.SQLAlchemyError):
        found = None
    text = "".join(_text(request.scope["laneway.requests"], found, degraded=runtime.limiter.degraded))
    return Response(text.encode(), media_type=MEDIA_TYPE)


def _check_network(request: Request, runtime: Runtime) -> None:
    settings = runtime.settings
    address = request.client.host if request.client else ""
    hidden = "x-forwarded-for" in request.headers and not settings.trusted_proxies
    try:
        here = ip_address(address)
        allowed = not hidden and any(here in ip_network(each) for each in settings.metrics_networks)
    except ValueError:  # a unix socket, say
        allowed = False
    if not allowed:
        raise Forbidden("metrics are for the networks of LANEWAY_METRICS_NETWORKS, and the caller is in none")


def _text(requests: Requests, found: gauges.Gauges | None, *, degraded: bool) -> Iterable[str]:
    answered = sorted(requests.answered.items())
    yield from _metric(
        "laneway_http_requests_total",
        "counter",
        "Requests answered by this process.",
        [({"operation": name, "status": status}, count) for (name, status), count in answered],
    )
    yield from _metric(
        "laneway_http_request_seconds_total",
        "counter",
        "Seconds they took, long waits and streams among them.",
        [({"operation": name}, seconds) for name, seconds in sorted(requests.seconds.items())],
    )
    yield from _metric("laneway_limiter_degraded", "gauge", "1 while Redis does not count.", [({}, degraded)])
    yield from _metric("laneway_database_up", "gauge", "1 when it answered.", [({}, found is not None)])
    if found is None:
        return
    for name, text, samples in (
        ("jobs", "Active jobs, up to 10,000 of a status.", _by("status", found.jobs)),
        ("webhooks_waiting", "Deliveries that wait to be sent, up to 10,000.", [({}, found.deliveries)]),
        ("workers", "Living workers.", _by("state", found.workers)),
        ("jobs_held", "Jobs that they hold.", [({}, found.held)]),
        ("lanes_up", "1 when Redis answered.", [({}, found.depths is not None)]),
        ("lane_depth", "Ids in the lanes that they serve.", _by("lane", found.depths or {})),
    ):
        yield from _metric(f"laneway_{name}", "gauge", text, samples)


def _by(label: str, values: dict[str, int]) -> list[Sample]:
    return [({label: name}, value) for name, value in values.items()]


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterable[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        said = ",".join(f'{label}="{text}"' for label, text in labels.items())
        yield f"{name}{{{said}}} {value:.10g}\n" if said else f"{name} {value:.10g}\n"
