"""`POST /jobs/cancel`: what may be asked, who may, and what is answered."""

from __future__ import annotations

from typing import Any

import pytest

from api_client import LocalApi
from factories import add_job, job_row, status_of
from laneway.api.cancels import MAX_IDS
from laneway.clock import new_id
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.cancels import MAX_CANCELLED


def job(api: LocalApi, status: JobStatus = JobStatus.QUEUED, **columns: Any) -> str:
    return add_job(api.database, status, **({"tenant_id": api.tenant_id} | columns))


def test_many_jobs_are_cancelled_by_one_call(each_api: LocalApi) -> None:
    api, operator = each_api, each_api.key(Role.OPERATOR, subject="olga")
    waiting, running = [job(api, created_by="bob") for _ in range(3)], job(api, JobStatus.RUNNING)
    elsewhere = job(api, tenant_id=api.tenant("other"))
    asked = {"filter": {"queue": "default"}, "reason": "maintenance", "grace_seconds": 3}
    forecast = api.post("/jobs/cancel", key=operator, json=asked | {"dry_run": True})
    assert forecast.json() == {"matched": 4, "cancelled": 0, "cancelling": 0, "remaining": 4}
    done = api.post("/jobs/cancel", key=operator, json=asked | {"limit": 2})
    assert done.json() == {"matched": 4, "cancelled": 2, "cancelling": 0, "remaining": 2}
    rest = api.post("/jobs/cancel", key=operator, json=asked)
    assert rest.json() == {"matched": 2, "cancelled": 1, "cancelling": 1, "remaining": 0}
    for job_id in waiting:
        row = job_row(api.database, job_id)
        assert (row["status"], row["cancelled_by"], row["cancel_reason"]) == (
            "cancelled",
            "olga",
            "maintenance",
        )
    assert api.get(f"/jobs/{running}").json()["cancelling"]
    assert job_row(api.database, running)["cancel_grace_seconds"] == 3
    assert status_of(api.database, elsewhere) == "queued"


@pytest.mark.parametrize("role", [Role.USER, Role.OPERATOR, Role.ADMIN])
def test_an_operator_may_and_only_in_its_tenant(api: LocalApi, role: Role) -> None:
    mine, elsewhere = job(api), job(api, tenant_id=api.tenant("other"))
    response = api.post("/jobs/cancel", key=api.key(role), json={"filter": {"ids": [mine, elsewhere]}})
    if role is Role.USER:
        assert response.json()["facts"] == {"needed_role": "operator"}
    else:
        assert response.json()["cancelled"] == 1
    assert status_of(api.database, mine) == ("queued" if role is Role.USER else "cancelled")
    assert status_of(api.database, elsewhere) == "queued"


def test_every_filter_narrows(api: LocalApi) -> None:
    other = job(api, JobStatus.SCHEDULED, job_type="a.b", queue="emails", priority="low")
    fits = job(api)
    created = api.get(f"/jobs/{fits}").json()["created_at"]
    for narrow in (
        {"status": ["queued"]},
        {"status": ["pending"]},
        {"job_type": "demo.echo"},
        {"queue": "default"},
        {"priority": "normal"},
        {"ids": [fits]},
        {"queue": "default", "created_before": created.replace("2026", "2027")},
        {"queue": "default", "created_after": created.replace("2026", "2025")},
    ):
        asked = {"filter": narrow, "dry_run": True}
        assert api.post("/jobs/cancel", key=api.key(Role.OPERATOR), json=asked).json()["matched"] == 1, narrow
    assert status_of(api.database, other) == "scheduled"


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ({}, "/filter"),
        ({"filter": {}}, "/filter"),
        ({"filter": {"queue": None}}, "/filter"),
        ({"filter": {"status": []}}, "/filter/status"),
        ({"filter": {"ids": []}}, "/filter/ids"),
        ({"filter": {"ids": ["x"]}}, "/filter/ids/0"),
        ({"filter": {"colour": "red"}}, "/filter/colour"),
        ({"filter": {"queue": "default"}, "limit": 0}, "/limit"),
        ({"filter": {"queue": "default"}, "limit": MAX_CANCELLED + 1}, "/limit"),
        ({"filter": {"queue": "default"}, "reason": "x" * 201}, "/reason"),
        ({"filter": {"created_after": "2026-01-01T00:00:00"}}, "/filter/created_after"),
        *[({"filter": {"status": [status]}}, "/filter/status/0") for status in sorted(FINAL)],
    ],
)
def test_what_is_wrong_cancels_nothing(api: LocalApi, asked: dict[str, Any], pointer: str) -> None:
    job_id = job(api)
    response = api.post("/jobs/cancel", key=api.key(Role.OPERATOR), json=asked)
    assert response.status_code == 422, response.text
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
    assert status_of(api.database, job_id) == "queued"


def test_as_many_ids_as_the_limit_says_and_no_more(each_api: LocalApi) -> None:
    assert MAX_IDS == 1_000
    last = job(each_api)
    ids = [*(new_id() for _ in range(MAX_IDS - 1)), last]
    operator = each_api.key(Role.OPERATOR)
    asked = {"filter": {"ids": [*ids, new_id()]}}
    assert each_api.post("/jobs/cancel", key=operator, json=asked).status_code == 422
    asked = {"filter": {"ids": ids}, "limit": MAX_CANCELLED}
    assert each_api.post("/jobs/cancel", key=operator, json=asked).json()["cancelled"] == 1
    assert status_of(each_api.database, last) == "cancelled"


def test_it_costs_the_batch_budget(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=100/60@user,batch=1/60@user,default=100/60@user")
    operator = api.key(Role.OPERATOR)
    asked = {"filter": {"queue": "default"}}
    assert api.post("/jobs/cancel", key=operator, json=asked).status_code == 200
    assert api.post("/jobs/cancel", key=operator, json=asked).status_code == 429
