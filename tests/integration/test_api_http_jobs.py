"""HTTP jobs over HTTP: made, shown, and reported about with the token of an attempt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from api_client import LocalApi, claim
from laneway.clock import new_id
from laneway.domain.http_target import MASK
from laneway.engine.access.callers import Role
from laneway.engine.access.job_tokens import JobTokens
from laneway.engine.context import MAX_DETAILS_BYTES, MAX_MESSAGE
from laneway.engine.endings import MAX_ERROR_MESSAGE
from laneway.engine.outcomes import Claimed
from laneway.webhooks.secrets import SecretBox

HUSH = "Bearer hush-7f3a"
URL = "https://api.example.com/do"


def make(api: LocalApi, **fields: Any) -> dict[str, Any]:
    target = {"url": URL, "headers": {"Authorization": HUSH}}
    response = api.post("/jobs", json={"target": target, "max_retries": 0, **fields})
    assert response.status_code == 202, response.text
    return dict(response.json())


def token(api: LocalApi, job: Claimed, *, attempt: int | None = None) -> str:
    tokens = JobTokens(SecretBox.from_settings(api.settings))
    return tokens.make(api.tenant_id, job.job_id, job.attempt if attempt is None else attempt)


def at_target(api: LocalApi, **fields: Any) -> tuple[Claimed, str]:
    """A job that runs, and the token that its target got."""
    job = claim(api, make(api, **fields)["id"])
    return job, token(api, job)


def test_a_job_with_a_target_is_shown_without_its_secrets(each_api: LocalApi) -> None:
    job = make(each_api)
    assert job["job_type"] == "http.request"
    assert job["parameters"]["headers"] == {"Authorization": MASK}
    for path in (f"/jobs/{job['id']}", "/jobs", f"/jobs/{job['id']}/timeline", "/admin/jobs"):
        key = each_api.key(Role.ADMIN) if "admin" in path else ""
        text = each_api.get(path, key=key).text
        assert HUSH not in text
        assert "private" not in text


def test_a_request_that_is_sent_again_is_answered_without_its_secrets(each_api: LocalApi) -> None:
    body = {"target": {"url": URL, "headers": {"Authorization": HUSH}}}
    answers = [
        each_api.post("/jobs", json=body, headers={"Idempotency-Key": "once"}).json() for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert answers[1]["parameters"]["headers"] == {"Authorization": MASK}
    assert "private" not in answers[1]["parameters"]


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({"target": {"url": "https://10.0.0.1/"}}, "webhook_url_refused", "/target/url"),
        ({"target": {"url": "http://api.example.com/"}}, "webhook_url_refused", "/target/url"),
        ({"target": {"url": URL, "headers": {"Host": "x"}}}, "invalid_request", "/target/headers"),
        ({"target": {"url": URL}, "job_type": "demo.echo"}, "invalid_request", ""),
        ({}, "invalid_request", "/job_type"),
        ({"job_type": "http.request", "parameters": {"url": URL}}, "invalid_parameters", "/parameters"),
    ],
)
def test_a_target_that_cannot_be_is_refused(api: LocalApi, body: Any, code: str, pointer: str) -> None:
    response = api.post("/jobs", json=body)
    assert (response.status_code, response.json()["code"]) == (422, code)
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
    assert api.count_jobs() == 0


def test_a_target_is_taken_in_batches_and_chains(each_api: LocalApi) -> None:
    target = {"url": URL, "headers": {"Authorization": HUSH}}
    batch = each_api.post("/batches", json={"jobs": [{"target": target}], "defaults": {"priority": "low"}})
    assert batch.status_code == 202, batch.text
    [job] = each_api.get(f"/batches/{batch.json()['id']}/jobs").json()["data"]
    assert job["parameters"]["headers"] == {"Authorization": MASK}
    step = {"target": {"url": URL, "body": {"n": {"$result": "step_0"}}}}
    chain = {"name": "c", "chain_definition": [{"job_type": "demo.noop"}, step], "execute": True}
    made = each_api.post("/chains", json=chain)
    assert made.status_code == 202, made.text
    assert [each["job_type"] for each in made.json()["steps"]] == ["demo.noop", "http.request"]
    chain["chain_definition"] = [{"target": target}]
    assert each_api.post("/chains", json=chain).status_code == 422


def test_the_target_reports_with_its_token(each_api: LocalApi) -> None:
    job, secret = at_target(each_api)
    report = {"percent": 40, "message": "half-way", "details": {"page": 4}}
    told = each_api.post(f"/jobs/{job.job_id}/progress", key=secret, json=report)
    assert (told.status_code, told.json()["progress"], told.json()["cancelling"]) == (200, 40, False)
    each_api.post(f"/jobs/{job.job_id}/cancel")
    asked = each_api.post(f"/jobs/{job.job_id}/progress", key=secret, json={"percent": 41})
    assert asked.json()["cancelling"] is True
    done = each_api.post(f"/jobs/{job.job_id}/complete", key=secret, json={"result": {"sent": True}})
    assert (done.status_code, done.json()["status"]) == (200, "completed")
    assert each_api.get(f"/jobs/{job.job_id}/result").json()["result"] == {"sent": True}
    again = each_api.post(f"/jobs/{job.job_id}/complete", key=secret, json={"result": 2})
    assert (again.status_code, again.json()["facts"]["current_status"]) == (409, "completed")


def test_a_reported_failure_is_in_the_record_of_its_attempt(each_api: LocalApi) -> None:
    job, secret = at_target(each_api)
    failed = each_api.post(f"/jobs/{job.job_id}/fail", key=secret, json={"message": "no paper"})
    assert (failed.status_code, failed.json()["status"]) == (200, "failed")
    [attempt] = each_api.get(f"/jobs/{job.job_id}/attempts").json()["data"]
    assert (attempt["outcome"], attempt["error"]["message"]) == ("failed", "no paper")


ENDS = [("progress", {"percent": 1}), ("complete", {}), ("fail", {})]


@pytest.mark.parametrize(("report", "body"), ENDS)
def test_a_token_reports_about_its_own_attempt_alone(each_api: LocalApi, report: str, body: Any) -> None:
    job, secret = at_target(each_api)
    other, _ = at_target(each_api)
    wrong: list[tuple[str, str | None, int]] = [
        (other.job_id, secret, 404),  # another job's token
        (new_id(), secret, 404),
        (job.job_id, token(each_api, job, attempt=0), 409),  # of an older attempt
        (job.job_id, "", 403),  # the caller's own key
        (job.job_id, each_api.key(Role.ADMIN), 403),
        (job.job_id, secret[:-1] + ("A" if secret[-1] != "A" else "B"), 401),
        (job.job_id, None, 401),
    ]
    before = each_api.get(f"/jobs/{job.job_id}").json()
    for job_id, key, status in wrong:
        assert each_api.post(f"/jobs/{job_id}/{report}", key=key, json=body).status_code == status
    assert each_api.get(f"/jobs/{job.job_id}").json() == before


def test_a_token_of_another_tenant_s_job_finds_nothing(each_api: LocalApi) -> None:
    job, _ = at_target(each_api)
    tokens = JobTokens(SecretBox.from_settings(each_api.settings))
    stranger = tokens.make(each_api.tenant("other"), job.job_id, job.attempt)
    assert each_api.post(f"/jobs/{job.job_id}/complete", key=stranger, json={}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/result"), ("POST", "/cancel"), ("POST", "/retry"), ("PATCH", ""), ("GET", "s")],
)
def test_a_token_opens_nothing_else(api: LocalApi, method: str, path: str) -> None:
    job, secret = at_target(api)
    where = "/jobs" if path == "s" else f"/jobs/{job.job_id}{path}"
    body = {} if method == "GET" else {"json": {"tags": ["x"]} if method == "PATCH" else {}}
    assert api.request(method, where, key=secret, **body).status_code == 403
    assert api.get("/me", key=secret).status_code == 403


@pytest.mark.parametrize(
    ("report", "most", "too_much", "status"),
    [
        ("progress", {"percent": 100}, {"percent": 101}, 422),
        (
            "progress",
            {"percent": 1, "message": "m" * MAX_MESSAGE},
            {"percent": 1, "message": "m" * (MAX_MESSAGE + 1)},
            422,
        ),
        (
            "progress",
            {"percent": 1, "details": {"d": "x" * (MAX_DETAILS_BYTES - 8)}},
            {"percent": 1, "details": {"d": "x" * (MAX_DETAILS_BYTES - 7)}},
            413,
        ),
        ("fail", {"message": "m" * MAX_ERROR_MESSAGE}, {"message": "m" * (MAX_ERROR_MESSAGE + 1)}, 422),
        ("complete", {"result": "r" * (256 * 1024 - 2)}, {"result": "r" * (256 * 1024 - 1)}, 413),
        ("complete", {"result": "fine"}, {"result": "nul \0"}, 422),
    ],
)
def test_reports_are_bounded(api: LocalApi, report: str, most: Any, too_much: Any, status: int) -> None:
    job, secret = at_target(api)
    path = f"/jobs/{job.job_id}/{report}"
    assert api.post(path, key=secret, json=too_much).status_code == status
    assert api.get(f"/jobs/{job.job_id}").json()["status"] == "running"
    assert api.post(path, key=secret, json=most).status_code == 200


def test_no_token_and_no_header_is_in_the_log(
    local: Callable[..., LocalApi], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        api = local()
        job, secret = at_target(api)
        for key in (secret, secret + "A"):
            api.post(f"/jobs/{job.job_id}/complete", key=key, json={"result": HUSH})
            api.post(f"/jobs/{job.job_id}/complete", key=key, json={})
    said = capfd.readouterr()
    for text in (said.out, said.err, caplog.text):
        assert HUSH not in text
        assert secret.rpartition(".")[2] not in text
