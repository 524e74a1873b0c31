"""Browser tokens over HTTP: for a job, for a while."""

from __future__ import annotations

from typing import Any

from api_client import LocalApi
from laneway.clock import new_id
from laneway.engine.access.callers import Role, key_id_of


def token(api: LocalApi, key: str = "", **wanted: Any) -> str:
    response = api.post("/auth/tokens", key=key, json=wanted)
    assert response.status_code == 201, response.text
    return str(response.json()["token"])


def test_a_token_says_what_it_may_and_for_how_long(api: LocalApi) -> None:
    made = api.post("/auth/tokens", json={"expires_in_seconds": 60, "scopes": ["jobs:read"]}).json()
    me = api.get("/me", key=made["token"]).json()
    assert (me["subject"], me["scopes"], me["job_id"]) == ("alice", ["jobs:read"], None)
    assert me["expires_at"] == made["expires_at"]
    assert me["key_id"] == key_id_of(api.alice)
    assert api.get("/jobs", key=made["token"]).status_code == 200
    assert api.post("/jobs", key=made["token"], json={"job_type": "demo.echo"}).status_code == 403


def test_without_a_body_it_may_what_its_maker_may_but_for_keys(api: LocalApi) -> None:
    operator = api.key(Role.OPERATOR)
    text = str(api.post("/auth/tokens", key=operator).json()["token"])
    assert api.make(key=text)["created_by"] == f"key:{key_id_of(operator)}"
    assert api.get("/api-keys", key=text).json()["facts"] == {"needed_scope": "keys:manage"}


def test_a_token_of_a_job_looks_at_that_job_alone(each_api: LocalApi) -> None:
    api = each_api
    mine, other = api.make(), api.make()
    text = token(api, job_id=mine["id"])
    for tail in ("", "/status", "/timeline"):
        assert api.get(f"/jobs/{mine['id']}{tail}", key=text).status_code == 200
        answers = set()
        for job_id in (other["id"], new_id()):
            response = api.get(f"/jobs/{job_id}{tail}", key=text)
            shown = response.text.replace(job_id, "ID").replace(response.headers["x-request-id"], "R")
            answers.add((response.status_code, shown))
        assert len(answers) == 1
        assert answers.pop()[0] == 404
    assert api.get(f"/jobs/{mine['id']}/result", key=text).status_code == 409
    assert api.get(f"/jobs/{mine['id'].upper()}", key=text).status_code == 200
    assert api.get("/me", key=text).json()["job_id"] == mine["id"]
    refused = [
        api.get("/jobs", key=text),
        api.get("/events", key=text),
        api.get("/queues/stats", key=text),
        api.get(f"/jobs/{mine['id']}/attempts", key=text),
        api.get(f"/jobs/{mine['id']}/webhooks", key=text),
        api.post("/jobs", key=text, json={"job_type": "demo.echo"}),
        api.post("/auth/tokens", key=text),
        api.post(f"/jobs/{mine['id']}/cancel", key=text),
    ]
    assert {response.status_code for response in refused} == {403}
    assert api.get(f"/jobs/{mine['id']}").json()["status"] == "queued"


def test_a_token_of_a_job_may_be_let_cancel_it_and_nothing_else(api: LocalApi) -> None:
    mine, other = api.make(), api.make()
    text = token(api, job_id=mine["id"], scopes=["jobs:read", "jobs:write"])
    assert api.post(f"/jobs/{other['id']}/cancel", key=text).status_code == 404
    assert api.post(f"/jobs/{mine['id']}/cancel", key=text).json()["cancelled_by"] == "alice"
    assert api.post(f"/jobs/{mine['id']}/retry", key=text).status_code == 403
    assert api.request("PATCH", f"/jobs/{mine['id']}", key=text, json={}).status_code == 403
    assert api.get(f"/jobs/{other['id']}").json()["status"] == "queued"


def test_its_events_are_streamed(api: LocalApi) -> None:
    mine = api.make()
    api.post(f"/jobs/{mine['id']}/cancel")
    response = api.get(f"/jobs/{mine['id']}/events", key=token(api, job_id=mine["id"]))
    assert response.status_code == 200
    assert "job.cancelled" in response.text


def test_nobody_makes_a_token_for_a_job_they_may_not_see(api: LocalApi) -> None:
    of_bob = api.make(key=api.key(subject="bob"))
    elsewhere = api.make(key=api.key(tenant="other"))
    for job_id in (of_bob["id"], elsewhere["id"], new_id()):
        response = api.post("/auth/tokens", json={"job_id": job_id})
        assert (response.status_code, response.json()["code"]) == (404, "job_not_found")


def test_a_tokens_limits(api: LocalApi) -> None:
    for body, status in (
        ({"expires_in_seconds": 900}, 201),
        ({"expires_in_seconds": 901}, 422),
        ({"expires_in_seconds": 1}, 201),
        ({"expires_in_seconds": 0}, 422),
        ({"scopes": []}, 422),
        ({"scopes": ["everything"]}, 422),
        ({"scopes": ["admin"]}, 403),
        ({"scopes": ["keys:manage"]}, 422),
        ({"job_id": "not-an-id"}, 422),
        ({"subject": "root"}, 422),
    ):
        assert api.post("/auth/tokens", json=body).status_code == status, body


def test_a_token_dies_with_its_key_and_loses_what_its_key_loses(api: LocalApi) -> None:
    olga = api.key(Role.OPERATOR)
    key = api.key()
    text = token(api, key)
    assert api.get("/jobs", key=text).status_code == 200
    api.request("PATCH", f"/api-keys/{key_id_of(key)}", key=olga, json={"scopes": ["chains:read"]})
    assert api.get("/jobs", key=text).status_code == 403
    api.request("DELETE", f"/api-keys/{key_id_of(key)}", key=olga)
    assert api.get("/me", key=text).status_code == 401
