"""What was kept from running comes back at the head of its lane, in every lane backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakeredis import FakeRedis, FakeServer

from laneway.clock import SystemClock
from laneway.lanes.backend import Due, LaneBackend
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.rq_lanes import RqLanes

WINDOW = 5


@pytest.fixture(params=["memory", "fakeredis", "redis"])
def lanes(request: pytest.FixtureRequest) -> Iterator[LaneBackend]:
    """Each backend in turn, empty, with a window of five ids."""
    backend: LaneBackend
    if request.param == "memory":
        backend = MemoryLanes(window=WINDOW)
    elif request.param == "fakeredis":
        server = FakeServer(version=(6, 2))
        backend = RqLanes(
            "redis://fake",
            clock=SystemClock(),
            window=WINDOW,
            connect=lambda _url, _seconds: FakeRedis(server=server, decode_responses=True),
        )
    else:
        backend = RqLanes(request.getfixturevalue("redis_url"), clock=SystemClock(), window=WINDOW)
    yield backend
    backend.close()


def due(*job_ids: str, lane: str = "high", tenant: str = "t") -> list[Due]:
    return [Due(lane, job_id, tenant) for job_id in job_ids]


def test_ids_come_before_all_others_and_in_their_order(lanes: LaneBackend) -> None:
    lanes.push(due("a", "b"))
    lanes.push(due("c", tenant="u"))
    assert lanes.push_first([*due("x", "y"), *due("z", lane="low")]) == 3
    assert lanes.contents("high")[:2] == ["x", "y"]
    assert lanes.contents("low") == ["z"]
    assert sorted(lanes.take(["high"], 9, worker_name="w")) == ["a", "b", "c", "x", "y"]


def test_an_empty_lane_takes_them_and_rings(lanes: LaneBackend) -> None:
    assert lanes.push_first(due("a")) == 1
    assert lanes.wait(["default"], 0.1)
    assert lanes.take(["high"], 1, worker_name="w") == ["a"]


def test_what_does_not_fit_waits_outside(lanes: LaneBackend) -> None:
    lanes.push(due("a", "b", "c", "d"))
    assert lanes.push_first(due("x", "y")) == 1
    assert lanes.contents("high")[0] == "x"
    assert len(lanes.contents("high")) == WINDOW
    assert lanes.backlog("high").waiting


def test_those_behind_keep_their_order(lanes: LaneBackend) -> None:
    lanes.push(due("a", "b"))
    lanes.push_first(due("x"))
    lanes.push(due("u", tenant="u"))
    taken = lanes.take(["high"], 9, worker_name="w")
    assert taken[0] == "x"
    assert [job_id for job_id in taken if job_id in "ab"] == ["a", "b"]
