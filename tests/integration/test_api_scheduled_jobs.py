"""Schedules over HTTP: what is answered, who sees what, what is refused and how."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api_client import LocalApi
from factories import change, job_row, rows_of
from laneway import models
from laneway.clock import new_id
from laneway.domain.cadence import MAX_EXPRESSION
from laneway.domain.spec import MAX_SECONDS
from laneway.engine.access.callers import Role
from laneway.engine.schedules import MAX_JITTER_SECONDS, MAX_PREVIEWED, MAX_SCHEDULES
from laneway.engine.slot_plan import MAX_ACTIVE_RUNS
from laneway.settings import Settings

BERLIN = "Europe/Berlin"
HOURLY = {"job_type": "demo.echo", "cron_expression": "0 * * * *"}
BASE = "/scheduled-jobs"


def made(api: LocalApi, *, key: str = "", **fields: Any) -> dict[str, Any]:
    answer = api.post(BASE, json=HOURLY | fields, **({"key": key} if key else {}))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def refused(answer: Any, pointer: str, code: str | None = None) -> None:
    assert answer.status_code == 422, answer.text
    errors = answer.json()["errors"]
    assert pointer in [error["pointer"] for error in errors], errors
    if code is not None:
        assert [error["code"] for error in errors] == [code]


def test_a_schedule_is_made_with_defaults_and_answered_whole(each_api: LocalApi) -> None:
    answer = each_api.post(BASE, json=HOURLY)
    assert answer.status_code == 201
    schedule = answer.json()
    assert answer.headers["location"] == f"/api/v1{BASE}/{schedule['id']}"
    wanted = {
        "name": None,
        "parameters": {},
        "queue": "default",
        "priority": "normal",
        "max_retries": 3,
        "retry_delay_seconds": 120.0,
        "timezone": "UTC",
        "interval_seconds": None,
        "cron_description": "every hour",
        "is_active": True,
        "max_concurrent_runs": 1,
        "overlap": "skip",
        "misfire": "fire_once",
        "jitter_seconds": 0,
        "last_run_at": None,
        "total_runs": 0,
        "success_rate": None,
    }
    assert {name: schedule[name] for name in wanted} == wanted
    due = datetime.fromisoformat(schedule["next_run_at"])
    assert timedelta() < due - datetime.now(UTC) <= timedelta(hours=1)
    assert (due.minute, due.second) == (0, 0)
    assert each_api.get(f"{BASE}/{schedule['id']}").json() == schedule


def test_the_other_names_of_fields_are_taken(api: LocalApi) -> None:
    schedule = api.post(
        BASE,
        json={
            "task_type": "demo.echo",
            "task_params": {"text": "x"},
            "queue_name": "mail",
            "enabled": False,
            "interval_seconds": 90,
            "priority": 8,
        },
    ).json()
    assert (schedule["job_type"], schedule["parameters"]) == ("demo.echo", {"text": "x"})
    assert (schedule["queue"], schedule["is_active"], schedule["priority"]) == ("mail", False, "high")
    assert schedule["next_run_at"] is None
    assert schedule["cron_description"] == "every 90 seconds"
    changed = api.request("PATCH", f"{BASE}/{schedule['id']}", json={"enabled": True, "queue_name": "x"})
    assert (changed.json()["is_active"], changed.json()["queue"]) == (True, "x")
    both = api.post(BASE, json=HOURLY | {"task_type": "demo.noop"})
    assert both.status_code == 422


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"cron_expression": "61 * * * *"}, "/cron_expression"),
        ({"cron_expression": "* * * * * *"}, "/cron_expression"),
        ({"cron_expression": "H * * * *"}, "/cron_expression"),
        ({"cron_expression": "0 0 31 2 *"}, "/cron_expression"),
        ({"cron_expression": None}, "/cron_expression"),
        ({"timezone": "Mars/Olympus"}, "/timezone"),
        ({"timezone": "../UTC"}, "/timezone"),
        ({"starts_at": "2030-01-02T00:00:00Z", "ends_at": "2030-01-01T00:00:00Z"}, "/ends_at"),
        ({"starts_at": "2030-01-02T00:00:00"}, "/starts_at"),
        ({"interval_seconds": 60}, ""),
        ({"job_type": "no.such_type"}, "/job_type"),
        ({"parameters": {"nothing": 1, "like": "it"}, "job_type": "demo.sleep"}, "/parameters/nothing"),
        ({"queue": "high"}, "/queue"),
        ({"queue": "No"}, "/queue"),
        ({"overlap": "never"}, "/overlap"),
        ({"misfire": "always"}, "/misfire"),
        ({"name": ""}, "/name"),
        ({"name": "nul\0"}, "/name"),
        ({"surplus": 1}, "/surplus"),
        ({"jitter_seconds": -1}, "/jitter_seconds"),
    ],
)
def test_what_is_wrong_is_refused_with_where_it_is(
    api: LocalApi, fields: dict[str, Any], pointer: str
) -> None:
    refused(api.post(BASE, json=HOURLY | fields), pointer)
    assert rows_of(api.database, models.schedules) == []


def test_a_schedule_needs_one_cadence(api: LocalApi) -> None:
    assert api.post(BASE, json={"job_type": "demo.echo"}).status_code == 422


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"jitter_seconds": MAX_JITTER_SECONDS}, True),
        ({"jitter_seconds": MAX_JITTER_SECONDS + 1}, False),
        ({"max_concurrent_runs": MAX_ACTIVE_RUNS}, True),
        ({"max_concurrent_runs": MAX_ACTIVE_RUNS + 1}, False),
        ({"max_concurrent_runs": 0}, False),
        ({"cron_expression": "0 * * * *".ljust(MAX_EXPRESSION)}, True),
        ({"cron_expression": "0 * * * *".ljust(MAX_EXPRESSION + 1)}, False),
        ({"name": "x" * 100}, True),
        ({"name": "x" * 101}, False),
        ({"description": "x" * 500}, True),
        ({"description": "x" * 501}, False),
    ],
)
def test_each_limit_holds_at_its_number(api: LocalApi, fields: dict[str, Any], most: bool) -> None:
    assert api.post(BASE, json=HOURLY | fields).status_code == (201 if most else 422)


@pytest.mark.parametrize(
    ("seconds", "status"), [(0, 422), (1, 201), (MAX_SECONDS, 201), (MAX_SECONDS + 1, 422)]
)
def test_an_interval_is_a_second_to_a_year(api: LocalApi, seconds: int, status: int) -> None:
    body = {"job_type": "demo.echo", "interval_seconds": seconds}
    assert api.post(BASE, json=body).status_code == status


def test_a_tenant_has_1000_schedules_at_most(api: LocalApi) -> None:
    first = made(api)
    row = dict(rows_of(api.database, models.schedules)[0])
    with api.database.write() as connection:
        connection.execute(
            models.schedules.insert(), [row | {"id": new_id()} for _ in range(MAX_SCHEDULES - 2)]
        )
    made(api)
    answer = api.post(BASE, json=HOURLY)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    api.request("DELETE", f"{BASE}/{first['id']}")
    made(api)


def test_a_name_is_held_by_one_schedule_of_the_tenant(each_api: LocalApi) -> None:
    schedule = made(each_api, name="nightly")
    other = made(each_api, name="weekly")
    assert each_api.post(BASE, json=HOURLY | {"name": "nightly"}).status_code == 409
    path = f"{BASE}/{other['id']}"
    assert each_api.request("PATCH", path, json={"name": "nightly"}).status_code == 409
    assert each_api.request("PATCH", f"{BASE}/{schedule['id']}", json={"name": "nightly"}).status_code == 200
    assert each_api.request("PATCH", path, json={"name": None}).json()["name"] is None


def test_a_change_sets_what_is_given_and_a_new_timing_counts_from_now(each_api: LocalApi) -> None:
    schedule = made(each_api, cron_expression="30 9 * * *", name="x", parameters={"text": "a"})
    path = f"{BASE}/{schedule['id']}"
    changed = each_api.request("PATCH", path, json={"parameters": {"text": "b"}, "priority": "low"}).json()
    assert (changed["parameters"], changed["priority"], changed["name"]) == ({"text": "b"}, "low", "x")
    assert changed["next_run_at"] == schedule["next_run_at"]
    moved = each_api.request("PATCH", path, json={"timezone": BERLIN}).json()
    assert moved["next_run_at"] != schedule["next_run_at"]
    every = each_api.request("PATCH", path, json={"interval_seconds": 60}).json()
    assert (every["cron_expression"], every["interval_seconds"]) == (None, 60)
    assert every["cron_description"] == "every minute"
    due = datetime.fromisoformat(every["next_run_at"])
    assert timedelta(seconds=30) < due - datetime.now(UTC) <= timedelta(seconds=60)
    back = each_api.request("PATCH", path, json={"cron_expression": "@daily"}).json()
    assert (back["cron_expression"], back["interval_seconds"]) == ("@daily", None)
    for body, pointer in (
        ({"parameters": {"surplus": 1}, "job_type": "demo.sleep"}, "/parameters/surplus"),
        ({"cron_expression": "nonsense"}, "/cron_expression"),
        ({"timezone": None}, "/timezone"),
    ):
        refused(each_api.request("PATCH", path, json=body), pointer)
    assert each_api.get(path).json() == back


def test_a_slot_that_was_decided_never_comes_again(each_api: LocalApi) -> None:
    """Not after switching off and on, nor for another timing, nor with a clock that fell back."""
    schedule = made(each_api)
    later = datetime.now(UTC) + timedelta(days=2)
    change(each_api.database, models.schedules, schedule["id"], last_slot=later)
    path = f"{BASE}/{schedule['id']}"
    each_api.post(f"{path}/toggle?is_active=false")
    on = each_api.post(f"{path}/toggle?is_active=true").json()
    assert datetime.fromisoformat(on["next_run_at"]) > later
    moved = each_api.request("PATCH", path, json={"cron_expression": "*/5 * * * *"}).json()
    assert datetime.fromisoformat(moved["next_run_at"]) > later


def test_it_is_switched_off_and_on(each_api: LocalApi) -> None:
    schedule = made(each_api, overlap="queue_one")
    path = f"{BASE}/{schedule['id']}"
    off = each_api.post(f"{path}/toggle?is_active=false")
    assert (off.status_code, off.json()["is_active"], off.json()["next_run_at"]) == (200, False, None)
    on = each_api.post(f"{path}/toggle?is_active=true").json()
    assert on["next_run_at"] == schedule["next_run_at"]
    assert each_api.post(f"{path}/toggle").status_code == 422


def test_it_runs_now_beside_its_slots(each_api: LocalApi) -> None:
    schedule = made(each_api, name="report", parameters={"text": "x"}, is_active=False, queue="mail")
    answer = each_api.post(f"{BASE}/{schedule['id']}/run")
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}"
    assert (job["scheduled_job_id"], job["status"], job["queue"]) == (schedule["id"], "queued", "mail")
    assert (job["parameters"], job["title"]) == ({"text": "x"}, "report")
    assert each_api.get(f"/jobs/{job['id']}").json()["scheduled_job_id"] == schedule["id"]
    each_api.post(f"{BASE}/{schedule['id']}/run")
    runs = each_api.get(f"{BASE}/{schedule['id']}/runs").json()["data"]
    assert [(run["trigger"], run["status"], run["job_status"]) for run in runs] == [
        ("manual", "started", "queued")
    ] * 2
    assert runs[1]["job_id"] == job["id"]
    after = each_api.get(f"{BASE}/{schedule['id']}").json()
    assert (after["total_runs"], after["next_run_at"]) == (2, None)
    assert after["last_run_at"] is not None
    found = each_api.get(f"/jobs?scheduled_job_id={schedule['id']}").json()["data"]
    assert [each["id"] for each in found] == [runs[0]["job_id"], job["id"]]
    assert each_api.get(f"/jobs?scheduled_job_id={new_id()}").json()["data"] == []


def test_a_run_that_is_asked_for_twice_with_one_key_is_made_once(each_api: LocalApi) -> None:
    schedule = made(each_api)
    again = {"headers": {"Idempotency-Key": "k"}}
    path = f"{BASE}/{schedule['id']}/run"
    first, second = each_api.post(path, **again), each_api.post(path, **again)
    assert (first.json(), second.status_code) == (second.json(), 202)
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert each_api.count_jobs() == 1
    new, old = (each_api.post(BASE, json=HOURLY, **again) for _ in range(2))
    assert new.json() == old.json()
    assert len(rows_of(each_api.database, models.schedules)) == 2


def test_while_too_many_jobs_wait_a_run_is_refused_and_leaves_nothing(
    local: Any, api_settings: Settings
) -> None:
    api = local(waiting_per_tenant=1)
    schedule = made(api)
    assert api.post(f"{BASE}/{schedule['id']}/run").status_code == 202
    refusal = api.post(f"{BASE}/{schedule['id']}/run")
    assert (refusal.status_code, refusal.json()["code"]) == (429, "quota_queued")
    assert len(api.get(f"{BASE}/{schedule['id']}/runs").json()["data"]) == 1


def test_schedules_and_runs_are_listed_in_pages(each_api: LocalApi) -> None:
    ids = [made(each_api, is_active=n != 1)["id"] for n in range(3)]
    first = each_api.get(f"{BASE}?limit=2").json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    second = each_api.get(f"{BASE}?limit=2&cursor={first['next_cursor']}").json()
    assert ([each["id"] for each in second["data"]], second["next_cursor"]) == (ids[:1], None)
    off = each_api.get(f"{BASE}?is_active=false").json()["data"]
    assert [each["id"] for each in off] == [ids[1]]
    assert each_api.get(f"{BASE}?job_type=demo.noop").json()["data"] == []
    assert each_api.get(f"{BASE}?is_active=true&cursor={first['next_cursor']}").status_code == 400
    assert each_api.get(f"{BASE}?surplus=1").status_code == 422
    runs = [each_api.post(f"{BASE}/{ids[0]}/run").json()["id"] for _ in range(3)]
    page = each_api.get(f"{BASE}/{ids[0]}/runs?limit=2").json()
    assert [run["job_id"] for run in page["data"]] == runs[:0:-1]
    rest = each_api.get(f"{BASE}/{ids[0]}/runs?limit=2&cursor={page['next_cursor']}").json()
    assert [run["job_id"] for run in rest["data"]] == runs[:1]
    assert each_api.get(f"{BASE}/{ids[1]}/runs?cursor={page['next_cursor']}").status_code == 400


def test_a_deleted_schedule_is_gone_and_its_jobs_stay(each_api: LocalApi) -> None:
    schedule = made(each_api)
    job = each_api.post(f"{BASE}/{schedule['id']}/run").json()
    path = f"{BASE}/{schedule['id']}"
    assert each_api.request("DELETE", path).status_code == 204
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/run"), ("GET", f"{path}/runs")):
        answer = each_api.request(method, where)
        assert (answer.status_code, answer.json()["code"]) == (404, "schedule_not_found")
    assert job_row(each_api.database, job["id"])["status"] == "queued"


def test_a_user_has_its_own_schedules_and_an_operator_the_tenants(each_api: LocalApi) -> None:
    alice, bob = each_api.key(subject="alice"), each_api.key(subject="bob")
    olga = each_api.key(Role.OPERATOR, subject="olga")
    stranger = each_api.key(Role.ADMIN, tenant="other", subject="alice")
    schedule = made(each_api, key=alice)
    path = f"{BASE}/{schedule['id']}"
    for key in (bob, stranger):
        for method, where, body in (
            ("GET", path, None),
            ("PATCH", path, {"priority": "low"}),
            ("DELETE", path, None),
            ("POST", f"{path}/run", None),
            ("POST", f"{path}/toggle?is_active=false", None),
            ("GET", f"{path}/runs", None),
        ):
            assert each_api.request(method, where, key=key, json=body).status_code == 404, (method, where)
        assert each_api.get(BASE, key=key).json()["data"] == []
    assert each_api.get(path, key=olga).json() == schedule
    job = each_api.post(f"{path}/run", key=olga).json()
    assert job["created_by"] == "alice"
    assert each_api.get(f"/jobs/{job['id']}", key=alice).status_code == 200
    assert [each["id"] for each in each_api.get(BASE, key=olga).json()["data"]] == [schedule["id"]]


def test_a_preview_shows_the_next_times_and_what_changing_clocks_do(api: LocalApi) -> None:
    asked = {
        "cron_expression": "30 2 * * *",
        "timezone": BERLIN,
        "starts_at": "2030-03-30T00:00:00+01:00",
        "count": 3,
    }
    seen = api.post(f"{BASE}/preview", json=asked).json()
    assert seen == {
        "cron_description": "at 02:30 every day",
        "timezone": BERLIN,
        "times": [
            {"at": "2030-03-30T01:30:00.000000Z", "local": "2030-03-30T02:30:00+01:00", "note": None},
            {
                "at": "2030-03-31T01:00:00.000000Z",
                "local": "2030-03-31T03:00:00+02:00",
                "note": "its time does not exist that day: runs at 03:00, when the clocks have changed",
            },
            {"at": "2030-04-01T00:30:00.000000Z", "local": "2030-04-01T02:30:00+02:00", "note": None},
        ],
    }
    few = asked | {"ends_at": "2030-03-30T12:00:00Z"}
    assert len(api.post(f"{BASE}/preview", json=few).json()["times"]) == 1
    every = api.post(f"{BASE}/preview", json={"interval_seconds": 60, "count": MAX_PREVIEWED})
    assert len(every.json()["times"]) == MAX_PREVIEWED
    assert api.post(f"{BASE}/preview", json={"interval_seconds": 60}).json()["times"][4]["note"] is None
    refused(api.post(f"{BASE}/preview", json={"interval_seconds": 60, "count": MAX_PREVIEWED + 1}), "/count")
    refused(api.post(f"{BASE}/preview", json=asked | {"cron_expression": "x"}), "/cron_expression")
    refused(api.post(f"{BASE}/preview", json={"timezone": "UTC"}), "")
    assert rows_of(api.database, models.schedules) == []
