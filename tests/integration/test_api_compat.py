"""The paths that other job services have, each called once, and page numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.routing import APIRoute

from api_client import LocalApi
from factories import add_job
from laneway.api import compat
from laneway.clock import SystemClock
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role

SCHEDULE = {"name": "hourly", "job_type": "demo.noop", "interval_seconds": 3600}
CHAIN = {"name": "two", "chain_definition": [{"job_type": "demo.noop"}, {"job_type": "demo.noop"}]}
SCHEDULES = "/jobs/scheduler/scheduled-jobs"
CHAINS = "/jobs/scheduler/chains"

CALLS: tuple[tuple[str, str, Any, int], ...] = (
    ("POST", "/jobs/", {"job_type": "demo.noop"}, 202),
    ("GET", "/jobs/", None, 200),
    ("GET", "/jobs/admin/all", None, 200),
    ("GET", "/jobs/admin/statistics", None, 200),
    ("GET", "/jobs/admin/queue-status", None, 200),
    ("POST", "/jobs/admin/{job_id}/force-complete", {"result": 7}, 200),
    ("DELETE", "/jobs/admin/cleanup", None, 200),
    ("GET", "/queue/stats", None, 200),
    ("GET", "/queue/health", None, 503),
    ("POST", SCHEDULES, SCHEDULE, 201),
    ("GET", SCHEDULES, None, 200),
    ("POST", f"{SCHEDULES}/preview", {"interval_seconds": 3600}, 200),
    ("GET", f"{SCHEDULES}/{{schedule_id}}", None, 200),
    ("PATCH", f"{SCHEDULES}/{{schedule_id}}", {"name": "other"}, 200),
    ("POST", f"{SCHEDULES}/{{schedule_id}}/toggle?is_active=false", None, 200),
    ("POST", f"{SCHEDULES}/{{schedule_id}}/run", None, 202),
    ("GET", f"{SCHEDULES}/{{schedule_id}}/runs", None, 200),
    ("DELETE", f"{SCHEDULES}/{{schedule_id}}", None, 204),
    ("POST", CHAINS, CHAIN, 201),
    ("GET", CHAINS, None, 200),
    ("GET", f"{CHAINS}/{{chain_id}}", None, 200),
    ("PATCH", f"{CHAINS}/{{chain_id}}", {"name": "other"}, 200),
    ("POST", f"{CHAINS}/{{chain_id}}/execute", None, 202),
    ("GET", f"{CHAINS}/{{chain_id}}/runs", None, 200),
    ("GET", f"{CHAINS}/{{chain_id}}/runs/{{run_id}}", None, 200),
    ("POST", f"{CHAINS}/{{chain_id}}/cancel", None, 200),
    ("GET", f"{CHAINS}/{{chain_id}}/events", None, 200),
    ("DELETE", f"{CHAINS}/{{chain_id}}", None, 204),
)
"""Method, path, body, status: in an order in which each finds what it needs."""


def test_each_path_is_called_by_this_table() -> None:
    routes = {
        (method, route.path)
        for route in compat.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert {(method, path.partition("?")[0]) for method, path, _, _ in CALLS} == routes


def test_each_path_does_what_ours_does(each_api: LocalApi) -> None:
    admin = each_api.key(Role.ADMIN)
    ids = {"job_id": each_api.make()["id"]}
    for method, path, body, status in CALLS:
        how = {} if body is None else {"json": body}
        response = each_api.request(method, path.format(**ids), key=admin, **how)
        assert response.status_code == status, f"{method} {path}: {response.text}"
        answer = response.json() if response.text[:1] == "{" else {}
        if (method, path) == ("POST", SCHEDULES):
            ids["schedule_id"] = answer["id"]
        elif (method, path) == ("POST", CHAINS):
            ids["chain_id"] = answer["id"]
        elif path == f"{CHAINS}/{{chain_id}}/runs":
            ids["run_id"] = answer["data"][0]["id"]
        if method == "GET" and answer.keys() <= {"data", "next_cursor", "has_more"} and answer:
            ours = re.sub("^/jobs/scheduler|^/jobs/admin/all$|/$", "", path.format(**ids)) or "/admin/jobs"
            assert each_api.get(ours, key=admin).json()["data"] == answer["data"], path


def test_an_old_cleanup_keeps_failed_jobs_and_30_days(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)
    now = SystemClock().now()
    for status in (JobStatus.COMPLETED, JobStatus.FAILED):
        for days in (29, 31):
            add_job(api.database, status, finished_at=now.replace(year=now.year - 1) if days > 30 else now)
    assert api.request("DELETE", "/jobs/admin/cleanup", key=admin).json()["by_status"] == {
        "cancelled": 0,
        "completed": 1,
        "expired": 0,
    }
    assert api.count_jobs() == 3
    for wrong in ("days_old=-1", "days_old=36501", "days=1", "days_old="):
        assert api.request("DELETE", f"/jobs/admin/cleanup?{wrong}", key=admin).status_code == 422, wrong
    assert api.request("DELETE", "/jobs/admin/cleanup?days_old=0", key=admin).json()["deleted"] == 1


@pytest.mark.parametrize("size", ["per_page", "page_size"])
def test_pages_may_be_asked_for_by_number(api: LocalApi, size: str) -> None:
    ids = [api.make(priority="high" if n % 2 else "low")["id"] for n in range(7)][::-1]

    def page(query: str) -> tuple[list[int], bool]:
        answer = api.get(f"/jobs/?{query}").json()
        return [ids.index(job["id"]) for job in answer["data"]], answer["has_more"]

    assert page(f"page=1&{size}=3") == ([0, 1, 2], True)
    assert page(f"page=2&{size}=3") == ([3, 4, 5], True)
    assert page(f"page=3&{size}=3") == ([6], False)
    assert page(f"page=4&{size}=3") == page("page=100") == ([], False)
    assert page("page=1") == ([0, 1, 2, 3, 4, 5, 6], False)
    assert page(f"page=2&{size}=2&priority=high") == ([5], False)
    assert page("limit=2")[1]
    for wrong in ("page=0", "page=101", "page=x", f"{size}=0", f"{size}=201", f"page=1&{size}=", "nobody=1"):
        answer = api.get(f"/jobs/?{wrong}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), wrong
    assert api.get(f"/jobs?page=1&{size}=3").status_code == 422, "ours know cursors alone"


def test_a_page_by_number_is_one_request_to_the_limiter(local: Any) -> None:
    api: LocalApi = local(rate_limits="default=2/60@user,queue=9/60@user")
    for _ in range(4):
        api.make()
    assert api.get("/jobs/?page=4&per_page=1").headers["x-ratelimit-remaining"] == "1"
    assert len(api.get("/jobs/?page=4&per_page=1").json()["data"]) == 1
    assert api.get("/jobs/?page=1").status_code == 429


def test_the_gate_stands_before_these_paths_too(api: LocalApi) -> None:
    for path in ("/jobs/admin/all", "/jobs/admin/statistics", "/jobs/admin/queue-status"):
        assert api.get(path, key=api.key(Role.OPERATOR)).status_code == 403
    assert api.get("/jobs/", key=None).status_code == 401
