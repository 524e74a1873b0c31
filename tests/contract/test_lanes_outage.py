"""Lanes whose Redis is away, hangs, refuses, forgets or may evict."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import redis as redis_py
from structlog.testing import capture_logs

from laneway.clock import FrozenClock
from laneway.lanes.backend import Lack, LanesUnavailable
from laneway.lanes.rq_lanes import BREAK_SECONDS, RqLanes, connect
from servers import RedisServer, wait_until

ITEM = [("high", "a")]


class SilentServer:
    """Accepts and counts connections; answers none. With `hangs` false it also closes them at once."""

    def __init__(self, *, hangs: bool) -> None:
        self.accepted = 0
        self._hangs = hangs
        self._held = ExitStack()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}/0"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.accepted += 1
            if self._hangs:
                self._held.enter_context(connection)
            else:
                connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        self._held.close()


@pytest.fixture
def closing_server() -> Iterator[SilentServer]:
    server = SilentServer(hangs=False)
    yield server
    server.close()


@pytest.fixture
def hanging_server() -> Iterator[SilentServer]:
    server = SilentServer(hangs=True)
    yield server
    server.close()


def test_a_broken_connection_is_tried_once_and_then_not_for_a_second(
    closing_server: SilentServer, clock: FrozenClock
) -> None:
    lanes = RqLanes(closing_server.url, clock=clock)
    with pytest.raises(LanesUnavailable):
        lanes.push(ITEM)
    wait_until(lambda: closing_server.accepted == 1, what="one connection, no retry")
    clock.advance(seconds=BREAK_SECONDS - 0.001)
    for call in (
        lambda: lanes.push(ITEM),
        lambda: lanes.depths(["high"]),
        lambda: lanes.wait(["default"], 1),
    ):
        with pytest.raises(LanesUnavailable):
            call()
    assert closing_server.accepted == 1
    clock.advance(seconds=0.002)
    with pytest.raises(LanesUnavailable):
        lanes.push(ITEM)
    wait_until(lambda: closing_server.accepted == 2, what="a second connection")
    lanes.close()


def test_a_redis_that_hangs_is_given_up_and_one_caller_at_a_time_looks_again(
    hanging_server: SilentServer, clock: FrozenClock
) -> None:
    lanes = RqLanes(hanging_server.url, clock=clock, connect=lambda url, _seconds: connect(url, 0.5))
    with pytest.raises(LanesUnavailable):
        lanes.push(ITEM)
    before = hanging_server.accepted
    clock.advance(seconds=BREAK_SECONDS + 0.001)
    outcome: list[str] = []

    def look() -> None:
        try:
            lanes.push(ITEM)
        except LanesUnavailable:
            outcome.append("unavailable")

    scout = threading.Thread(target=look)
    scout.start()
    wait_until(lambda: hanging_server.accepted == before + 1, what="the scout's connection")
    with pytest.raises(LanesUnavailable):
        lanes.push(ITEM)
    scout.join()
    assert outcome == ["unavailable"]
    assert hanging_server.accepted == before + 1
    lanes.close()


def test_lanes_come_back_with_redis(own_redis_server: RedisServer, clock: FrozenClock) -> None:
    lanes = RqLanes(own_redis_server.url, clock=clock)
    lanes.push(ITEM)
    own_redis_server.kill()
    with pytest.raises(LanesUnavailable):
        lanes.push(ITEM)
    own_redis_server.start()
    with pytest.raises(LanesUnavailable):
        lanes.push(ITEM)
    clock.advance(seconds=BREAK_SECONDS + 0.001)
    assert lanes.push([("high", "b")]) == 1
    assert lanes.contents("high")[-1] == "b"
    lanes.close()


def test_one_refused_command_does_not_close_the_other_lanes(
    redis: redis_py.Redis, redis_url: str, clock: FrozenClock
) -> None:
    lanes = RqLanes(redis_url, clock=clock)
    redis.set("rq:queue:high", "not a list")
    with pytest.raises(LanesUnavailable, match="WRONGTYPE"):
        lanes.push(ITEM)
    assert lanes.push([("low", "a")]) == 1
    lanes.close()


def test_a_redis_that_lost_everything_is_filled_again(
    redis: redis_py.Redis, redis_url: str, clock: FrozenClock
) -> None:
    lanes = RqLanes(redis_url, clock=clock, window=2)
    lanes.push([("high", name) for name in "abc"])
    redis.flushall()
    redis.script_flush()
    assert lanes.refill("high", [Lack("", [], ["a", "b", "c"], True)], refusals_seen=0) == 2
    assert lanes.take(["high"], 5, worker_name="w") == ["a", "b"]
    assert lanes.backlog("high").waiting is True
    lanes.close()


@pytest.mark.parametrize(("policy", "warnings"), [("noeviction", 0), ("allkeys-lru", 1)])
def test_a_redis_that_may_evict_is_named_once(
    own_redis_server: RedisServer, clock: FrozenClock, policy: str, warnings: int
) -> None:
    with own_redis_server.client() as client:
        client.config_set("maxmemory-policy", policy)
    lanes = RqLanes(own_redis_server.url, clock=clock)
    with capture_logs() as lines:
        lanes.push(ITEM)
        lanes.push(ITEM)
    assert [line["event"] for line in lines].count("redis_may_evict") == warnings
    lanes.close()
