"""What to ring: any lane is made to hold its oldest rows, and a lane stays first in, first out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.engine.upkeep import RING_GRACE, missing
from laneway.lanes.backend import Lack
from laneway.lanes.memory_lanes import MemoryLanes

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LANE = "normal"
WINDOW = 4
OLD = NOW - RING_GRACE


def rows(*names: str, age: timedelta = RING_GRACE) -> list[tuple[str, datetime]]:
    return [(name, NOW - age) for name in names]


class Lane:
    """The queued rows of a lane, oldest first, its ids, and the order in which rows were claimed."""

    def __init__(self) -> None:
        self.lanes = MemoryLanes(window=WINDOW)
        self.queued: list[str] = []
        self.claimed: list[str] = []
        self.made = 0

    def enqueue(self) -> None:
        self.made += 1
        job_id = f"{self.made:03}"
        self.queued.append(job_id)
        self.lanes.push([(LANE, job_id)])

    def take(self, count: int = 2) -> None:
        for job_id in self.lanes.take([LANE], count, worker_name="w"):
            if job_id in self.queued:
                self.queued.remove(job_id)
                self.claimed.append(job_id)

    def flush(self) -> None:
        self.lanes = MemoryLanes(window=WINDOW)

    def refill(self, meanwhile: str = "") -> None:
        """As `reconcile` does it, in three steps; other processes act between them."""
        lanes, waiting = self.lanes, list(meanwhile)
        backlog = lanes.backlog(LANE)
        self.act(waiting[0::3])
        queued = [(job_id, OLD) for job_id in self.queued[: WINDOW + 1]]
        self.act(waiting[1::3])
        present = set(lanes.contents(LANE))
        self.act(waiting[2::3])
        lacks = missing(queued, present, tenant_id="", window=WINDOW, refused=backlog.waiting, now=NOW)
        lanes.refill(LANE, [lacks], refusals_seen=backlog.refusals)

    def act(self, actions: list[str]) -> None:
        for action in actions:
            self.enqueue() if action == "e" else self.take()

    def drain(self) -> None:
        for _ in range(self.made + 1):
            self.refill()
            self.take(WINDOW)


ACTIONS = st.text("eet", max_size=6)  # twice as many come as are taken


@given(st.lists(st.tuples(ACTIONS, ACTIONS, st.booleans()), max_size=12))
def test_a_lane_stays_first_in_first_out_through_refills_and_the_loss_of_redis(
    rounds: list[tuple[str, str, bool]],
) -> None:
    lane = Lane()
    for before, meanwhile, flushed in rounds:
        lane.act(list(before))
        if flushed:
            lane.flush()
            lane.refill()
        lane.refill(meanwhile)
        assert len(lane.lanes.contents(LANE)) <= WINDOW
    lane.drain()
    assert lane.claimed == sorted(lane.claimed)
    assert len(lane.claimed) == lane.made


@given(st.dictionaries(st.sampled_from(["critical", "high", "normal", "q-low"]), st.integers(0, 3 * WINDOW)))
def test_after_the_loss_of_redis_all_lanes_hold_their_oldest_rows_in_order(depths: dict[str, int]) -> None:
    lanes = MemoryLanes(window=WINDOW)
    for lane, depth in depths.items():
        ids = [f"{lane}{n:03}" for n in range(depth)]
        lacks = missing(rows(*ids[: WINDOW + 1]), (), tenant_id="", window=WINDOW, refused=False, now=NOW)
        lanes.refill(lane, [lacks], refusals_seen=0)
    for lane, depth in depths.items():
        assert lanes.contents(lane) == [f"{lane}{n:03}" for n in range(min(depth, WINDOW))]
        assert lanes.backlog(lane).waiting == (depth > WINDOW)


@given(st.integers(0, 3 * WINDOW), st.sets(st.integers(0, WINDOW - 1)), st.booleans())
def test_whatever_a_lane_holds_it_is_given_the_rest_of_its_oldest_rows_once(
    depth: int, places: set[int], refused: bool
) -> None:
    ids = [f"{n:03}" for n in range(depth)]
    here = sorted(place for place in places if place < depth)
    present = [ids[place] for place in here]
    lacks = missing(rows(*ids[: WINDOW + 1]), present, tenant_id="", window=WINDOW, refused=refused, now=NOW)
    held = [*lacks.head, *present, *lacks.tail]
    assert sorted(held) == ids[:WINDOW]
    assert lacks.complete == (depth <= WINDOW)
    no_holes = here == list(range(here[0], here[-1] + 1)) if here else True
    assert held == ids[:WINDOW] or not no_holes


@pytest.mark.parametrize(
    ("age", "refused", "rung"),
    [
        (RING_GRACE, False, True),
        (RING_GRACE - timedelta(microseconds=1), False, False),
        (RING_GRACE - timedelta(microseconds=1), True, True),
        (timedelta(seconds=-60), False, False),  # of a machine whose clock is ahead
        (timedelta(seconds=-60), True, True),
    ],
)
def test_a_young_row_is_left_to_its_own_push_unless_pushes_were_refused(
    age: timedelta, refused: bool, rung: bool
) -> None:
    lacks = missing(rows("a", age=age), (), tenant_id="", window=WINDOW, refused=refused, now=NOW)
    assert lacks == Lack("", (), ("a",) if rung else (), complete=True)


def test_a_window_of_rows_is_all_of_them_and_one_more_is_not() -> None:
    names = [str(n) for n in range(WINDOW + 1)]
    assert missing(rows(*names[:WINDOW]), (), tenant_id="", window=WINDOW, refused=False, now=NOW).complete
    assert not missing(rows(*names), (), tenant_id="", window=WINDOW, refused=False, now=NOW).complete
