"""Who may pass, and what they may see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from api_client import LocalApi, reference
from factories import add_job, change
from laneway import models
from laneway.clock import new_id
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role, key_id_of, make_key

OPERATIONS = [
    (
        method.upper(),
        path.removeprefix("/api/v1").format_map(defaultdict(new_id, name="demo.echo")),
    )
    for path, methods in reference().document["paths"].items()
    for method, operation in methods.items()
    if operation.get("security") != []
]
OF_A_JOB = [
    (method.upper(), path.partition("{job_id}")[2])
    for path, methods in reference().document["paths"].items()
    for method in methods
    if path.startswith("/api/v1/jobs/{job_id}")
]


def body_of(method: str) -> dict[str, Any]:
    return {"json": {"job_type": "demo.echo"}} if method == "POST" else {}


def test_every_operation_wants_a_key(local: Callable[..., LocalApi]) -> None:
    api = local(trusted_proxies="127.0.0.0/8")
    assert len(OPERATIONS) >= 90
    for number, (method, path) in enumerate(OPERATIONS):
        address = {"X-Forwarded-For": f"198.18.0.{number}"}  # each has its own, and its own allowance
        response = api.request(method, path, key=None, headers=address, **body_of(method))
        assert (response.status_code, response.json()["code"]) == (401, "unauthenticated"), path
    assert api.count_jobs() == 0


def test_only_a_key_that_is_known_whole_and_not_revoked_passes(each_api: LocalApi) -> None:
    revoked = each_api.key()
    change(
        each_api.database, models.api_keys, key_id_of(revoked), revoked_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    expired = each_api.key()
    change(
        each_api.database, models.api_keys, key_id_of(expired), expires_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    good = each_api.key()
    other = each_api.key()
    swapped = make_key()
    for name, key in {
        "unknown": make_key(),
        "revoked": revoked,
        "expired": expired,
        "cut": good[:-1],
        "longer": good + "0",
        "bent": good[:30] + ("A" if good[30] != "A" else "B") + good[31:],
        "of two": good[:21] + other[21:],
        "another's": swapped,
        "half a character": "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        "long": "x" * 10_000,
    }.items():
        headers = {"Authorization": f"Bearer {key}".encode("latin-1")}
        response = each_api.get("/jobs", key=None, headers=headers)
        assert (response.status_code, response.json()["code"]) == (401, "unauthenticated"), name
        assert key not in response.text
    assert each_api.get("/jobs", key=good).status_code == 200


def test_a_key_may_be_sent_in_either_header(api: LocalApi) -> None:
    for headers in (
        {"Authorization": f"Bearer {api.alice}"},
        {"Authorization": f"bearer  {api.alice} "},
        {"X-API-Key": api.alice},
        {"Authorization": "Basic YTpi", "X-API-Key": api.alice},
    ):
        assert api.get("/jobs", key=None, headers=headers).status_code == 200, headers
    assert api.get("/jobs", key=None, headers={"Authorization": api.alice}).status_code == 401


def test_an_address_without_a_key_is_refused_after_60_requests(api: LocalApi) -> None:
    for n in range(60):
        response = api.get("/jobs", key=None)
        assert response.status_code == 401, n
        assert response.headers["x-ratelimit-remaining"] == str(59 - n)
    response = api.get("/jobs", key=None)
    assert (response.status_code, response.json()["code"]) == (429, "rate_limited")
    assert response.json()["facts"] == {"violated_policies": ["anonymous"]}
    assert api.get("/jobs").status_code == 200, "who has a key is not refused with it"


def test_a_user_may_not_read_the_webhook_secret(api: LocalApi) -> None:
    response = api.get("/webhooks/secret")
    assert (response.status_code, response.json()["code"]) == (403, "forbidden")
    assert response.json()["facts"] == {"needed_role": "operator"}
    for role in (Role.OPERATOR, Role.ADMIN):
        assert api.get("/webhooks/secret", key=api.key(role)).json()["secret"].startswith("whsec_")


def test_each_tenant_has_its_own_webhook_secret(api: LocalApi) -> None:
    secrets = {
        api.get("/webhooks/secret", key=api.key(Role.OPERATOR, tenant=name)).json()["secret"]
        for name in ("default", "other", "other")
    }
    assert len(secrets) == 2


REPORTS = ("/progress", "/complete", "/fail")


def without_ids(response: httpx.Response, job_id: str) -> tuple[int, str]:
    text = response.text.replace(job_id, "ID").replace(response.headers["x-request-id"], "REQUEST")
    return response.status_code, text


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.COMPLETED])
def test_a_job_of_others_is_the_same_404_as_no_job(each_api: LocalApi, status: JobStatus) -> None:
    of_bob = add_job(each_api.database, status, tenant_id=each_api.tenant_id, created_by="bob")
    elsewhere = add_job(each_api.database, status, tenant_id=each_api.tenant("other"), created_by="alice")
    assert len(OF_A_JOB) == 14
    for method, tail in OF_A_JOB:
        body = {"json": {"tags": ["x"]}} if method == "PATCH" else {}
        answers = set()
        for job_id in (new_id(), of_bob, elsewhere):
            response = each_api.request(method, f"/jobs/{job_id}{tail}", **body)
            answers.add(without_ids(response, job_id))
        assert len(answers) == 1, answers
        others_do = method == "DELETE" or tail in REPORTS  # operators delete, targets report
        assert answers.pop()[0] == (403 if others_do else 404)
    operator = each_api.key(Role.OPERATOR)
    assert each_api.get(f"/jobs/{of_bob}", key=operator).status_code == 200
    assert each_api.get(f"/jobs/{elsewhere}", key=operator).status_code == 404
    assert each_api.get(f"/jobs/{elsewhere}", key=each_api.key(Role.ADMIN)).status_code == 404


def test_nobody_cancels_what_they_may_not_see(each_api: LocalApi) -> None:
    job = each_api.make()
    bob = each_api.key(subject="bob")
    assert each_api.post(f"/jobs/{job['id']}/cancel", key=bob).status_code == 404
    assert each_api.get(f"/jobs/{job['id']}").json()["status"] == "queued"
    operator = each_api.key(Role.OPERATOR, subject="olga")
    assert each_api.post(f"/jobs/{job['id']}/cancel", key=operator).json()["cancelled_by"] == "olga"


def test_lists_and_counts_show_what_the_caller_may_see(each_api: LocalApi) -> None:
    bob = each_api.key(subject="bob")
    operator = each_api.key(Role.OPERATOR, subject="olga")
    stranger = each_api.key(Role.ADMIN, tenant="other", subject="alice")
    made = {key: each_api.make(key=key)["id"] for key in (each_api.alice, bob, operator, stranger)}

    def seen(key: str, query: str = "") -> set[str]:
        return {job["id"] for job in each_api.get(f"/jobs{query}", key=key).json()["data"]}

    assert seen(each_api.alice) == seen(each_api.alice, "?scope=tenant") == {made[each_api.alice]}
    assert seen(bob) == {made[bob]}
    assert seen(operator) == {made[each_api.alice], made[bob], made[operator]}
    assert seen(operator, "?scope=mine") == {made[operator]}
    assert seen(stranger) == {made[stranger]}
    elsewhere = each_api.key(Role.OPERATOR, tenant="other")
    for key, count in ((elsewhere, 1), (each_api.alice, 3), (stranger, 4)):  # an admin: the installation's
        assert each_api.get("/queues/stats", key=key).json()["jobs"]["queued"] == count


def test_two_keys_of_one_subject_see_the_same_jobs(api: LocalApi) -> None:
    job = api.make()
    assert api.get(f"/jobs/{job['id']}", key=api.key(subject="alice")).json() == job | {"position": 1}
