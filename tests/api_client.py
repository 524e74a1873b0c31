"""The API under test: in this process, or served by uvicorn on a socket; every answer is checked.

Whatever a test asks for, the answer must be one that the OpenAPI document allows for that operation, and
must keep the promises that all answers make: `Reference.check` holds them to it.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self

import httpx
import sqlalchemy as sa
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from openapi_schema_validator import OAS32Validator

from laneway import models
from laneway.api.app import BASE, create_api
from laneway.api.edge import Edge
from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.engine import progress
from laneway.engine.access.callers import Role, create_key, ensure_tenant
from laneway.engine.context import Progress
from laneway.engine.outcomes import Claimed
from laneway.engine.transitions import Applied, Claim, Complete, Move, apply
from laneway.lanes.live import RedisNews
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox
from servers import Server

RATE_HEADERS = (
    "ratelimit-policy",
    "ratelimit",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
)
PROBLEM = "application/problem+json"
_UNCOUNTED = re.compile("storage_unavailable|temporary_reduced_capacity")  # whose, or how many, is not known
_INTERNALS = re.compile(
    r"Traceback|File \"|sqlalchemy|psycopg|sqlite3|SELECT |INSERT |UPDATE |site-packages", re.I
)


class Reference:
    """What the OpenAPI document and docs/reference/http.md promise of answers."""

    def __init__(self) -> None:
        self.document = create_api(Settings()).openapi()
        self._paths = {
            template: re.compile(re.sub(r"\{[^}]+\}", "[^/]+", template))
            for template in self.document["paths"]
        }
        self.schema = cache(self._schema)

    def check(self, response: httpx.Response) -> None:
        """Raise AssertionError where the answer is none that this operation may give."""
        request = response.request
        text = "" if response.headers.get("content-type") == "text/event-stream" else response.text
        said = f"{request.method} {request.url.path} → {response.status_code} {text[:2000]}"
        operation = self.operation(request.method, request.url.path)
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", response.headers["x-request-id"]), said
        assert "cache-control" in response.headers, said
        if response.status_code in (429, 503):
            assert int(response.headers["retry-after"]) >= 1, said
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if media_type == PROBLEM:
            self.check_problem(response)
        if operation is None:
            assert response.status_code in (404, 405), said
            assert media_type == PROBLEM, said
            return
        documented = operation["responses"].get(str(response.status_code))
        assert documented is not None, f"not documented: {said}"
        for name in documented["headers"]:
            if name.lower() in RATE_HEADERS:
                expected = not _UNCOUNTED.search(text)
            else:
                expected = self.document["components"]["headers"][name]["required"]
            assert not expected or name in response.headers, f"no {name}: {said}"
        if response.status_code == 202:
            assert "location" in response.headers, said
        contents = documented.get("content", {})
        if response.status_code in (204, 304) or not contents:
            assert not text, said
            return
        assert media_type in contents, f"{media_type}: {said}"
        if media_type.endswith("json"):
            schema = contents[media_type].get("schema", {})
            errors = [
                error.message for error in self.schema(str(schema.get("$ref"))).iter_errors(response.json())
            ]
            assert not errors, f"{errors}: {said}"

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """The operation behind a request, None when there is none."""
        for template, pattern in self._paths.items():
            if pattern.fullmatch(path):
                found: dict[str, Any] | None = self.document["paths"][template].get(method.lower())
                if found is not None:
                    return found
        return None

    def _schema(self, reference: str) -> OAS32Validator:
        return OAS32Validator({"$ref": reference, "components": self.document["components"]})

    def check_problem(self, response: httpx.Response) -> None:
        """Raise AssertionError where the answer is no complete problem, or tells of our insides."""
        problem = response.json()
        said = f"{response.request.method} {response.request.url.path} → {response.text[:2000]}"
        assert response.headers["content-type"] == PROBLEM, said
        assert not _INTERNALS.search(response.text), said
        errors = [e.message for e in self.schema("#/components/schemas/Problem").iter_errors(problem)]
        assert not errors, f"{errors}: {said}"
        assert problem["status"] == response.status_code, said
        assert problem["instance"] == response.request.url.path, said
        assert problem["request_id"] == response.headers["x-request-id"], said
        if response.status_code == 401:
            assert response.headers["www-authenticate"] == "Bearer", said
        if problem["code"] in ("invalid_request", "invalid_parameters", "invalid_payload"):
            assert problem["errors"], said


@cache
def reference() -> Reference:
    return Reference()


class Calls:
    """Requests with a key, and what is behind the API: its store, its tenants."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reference = reference()
        self.database = Database(settings.database)
        self._box = SecretBox.from_settings(settings)
        self.tenant_id = self.tenant("default")
        self.news = RedisNews(settings.redis_url, courier_channel="nobody")
        self.alice = self.key(Role.USER, subject="alice")

    def send(self, method: str, path: str, **how: Any) -> httpx.Response:
        raise NotImplementedError

    def request(self, method: str, path: str, *, key: str | None = "", **how: Any) -> httpx.Response:
        """The checked answer. `path` is below the base, unless it starts with two slashes; key None: none."""
        url = path[1:] if path.startswith("//") else BASE + path
        response = self.send(method, url, headers=self.headers(key) | how.pop("headers", {}), **how)
        self.reference.check(response)
        return response

    def headers(self, key: str | None = "") -> dict[str, str]:
        return {} if key is None else {"Authorization": f"Bearer {key or self.alice}"}

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.request("GET", path, **how)

    def post(self, path: str, **how: Any) -> httpx.Response:
        return self.request("POST", path, **how)

    def make(self, job_type: str = "demo.echo", *, key: str = "", **fields: Any) -> dict[str, Any]:
        """A job that was accepted."""
        response = self.post("/jobs", key=key, json={"job_type": job_type, **fields})
        assert response.status_code == 202, response.text
        return dict(response.json())

    def tenant(self, name: str) -> str:
        return ensure_tenant(self.database, self._box, name)

    def key(self, role: Role = Role.USER, *, tenant: str = "default", subject: str | None = None) -> str:
        """A new key."""
        return create_key(self.database, tenant_id=self.tenant(tenant), role=role, subject=subject)

    def close(self) -> None:
        self.news.close()
        self.database.dispose()

    def count_jobs(self) -> int:
        with self.database.read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(models.jobs)).scalar_one())


class LocalApi(Calls):
    """The application in this process: `with` runs its lifespan, on an event loop of its own."""

    def __init__(self, settings: Settings, *, app: FastAPI | None = None) -> None:
        super().__init__(settings)
        self.app = app or create_api(settings)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.close)
            self.portal: BlockingPortal = stack.enter_context(start_blocking_portal())
            self._client = stack.enter_context(self.portal.wrap_async_context_manager(self._running()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[httpx.AsyncClient]:
        async with (
            self.app.router.lifespan_context(self.app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(Edge(self.app, self.settings), raise_app_exceptions=False),
                base_url="http://laneway.test",
                timeout=60,
            ) as client,
        ):
            yield client

    def send(self, method: str, path: str, **how: Any) -> httpx.Response:
        return self.portal.call(lambda: self._client.request(method, path, **how))

    @contextmanager
    def asking(self, method: str, path: str, **how: Any) -> Iterator[Callable[[], httpx.Response]]:
        """A request under way; the value waits for its answer."""
        future = self.portal.start_task_soon(
            lambda: self._client.request(
                method, BASE + path, headers=self.headers() | how.pop("headers", {}), **how
            )
        )

        def answer() -> httpx.Response:
            response = future.result(60)
            self.reference.check(response)
            return response

        yield answer


class ServedApi(Calls, Server):
    """The application in a uvicorn process of its own, on a unix socket."""

    def __init__(self, settings: Settings) -> None:
        Server.__init__(self, "api")
        Calls.__init__(self, settings)
        self.socket = self.folder / "api.sock"

    def __enter__(self) -> Self:
        Server.__enter__(self)
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://localhost", timeout=60
        )
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_client"):
            self._client.close()
        Server.__exit__(self)
        self.close()

    def start(self) -> None:
        self.run(
            [
                sys.executable,
                "-m",
                "uvicorn",
                "--factory",
                "laneway.api.app:create_app",
                "--uds",
                self.socket,
                "--no-access-log",
            ],
            ready=self._answers,
            dying=signal.SIGKILL,
            env=environment(self.settings),
        )

    def _answers(self) -> bool:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket))) as client:
            try:
                return client.get("http://localhost/livez").status_code == 200
            except httpx.TransportError:
                return False

    def send(self, method: str, path: str, **how: Any) -> httpx.Response:
        return self._client.request(method, path, **how)

    def stream(self, path: str, **how: Any) -> Any:
        """`with` gives the checked answer as soon as its headers are there."""
        return self._client.stream("GET", BASE + path, headers=self.headers() | how.pop("headers", {}), **how)


class WorkerProcess(Server):
    """A worker with one child, on the same stores."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("worker")
        self._settings = settings

    def start(self) -> None:
        database = Database(self._settings.database)
        try:
            self.run(
                [sys.executable, "-m", "laneway", "worker", "--no-courier", "--concurrency", "1"],
                ready=lambda: bool(_workers(database)),
                dying=signal.SIGKILL,
                env=environment(self._settings),
            )
        finally:
            database.dispose()


def _workers(database: Database) -> list[Any]:
    with database.read() as connection:
        return list(connection.execute(sa.select(models.workers.c.id)).scalars())


def move(api: Calls, change: Move) -> Applied:
    """A move of the engine, made past the API."""
    with api.database.write() as connection:
        (outcome,) = apply(connection, [change], now=SystemClock().now(), actor="test")
    assert isinstance(outcome, Applied), outcome
    api.news.changed([change.job_id])
    return outcome


def claim(api: Calls, job_id: str) -> Claimed:
    """A worker takes the job."""
    token = new_id()
    return Claimed.of(move(api, Claim(job_id, token, new_id(), SystemClock().now())).row, token)


def report(api: Calls, held: Claimed, percent: int, message: str = "so far") -> None:
    """The worker saves progress."""
    with api.database.write() as connection:
        progress.save(connection, [(held, Progress(percent, message))], now=SystemClock().now())
    api.news.changed([held.job_id])


def complete(api: Calls, held: Claimed, result: str = "null") -> None:
    """The worker reports the end, with a result as JSON text."""
    move(api, Complete(held.job_id, held.attempt, held.lease_token, result=result))


def environment(settings: Settings) -> dict[str, str]:
    """A process environment that makes these settings."""
    said: Mapping[str, Any] = {name: getattr(settings, name) for name in settings.model_fields_set}
    values = {
        name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in said.items()
    }
    path = {"PYTHONPATH": ":".join(sys.path), "PATH": str(Path(sys.executable).parent)}
    return path | {f"LANEWAY_{name.upper()}": value for name, value in values.items()}
