"""Every body that the OpenAPI document shows is one that the API takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from api_client import LocalApi, reference
from factories import add_job
from laneway.api.examples import EXAMPLES
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.access.job_tokens import JobTokens
from laneway.webhooks.secrets import SecretBox

OPERATIONS = {
    operation["operationId"]: (method.upper(), path.removeprefix("/api/v1"), operation)
    for path, methods in reference().document["paths"].items()
    for method, operation in methods.items()
}
SHOWN = [(name, title) for name, examples in EXAMPLES.items() for title in examples]


class Makers:
    """What an operation's path leads to, in a state in which the operation can do its work."""

    def __init__(self, api: LocalApi, key: str) -> None:
        self._api = api
        self._key = key
        self.caller = key  # of the operation itself

    def of(self, operation: str, parameter: str) -> str:
        make: Callable[[], str] = getattr(self, f"_{operation}", None) or getattr(self, f"_{parameter}")
        return make()

    def _made(self, path: str, body: dict[str, Any], name: str = "id") -> str:
        response = self._api.post(path, json=body, key=self._key)
        assert response.is_success, response.text
        return str(response.json()[name])

    def _row(self, status: JobStatus, **columns: Any) -> str:
        return add_job(self._api.database, status, tenant_id=self._api.tenant_id, **columns)

    def _job_id(self) -> str:
        return self._row(JobStatus.QUEUED)

    def _changeJob(self) -> str:  # noqa: N802 - an operationId
        return self._row(JobStatus.SCHEDULED)

    def _retryJob(self) -> str:  # noqa: N802
        return self._row(JobStatus.CANCELLED)

    def _retryDeadLetter(self) -> str:  # noqa: N802
        return self._row(JobStatus.FAILED, job_type="demo.fail", dead_letter_reason="permanent")

    def _at_target(self) -> str:
        job_id = self._row(JobStatus.RUNNING, job_type="http.request", parameters={})
        self.caller = JobTokens(SecretBox.from_settings(self._api.settings)).make(
            self._api.tenant_id, job_id, 1
        )
        return job_id

    _reportJobProgress = _reportJobComplete = _reportJobFailure = _at_target  # noqa: N815

    def _endpoint_id(self) -> str:
        return self._made("/webhooks/endpoints", EXAMPLES["createWebhookEndpoint"]["ends of jobs"])

    def _name(self) -> str:
        return "default"

    def _batch_id(self) -> str:
        return self._made("/batches", EXAMPLES["createBatch"]["of one type"])

    def _chain_id(self) -> str:
        return self._made("/chains", EXAMPLES["createChain"]["side by side"])

    def _cancelChain(self) -> str:  # noqa: N802
        return self._made("/chains", EXAMPLES["createChain"]["one after the other"])

    def _schedule_id(self) -> str:
        return self._made("/scheduled-jobs", EXAMPLES["createScheduledJob"]["every five minutes"])

    def _key_id(self) -> str:
        made = self._api.post("/api-keys", json={"role": "user", "subject": "somebody"}, key=self._key).json()
        return str(made["id"])

    def _tenant_id(self) -> str:
        return self._made("/admin/tenants", {"name": "before"})

    def _policy(self) -> str:
        return "queue"


@pytest.mark.parametrize(("name", "title"), SHOWN, ids=[f"{name}-{title}" for name, title in SHOWN])
def test_an_example_is_taken(api: LocalApi, name: str, title: str) -> None:
    method, template, operation = OPERATIONS[name]
    key = api.key(Role.ADMIN, subject="admin")
    makers = Makers(api, key)
    path = template
    for each in operation.get("parameters", ()):
        if each["in"] == "path":
            path = path.replace(f"{{{each['name']}}}", makers.of(name, each["name"]))
    shown = operation["requestBody"]["content"]["application/json"]["examples"][title]["value"]
    response = api.request(method, path, json=shown, key=makers.caller)
    assert response.is_success, response.text


def test_every_body_has_an_example() -> None:
    wanted = {name.removesuffix("Alias") for name, (_, _, of) in OPERATIONS.items() if "requestBody" in of}
    assert wanted == set(EXAMPLES)
