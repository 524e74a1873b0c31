"""Chains over HTTP: what may be asked, what is answered, and a real worker under it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from api_client import LocalApi, ServedApi, WorkerProcess, claim
from laneway.clock import SystemClock, new_id
from laneway.domain.flow import MAX_STEPS
from laneway.engine.access.callers import Role
from laneway.engine.outcomes import carry_out
from laneway.engine.transitions import Stop
from servers import wait_until

ECHO: dict[str, Any] = {"job_type": "demo.echo", "parameters": {"x": 1}}


def chain(*definition: Any, **fields: Any) -> dict[str, Any]:
    return {"name": "c", "chain_definition": list(definition)} | fields


def made(api: LocalApi, *definition: Any, **fields: Any) -> dict[str, Any]:
    response = api.post("/chains", json=chain(*definition, **fields))
    assert response.status_code in (201, 202), response.text
    return dict(response.json())


def test_a_chain_is_defined_and_executed(each_api: LocalApi) -> None:
    api = each_api
    response = api.post("/chains", json=chain(ECHO, [ECHO, {"job_type": "demo.echo"}]))
    assert response.status_code == 201
    defined = response.json()
    assert response.headers["location"].endswith(f"/api/v1/chains/{defined['id']}")
    assert (defined["status"], defined["run_id"], defined["total_steps"]) == ("pending", None, 3)
    assert defined["chain_definition"] == [ECHO, [ECHO, {"job_type": "demo.echo"}]]
    executed = api.post(f"/chains/{defined['id']}/execute")
    assert executed.status_code == 202
    assert executed.headers["retry-after"]
    assert executed.json()["status"] == "running"
    assert api.get(f"/jobs?chain_id={defined['id']}").json()["data"][0]["chain_step"] == 0
    assert api.post(f"/chains/{defined['id']}/execute").json()["facts"] == {"current_status": "running"}
    runs = api.get(f"/chains/{defined['id']}/runs").json()["data"]
    assert [run["id"] for run in runs] == [executed.json()["run_id"]]
    run = api.get(f"/chains/{defined['id']}/runs/{runs[0]['id']}").json()
    assert [step["status"] for step in run["steps"]] == ["queued", None, None]
    assert api.get(f"/chains/{defined['id']}/runs/{new_id()}").json()["code"] == "chain_run_not_found"


def test_a_chain_may_be_executed_at_once(api: LocalApi) -> None:
    response = api.post("/chains", json=chain(ECHO, execute=True))
    assert (response.status_code, response.json()["status"]) == (202, "running")


def test_a_worker_runs_a_chain_to_its_end(each_api: LocalApi, worker: WorkerProcess) -> None:
    api = each_api
    use = {"job_type": "demo.echo", "parameters": {"n": {"$result": "step_0.x"}}}
    defined = made(api, ECHO, {"parallel": [use, ECHO]}, execute=True)
    wait_until(
        lambda: api.get(f"/chains/{defined['id']}").json()["status"] != "running", what="the chain ends"
    )
    at = api.get(f"/chains/{defined['id']}").json()
    assert (at["status"], at["progress_percent"], at["current_step"]) == ("completed", 100, 3)
    assert at["results"] == {"step_0": {"x": 1}, "step_1": {"n": 1}, "step_2": {"x": 1}}


def test_what_is_no_chain_is_refused_with_its_place(api: LocalApi) -> None:
    for body, pointer in (
        (chain(), "/chain_definition"),
        (chain(ECHO, name=""), "/name"),
        (chain(ECHO, nonsense=1), "/nonsense"),
        (chain(ECHO, timeout_seconds=0), "/timeout_seconds"),
        (chain({"job_type": "demo.unknown"}), "/chain_definition/0/job_type"),
        (
            chain(ECHO, [{"job_type": "demo.sleep", "parameters": {"seconds": "x"}}]),
            "/chain_definition/1/0/parameters/seconds",
        ),
    ):
        response = api.post("/chains", json=body)
        assert response.status_code == 422, response.text
        assert response.json()["errors"][0]["pointer"].startswith(pointer), response.text
    looped = chain({"job_type": "demo.echo", "parameters": {"x": {"$result": "step_1"}}}, ECHO)
    assert "does not end before" in api.post("/chains", json=looped).text
    assert api.post("/chains", json=chain(*[ECHO] * MAX_STEPS)).status_code == 201
    assert api.post("/chains", json=chain(*[ECHO] * (MAX_STEPS + 1))).status_code == 422


def test_a_chain_is_changed_as_a_whole(api: LocalApi) -> None:
    defined = made(api, ECHO, timeout_seconds=60)
    path = f"/chains/{defined['id']}"
    assert api.request("PATCH", path, json={}).json()["name"] == "c"
    changed = api.request("PATCH", path, json={"name": "d", "timeout_seconds": None}).json()
    assert (changed["name"], changed["timeout_seconds"]) == ("d", None)
    assert changed["chain_definition"] == defined["chain_definition"]
    changed = api.request("PATCH", path, json={"chain_definition": [ECHO, ECHO]}).json()
    assert changed["total_steps"] == 2
    refused: list[dict[str, Any]] = [{"name": None}, {"name": ""}, {"chain_definition": []}, {"id": "x"}]
    for wrong in refused:
        assert api.request("PATCH", path, json=wrong).status_code == 422
    grouped = api.request("PATCH", path, json={"chain_definition": [[ECHO, ECHO]]})
    assert grouped.json()["total_steps"] == 2
    assert api.request("PATCH", path, json={"execution_mode": "parallel"}).status_code == 422


def test_a_chain_is_cancelled_and_deleted(api: LocalApi) -> None:
    defined = made(api, ECHO, ECHO, execute=True)
    path = f"/chains/{defined['id']}"
    assert api.request("DELETE", path).status_code == 409
    held = claim(api, api.get(path).json()["steps"][0]["job_id"])
    asked = api.post(f"{path}/cancel", json={"reason": "enough"})
    assert (asked.status_code, asked.json()["cancelling"]) == (202, True)
    with api.database.write() as connection:
        stop = Stop(held.job_id, held.attempt, held.lease_token)
        carry_out(connection, [stop], now=SystemClock().now(), actor="test")
    assert api.get(path).json()["status"] == "cancelled"
    assert api.post(f"{path}/cancel").json()["facts"] == {"current_status": "cancelled"}
    assert api.post(f"{path}/execute").status_code == 202
    assert api.post(f"{path}/cancel").status_code == 200
    assert api.request("DELETE", path).status_code == 204
    assert api.get(path).json()["code"] == "chain_not_found"


def test_a_request_that_is_sent_again_makes_one_chain_and_one_run(api: LocalApi) -> None:
    headers = {"Idempotency-Key": "k"}
    first = api.post("/chains", json=chain(ECHO, execute=True), headers=headers)
    again = api.post("/chains", json=chain(ECHO, execute=True), headers=headers)
    assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
    other = made(api, ECHO)
    path = f"/chains/{other['id']}/execute"
    assert [api.post(path, headers=headers).status_code for _ in range(2)] == [202, 202]
    assert api.count_jobs() == 2


def test_a_user_sees_its_own_chains_and_an_operator_the_tenants(api: LocalApi) -> None:
    defined = made(api, ECHO)
    bob, olga = api.key(Role.USER, subject="bob"), api.key(Role.OPERATOR, subject="olga")
    foreign = api.key(Role.ADMIN, tenant="other")
    for key, status in ((bob, 404), (foreign, 404), (olga, 200)):
        assert api.get(f"/chains/{defined['id']}", key=key).status_code == status
        assert len(api.get("/chains", key=key).json()["data"]) == (status == 200)


def test_a_chain_is_followed_to_its_end(served: Callable[..., ServedApi]) -> None:
    api = served()
    response = api.post("/chains", json=chain(ECHO, ECHO, execute=True))
    path = f"/chains/{response.json()['id']}"
    job_id = response.json()["steps"][0]["job_id"]
    frames: list[dict[str, Any]] = []
    last_id = ""
    with api.stream(f"{path}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event = ""
        for line in stream.iter_lines():
            if line.startswith("id: "):
                last_id = line[4:]
            if line.startswith("event: "):
                event = line[7:]
            if line.startswith("data: "):
                frames.append({"event": event} | json.loads(line[6:]))
                if len(frames) == 1:
                    api.post(f"/jobs/{job_id}/cancel")
    assert [frame["event"] for frame in frames] == ["chain.progress", "chain.failed"]
    assert frames[-1]["steps"][0]["status"] == "cancelled"
    with api.stream(f"{path}/events", headers={"Last-Event-ID": last_id}) as stream:
        assert stream.status_code == 204
    with api.stream(f"{path}/events") as stream:
        assert "chain.failed" in "".join(stream.iter_text())


def test_each_step_is_charged_to_the_budget_of_jobs(local: Callable[..., LocalApi]) -> None:
    api = local(rate_limits="default=99/60@user,queue=99/60@user,jobs=3/60@tenant")
    assert api.post("/chains", json=chain(ECHO, ECHO)).status_code == 201
    assert api.post("/chains", json=chain(ECHO, ECHO, execute=True)).status_code == 202
    refused = api.post("/chains", json=chain(ECHO, ECHO, execute=True))
    assert refused.status_code == 429
    too_many = api.post("/chains", json=chain(ECHO, ECHO, ECHO, ECHO, execute=True))
    assert too_many.json()["code"] == "cost_exceeds_quota"
