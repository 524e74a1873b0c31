"""Concurrency keys, limits of tenants and debounce as callers meet them."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from api_client import LocalApi
from factories import WORKER, job_row
from laneway import models
from laneway.clock import SystemClock, new_id
from laneway.engine.access import tenants
from laneway.engine.access.callers import Role
from laneway.engine.outcomes import carry_out
from laneway.engine.transitions import Claim, Complete, Move

KEYED = {"concurrency_key": "shop-17"}


def apply(api: LocalApi, *moves: Move) -> None:
    with api.database.write() as connection:
        carry_out(connection, moves, now=SystemClock().now(), actor="t")


def claim(api: LocalApi, *ids: str) -> None:
    now = SystemClock().now()
    apply(api, *(Claim(job_id, new_id(), WORKER, now) for job_id in ids))


def told(api: LocalApi, job_id: str) -> tuple[Any, ...]:
    job = api.get(f"/jobs/{job_id}").json()
    return job["status"], job["status_reason"], job["position"]


def test_a_key_and_its_limit_are_answered_and_a_waiting_job_says_why_and_where(each_api: LocalApi) -> None:
    ids = [each_api.make(**KEYED)["id"] for _ in range(4)]
    assert told(each_api, ids[3]) == ("queued", None, 4)
    claim(each_api, *ids[:3])
    assert [told(each_api, job_id) for job_id in ids] == [
        ("running", None, None),
        ("blocked", "concurrency_key", 1),
        ("blocked", "concurrency_key", 2),
        ("queued", None, 1),
    ]
    job = each_api.get(f"/jobs/{ids[0]}").json()
    assert (job["concurrency_key"], job["concurrency_limit"]) == ("shop-17", 1)
    assert {each["position"] for each in each_api.get("/jobs").json()["data"]} == {None}


def test_the_tag_of_an_answer_changes_with_the_position(api: LocalApi) -> None:
    first, second = (api.make()["id"] for _ in range(2))
    tag = api.get(f"/jobs/{second}").headers["etag"]
    assert api.get(f"/jobs/{second}", headers={"If-None-Match": tag}).status_code == 304
    claim(api, first)
    again = api.get(f"/jobs/{second}", headers={"If-None-Match": tag})
    assert (again.status_code, again.json()["position"]) == (200, 1)
    changed = api.request(
        "PATCH", f"/jobs/{second}", json={"tags": ["x"]}, headers={"If-Match": again.headers["etag"]}
    )
    assert changed.status_code == 200


@pytest.mark.parametrize(("limit", "status"), [(1, 202), (1000, 202), (0, 422), (1001, 422), (1.5, 422)])
def test_a_limit_is_1_to_1000(api: LocalApi, limit: float, status: int) -> None:
    wanted = {"job_type": "demo.echo", "concurrency_limit": limit} | KEYED
    assert api.post("/jobs", json=wanted).status_code == status


def test_a_limit_needs_a_key(api: LocalApi) -> None:
    answer = api.post("/jobs", json={"job_type": "demo.echo", "concurrency_limit": 2})
    assert (answer.status_code, "concurrency_key" in answer.text) == (422, True)


def test_jobs_of_batches_and_steps_of_chains_have_keys(api: LocalApi) -> None:
    batch = {"job_type": "demo.echo", "items": [{}], "defaults": KEYED | {"concurrency_limit": 3}}
    assert api.post("/batches", json=batch).status_code == 202
    step = {"job_type": "demo.echo", "concurrency_key": "step"}
    chain = {"name": "c", "chain_definition": [step, step], "execute": True}
    assert api.post("/chains", json=chain).status_code == 202
    with api.database.read() as connection:
        columns = (models.jobs.c.concurrency_key, models.jobs.c.concurrency_limit)
        found = {tuple(row) for row in connection.execute(sa.select(*columns))}
    assert found == {("shop-17", 3), ("step", 1)}


def test_an_admin_limits_a_tenant_and_what_runs_counts(each_api: LocalApi) -> None:
    admin = each_api.key(Role.ADMIN)
    path = f"/admin/tenants/{each_api.tenant_id}"
    assert each_api.get(path, key=admin).json()["max_running"] is None
    ids = [each_api.make()["id"] for _ in range(3)]
    claim(each_api, ids[0])
    limited = each_api.request("PATCH", path, key=admin, json={"max_running": 1})
    assert (limited.status_code, limited.json()["max_running"]) == (200, 1)
    claim(each_api, *ids[1:])
    assert [told(each_api, job_id) for job_id in ids[1:]] == [
        ("blocked", "tenant_limit", 1),
        ("blocked", "tenant_limit", 2),
    ]
    held = job_row(each_api.database, ids[0])
    apply(each_api, Complete(ids[0], 1, held["lease_token"], result="1"))
    assert told(each_api, ids[1])[0] == "queued"
    lifted = each_api.request("PATCH", path, key=admin, json={"max_running": None})
    assert lifted.json()["max_running"] is None


@pytest.mark.parametrize(
    ("limit", "status"), [(1, 200), (tenants.MAX_RUNNING, 200), (0, 422), (tenants.MAX_RUNNING + 1, 422)]
)
def test_a_tenants_limit_is_1_to_100_000(api: LocalApi, limit: int, status: int) -> None:
    assert tenants.MAX_RUNNING == 100_000
    path = f"/admin/tenants/{api.tenant_id}"
    answer = api.request("PATCH", path, key=api.key(Role.ADMIN), json={"max_running": limit})
    assert answer.status_code == status


def test_a_debounced_request_is_answered_with_the_job_that_waits(each_api: LocalApi) -> None:
    wanted = {"unique_key": "index", "debounce_seconds": 60}
    first = each_api.make(parameters={"n": 1}, **wanted)
    second = each_api.make(parameters={"n": 2}, **wanted)
    assert (second["id"], second["status"], second["parameters"]) == (first["id"], "scheduled", {"n": 2})
    assert second["scheduled_for"] > first["scheduled_for"]
