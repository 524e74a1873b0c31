"""All that a delivery needs around it: a tenant with a secret, jobs that ended, couriers that run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.models import jobs, tenants, webhook_attempts, webhook_deliveries
from laneway.settings import Settings
from laneway.webhooks.courier import Courier
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.secrets import SecretBox, new_webhook_secret, tenant_context
from servers import wait_until

NOWHERE = "unix:///nowhere/redis.sock"


class Office:
    """One tenant of one store. Its clock stands still until it is moved, at about the real time."""

    def __init__(self, database: Database, *, redis_url: str = NOWHERE, **settings: Any) -> None:
        self.database = database
        self.clock = FrozenClock(datetime.now(UTC))
        self.box = SecretBox({"k1": bytes(32)})
        self.secret = new_webhook_secret()
        self.tenant_id = new_id()
        values: dict[str, Any] = {
            "redis_url": redis_url,
            "webhook_allow_http": True,
            "webhook_allowed_cidrs": ("127.0.0.0/8",),
            "encryption_keys": SecretStr(""),
        }
        self.settings = Settings(**values | settings)
        with database.write() as connection:
            connection.execute(
                sa.insert(tenants).values(
                    id=self.tenant_id,
                    name=self.tenant_id,
                    webhook_secret=self.box.seal(self.secret, tenant_context(self.tenant_id)),
                    created_by="test",
                )
            )

    def post(self, url: str, **data: Any) -> str:
        """A completed job whose end is to be told to `url`; its id."""
        job_id, now = new_id(), self.clock.now()
        job = {
            "id": job_id,
            "tenant_id": self.tenant_id,
            "created_by": "alice",
            "job_type": "demo.echo",
            "parameters": {},
            "queue": "default",
            "priority": "normal",
            "lane": "normal",
            "tags": [],
            "metadata": {},
            "timeout_seconds": 60,
            "max_retries": 0,
            "retry_delay_seconds": 0,
            "retry_backoff": 1,
            "retry_max_delay_seconds": 0,
            "retry_jitter": False,
            "webhook_url": url,
            "status": "completed",
            "progress": 100,
            "finished_at": now,
        }
        end = Told(
            message_id(job_id, 3, "job.completed"),
            self.tenant_id,
            "job.completed",
            {"job_id": job_id} | data,
            "alice",
            [Target.own(self.tenant_id, url)],
            job_id,
            3,
        )
        with self.database.write() as connection:
            connection.execute(sa.insert(jobs).values(job))
            record(connection, [end], now=now)
        return job_id

    def courier(self, **options: Any) -> Courier:
        values: dict[str, Any] = {"box": self.box, "rng": Random(1)}
        return Courier(self.database, self.settings, self.clock, **values | options)

    @contextmanager
    def open(self, courier: Courier | None = None) -> Iterator[Courier]:
        """A courier at work in a thread of its own; stopped at the end, and whatever broke it is raised."""
        courier = courier or self.courier()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                asyncio.run(courier.run())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield courier
        finally:
            courier.stop()
            thread.join(60)
        assert not thread.is_alive()
        assert not failures, failures

    def job(self, job_id: str) -> sa.RowMapping:
        return self._rows(sa.select(jobs).where(jobs.c.id == job_id))[0]

    def delivery(self, job_id: str) -> sa.RowMapping:
        return self._rows(sa.select(webhook_deliveries).where(webhook_deliveries.c.job_id == job_id))[0]

    def attempts(self, job_id: str) -> list[sa.RowMapping]:
        return self._rows(
            sa.select(webhook_attempts)
            .join(webhook_deliveries, webhook_deliveries.c.id == webhook_attempts.c.delivery_id)
            .where(webhook_deliveries.c.job_id == job_id)
            .order_by(webhook_attempts.c.number)
        )

    def wait(self, job_id: str, *, status: str, attempts: int | None = None) -> sa.RowMapping:
        """The job's delivery, as soon as it has this status (and so many attempts behind it)."""

        def found() -> sa.RowMapping | None:
            row = self.delivery(job_id)
            fits = row["status"] == status and attempts in (None, row["attempt_count"])
            return row if fits else None

        row: sa.RowMapping = wait_until(
            found, what=f"the delivery is {status}", evidence=lambda: str(self.delivery(job_id))
        )
        return row

    def _rows(self, query: sa.Select[Any]) -> list[sa.RowMapping]:
        with self.database.read() as connection:
            return list(connection.execute(query).mappings())
