"""API keys and their scopes over HTTP."""

from __future__ import annotations

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from api_client import BASE, LocalApi, ServedApi, environment, reference
from factories import change, rows_of
from laneway import models
from laneway.api.authentication import is_known, scope_of
from laneway.clock import new_id
from laneway.engine.access.callers import ROLE_SCOPES, AccessScope, Caller, Role, create_key, key_id_of
from laneway.engine.access.credentials import Callers
from laneway.engine.access.keys import Keys
from laneway.engine.access.watch import WATCH_SECONDS
from servers import wait_until

OF_TARGETS = {"reportJobProgress", "reportJobComplete", "reportJobFailure"}  # not for keys at all
UNSCOPED = {"getMe", "getRateLimits", "createToken"}
OPERATIONS = {
    operation["operationId"]: (method.upper(), path)
    for path, methods in reference().document["paths"].items()
    for method, operation in methods.items()
    if operation.get("security") != [] and path.startswith(BASE)
}
NEEDED = {  # of the first operation of each kind; `test_every_route_says_which_scope` has the rest
    "createJob": "jobs:write",
    "listJobs": "jobs:read",
    "cancelJob": "jobs:write",
    "streamJobEvents": "jobs:read",
    "listDeadLetters": "jobs:read",
    "purgeDeadLetters": "jobs:write",
    "listWebhookEndpoints": "webhooks:read",
    "createWebhookEndpoint": "webhooks:write",
    "getWebhookSecret": "webhooks:write",
    "getQueueStats": "queues:read",
    "listWorkers": "queues:read",
    "createApiKey": "keys:manage",
    "listApiKeys": "keys:manage",
    "getMe": None,
}


@pytest.fixture
def olga(api: LocalApi) -> str:
    return api.key(Role.OPERATOR, subject="olga")


def made(api: LocalApi, key: str, **fields: Any) -> dict[str, Any]:
    response = api.post("/api-keys", key=key, json={"role": "user"} | fields)
    assert response.status_code == 201, response.text
    return dict(response.json())


# A key's life


def test_a_key_is_made_used_changed_rotated_and_revoked(each_api: LocalApi) -> None:
    api = each_api
    olga = api.key(Role.OPERATOR, subject="olga")
    response = api.post("/api-keys", key=olga, json={"role": "user", "name": "ci", "subject": "alice"})
    key = response.json()
    assert response.headers["location"] == f"/api/v1/api-keys/{key['id']}"
    text = key.pop("key")
    assert (key["name"], key["created_by"], key["scopes"]) == ("ci", "olga", None)
    assert api.get("/me", key=text).json() == {
        "tenant_id": api.tenant_id,
        "subject": "alice",
        "role": "user",
        "scopes": sorted(ROLE_SCOPES[Role.USER]),
        "key_id": key["id"],
        "job_id": None,
        "expires_at": None,
    }
    assert api.get(f"/api-keys/{key['id']}", key=olga).json() == key
    assert key in api.get("/api-keys", key=olga).json()["data"]

    url = f"/api-keys/{key['id']}"
    changed = api.request("PATCH", url, key=olga, json={"scopes": ["jobs:read"]})
    assert changed.json()["scopes"] == ["jobs:read"]
    refused = api.post("/jobs", key=text, json={"job_type": "demo.echo"})
    assert (refused.status_code, refused.json()["facts"]) == (403, {"needed_scope": "jobs:write"})

    rotated = api.post(f"{url}/rotate", key=olga).json()
    assert rotated["replaces"] == key["id"]
    for each in (text, rotated["key"]):
        assert api.get("/me", key=each).json()["subject"] == "alice"
    end = datetime.fromisoformat(api.get(url, key=olga).json()["expires_at"])
    assert timedelta(hours=23) < end - datetime.now(UTC) <= timedelta(hours=24)

    assert api.request("DELETE", url, key=olga).status_code == 204
    assert api.get("/me", key=text).status_code == 401, "at once, in the process that revoked it"
    assert api.get("/me", key=rotated["key"]).status_code == 200
    assert [row["action"] for row in rows_of(api.database, models.audit_log)] == [
        *("key.created", "key.changed", "key.rotated", "key.revoked")
    ]
    assert all(row["request_id"] for row in rows_of(api.database, models.audit_log))
    stored = str([dict(row) for row in rows_of(api.database, models.api_keys)])
    assert text[21:-6] not in stored


class NeverForgets(ServedApi):
    """An API process that remembers keys for ever: what it hears of changes, it hears by its looks."""

    PROGRAM = """
import sys, uvicorn
from laneway.engine.access import credentials
credentials.CACHE_SECONDS = 1e9
uvicorn.run("laneway.api.app:create_app", factory=True, uds=sys.argv[1], access_log=False)
"""

    def start(self) -> None:
        self.run(
            [sys.executable, "-c", self.PROGRAM, self.socket],
            ready=self._answers,
            dying=signal.SIGKILL,
            env=environment(self.settings),
        )


def test_a_revoked_key_is_refused_by_another_process_soon(api: LocalApi, olga: str) -> None:
    key = made(api, olga)
    with NeverForgets(api.settings) as other:
        for door in (api, other):
            assert door.get("/me", key=key["key"]).status_code == 200
        api.request("DELETE", f"/api-keys/{key['id']}", key=olga)
        assert api.get("/me", key=key["key"]).status_code == 401
        wait_until(lambda: other.get("/me", key=key["key"]).status_code == 401, what="the other has heard")
    assert WATCH_SECONDS <= 0.5


def test_an_issuer_that_does_not_answer_keeps_no_revoked_key_open(
    local: Callable[..., LocalApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching, answered = threading.Event(), threading.Event()

    def never_answers(_: Callers) -> None:
        fetching.set()
        answered.wait(60)

    monkeypatch.setattr(Callers, "refresh", never_answers)
    api = local()
    try:
        assert fetching.wait(20)
        assert api.get("/me").status_code == 200
        Keys(api.database, Caller(api.tenant_id, "root", Role.ADMIN), now=datetime.now(UTC)).revoke(
            key_id_of(api.alice)
        )
        wait_until(lambda: api.get("/me").status_code == 401, what="this process has heard of it")
        assert not answered.is_set()
    finally:
        answered.set()


def test_nobody_makes_a_key_stronger_than_himself(api: LocalApi, olga: str) -> None:
    for key in (api.alice, olga):
        response = api.post("/api-keys", key=key, json={"role": "admin"})
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert rows_of(api.database, models.audit_log) == []


def test_a_bad_wish_says_what_is_wrong(api: LocalApi, olga: str) -> None:
    for body, pointer in (
        ({}, "/role"),
        ({"role": "king"}, "/role"),
        ({"role": "user", "scopes": ["keys:manage"]}, ""),
        ({"role": "user", "expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ({"role": "user", "allowed_cidrs": ["10.0.0.1/8"]}, "/allowed_cidrs/0"),
        ({"role": "user", "tenant_id": "x"}, "/tenant_id"),
    ):
        response = api.post("/api-keys", key=olga, json=body)
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == pointer


def test_a_key_of_another_tenant_is_the_same_404_as_none(api: LocalApi, olga: str) -> None:
    theirs = key_id_of(api.key(tenant="other"))
    for method, tail in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate")):
        answers = set()
        for key_id in (theirs, "nobodyskey12"):
            response = api.request(method, f"/api-keys/{key_id}{tail}", key=olga, json={})
            text = response.text.replace(key_id, "ID").replace(response.headers["x-request-id"], "R")
            answers.add((response.status_code, text))
        assert len(answers) == 1
        assert answers.pop()[0] == 404
    assert api.get("/api-keys/NOT-AN-ID", key=olga).status_code == 422


def test_the_last_use_is_shown_soon(api: LocalApi, olga: str) -> None:
    key = made(api, olga)
    api.get("/me", key=key["key"])

    def shown() -> dict[str, Any]:
        return dict(api.get(f"/api-keys/{key['id']}", key=olga).json())

    wait_until(lambda: shown()["last_used_at"] is not None, seconds=60, what="it is written")
    assert shown()["last_used_ip"] == "127.0.0.1"


# Scopes


def test_every_route_says_which_scope_it_needs() -> None:
    unknown = [path for _, path in OPERATIONS.values() if not is_known(path)]
    assert unknown == [], "add them to _SCOPES in api/authentication.py"
    needed = {name: scope_of(path, method) for name, (method, path) in OPERATIONS.items()}
    assert {name: needed[name] for name in NEEDED} == NEEDED
    assert {name for name, scope in needed.items() if scope is None} <= UNSCOPED
    for name, (method, path) in OPERATIONS.items():
        if path.startswith(f"{BASE}/admin") or path.startswith(f"{BASE}/jobs/admin"):
            assert needed[name] is AccessScope.ADMIN, name
        if method != "GET" and name not in UNSCOPED:
            assert not str(needed[name]).endswith(":read"), name


def test_an_applications_routes_need_the_scopes_of_jobs() -> None:
    path = f"{BASE}/feedback-summaries/evaluation/1/batch-queue"
    assert scope_of(path, "POST") is AccessScope.JOBS_WRITE
    assert scope_of(path, "GET") is AccessScope.JOBS_READ
    assert not is_known(f"{BASE}/jobs-of-somebody")


def test_each_operation_wants_its_scope_and_no_other(api: LocalApi) -> None:
    """Matrix: all scopes but the one needed are a 403 that names it; that one alone is none of scopes."""

    def key_with(scopes: frozenset[AccessScope]) -> str:
        text = create_key(api.database, tenant_id=api.tenant_id, role=Role.ADMIN, subject="root")
        change(api.database, models.api_keys, key_id_of(text), scopes=sorted(scopes))
        return text

    every = frozenset(AccessScope)
    only = {scope: key_with(frozenset({scope})) for scope in every}
    without = {scope: key_with(every - {scope}) for scope in every}
    none = key_with(frozenset())
    for name in OPERATIONS.keys() - OF_TARGETS:
        method, template = OPERATIONS[name]
        path = template.removeprefix(BASE).format_map(defaultdict(new_id, name="demo.echo", policy="queue"))
        body = {"json": {"surely": "no field"}} if method in {"POST", "PATCH", "PUT"} else {}
        needed = scope_of(template, method)

        def ask(key: str, method: str = method, path: str = path, body: Any = body) -> httpx.Response:
            return api.send(method, BASE + path, headers=api.headers(key), **body)

        if needed is None:
            assert ask(none).status_code != 403, name
            continue
        refused = ask(without[needed])
        assert (refused.status_code, refused.json()["facts"]) == (403, {"needed_scope": needed.value}), name
        if "events" not in template:  # which would stream on
            passed = ask(only[needed])
            assert "needed_scope" not in passed.text, name


def test_a_role_is_needed_beside_the_scope(api: LocalApi) -> None:
    text = api.key(Role.USER)
    change(api.database, models.api_keys, key_id_of(text), scopes=sorted(AccessScope))
    response = api.get("/api-keys", key=text)
    assert (response.status_code, response.json()["facts"]) == (403, {"needed_role": "operator"})
    assert "keys:manage" not in api.get("/me", key=text).json()["scopes"]
