"""Every lane backend keeps the same promises: in memory, on fakeredis, on a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fakeredis import FakeRedis, FakeServer

from laneway.clock import SystemClock
from laneway.domain.spec import Priority, lane_of, lanes_of
from laneway.domain.states import JobStatus
from laneway.lanes.backend import BELL_STROKES, Backlog, Due, EndedRun, Lack, LaneBackend
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


def fill(lanes: LaneBackend, lane: str, *job_ids: str) -> int:
    return lanes.push([(lane, job_id) for job_id in job_ids])


def take(lanes: LaneBackend, count: int, *names: str) -> list[str]:
    return lanes.take(names, count, worker_name="w")


def test_a_lane_is_first_in_first_out(lanes: LaneBackend) -> None:
    fill(lanes, "high", "a", "b")
    fill(lanes, "high", "c")
    assert take(lanes, 10, "high") == ["a", "b", "c"]
    assert take(lanes, 10, "high") == []


def test_one_push_serves_many_lanes_and_keeps_the_order_in_each(lanes: LaneBackend) -> None:
    assert lanes.push([("low", "l1"), ("high", "h1"), ("low", "l2"), ("emails", "e1"), ("high", "h2")]) == 5
    assert lanes.contents("low") == ["l1", "l2"]
    assert lanes.contents("high") == ["h1", "h2"]
    assert lanes.contents("emails") == ["e1"]


def test_take_empties_more_urgent_lanes_first_over_any_number_of_queues(lanes: LaneBackend) -> None:
    queues = ("default", "emails", "reports")
    waiting = [(lane_of(queue, priority), f"{queue}-{priority}") for queue in queues for priority in Priority]
    lanes.push(waiting[::-1])
    wanted = [f"{queue}-{priority}" for priority in Priority for queue in queues]
    order = lanes_of(queues)
    assert take(lanes, 5, *order) + take(lanes, 5, *order) + take(lanes, 5, *order) == wanted


def test_take_gives_no_more_than_asked_for(lanes: LaneBackend) -> None:
    lanes.push([("critical", "a"), ("critical", "b"), ("low", "c")])
    assert take(lanes, 0, "critical", "low") == []
    assert take(lanes, 1, "critical", "low") == ["a"]
    assert take(lanes, 2, "critical", "low") == ["b", "c"]


def test_take_leaves_lanes_it_was_not_asked_for(lanes: LaneBackend) -> None:
    lanes.push([("high", "a"), ("emails-high", "b")])
    assert take(lanes, 10, "emails-high") == ["b"]
    assert lanes.depths(["high", "emails-high", "never"]) == {"high": 1, "emails-high": 0, "never": 0}


def test_an_empty_push_or_take_does_nothing(lanes: LaneBackend) -> None:
    assert lanes.push([]) == 0
    assert lanes.take([], 3, worker_name="w") == []
    lanes.mirror_running([], worker_name="w", lease_seconds=30)
    lanes.mirror_ended([])


def test_an_id_pushed_twice_is_there_twice(lanes: LaneBackend) -> None:
    """Nobody looks for duplicates when pushing: the second one fails to claim its row."""
    fill(lanes, "high", "a", "a")
    assert take(lanes, 10, "high") == ["a", "a"]


def test_the_window_takes_its_number_and_not_one_more(lanes: LaneBackend) -> None:
    assert fill(lanes, "high", *"abcde") == WINDOW
    assert lanes.backlog("high").waiting is False
    assert fill(lanes, "high", "f") == 0
    assert lanes.backlog("high").waiting is True
    assert lanes.contents("high") == list("abcde")


def test_a_push_over_the_window_is_taken_from_its_front(lanes: LaneBackend) -> None:
    assert lanes.push([("high", name) for name in "abcdefg"] + [("low", "z")]) == WINDOW + 1
    assert lanes.contents("high") == list("abcde")
    assert lanes.backlog("high").refusals == 2
    assert lanes.backlog("low") == Backlog(0)


def test_while_rows_wait_outside_a_push_does_not_overtake_them(lanes: LaneBackend) -> None:
    fill(lanes, "high", *"abcdef")
    assert take(lanes, 3, "high") == ["a", "b", "c"]
    assert fill(lanes, "high", "g") == 0
    assert lanes.contents("high") == ["d", "e"]
    assert lanes.backlog("high").refusals == 2


def test_refill_lets_the_waiting_rows_in_before_later_pushes(lanes: LaneBackend) -> None:
    fill(lanes, "high", *"abcdef")
    take(lanes, 3, "high")
    seen = lanes.backlog("high").refusals
    assert lanes.refill("high", [Lack("", [], ["f"], True)], refusals_seen=seen) == 1
    assert lanes.backlog("high").waiting is False
    assert fill(lanes, "high", "g") == 1
    assert lanes.contents("high") == ["d", "e", "f", "g"]


def test_refill_keeps_the_order_on_both_sides(lanes: LaneBackend) -> None:
    fill(lanes, "high", "c")
    assert lanes.refill("high", [Lack("", ["a", "b"], ["d", "e"], True)], refusals_seen=0) == 4
    assert lanes.contents("high") == list("abcde")


def test_refill_never_puts_an_id_in_twice(lanes: LaneBackend) -> None:
    fill(lanes, "high", "b", "c")
    assert lanes.refill("high", [Lack("", ["a", "b", "a"], ["c", "d", "d", "a"], True)], refusals_seen=0) == 2
    assert lanes.contents("high") == list("abcd")
    assert lanes.backlog("high").waiting is False


def test_refill_fills_the_window_and_not_one_more(lanes: LaneBackend) -> None:
    fill(lanes, "high", "c", "d")
    assert lanes.refill("high", [Lack("", ["a", "b"], ["e"], True)], refusals_seen=0) == 3
    assert lanes.backlog("high").waiting is False
    take(lanes, 1, "high")
    assert lanes.refill("high", [Lack("", [], ["f", "g"], True)], refusals_seen=0) == 1
    assert lanes.contents("high") == list("bcdef")
    assert lanes.backlog("high").waiting is True, "g waits outside"


def test_an_incomplete_refill_makes_later_pushes_wait(lanes: LaneBackend) -> None:
    """After Redis lost everything: the flag is gone, the rows are not."""
    lanes.refill("high", [Lack("", [], ["a"], False)], refusals_seen=0)
    assert lanes.backlog("high").waiting is True
    assert fill(lanes, "high", "z") == 0


def test_the_flag_stays_when_a_push_was_refused_after_the_rows_were_read(lanes: LaneBackend) -> None:
    fill(lanes, "high", *"abcdef")
    take(lanes, 5, "high")
    seen = lanes.backlog("high").refusals
    fill(lanes, "high", "g")  # refused, and its row came too late for the reconciler to see
    lanes.refill("high", [Lack("", [], ["f"], True)], refusals_seen=seen)
    assert lanes.backlog("high").waiting is True
    seen = lanes.backlog("high").refusals
    lanes.refill("high", [Lack("", [], ["g"], True)], refusals_seen=seen)
    assert lanes.backlog("high").waiting is False
    assert lanes.contents("high") == ["f", "g"]


def test_a_refill_without_ids_only_settles_the_flag(lanes: LaneBackend) -> None:
    fill(lanes, "high", *"abcdef")
    seen = lanes.backlog("high").refusals
    assert lanes.refill("high", [Lack("", [], [], True)], refusals_seen=seen) == 0
    assert lanes.backlog("high").waiting is False
    assert lanes.contents("high") == list("abcde")


def test_each_lane_has_a_flag_of_its_own(lanes: LaneBackend) -> None:
    fill(lanes, "high", *"abcdef")
    assert lanes.backlog("low").waiting is False
    assert fill(lanes, "low", "x") == 1


def test_remove_takes_out_every_occurrence(lanes: LaneBackend) -> None:
    fill(lanes, "high", "a", "b", "a", "c")
    assert lanes.remove("high", ["a", "never", "c"]) == 3
    assert lanes.contents("high") == ["b"]
    assert lanes.remove("high", []) == 0


def test_purge_empties_one_lane_and_leaves_its_flag(lanes: LaneBackend) -> None:
    fill(lanes, "high", *"abcdef")
    fill(lanes, "low", "x")
    assert lanes.purge("high") == WINDOW
    assert lanes.depths(["high", "low"]) == {"high": 0, "low": 1}
    assert lanes.backlog("high").waiting is True
    assert lanes.purge("high") == 0


def test_a_push_rings_the_bell_of_its_queue_only(lanes: LaneBackend) -> None:
    lanes.push([("emails-low", "a")])
    assert lanes.wait(["default", "reports"], 0.05) is False
    assert lanes.wait(["default", "emails"], 5) is True
    assert lanes.wait(["default", "emails"], 0.05) is False, "one id, one stroke"


def test_a_wait_of_no_seconds_returns(lanes: LaneBackend) -> None:
    assert lanes.wait(["default"], 0) is False
    lanes.push([("high", "a")])
    assert lanes.wait(["default"], 0) is True


def test_a_refill_rings_too(lanes: LaneBackend) -> None:
    lanes.refill("emails-high", [Lack("", [], ["a"], True)], refusals_seen=0)
    assert lanes.wait(["emails"], 5) is True


def test_a_waiting_worker_hears_a_later_push(lanes: LaneBackend) -> None:
    heard: list[bool] = []
    waiter = threading.Thread(target=lambda: heard.append(lanes.wait(["default"], 10)))
    waiter.start()
    lanes.push([("critical", "a")])
    waiter.join(15)
    assert heard == [True]


def test_the_bell_keeps_a_bounded_number_of_strokes(lanes: LaneBackend) -> None:
    for name in range(BELL_STROKES // WINDOW + 2):
        lanes.push([("high", f"{name}-{i}") for i in range(WINDOW)])
        take(lanes, WINDOW, "high")
    strokes = 0
    while lanes.wait(["default"], 0.05):
        strokes += 1
    assert strokes == BELL_STROKES


def test_a_mirrored_end_leaves_the_lanes_alone(lanes: LaneBackend) -> None:
    fill(lanes, "high", "a", "b")
    lanes.mirror_running([("high", "a")], worker_name="w", lease_seconds=30)
    lanes.mirror_ended(
        [EndedRun("high", "a", status) for status in JobStatus if status is not JobStatus.RUNNING]
    )
    assert lanes.contents("high") == ["a", "b"]


def test_without_workers_there_are_no_names(lanes: LaneBackend) -> None:
    assert lanes.workers() == []


def test_threads_share_a_backend_and_every_id_is_taken_once(lanes: LaneBackend) -> None:
    taken: list[str] = []

    def drain() -> None:
        while len(taken) < 200:
            taken.extend(take(lanes, 3, "critical", "high"))

    def offer(lane: str) -> None:
        left = [f"{lane}-{i}" for i in range(100)]
        while left:
            if lanes.push([(lane, left[0])]):
                left.pop(0)
            else:
                lanes.refill(lane, [Lack("", [], [], True)], refusals_seen=lanes.backlog(lane).refusals)

    threads = [threading.Thread(target=drain) for _ in range(3)]
    threads += [threading.Thread(target=offer, args=(lane,)) for lane in ("critical", "high")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == sorted(f"{lane}-{i}" for lane in ("critical", "high") for i in range(100))


# Pushes to the head


def _due(*job_ids: str, lane: str = "high", tenant: str = "t") -> list[Due]:
    return [Due(lane, job_id, tenant) for job_id in job_ids]


def test_ids_come_before_all_others_and_in_their_order(lanes: LaneBackend) -> None:
    lanes.push(_due("a", "b"))
    lanes.push(_due("c", tenant="u"))
    assert lanes.push_first([*_due("x", "y"), *_due("z", lane="low")]) == 3
    assert lanes.contents("high")[:2] == ["x", "y"]
    assert lanes.contents("low") == ["z"]
    assert sorted(lanes.take(["high"], 9, worker_name="w")) == ["a", "b", "c", "x", "y"]


def test_an_empty_lane_takes_them_and_rings(lanes: LaneBackend) -> None:
    assert lanes.push_first(_due("a")) == 1
    assert lanes.wait(["default"], 0.1)
    assert lanes.take(["high"], 1, worker_name="w") == ["a"]


def test_what_does_not_fit_waits_outside(lanes: LaneBackend) -> None:
    lanes.push(_due("a", "b", "c", "d"))
    assert lanes.push_first(_due("x", "y")) == 1
    assert lanes.contents("high")[0] == "x"
    assert len(lanes.contents("high")) == WINDOW
    assert lanes.backlog("high").waiting


def test_those_behind_keep_their_order(lanes: LaneBackend) -> None:
    lanes.push(_due("a", "b"))
    lanes.push_first(_due("x"))
    lanes.push(_due("u", tenant="u"))
    taken = lanes.take(["high"], 9, worker_name="w")
    assert taken[0] == "x"
    assert [job_id for job_id in taken if job_id in "ab"] == ["a", "b"]
