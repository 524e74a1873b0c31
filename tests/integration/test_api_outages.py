"""What callers see while something behind the API is away, or broken."""

from __future__ import annotations

import signal
import socket
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import APIRouter
from structlog.testing import capture_logs

from api_client import LocalApi, ServedApi, claim
from laneway import models
from laneway.api.app import create_api
from laneway.api.gate import GatedRoute, access
from laneway.domain.spec import JobSpec
from laneway.limits.rules import RateClass
from servers import PostgresServer, RedisServer, wait_until

JOB = {"job_type": "demo.noop"}
STORAGE_ROUTES = ("/jobs", "/jobs/{id}", "/jobs/{id}/status", "/jobs/{id}/result", "/jobs/{id}/events")


def test_without_the_database_nothing_is_accepted_and_it_recovers_by_itself(
    local: Any, own_postgres_server: PostgresServer
) -> None:
    api: LocalApi = local(database_url=own_postgres_server.fresh())
    job_id = api.make()["id"]
    own_postgres_server.stop()
    for _ in range(2):
        refused = api.post("/jobs", json=JOB)
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
        assert 2 <= int(refused.headers["retry-after"]) <= 10
    assert api.post("/jobs", json=JOB, headers={"Prefer": "wait=1"}).status_code == 503
    assert api.post(f"/jobs/{job_id}/cancel").status_code == 503
    for path in (*STORAGE_ROUTES, "/queues/stats", "/queues/health"):
        assert api.get(path.format(id=job_id)).status_code == 503, path
    assert api.get("/job-types").status_code == 200, "what needs no database is served"
    assert api.get("//livez", key=None).status_code == 200
    ready = api.get("//readyz", key=None)
    assert (ready.status_code, ready.json()["database"]) == (503, "away")
    own_postgres_server.start()
    wait_until(lambda: api.get("//readyz", key=None).status_code == 200, what="the API is ready again")
    wait_until(lambda: api.post("/jobs", json=JOB).status_code == 202, what="jobs are accepted again")
    assert api.get(f"/jobs/{job_id}").json()["id"] == job_id


def test_a_key_that_cannot_be_checked_is_not_let_in(local: Any, own_postgres_server: PostgresServer) -> None:
    api: LocalApi = local(database_url=own_postgres_server.fresh())
    own_postgres_server.stop()
    response = api.get("/job-types")
    assert (response.status_code, response.json()["code"]) == (503, "storage_unavailable")


def test_a_stream_ends_when_the_database_goes(served: Any, own_postgres_server: PostgresServer) -> None:
    api: ServedApi = served(database_url=own_postgres_server.fresh())
    job_id = api.make()["id"]
    with api.stream(f"/jobs/{job_id}/events") as response:
        lines = response.iter_lines()
        assert "id: 1" in [next(lines) for _ in range(3)]
        own_postgres_server.kill()
        assert [line for line in lines if line.startswith("id:")] == []
    assert api.get(f"/jobs/{job_id}/events").status_code == 503
    own_postgres_server.start()
    wait_until(lambda: api.get(f"/jobs/{job_id}").status_code == 200, what="the API has its database again")


def test_a_database_that_nobody_may_use_for_a_while_is_away(local: Any, postgres_url: str) -> None:
    """An ACCESS EXCLUSIVE lock, as a careless migration takes it: the statement's lock timeout ends it."""
    api: LocalApi = local(database_url=postgres_url)
    api.make()
    with api.database.write() as migration:
        migration.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        refused = api.post("/jobs", json=JOB)
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
    assert api.post("/jobs", json=JOB).status_code == 202
    assert api.count_jobs() == 2


def test_news_from_a_redis_that_came_back_are_heard(local: Any, own_redis_server: RedisServer) -> None:
    api: LocalApi = local(redis_url=own_redis_server.url)
    own_redis_server.stop()
    job_id = api.make()["id"]
    claim(api, job_id)
    assert api.post(f"/jobs/{job_id}/cancel").status_code == 202, "the wish is in the database"
    own_redis_server.start()
    with own_redis_server.client() as client:
        wait_until(lambda: client.pubsub_numsub("laneway:live")[0][1] == 1, what="the API listens again")


def test_the_api_stops_while_redis_is_away(local: Any, own_redis_server: RedisServer) -> None:
    own_redis_server.stop()
    api: LocalApi = local(redis_url=own_redis_server.url)
    api.make()


@pytest.fixture
def broken(api_settings: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The application with a route that crashes, and one whose SQL is wrong."""
    router = APIRouter(route_class=GatedRoute)

    @router.post("/crash")
    @access(RateClass.QUEUE)
    async def crash(spec: JobSpec) -> None:
        raise RuntimeError(f"secret details: {spec.parameters}")

    @router.get("/wrong-sql")
    @access(RateClass.DEFAULT)
    async def wrong_sql() -> None:
        engine = sa.create_engine("sqlite://")
        with engine.connect() as connection:
            connection.execute(sa.insert(models.tenants).values(id="x", name=None))

    app = create_api(api_settings)
    app.include_router(router, prefix="/api/v1")
    with LocalApi(api_settings, app=app) as api:
        yield api


@pytest.mark.parametrize(("method", "path"), [("POST", "/crash"), ("GET", "/wrong-sql")])
def test_a_crash_is_a_problem_without_internals(broken: LocalApi, method: str, path: str) -> None:
    sent = {"job_type": "demo.echo", "parameters": {"card": "4111"}}
    body = {"json": sent} if method == "POST" else {}
    headers = broken.headers() | {"X-Request-Id": "find-me"}
    with capture_logs() as logs:
        response = broken.send(method, f"/api/v1{path}", headers=headers, **body)
    assert response.status_code == 500
    broken.reference.check_problem(response)
    assert response.json()["code"] == "internal_error"
    assert response.headers["x-request-id"] == response.json()["request_id"] == "find-me"
    for name in ("ratelimit", "x-ratelimit-remaining", "x-content-type-options", "cache-control"):
        assert name in response.headers
    (crash,) = [entry for entry in logs if entry["event"] == "request_crashed"]
    assert crash["request_id"] == "find-me"
    assert broken.get("/jobs").status_code == 200


def test_a_caller_that_leaves_in_the_middle_of_its_body_is_no_crash(served: Any) -> None:
    api: ServedApi = served()
    for path in ("/api/v1/jobs", f"/api/v1/jobs/{api.make()['id']}/cancel"):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {api.alice}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(api.socket))
            caller.sendall(head.encode())
    assert api.count_jobs() == 1
    api.end(signal.SIGTERM)
    said = (api.folder / "server.log").read_text()
    assert "Finished server process" in said
    assert "request_crashed" not in said
    assert "Traceback" not in said
