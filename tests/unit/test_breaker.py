"""What failed a moment ago is not tried by everybody: the rule, and those who keep it towards Redis."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from laneway.clock import Breaker, FrozenClock
from laneway.lanes.backend import LanesUnavailable
from laneway.lanes.live import RedisNews
from laneway.lanes.rq_lanes import BREAK_SECONDS, PROBE_SECONDS, RqLanes, connect


def test_after_a_failure_nobody_tries_then_one_a_period_until_it_works(clock: FrozenClock) -> None:
    breaker = Breaker(clock.monotonic, seconds=2)
    assert breaker.may_try()
    assert breaker.may_try()
    breaker.failed()
    assert not breaker.may_try()
    clock.advance(seconds=1.999)
    assert not breaker.may_try()
    clock.advance(seconds=0.001)
    assert [breaker.may_try() for _ in range(3)] == [True, False, False]
    assert breaker.shut
    clock.advance(seconds=2)
    assert [breaker.may_try() for _ in range(2)] == [True, False], "who tried never said how it went"
    breaker.worked()
    assert not breaker.shut
    assert [breaker.may_try() for _ in range(3)] == [True] * 3


@contextmanager
def silence() -> Iterator[socket.socket]:
    """A server that lets anybody in and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def url_of(server: socket.socket) -> str:
    return f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def dialled(server: socket.socket) -> int:
    """How many have connected since the last call."""
    count = 0
    while True:
        try:
            connection, _ = server.accept()
        except BlockingIOError:
            return count
        connection.close()
        count += 1


def test_news_for_a_redis_that_hangs_are_dropped_but_one_a_second(clock: FrozenClock) -> None:
    with silence() as silent:
        news = RedisNews(url_of(silent), courier_channel="c", monotonic=clock.monotonic)
        for _ in range(2):
            news.changed(["a"])
            assert dialled(silent) == 1
            for _ in range(3):
                news.changed(["a"])
                news.wished()
                news.ring_courier()
            assert dialled(silent) == 0
            clock.advance(seconds=BREAK_SECONDS)
        news.close()


def test_lanes_whose_redis_hangs_are_asked_with_a_short_probe_first(clock: FrozenClock) -> None:
    """Two seconds are lost once; after that whoever tries loses a quarter, and the others nothing."""
    with silence() as silent, silence() as probed:

        def connect_to(_url: str, seconds: float) -> redis.Redis:
            return connect(url_of(probed if seconds == PROBE_SECONDS else silent), seconds)

        lanes = RqLanes("redis://", clock=clock, connect=connect_to)
        with pytest.raises(LanesUnavailable):
            lanes.push([("normal", "a")])
        assert (dialled(silent), dialled(probed)) == (1, 0)
        for _ in range(2):
            clock.advance(seconds=BREAK_SECONDS)
            for _ in range(3):
                with pytest.raises(LanesUnavailable):
                    lanes.push([("normal", "a")])
            assert (dialled(silent), dialled(probed)) == (0, 1)
        lanes.close()
