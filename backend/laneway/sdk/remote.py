"""The backend of a process that only reaches a Laneway server: the HTTP API, with a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import sqlalchemy as sa

from laneway.clock import new_id
from laneway.domain.states import WAITING
from laneway.engine.registry import JobType
from laneway.errors import Unauthenticated
from laneway.sdk.backend import Answer, Request
from laneway.sdk.client import LanewayClient
from laneway.settings import Settings

PAGE = 200


class RemoteBackend:
    """Jobs of the key's own tenant."""

    def __init__(self, client: LanewayClient) -> None:
        self._client = client

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Raises Unauthenticated unless the settings say where the server is, and with what key to call."""
        key = settings.api_key.get_secret_value()
        if not settings.url or not key:
            raise Unauthenticated("LANEWAY_BACKEND=http needs LANEWAY_URL and LANEWAY_API_KEY")
        return cls(LanewayClient(settings.url, key))

    def close(self) -> None:
        self._client.close()

    # Making jobs

    def enqueue(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._post("/jobs", request) for request in requests]

    def enqueue_batch(self, request: Request) -> Answer:
        return self._post("/batches", request)

    def enqueue_in(self, connection: sa.Connection, request: Request) -> Any:
        raise RuntimeError(
            "LANEWAY_BACKEND=http has no database in common with the session; "
            "enqueue after its commit, or use LANEWAY_BACKEND=rq"
        )

    def hold(self, job_type: JobType, parameters: Mapping[str, Any]) -> None:
        return None  # the server's workers run it

    # Looking at jobs

    def get(self, job_id: str) -> Answer:
        return self._read(f"/jobs/{job_id}")

    def wait(self, job_id: str, *, timeout_seconds: float) -> Answer:
        try:
            self._client.wait(job_id, timeout_seconds=timeout_seconds)
        except TimeoutError:
            pass  # the answer says where the job is
        return self.get(job_id)

    def cancel(self, job_id: str, *, terminate: bool) -> Answer:
        return self._post(f"/jobs/{job_id}/cancel", {"terminate": terminate})

    # Queues

    def queue_length(self, queue: str) -> int:
        known = self._read("/queues/stats")["queues"]
        return sum(int(each["queued"]) for each in known if each["name"] == queue)

    def purge_queue(self, queue: str) -> int:
        wanted = {"queue": queue, "status": sorted(WAITING)}
        count: int = 0
        while True:
            done = self._post("/jobs/cancel", {"filter": wanted, "reason": "the queue was purged"})
            count += done["cancelled"]
            if not done["remaining"] or not done["cancelled"]:
                return count

    # Chains and schedules

    def start_chain(self, request: Request) -> Answer:
        return self._post("/chains", request)

    def create_schedule(self, request: Request) -> Answer:
        return self._post("/scheduled-jobs", request)

    def list_schedules(self) -> list[Answer]:
        found: list[Answer] = []
        query: dict[str, Any] = {"limit": PAGE}
        while True:
            page = self._client.request("GET", "/scheduled-jobs", query=query)
            found += page["data"]
            if not page["has_more"]:
                return found
            query["cursor"] = page["next_cursor"]

    def delete_schedule(self, schedule_id: str) -> None:
        self._client.request("DELETE", f"/scheduled-jobs/{schedule_id}")

    # Calls

    def _read(self, path: str) -> Answer:
        return dict(self._client.request("GET", path))

    def _post(self, path: str, body: Request) -> Answer:
        return dict(self._client.request("POST", path, body=dict(body), idempotency_key=new_id()))
