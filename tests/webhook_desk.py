"""Registered endpoints of an office's tenant, and jobs that end there as the engine ends them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import sqlalchemy as sa

from factories import add_job, hold_of
from laneway.clock import new_id
from laneway.domain.states import JobStatus
from laneway.engine.outcomes import carry_out
from laneway.engine.transitions import Applied, Complete, Fail, Move
from laneway.models import webhook_attempts, webhook_deliveries, webhook_messages
from laneway.webhooks.endpoints import EndpointChange, Endpoints, NewEndpoint
from laneway.webhooks.guard import Policy
from servers import wait_until
from webhook_office import Office


class Desk:
    """What an operator of the office's tenant does, and what then is in the ledger."""

    def __init__(self, office: Office) -> None:
        self.office = office
        self.endpoints = Endpoints(office.database, office.box, Policy.from_settings(office.settings))

    def register(self, url: str, **fields: Any) -> tuple[str, str]:
        """A new endpoint's id and its secret."""
        wanted = NewEndpoint(url=url, **fields)
        now = self.office.clock.now()
        made, secret = self.endpoints.create(self.office.tenant_id, wanted, by="olga", now=now)
        return made["id"], secret

    def change(self, endpoint_id: str, **fields: Any) -> dict[str, Any]:
        now = self.office.clock.now()
        return self.endpoints.change(self.office.tenant_id, endpoint_id, EndpointChange(**fields), now=now)

    def rotate(self, endpoint_id: str, *, grace_seconds: int, secret: str | None = None) -> str:
        """The new secret."""
        _, fresh = self.endpoints.rotate(
            self.office.tenant_id,
            endpoint_id,
            grace_seconds=grace_seconds,
            secret=secret,
            now=self.office.clock.now(),
        )
        return fresh

    def delete(self, endpoint_id: str) -> None:
        self.endpoints.delete(self.office.tenant_id, endpoint_id, now=self.office.clock.now())

    def complete(self, *, result: str = "null", **columns: Any) -> str:
        """The id of a job that has just completed."""
        return self._end(lambda hold: Complete(*hold, result=result), columns)

    def fail(self, **columns: Any) -> str:
        """The id of a job that has just become a dead letter."""
        error = '{"type": "E", "message": "m", "category": "permanent", "traceback": "frames"}'
        return self._end(lambda hold: Fail(*hold, error=error), columns)

    def _end(self, move: Any, columns: dict[str, Any]) -> str:
        database, now = self.office.database, self.office.clock.now()
        own = {"tenant_id": self.office.tenant_id, "lease_token": new_id()} | columns
        job_id = add_job(database, JobStatus.RUNNING, **own)
        end: Move = move(hold_of(database, job_id))
        with database.write() as connection:
            [outcome] = carry_out(connection, [end], now=now, actor="worker")
        assert isinstance(outcome, Applied), outcome
        return job_id

    def deliveries(self, target_id: str) -> list[sa.RowMapping]:
        """What was, or is to be, sent to the endpoint, oldest first."""
        d = webhook_deliveries
        with self.office.database.read() as connection:
            return list(
                connection.execute(
                    sa.select(d, webhook_messages.c.event_type)
                    .join(webhook_messages, webhook_messages.c.id == d.c.message_id)
                    .where(d.c.target_id == target_id)
                    .order_by(d.c.id)
                ).mappings()
            )

    def statuses(self, target_id: str) -> list[str]:
        return [row["status"] for row in self.deliveries(target_id)]

    def wait(self, target_id: str, *statuses: str) -> list[sa.RowMapping]:
        """The endpoint's deliveries, as soon as they have these statuses."""
        wait_until(
            lambda: self.statuses(target_id) == list(statuses),
            what=f"the deliveries are {statuses}",
            evidence=lambda: str(self.deliveries(target_id)),
        )
        return self.deliveries(target_id)

    def attempts(self, delivery_id: str) -> list[sa.RowMapping]:
        a = webhook_attempts.c
        query = sa.select(webhook_attempts).where(a.delivery_id == delivery_id).order_by(a.number)
        with self.office.database.read() as connection:
            return list(connection.execute(query).mappings())


def wait_for_waiter(connection: sa.Connection, asked: Future[Any]) -> None:
    """Until `asked` waits for a lock that this transaction holds, or is done. SQLite has one writer."""
    if connection.dialect.name == "postgresql":
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        wait_until(
            lambda: asked.done() or connection.execute(waiting).scalar_one(),
            what="somebody waits for this transaction",
            evidence=lambda: "nobody waits",
        )
