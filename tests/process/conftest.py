"""Stacks of real processes, each on a store and a Redis of its own choice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from process.stack import Stack
from servers import RedisServer


@pytest.fixture
def stack(sqlite_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stack]:
    """On SQLite."""
    with Stack(sqlite_url, redis_url, tmp_path) as started:
        yield started


@pytest.fixture
def either_stack(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stack]:
    """On each store in turn."""
    with Stack(database_url, redis_url, tmp_path) as started:
        yield started


@pytest.fixture
def stack_with_own_redis(database_url: str, own_redis_server: RedisServer, tmp_path: Path) -> Iterator[Stack]:
    """On each store in turn, with a Redis that the test may stop."""
    with Stack(database_url, own_redis_server.url, tmp_path) as started:
        yield started
