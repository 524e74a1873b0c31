"""The worker registry over HTTP."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from api_client import LocalApi, WorkerProcess
from factories import add_job, add_worker
from laneway import __version__
from laneway.clock import SystemClock, new_id
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.workers import MAX_HELD_SHOWN
from servers import wait_until


@pytest.fixture
def operator(each_api: LocalApi) -> str:
    return each_api.key(Role.OPERATOR)


def listed(api: LocalApi, key: str, query: str = "") -> list[dict[str, Any]]:
    response = api.get(f"/workers{query}", key=key)
    assert response.status_code == 200, response.text
    return list(response.json()["data"])


def running(api: LocalApi, worker_id: str, tenant: str = "default") -> str:
    return add_job(api.database, JobStatus.RUNNING, worker_id=worker_id, tenant_id=api.tenant(tenant))


def test_a_worker_tells_where_it_is_and_what_it_holds(each_api: LocalApi, operator: str) -> None:
    now = SystemClock().now()
    worker_id = add_worker(
        each_api.database,
        name="w1",
        host="h1",
        pid=77,
        version="1.2.3",
        lanes=["critical", "normal"],
        beat_at=now - timedelta(minutes=5),
        started_at=now - timedelta(hours=1),
    )
    mine = [running(each_api, worker_id) for _ in range(2)]
    theirs = running(each_api, worker_id, "other")
    add_job(each_api.database, tenant_id=each_api.tenant_id)
    [worker] = listed(each_api, operator)
    age = worker.pop("beat_age_seconds")
    assert 300 <= age < 400
    started = (now - timedelta(hours=1)).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    assert worker == {
        "id": worker_id,
        "name": "w1",
        "host": "h1",
        "pid": 77,
        "version": "1.2.3",
        "state": "active",
        "lanes": ["critical", "normal"],
        "held": 3,
        "held_jobs": mine,
        "started_at": started,
    }
    alone = each_api.get(f"/workers/{worker_id}", key=operator).json()
    assert alone | {"beat_age_seconds": 0} == worker | {"beat_age_seconds": 0}
    assert theirs not in each_api.get("/workers", key=each_api.key(Role.ADMIN)).text


def test_of_many_held_jobs_the_oldest_are_named_and_all_are_counted(
    each_api: LocalApi, operator: str
) -> None:
    assert MAX_HELD_SHOWN == 100
    busy, idle = add_worker(each_api.database), add_worker(each_api.database)
    ids = [running(each_api, busy) for _ in range(MAX_HELD_SHOWN + 1)]
    shown = {worker["id"]: worker for worker in listed(each_api, operator)}
    assert (shown[busy]["held"], shown[busy]["held_jobs"]) == (MAX_HELD_SHOWN + 1, ids[:-1])
    assert (shown[idle]["held"], shown[idle]["held_jobs"]) == (0, [])


def test_the_living_are_listed_unless_others_are_asked_for(each_api: LocalApi, operator: str) -> None:
    ids = {
        state: add_worker(each_api.database, state=state) for state in ("active", "draining", "gone", "dead")
    }
    assert [worker["id"] for worker in listed(each_api, operator)] == [ids["draining"], ids["active"]]
    assert [w["id"] for w in listed(each_api, operator, "?state=dead&state=gone")] == [
        ids["dead"],
        ids["gone"],
    ]
    assert each_api.get(f"/workers/{ids['dead']}", key=operator).json()["state"] == "dead"
    assert each_api.get("/workers?state=asleep", key=operator).status_code == 422


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_pages_hold_every_worker_once_newest_first(each_api: LocalApi, operator: str, count: int) -> None:
    ids = [add_worker(each_api.database) for _ in range(count)]
    found: list[str] = []
    query = "?limit=1"
    while True:
        page = each_api.get(f"/workers{query}", key=operator).json()
        found += [worker["id"] for worker in page["data"]]
        if not page["has_more"]:
            break
        query = f"?limit=1&cursor={page['next_cursor']}"
    assert found == ids[::-1]


def test_a_cursor_is_good_for_its_own_states_only(each_api: LocalApi, operator: str) -> None:
    for _ in range(2):
        add_worker(each_api.database)
    cursor = each_api.get("/workers?limit=1", key=operator).json()["next_cursor"]
    refused = each_api.get(f"/workers?limit=1&state=gone&cursor={cursor}", key=operator)
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_cursor")
    for limit, status in ((0, 422), (200, 200), (201, 422)):
        assert each_api.get(f"/workers?limit={limit}", key=operator).status_code == status


def test_users_do_not_see_workers_and_an_unknown_one_is_not_found(each_api: LocalApi, operator: str) -> None:
    worker_id = add_worker(each_api.database)
    for path in ("/workers", f"/workers/{worker_id}"):
        assert each_api.get(path).json()["facts"] == {"needed_role": "operator"}
    unknown = new_id()
    response = each_api.get(f"/workers/{unknown}", key=operator)
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert response.json()["facts"] == {"worker_id": unknown}


def test_a_real_worker_is_there_while_it_lives(
    each_api: LocalApi, operator: str, worker: WorkerProcess
) -> None:
    [shown] = listed(each_api, operator)
    assert (shown["version"], shown["state"]) == (__version__, "active")
    job = each_api.make("demo.sleep", parameters={"seconds": 600})
    wait_until(lambda: listed(each_api, operator)[0]["held_jobs"] == [job["id"]], what="the worker holds it")
    each_api.post(f"/jobs/{job['id']}/cancel", json={"terminate": True})
    wait_until(lambda: listed(each_api, operator)[0]["held"] == 0, what="the worker let go")
    attempts = each_api.get(f"/jobs/{job['id']}/attempts").json()["data"]
    assert [(entry["worker"], entry["outcome"]) for entry in attempts] == [(shown["id"], "cancelled")]
