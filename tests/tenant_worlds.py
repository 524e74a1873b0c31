"""Two tenants with something of every kind, and every operation there is: for tests that keep them apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from api_client import LocalApi, reference
from factories import add_job
from laneway.clock import SystemClock, new_id
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role

CANARY = "cx_victim_7f3a"
SINCE = "2020-01-01T00:00:00Z"

KIND_OF = {
    "job_id": "job",
    "endpoint_id": "endpoint",
    "delivery_id": "delivery",
    "recovery_id": "recovery",
    "key_id": "key",
    "schedule_id": "schedule",
    "scheduled_job_id": "schedule",
    "batch_id": "batch",
    "chain_id": "chain",
    "run_id": "run",
    "tenant_id": "tenant",
    "name": "queue",
}
"""By the name of a parameter, in the path or the query."""

ITS_OWN = {
    "getWorker": "workers are the installation's; that of jobs only the caller's are named has its own test",
    "getJobType": "job types are the installation's",
}
"""Operations whose id is no tenant's."""

CONSTANTS = {"policy": "queue"}

STEP: dict[str, Any] = {"job_type": "demo.noop"}
BODIES: dict[str, Any] = {
    "changeJob": {"priority": "low"},
    "changeWebhookEndpoint": {"status": "paused"},
    "recoverWebhookEndpoint": {"since": SINCE},
    "changeApiKey": {"name": "n"},
    "changeScheduledJob": {"name": "n"},
    "changeChain": {"name": "n"},
    "purgeQueue": {"confirm": "nobody_s"},
    "setTenantRateLimit": {"quota": 1, "window_seconds": 1, "reason": "r"},
    "changeTenant": {"name": "n"},
}
"""By operation, where an empty object would not do."""

QUERIES = {"toggleScheduledJob": "?is_active=false"}
"""By operation, what its path does not do without."""


@dataclass
class World:
    """A tenant with something of every kind; every text of it holds `mark`."""

    api: LocalApi
    name: str
    mark: str
    keys: dict[Role, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def build(self) -> World:
        api, mark = self.api, self.mark
        for role in Role:
            self.keys[role] = api.key(role, tenant=self.name, subject=f"{mark} {role}")
        queue = re.sub("[^a-z0-9]", "", f"q{mark}")
        target = f"https://example.org/{mark}"
        spec = {
            "job_type": "demo.echo",
            "parameters": {"value": mark},
            "queue": queue,
            "title": mark,
            "description": mark,
            "tags": [mark],
            "metadata": {mark: mark},
            "webhook_url": target,
        }
        user = self.keys[Role.USER]
        jobs = [self._made("/jobs", {**spec, "unique_key": f"{mark} {n}"}, Role.USER)["id"] for n in range(2)]
        for job_id in jobs:
            api.post(f"/jobs/{job_id}/cancel", key=user, json={"reason": mark})
        running = self._made("/jobs", spec, Role.USER)
        endpoints = [
            self._made(
                "/webhooks/endpoints",
                {"url": target, "description": mark, "event_types": ["*"], "headers": {"X-Mark": mark}},
            )["id"]
            for _ in range(2)
        ]
        recovery = self._made(f"/webhooks/endpoints/{endpoints[0]}/recover", {"since": SINCE})["id"]
        keys = [self._made("/api-keys", {"role": "user", "name": mark})["id"] for _ in range(2)]
        schedule = {"job_type": "demo.echo", "parameters": {"value": mark}, "queue": queue}
        schedules = [
            self._made(
                "/scheduled-jobs",
                {**schedule, "name": f"{mark} {n}", "interval_seconds": 3600},
                Role.USER,
            )["id"]
            for n in range(2)
        ]
        api.post(f"/scheduled-jobs/{schedules[0]}/run", key=user)
        batches = [
            self._made("/batches", {"jobs": [{**spec, "title": f"{mark} {n}"}]}, Role.USER)["id"]
            for n in range(2)
        ]
        step = {"job_type": "demo.echo", "parameters": {"value": mark}, "queue": queue, "title": mark}
        chains = [
            self._made("/chains", {"name": f"{mark} {n}", "chain_definition": [step, step]}, Role.USER)["id"]
            for n in range(2)
        ]
        for _ in range(2):
            api.post(f"/chains/{chains[0]}/execute", key=user)
        runs = api.get(f"/chains/{chains[0]}/runs", key=user).json()["data"]
        api.post(f"/queues/{queue}/pause", key=self.keys[Role.ADMIN], json={"reason": mark})
        deliveries = api.get("/webhooks/deliveries", key=user).json()["data"]
        dead_letters = [self._dead_letter(running["created_by"], queue) for _ in range(2)]
        self.ids = {
            "job": running["id"],
            "dead letter": dead_letters[0],
            "endpoint": endpoints[0],
            "delivery": deliveries[0]["id"],
            "recovery": recovery,
            "key": keys[0],
            "schedule": schedules[0],
            "batch": batches[0],
            "chain": chains[0],
            "run": runs[0]["id"],
            "tenant": api.tenant(self.name),
            "queue": queue,
        }
        return self

    def _made(self, path: str, body: dict[str, Any], role: Role = Role.OPERATOR) -> dict[str, Any]:
        response = self.api.post(path, key=self.keys[role], json=body)
        assert response.status_code in (200, 201, 202), response.text
        return dict(response.json())

    def _dead_letter(self, subject: str, queue: str) -> str:
        error = {"type": "Error", "message": self.mark, "category": "permanent", "traceback": self.mark}
        return add_job(
            self.api.database,
            JobStatus.FAILED,
            tenant_id=self.api.tenant(self.name),
            created_by=subject,
            queue=queue,
            lane=queue,
            title=self.mark,
            error=error,
            dead_letter_reason="permanent",
            finished_at=SystemClock().now(),
        )

    def snapshot(self) -> list[tuple[str, str, Any]]:
        """What its operator sees of each of its things."""
        paths = {
            "job": "/jobs/",
            "dead letter": "/dead-letters/",
            "endpoint": "/webhooks/endpoints/",
            "delivery": "/webhooks/deliveries/",
            "recovery": "/webhooks/recoveries/",
            "key": "/api-keys/",
            "schedule": "/scheduled-jobs/",
            "batch": "/batches/",
            "chain": "/chains/",
            "queue": "/queues/",
        }
        seen = []
        for kind, path in paths.items():
            thing = self.api.get(path + self.ids[kind], key=self.keys[Role.OPERATOR])
            assert thing.status_code == 200, (kind, thing.text)
            still = {
                k: v for k, v in thing.json().items() if not re.search("age|wait|per_minute|used|lanes", k)
            }
            seen.append((kind, self.ids[kind], still))
        return seen


def nobodys() -> dict[str, str]:
    """Ids of every kind that no tenant has."""
    kinds = {*KIND_OF.values(), "dead letter"}
    return dict.fromkeys(kinds - {"key", "queue"}) | {  # type: ignore[return-value]
        **{kind: new_id() for kind in kinds - {"key", "queue"}},
        "key": "abcdefghijkl",
        "queue": "nobodysqueue",
    }


@dataclass(frozen=True)
class Operation:
    """One operation of the document."""

    method: str
    path: str
    id: str
    path_parameters: tuple[str, ...]
    query_parameters: tuple[str, ...]
    takes_body: bool

    @property
    def kinds(self) -> dict[str, str]:
        """Its path's ids, by name; the kind of each."""
        kinds = {n: KIND_OF[n] for n in self.path_parameters if n not in CONSTANTS}
        return kinds | {"job_id": "dead letter"} if self.path.startswith("/dead-letters/{") else kinds

    @property
    def name(self) -> str:
        """Of an alias, the operation that it means."""
        return self.id.removesuffix("Alias")

    def url(self, ids: dict[str, str]) -> str:
        """Its path with these ids, by name."""
        path = self.path.format(**CONSTANTS, **{name: quote(value) for name, value in ids.items()})
        return path + QUERIES.get(self.name, "")

    def body(self) -> dict[str, Any]:
        return {"json": BODIES.get(self.name, {})} if self.takes_body else {}


def operations() -> Iterator[Operation]:
    for path, methods in reference().document["paths"].items():
        for method, operation in methods.items():
            if operation.get("security") == []:
                continue
            parameters = operation.get("parameters", [])
            yield Operation(
                method.upper(),
                path.removeprefix("/api/v1"),
                operation["operationId"],
                tuple(p["name"] for p in parameters if p["in"] == "path"),
                tuple(p["name"] for p in parameters if p["in"] == "query"),
                "requestBody" in operation,
            )
