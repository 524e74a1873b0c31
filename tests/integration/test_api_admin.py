"""What admins see and do across tenants."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from api_client import LocalApi, claim, complete
from factories import add_job, add_webhook, change, events_of, rows_of
from laneway import models
from laneway.clock import SystemClock, new_id
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import administration, statistics
from laneway.engine.access import tenants
from laneway.engine.access.callers import Role
from laneway.engine.turns import MAX_WEIGHT


@pytest.fixture
def admin(each_api: LocalApi) -> str:
    return each_api.key(Role.ADMIN, subject="ada")


def ended(api: LocalApi, status: JobStatus, *, days: float = 0, **columns: Any) -> str:
    at = SystemClock().now() - timedelta(days=days)
    return add_job(api.database, status, tenant_id=api.tenant_id, finished_at=at, **columns)


def test_what_admins_do_is_for_nobody_else(api: LocalApi) -> None:
    operations = [
        (method.upper(), path.removeprefix("/api/v1"))
        for path, methods in api.reference.document["paths"].items()
        for method in methods
        if path.startswith("/api/v1/admin/") or path.startswith("/api/v1/jobs/admin/")
    ]
    assert len(operations) >= 17
    for method, path in operations:
        url = path.format(job_id=new_id(), tenant_id=new_id(), policy="queue")
        for role in (Role.USER, Role.OPERATOR):
            body: dict[str, Any] = {} if method in ("GET", "DELETE") else {"json": {}}
            response = api.request(method, url, key=api.key(role), **body)
            assert (response.status_code, response.json()["code"]) == (403, "forbidden"), url


# Jobs


def test_jobs_of_all_tenants_are_listed(each_api: LocalApi, admin: str) -> None:
    bob = each_api.key(subject="bob", tenant="other")
    made = [
        each_api.make(key=key, title=title, priority=priority)["id"]
        for key, title, priority in (
            ("", "first", "high"),
            (bob, "second", "low"),
            (admin, "third", "high"),
            (bob, "fourth", "high"),
        )
    ]
    other = each_api.tenant("other")

    def seen(query: str = "") -> list[int]:
        page = each_api.get(f"/admin/jobs{query}", key=admin).json()["data"]
        return [made.index(job["id"]) for job in page]

    assert seen() == [3, 2, 1, 0]
    assert seen(f"?tenant_id={other}") == [3, 1]
    assert seen(f"?tenant_id={new_id()}") == []
    assert seen("?created_by=bob&priority=high") == [3]
    assert seen("?created_by=alice") == [0]
    assert seen("?scope=mine") == [2]
    assert seen("?q=second") == [1]
    first = each_api.get("/admin/jobs?limit=3", key=admin).json()
    rest = each_api.get(f"/admin/jobs?limit=3&cursor={first['next_cursor']}", key=admin).json()
    assert ([j["id"] for j in first["data"] + rest["data"]], rest["has_more"]) == (made[::-1], False)
    for wrong in (f"tenant_id={other}&cursor={first['next_cursor']}", "cursor=AAAA"):
        assert each_api.get(f"/admin/jobs?{wrong}", key=admin).json()["code"] == "invalid_cursor"
    elsewhere = each_api.get(f"/jobs?cursor={first['next_cursor']}", key=admin)
    assert elsewhere.json()["code"] == "invalid_cursor"
    assert each_api.get("/admin/jobs?nobody=1", key=admin).status_code == 422


# Statistics


def test_statistics_count_rates_durations_and_waits(each_api: LocalApi, admin: str) -> None:
    now = SystemClock().now()
    for n in range(1, 21):
        add_job(
            each_api.database,
            JobStatus.COMPLETED,
            tenant_id=each_api.tenant_id if n % 2 else each_api.tenant("other"),
            job_type="demo.echo",
            queued_at=now - timedelta(seconds=100 + 2 * n),
            started_at=now - timedelta(seconds=100),
            finished_at=now - timedelta(seconds=100 - n),
        )
    for status in sorted(FINAL - {JobStatus.COMPLETED}):
        ended(each_api, status, job_type="demo.fail", queued_at=now, started_at=None)
    ended(each_api, JobStatus.FAILED, days=0.5, job_type="demo.fail")
    seen = each_api.get("/admin/statistics", key=admin).json()
    assert (seen["window_seconds"], seen["cut"], seen["total"]) == (3600, False, 24)
    assert seen["by_status"] == {"completed": 20, "failed": 1, "timeout": 1, "cancelled": 1, "expired": 1}
    assert (seen["success_rate"], seen["failure_rate"]) == (round(20 / 22, 6), round(2 / 22, 6))
    assert seen["duration"] == {"average_seconds": 10.5, "p50_seconds": 10.0, "p95_seconds": 19.0}
    assert seen["wait"] == {"average_seconds": 21.0, "p50_seconds": 20.0, "p95_seconds": 38.0}
    echo, fail = seen["job_types"]
    assert (echo["job_type"], echo["total"], echo["success_rate"]) == ("demo.echo", 20, 1.0)
    assert (fail["job_type"], fail["success_rate"], fail["failure_rate"]) == ("demo.fail", 0.0, 1.0)
    assert fail["duration"]["p95_seconds"] is None
    assert each_api.get("/admin/statistics?window=24h", key=admin).json()["total"] == 25
    assert each_api.get("/admin/statistics?window=1m", key=admin).json()["total"] == 4


def test_statistics_of_many_jobs_are_cut_to_a_shorter_time(
    each_api: LocalApi, admin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of what is read nothing is cut; one past it, all statuses are, so that rates hold."""
    now = SystemClock().now()
    for n in range(8):
        add_job(each_api.database, JobStatus.COMPLETED, finished_at=now - timedelta(minutes=n))
    for minutes in (3, 9):
        add_job(each_api.database, JobStatus.FAILED, finished_at=now - timedelta(minutes=minutes))
    monkeypatch.setitem(statistics.sample.__kwdefaults__ or {}, "most", 8)
    whole = each_api.get("/admin/statistics", key=admin).json()
    assert (whole["cut"], whole["total"]) == (False, 10)
    add_job(each_api.database, JobStatus.COMPLETED, finished_at=now - timedelta(minutes=8))
    cut = each_api.get("/admin/statistics", key=admin).json()
    assert (cut["cut"], cut["by_status"]["completed"], cut["by_status"]["failed"]) == (True, 8, 1)
    assert cut["since"] > whole["since"]


def test_a_window_has_at_most_31_days(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)

    def status(window: str) -> int:
        return api.get("/admin/statistics", params={"window": window}, key=admin).status_code

    taken = ("31d", "744h", "44640m", "1m")
    wrong = ("32d", "745h", "44641m", "0h", "h", "1", "1w", "-1h", "1h ", "٣h", "")
    assert {window: status(window) for window in (*taken, *wrong)} == {
        **dict.fromkeys(taken, 200),
        **dict.fromkeys(wrong, 422),
    }


def test_the_queue_status_is_of_the_whole_installation(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    api.make(queue="emails")
    api.make(queue="sms", key=api.key(tenant="other"))
    api.make(delay_seconds=60)
    seen = api.get("/admin/queue-status", key=admin).json()
    assert [(q["name"], q["queued"]) for q in seen["queues"]] == [("default", 0), ("emails", 1), ("sms", 1)]
    assert seen["jobs"] == {"scheduled": 1, "blocked": 0, "queued": 2, "running": 0, "retrying": 0}
    assert (seen["health"]["status"], seen["health"]["workers"]) == ("unhealthy", [])


# Repairs


def test_any_job_but_a_completed_one_is_completed_by_hand(each_api: LocalApi, admin: str) -> None:
    body = {"result": {"by": ["hand", 1.5, None]}, "reason": "the bank confirmed it by phone"}
    for status in sorted(set(JobStatus) - {JobStatus.COMPLETED}):
        job_id = add_job(each_api.database, status, tenant_id=each_api.tenant("other"))
        done = each_api.post(f"/admin/jobs/{job_id}/force-complete", key=admin, json=body).json()
        assert (done["status"], done["result"], done["progress"]) == ("completed", body["result"], 100)
        event = events_of(each_api.database, job_id)[-1]
        assert (event["action"], event["actor"], event["reason"]) == ("force_complete", "ada", body["reason"])
        entry = each_api.get("/admin/audit-log", key=admin).json()["data"][0]
        assert (entry["action"], entry["target"]) == ("job.force_completed", f"job:{job_id}")
    again = each_api.post(f"/admin/jobs/{job_id}/force-complete", key=admin, json=body)
    assert (again.status_code, again.json()["facts"]) == (409, {"current_status": "completed"})
    assert len(each_api.get("/admin/audit-log", key=admin).json()["data"]) == len(JobStatus) - 1


def test_completing_by_hand_needs_a_job_and_sound_json(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    job_id = api.make()["id"]
    unknown = api.post(f"/admin/jobs/{new_id()}/force-complete", key=admin)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "job_not_found")
    for body in ({"result": "\x00"}, {"reason": "x" * 201}, {"result": 1, "status": "failed"}):
        wrong = api.post(f"/admin/jobs/{job_id}/force-complete", key=admin, json=body)
        assert wrong.status_code == 422, body
    large = {"result": "x" * 256 * 1024}
    assert api.post(f"/admin/jobs/{job_id}/force-complete", key=admin, json=large).status_code == 413
    assert api.get(f"/jobs/{job_id}").json()["status"] == "queued"
    done = api.post(f"/admin/jobs/{job_id}/force-complete", key=admin)
    assert (done.json()["result"], done.json()["status"]) == (None, "completed")


def test_a_result_that_comes_late_is_discarded(each_api: LocalApi, admin: str) -> None:
    job_id = each_api.make()["id"]
    held = claim(each_api, job_id)
    each_api.post(f"/admin/jobs/{job_id}/force-complete", key=admin, json={"result": "by hand"})
    with pytest.raises(AssertionError, match="Refused"):
        complete(each_api, held, '"too late"')
    assert each_api.get(f"/jobs/{job_id}").json()["result"] == "by hand"


def test_a_cleanup_deletes_what_ended_long_ago_and_keeps_failed_jobs(
    each_api: LocalApi, admin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(administration, "BATCH_ROWS", 2)
    old = {status: [ended(each_api, status, days=31) for _ in range(3)] for status in sorted(FINAL)}
    young = [ended(each_api, status, days=29) for status in sorted(FINAL)]
    waiting = each_api.make()["id"]
    untold = ended(each_api, JobStatus.COMPLETED, days=31)
    add_webhook(each_api.database, untold, "pending")

    def left() -> set[str]:
        return {row["id"] for row in rows_of(each_api.database, models.jobs)}

    body = {"older_than_days": 30}
    dry = each_api.post("/admin/cleanup", key=admin, json=body | {"dry_run": True}).json()
    by_status = {"cancelled": 3, "completed": 3, "expired": 3}
    assert dry == {"dry_run": True, "deleted": 9, "by_status": by_status, "remaining": 9}
    assert len(left()) == 22
    done = each_api.post("/admin/cleanup", key=admin, json=body).json()
    assert done == {"dry_run": False, "deleted": 9, "by_status": by_status, "remaining": 0}
    assert left() == {*young, waiting, untold, *old[JobStatus.FAILED], *old[JobStatus.TIMEOUT]}
    named = each_api.post("/admin/cleanup", key=admin, json=body | {"statuses": ["failed", "success"]}).json()
    assert named["by_status"] == {"completed": 0, "failed": 3}
    assert left() == {*young, waiting, untold, *old[JobStatus.TIMEOUT]}
    log = each_api.get("/admin/audit-log?action=jobs.cleaned_up", key=admin).json()["data"]
    assert [entry["facts"]["statuses"] for entry in log] == [
        ["completed", "failed"],
        ["cancelled", "completed", "expired"],
    ]


def test_a_cleanup_says_what_it_leaves_to_the_next_call(
    api: LocalApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    monkeypatch.setitem(administration.clean_up.__kwdefaults__ or {}, "limit", 4)
    for _ in range(5):
        ended(api, JobStatus.COMPLETED, days=2)
    for deleted, remaining in ((4, 1), (1, 0), (0, 0)):
        done = api.post("/admin/cleanup", key=admin, json={"older_than_days": 1}).json()
        assert (done["deleted"], done["remaining"]) == (deleted, remaining)


def test_a_cleanup_that_is_not_understood_deletes_nothing(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)
    ended(api, JobStatus.COMPLETED, days=36_499)
    for body in (
        {},
        {"older_than_days": -1},
        {"older_than_days": 36_501},
        {"older_than_days": 1, "statuses": []},
        {"older_than_days": 1, "statuses": ["queued"]},
        {"older_than_days": 1, "all": True},
        {"older_than_days": 1.5},
    ):
        assert api.post("/admin/cleanup", key=admin, json=body).status_code == 422, body
    oldest = {"older_than_days": 36_500}
    assert api.post("/admin/cleanup", key=admin, json=oldest).json()["deleted"] == 0
    assert api.count_jobs() == 1


# Tenants


def test_tenants_are_made_named_and_listed(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    made = api.post("/admin/tenants", key=admin, json={"name": "Ö & Co"})
    tenant = made.json()
    assert (made.status_code, tenant["name"], tenant["created_by"]) == (201, "Ö & Co", "ada")
    assert made.headers["location"].endswith(f"/admin/tenants/{tenant['id']}")
    assert not {"webhook_secret", "old_webhook_secrets"} & set(tenant)
    assert api.get(f"/admin/tenants/{tenant['id']}", key=admin).json() == tenant
    answer = api.request("PATCH", f"/admin/tenants/{tenant['id']}", key=admin, json={"name": "Ö & Sons"})
    assert (answer.json()["name"], answer.json()["created_at"]) == ("Ö & Sons", tenant["created_at"])
    listed = api.get("/admin/tenants?limit=1", key=admin).json()
    assert (listed["data"][0]["name"], listed["has_more"]) == ("Ö & Sons", True)
    rest = api.get(f"/admin/tenants?limit=1&cursor={listed['next_cursor']}", key=admin).json()
    assert (rest["data"][0]["name"], rest["has_more"]) == ("default", False)
    actions = [e["action"] for e in api.get("/admin/audit-log", key=admin).json()["data"]]
    assert actions == ["tenant.changed", "tenant.created"]


@pytest.mark.parametrize(
    ("field", "least", "most"), [("weight", 1, MAX_WEIGHT), ("max_queued", 1, tenants.MAX_QUEUED)]
)
def test_a_tenant_s_turns_and_quota_are_taken_within_their_limits(
    each_api: LocalApi, admin: str, field: str, least: int, most: int
) -> None:
    path = f"/admin/tenants/{each_api.tenant_id}"
    before = each_api.get(path, key=admin).json()
    assert (before["weight"], before["max_queued"]) == (1, None)
    for value in (least, most):
        answer = each_api.request("PATCH", path, key=admin, json={field: value})
        assert (answer.status_code, answer.json()[field]) == (200, value)
        assert answer.json()["name"] == before["name"], "what is left out stays"
    for wrong in (least - 1, most + 1, "many", 1.5, None if field == "weight" else []):
        assert each_api.request("PATCH", path, key=admin, json={field: wrong}).status_code == 422
    assert each_api.get(path, key=admin).json()[field] == most
    if field == "max_queued":
        assert each_api.request("PATCH", path, key=admin, json={field: None}).json()[field] is None


def test_two_tenants_never_have_one_name(each_api: LocalApi, admin: str) -> None:
    other = each_api.tenant("other")
    for method, path in (("POST", "/admin/tenants"), ("PATCH", f"/admin/tenants/{each_api.tenant_id}")):
        taken = each_api.request(method, path, key=admin, json={"name": "other"})
        assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    own = each_api.request("PATCH", f"/admin/tenants/{other}", key=admin, json={"name": "other"})
    assert own.status_code == 200
    assert {row["name"] for row in rows_of(each_api.database, models.tenants)} == {"default", "other"}


def test_a_tenant_s_name_has_1_to_100_characters(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)
    assert api.post("/admin/tenants", key=admin, json={"name": "x" * 100}).status_code == 201
    for wrong in ({"name": "x" * 101}, {"name": ""}, {"name": "\x00"}, {}, {"name": "n", "id": new_id()}):
        assert api.post("/admin/tenants", key=admin, json=wrong).status_code == 422
    for method in ("GET", "PATCH"):
        body: dict[str, Any] = {} if method == "GET" else {"json": {"name": "n"}}
        unknown = api.request(method, f"/admin/tenants/{new_id()}", key=admin, **body)
        assert (unknown.status_code, unknown.json()["code"]) == (404, "tenant_not_found")


def test_a_new_tenant_s_secret_signs(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    api.post("/admin/tenants", key=admin, json={"name": "new"})
    operator = api.key(Role.OPERATOR, tenant="new")
    assert api.get("/webhooks/secret", key=operator).json()["secret"].startswith("whsec_")


# Rate limits


def test_rate_limits_of_a_tenant_are_set_read_and_taken_back(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    path = f"/admin/tenants/{api.tenant_id}/rate-limits/queue"
    assert api.get(path, key=admin).status_code == 404
    spec = {"quota": 100, "window_seconds": 60, "reason": "an import"}
    whole = api.request("PUT", path, key=admin, json=spec)
    assert whole.status_code == 200
    assert {name: whole.json()[name] for name in spec} == spec
    assert (whole.json()["subject"], whole.json()["mode"]) == (None, "enforce")
    one = api.request(
        "PUT", f"{path}?subject=alice", key=admin, json={"quota": None, "reason": "trusted"}
    ).json()
    assert (one["subject"], one["quota"], one["updated_by"]) == ("alice", None, "ada")
    assert api.get(path, key=admin).json() == whole.json()
    assert api.get(f"{path}?subject=alice", key=admin).json() == one
    listed = api.get(path.removesuffix("/queue"), key=admin).json()["data"]
    assert listed == [whole.json(), one]
    assert api.request("DELETE", path, key=admin).status_code == 204
    assert api.request("DELETE", path, key=admin).status_code == 404
    assert api.get(path.removesuffix("/queue"), key=admin).json()["data"] == [one]
    actions = [e["action"] for e in api.get("/admin/audit-log", key=admin).json()["data"]]
    assert actions == ["rate_limit.removed", "rate_limit.set", "rate_limit.set"]


def test_a_rate_limit_that_makes_no_sense_is_refused(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)
    base = f"/admin/tenants/{api.tenant_id}/rate-limits"
    good = {"quota": 1, "window_seconds": 1, "reason": "r"}
    for path, body in (
        ("/queue", good | {"window_seconds": None}),
        ("/queue", good | {"quota": -1}),
        ("/queue", {"quota": 1, "window_seconds": 1}),
        ("/queue", good | {"expires_at": "2020-01-01T00:00:00Z"}),
        ("/queue", good | {"mode": "off"}),
        ("/nobody", good),
        ("/jobs?subject=alice", good),
        ("/queue?who=alice", good),
    ):
        assert api.request("PUT", base + path, key=admin, json=body).status_code == 422, (path, body)
    elsewhere = f"/admin/tenants/{new_id()}/rate-limits"
    unknown = api.request("PUT", elsewhere + "/queue", key=admin, json=good)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "tenant_not_found")
    assert api.get(elsewhere, key=admin).json()["code"] == "tenant_not_found"


# The audit log


def test_the_audit_log_is_filtered_and_walked(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN, subject="ada")
    for name in ("a", "b", "c"):
        api.post(f"/queues/{name}/pause", key=admin)
    eve = api.key(Role.ADMIN, tenant="other", subject="eve")
    api.post("/queues/a/resume", key=eve)

    def seen(query: str = "") -> list[tuple[str, str]]:
        page = api.get(f"/admin/audit-log{query}", key=admin).json()["data"]
        return [(entry["actor"], entry["target"]) for entry in page]

    assert seen() == [("eve", "queue:a"), ("ada", "queue:c"), ("ada", "queue:b"), ("ada", "queue:a")]
    assert seen("?actor=eve") == seen("?action=queue.resumed") == [("eve", "queue:a")]
    assert seen(f"?tenant_id={api.tenant('other')}") == [("eve", "queue:a")]
    assert seen("?target=queue:b") == [("ada", "queue:b")]
    assert seen("?created_before=2026-01-01T00:00:00Z") == []
    first = api.get("/admin/audit-log?limit=3", key=admin).json()
    rest = api.get(f"/admin/audit-log?limit=3&cursor={first['next_cursor']}", key=admin).json()
    assert (len(first["data"]), [e["target"] for e in rest["data"]], rest["has_more"]) == (
        3,
        ["queue:a"],
        False,
    )
    bent = api.get(f"/admin/audit-log?actor=eve&cursor={first['next_cursor']}", key=admin)
    assert bent.json()["code"] == "invalid_cursor"
    for wrong in ("action=queue.burnt", "nobody=1", "tenant_id=1"):
        assert api.get(f"/admin/audit-log?{wrong}", key=admin).status_code == 422


def test_a_demoted_admin_is_no_admin(api: LocalApi) -> None:
    demoted = api.key(Role.ADMIN)
    change(api.database, models.api_keys, demoted[8:20], role="operator")
    assert api.get("/admin/jobs", key=demoted).status_code == 403
