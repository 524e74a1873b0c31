"""A pytest plugin: jobs of a test run in it, on a store of its own, by a clock that it moves.

    pytest_plugins = ["laneway.testing"]        # in conftest.py

    def test_a_customer_is_welcomed(laneway_jobs, assert_enqueued, run_all, clock):
        sign_up("ada@example.org")
        assert_enqueued("emails.welcome", parameters={"to": "ada@example.org"})
        clock.advance(minutes=5)
        assert [job.status for job in run_all()] == ["completed"]

While `laneway_jobs` is there, all of Laneway's Python API in this process uses its store: `.delay(…)`,
`JobManager`, `enqueue`. Nothing runs until `run_all()`, in the test's own thread; what runs is the engine of
production, with its checks, retries, schedules and webhooks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any, Self

import pytest
import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock, FrozenClock, SystemClock
from laneway.engine.access.callers import webhook_secret
from laneway.engine.queries import view
from laneway.errors import WebhookNotVerified
from laneway.sdk.backend import use
from laneway.sdk.manager import JobManager, Task, name_of
from laneway.sdk.memory import MemoryBackend
from laneway.sdk.results import JobResult
from laneway.settings import get_settings
from laneway.webhooks.courier import Courier
from laneway.webhooks.retries import UNDONE, DeliveryStatus
from laneway.webhooks.signing import ID_HEADER, verify_webhook

DELIVERY_SECONDS = 30.0
LOOK_SECONDS = 0.005

d = models.webhook_deliveries.c


class LanewayJobs:
    """The jobs of one test. `clock` moves by `advance` alone; `engine` is SQLAlchemy's, of the store."""

    def __init__(self) -> None:
        self.clock = FrozenClock(SystemClock().now())
        settings = get_settings().model_copy(
            update={
                "backend": "memory",
                "webhook_allow_http": True,  # a receiver of the test's own is on this machine
                "webhook_allowed_cidrs": ("127.0.0.0/8",),
                "webhook_allowed_ports": ("*",),
            }
        )
        self.backend = MemoryBackend(settings, clock=self.clock)
        self.manager = JobManager(self.backend)

    @property
    def engine(self) -> sa.Engine:
        return self.backend.engine

    @property
    def jobs(self) -> list[JobResult]:
        """All jobs, in the order they were made."""
        return [JobResult.of(row) for row in self._rows()]

    def assert_enqueued(
        self, job_type: Task, parameters: Mapping[str, Any] | None = None, **fields: Any
    ) -> JobResult:
        """The newest job of that type with these parameters (others may be there too), in any status.

        `fields` are those of the HTTP API: `priority="high"`. Fails with a list of what there is instead.
        """
        name, wanted = name_of(job_type), dict(parameters or {})
        rows = self._rows()
        for row in reversed(rows):
            has = all(key in row["parameters"] and row["parameters"][key] == wanted[key] for key in wanted)
            if row["job_type"] == name and has and all(row[key] == value for key, value in fields.items()):
                return JobResult.of(row)
        there = "".join(f"\n  {row['job_type']} {row['parameters']}" for row in rows) or " nothing"
        said = f" with {wanted | fields}" if wanted or fields else ""
        raise AssertionError(f"no {name}{said} was enqueued; there is:{there}")

    def run_all(self) -> list[JobResult]:
        """Run what is due until nothing is, and deliver its webhooks; the jobs, in the order they ran."""
        ran = [JobResult.of(job) for job in self.backend.run_all()]
        self._deliver()
        return ran

    def keep_schedules(self) -> None:
        """Make the schedules that `@scheduled_job` declared, as a scheduler does when it starts."""
        self.backend.keep_declared()

    @contextmanager
    def webhook_receiver(self) -> Iterator[WebhookReceiver]:
        """A receiver that knows the secret of this store."""
        caller = self.backend.caller()
        secret = webhook_secret(self.backend.service.database, self.backend.box, caller.tenant_id)
        with WebhookReceiver(secret, clock=self.clock) as receiver:
            yield receiver

    def close(self) -> None:
        self.backend.close()

    def _rows(self) -> list[dict[str, Any]]:
        with self.backend.service.database.read() as connection:
            every = sa.select(models.jobs).order_by(models.jobs.c.id)
            return [view(row) for row in connection.execute(every).mappings()]

    def _deliver(self) -> None:
        """Let a courier send what is due by this clock."""
        if not self._undelivered():
            return
        service = self.backend.service
        rng = Random()  # noqa: S311 - jitter
        courier = Courier(service.database, service.settings, self.clock, box=self.backend.box, rng=rng)
        thread = threading.Thread(target=lambda: asyncio.run(courier.run()), name="courier")
        thread.start()
        try:
            deadline = time.monotonic() + DELIVERY_SECONDS
            while self._undelivered():
                if time.monotonic() > deadline or not thread.is_alive():
                    raise AssertionError("the webhooks that are due cannot be delivered; the log says why")
                threading.Event().wait(LOOK_SECONDS)
        finally:
            courier.stop()
            thread.join()

    def _undelivered(self) -> bool:
        due = sa.and_(d.status.in_(UNDONE), d.next_at <= self.clock.now())
        under_way = d.status == DeliveryStatus.SENDING
        with self.backend.service.database.read() as connection:
            return connection.execute(sa.select(d.id).where(sa.or_(due, under_way))).first() is not None


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook that came and verified. `type` is the event, `data` what it tells."""

    id: str
    type: str
    data: dict[str, Any]
    headers: dict[str, str]


class WebhookReceiver:
    """Takes webhooks at `url` between `with` and its end, and checks their signatures.

    Put statuses into `answers` to give them instead of 204, one after the other. What does not verify is
    answered 401 and stands in `refused`.
    """

    def __init__(self, secret: str, *, clock: Clock | None = None) -> None:
        self.received: list[Webhook] = []
        self.refused: list[str] = []
        self.answers: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.send_response(receiver._take(body, headers))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._secret = secret
        self._clock = clock or SystemClock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/webhooks"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take(self, body: bytes, headers: dict[str, str]) -> int:
        try:
            payload = verify_webhook(body, headers, self._secret, now=self._clock.now())
        except WebhookNotVerified as error:
            self.refused.append(str(error))
            return 401
        status = self.answers.pop(0) if self.answers else 204
        if status < 300:
            self.received.append(Webhook(headers[ID_HEADER], payload["type"], payload["data"], headers))
        return status


@pytest.fixture
def laneway_jobs() -> Iterator[LanewayJobs]:
    """Laneway in this test: a store of its own, which the whole Python API uses meanwhile."""
    jobs = LanewayJobs()
    before = use(jobs.backend)
    try:
        yield jobs
    finally:
        use(before)
        jobs.close()


@pytest.fixture
def assert_enqueued(laneway_jobs: LanewayJobs) -> Callable[..., JobResult]:
    """`assert_enqueued(job_type, parameters={…})`: the job, or a failure that lists what there is."""
    return laneway_jobs.assert_enqueued


@pytest.fixture
def run_all(laneway_jobs: LanewayJobs) -> Callable[[], list[JobResult]]:
    """`run_all()`: run what is due, and what that enqueues; the jobs."""
    return laneway_jobs.run_all


@pytest.fixture
def clock(laneway_jobs: LanewayJobs) -> FrozenClock:
    """The test's clock: `clock.advance(minutes=5)`."""
    return laneway_jobs.clock


@pytest.fixture
def webhook_receiver(laneway_jobs: LanewayJobs) -> Iterator[WebhookReceiver]:
    """A receiver of webhooks: give its `url` to a job as `webhook_url`, and look at `received`."""
    with laneway_jobs.webhook_receiver() as receiver:
        yield receiver
