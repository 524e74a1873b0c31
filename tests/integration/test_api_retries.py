"""Ended jobs retried over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
import redis as redis_py

from api_client import LocalApi, claim, complete
from factories import add_job, job_row
from laneway.clock import new_id
from laneway.domain.states import RULES, Action, JobStatus
from laneway.engine.access.callers import Role

RETRIED = sorted(RULES[Action.RETRY].sources)


def mine(api: LocalApi, status: JobStatus = JobStatus.FAILED, **columns: Any) -> str:
    """A job of Alice's, past the API."""
    return add_job(api.database, status, tenant_id=api.tenant_id, **columns)


@pytest.mark.parametrize("status", RETRIED)
def test_an_ended_job_is_accepted_again(each_api: LocalApi, redis: redis_py.Redis, status: JobStatus) -> None:
    job_id = mine(each_api, status, attempt=4, retry_count=3, dead_letter_reason="exhausted")
    response = each_api.post(f"/jobs/{job_id}/retry")
    assert response.status_code == 202
    assert response.headers["location"] == f"/api/v1/jobs/{job_id}"
    job = response.json()
    assert job == each_api.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["attempt"], job["retry_count"]) == ("queued", 4, 0)
    assert (job["dead_letter_reason"], job["finished_at"], job["next_retry_at"]) == (None, None, None)
    assert redis.lrange("rq:queue:normal", 0, -1) == [job_id.encode()]


def test_a_retried_job_runs_to_another_end(each_api: LocalApi) -> None:
    job_id = mine(each_api, attempt=4)
    each_api.post(f"/jobs/{job_id}/retry", json={})
    held = claim(each_api, job_id)
    assert held.attempt == 5
    complete(each_api, held, '"done"')
    assert each_api.get(f"/jobs/{job_id}/result").json()["result"] == "done"


@pytest.mark.parametrize("status", sorted(set(JobStatus) - set(RETRIED)))
def test_any_other_job_is_a_conflict_that_names_its_status(each_api: LocalApi, status: JobStatus) -> None:
    job_id = mine(each_api, status)
    response = each_api.post(f"/jobs/{job_id}/retry")
    assert (response.status_code, response.json()["code"]) == (409, "illegal_transition")
    assert response.json()["facts"] == {"current_status": status}
    assert job_row(each_api.database, job_id)["status"] == status


def test_it_may_be_retried_with_other_parameters(each_api: LocalApi) -> None:
    job_id = mine(each_api)
    response = each_api.post(f"/jobs/{job_id}/retry", json={"parameters": {"text": "é", "n": [1, 2.5]}})
    assert response.json()["parameters"] == {"text": "é", "n": [1, 2.5]}
    assert each_api.get(f"/jobs/{job_id}").json()["parameters"] == {"text": "é", "n": [1, 2.5]}
    other = mine(each_api)
    assert each_api.post(f"/jobs/{other}/retry", json={"parameters": None}).json()["parameters"] == {"x": 1}


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({"parameters": {"seconds": "x"}}, "invalid_parameters", "/parameters/seconds"),
        ({"parameters": {"seconds": 1, "more": 1}}, "invalid_parameters", "/parameters/more"),
        ({"parameters": {"seconds": 2**64}}, "invalid_payload", "/parameters/seconds"),
        ({"parameters": [1]}, "invalid_request", "/parameters"),
        ({"priority": "high"}, "invalid_request", "/priority"),
    ],
)
def test_what_a_new_job_could_not_have_is_refused_with_a_pointer(
    api: LocalApi, body: dict[str, Any], code: str, pointer: str
) -> None:
    job_id = mine(api, job_type="demo.sleep")
    response = api.post(f"/jobs/{job_id}/retry", json=body)
    assert (response.status_code, response.json()["code"]) == (422, code)
    assert response.json()["errors"][0]["pointer"] == pointer
    assert job_row(api.database, job_id)["status"] == "failed"


def test_the_parameters_have_the_size_limit_of_a_new_job(api: LocalApi) -> None:
    job_id = mine(api)
    fits = {"text": "x" * (256 * 1024 - len('{"text":""}'))}
    longer = {"text": fits["text"] + "x"}
    assert api.post(f"/jobs/{job_id}/retry", json={"parameters": longer}).status_code == 413
    assert api.post(f"/jobs/{job_id}/retry", json={"parameters": fits}).status_code == 202


def test_while_an_active_job_holds_its_key_a_retry_is_a_conflict_and_loses_nothing(
    each_api: LocalApi,
) -> None:
    job_id = mine(
        each_api, unique_key="k", error={"type": "E", "message": "m", "category": "c", "traceback": None}
    )
    holder = each_api.make(unique_key="k")
    before = each_api.get(f"/jobs/{job_id}").json()
    response = each_api.post(f"/jobs/{job_id}/retry")
    assert (response.status_code, response.json()["code"]) == (409, "unique_key_taken")
    assert response.json()["facts"] == {"job_id": holder["id"]}
    assert each_api.get(f"/jobs/{job_id}").json() == before
    each_api.post(f"/jobs/{holder['id']}/cancel")
    assert each_api.post(f"/jobs/{job_id}/retry").status_code == 202


def test_who_may_not_see_a_job_finds_none_to_retry(api: LocalApi) -> None:
    job_id = mine(api)
    for key in (api.key(subject="bob"), api.key(Role.ADMIN, tenant="other")):
        assert api.post(f"/jobs/{job_id}/retry", key=key).status_code == 404
    assert api.post(f"/jobs/{new_id()}/retry").status_code == 404
    assert job_row(api.database, job_id)["status"] == "failed"
    assert api.post(f"/jobs/{job_id}/retry", key=api.key(Role.OPERATOR)).status_code == 202


def test_a_retry_is_charged_to_the_queueing_budget(local: Any) -> None:
    api = local(rate_limits="queue=1/60@user,default=100/60@user")
    job_id = mine(api)
    assert api.post(f"/jobs/{job_id}/retry").status_code == 202
    assert api.post(f"/jobs/{job_id}/retry").status_code == 429
    assert api.get(f"/jobs/{job_id}").status_code == 200
