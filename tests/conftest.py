"""What every test may ask for: real servers, a clean store, a clock that stands still."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_py

from laneway.cli import migrate
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.settings import PREFIX, get_settings
from servers import PostgresServer, RedisServer

for _name in [name for name in os.environ if name.startswith(PREFIX)]:
    del os.environ[_name]  # a developer's own settings must not decide what a test sees


@pytest.fixture(autouse=True)
def _settings_read_anew() -> Iterator[None]:
    yield
    get_settings.cache_clear()


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The Redis that most tests share. Never stop it: `own_redis_server` is for that."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    """A Redis of the test's own, with an append-only file: it may be stopped, killed and started again."""
    with RedisServer(durable=True) as server:
        yield server


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[redis_py.Redis]:
    """A client of the shared Redis, which is empty when the test begins."""
    with redis_server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def redis_url(redis_server: RedisServer, redis: redis_py.Redis) -> str:
    """The shared Redis, empty when the test begins."""
    return redis_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL that tests share: `fresh()` is the URL of a database of one's own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def own_postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own: it may be stopped, killed and started again."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def _migrated_sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(_migrated_sqlite_file: Path, tmp_path: Path) -> str:
    """A SQLite store of the test's own, migrated and empty."""
    return f"sqlite:///{shutil.copy(_migrated_sqlite_file, tmp_path / 'laneway.db')}"


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database of the test's own, migrated and empty."""
    url = postgres_server.fresh()
    yield url
    postgres_server.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each store in turn, migrated and empty."""
    return str(request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Each store in turn, migrated and empty, open."""
    store = Database(database_url)
    yield store
    store.dispose()
