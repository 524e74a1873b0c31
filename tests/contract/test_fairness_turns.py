"""Turns inside a lane: Redis and memory keep the same order, and it is a fair one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laneway.clock import SystemClock
from laneway.lanes.backend import Due, Lack, LaneBackend
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.rq_lanes import RqLanes, turns_key
from laneway.lanes.turns import FORGET_EVERY

LANE = "normal"
WINDOW = 12


@pytest.fixture
def redis_lanes(redis_url: str) -> Iterator[RqLanes]:
    lanes = RqLanes(redis_url, clock=SystemClock(), window=WINDOW)
    yield lanes
    lanes.close()


@pytest.fixture(params=["memory", "redis"])
def lanes(request: pytest.FixtureRequest) -> LaneBackend:
    """Each backend in turn, with a window that nothing reaches."""
    if request.param == "memory":
        return MemoryLanes()
    backend: RqLanes = request.getfixturevalue("redis_lanes")
    backend.window = 10_000
    return backend


def names(tenant: str, number: int, first: int = 0) -> list[str]:
    return [f"{tenant}{n:05}" for n in range(first, first + number)]


def push(lanes: LaneBackend, tenant: str, number: int, first: int = 0) -> int:
    return lanes.push([Due(LANE, job_id, tenant) for job_id in names(tenant, number, first)])


def take(lanes: LaneBackend, number: int) -> list[str]:
    return lanes.take([LANE], number, worker_name="w")


def test_who_comes_second_has_every_second_turn(lanes: LaneBackend) -> None:
    push(lanes, "a", 1000)
    push(lanes, "b", 10)
    assert [job_id[0] for job_id in take(lanes, 22)] == ["a", "b"] * 10 + ["a", "a"]


def test_who_comes_later_begins_beside_the_first_that_waits(lanes: LaneBackend) -> None:
    push(lanes, "a", 1000)
    take(lanes, 500)
    push(lanes, "b", 10)
    assert [job_id[0] for job_id in take(lanes, 20)] == ["a", "b"] * 10


def test_jobs_that_come_one_by_one_take_turns_too(lanes: LaneBackend) -> None:
    push(lanes, "a", 100)
    for number in range(5):
        push(lanes, "b", 1, number)
        push(lanes, "c", 1, number)
    assert [job_id[0] for job_id in take(lanes, 15)] == ["a", "b", "c"] * 5


def test_each_tenant_stays_first_in_first_out(lanes: LaneBackend) -> None:
    for first in range(0, 60, 20):
        push(lanes, "a", 20, first)
        push(lanes, "b", 3, first)
        take(lanes, 4)
    rest = lanes.contents(LANE)
    for tenant in "ab":
        own = [job_id for job_id in rest if job_id[0] == tenant]
        assert own == sorted(own)


@pytest.mark.parametrize(("light", "heavy"), [(1, 3), (1, 1), (2, 5), (1, 100)])
def test_turns_go_by_weight(lanes: LaneBackend, light: int, heavy: int) -> None:
    lanes.weigh({"a": light, "b": heavy})
    push(lanes, "a", 400)
    push(lanes, "b", 400)
    for taken in range(50, 401, 50):
        had = Counter(job_id[0] for job_id in lanes.contents(LANE)[:taken])
        assert abs(had["b"] - taken * heavy / (light + heavy)) <= 1, f"of {taken}: {had}"


def test_a_weight_is_heard_with_the_next_push(lanes: LaneBackend) -> None:
    lanes.weigh({"a": 2})
    lanes.weigh({"b": 2})
    push(lanes, "a", 10)
    push(lanes, "b", 10)
    assert [job_id[0] for job_id in take(lanes, 6)] == ["a", "b", "b", "a", "b", "b"]


def test_a_lane_that_ran_empty_begins_anew(lanes: LaneBackend) -> None:
    """Nobody pays for what he had while nobody else wanted it."""
    push(lanes, "a", 50)
    push(lanes, "b", 1)
    take(lanes, 51)
    push(lanes, "a", 4)
    push(lanes, "b", 4)
    assert [job_id[0] for job_id in take(lanes, 8)] == ["a", "b"] * 4


def test_who_cancels_all_he_had_has_his_turns_back(lanes: LaneBackend) -> None:
    push(lanes, "b", 50)
    push(lanes, "a", 40)
    assert lanes.remove(LANE, names("a", 40)) == 40
    push(lanes, "a", 2, 100)
    assert take(lanes, 4) == ["b00000", "a00100", "b00001", "a00101"]


def test_a_full_lane_lets_in_who_is_next_and_puts_out_the_last(lanes: LaneBackend) -> None:
    lanes.window = WINDOW
    assert push(lanes, "a", WINDOW + 3) == WINDOW
    assert push(lanes, "b", 2) == 2
    assert lanes.contents(LANE) == ["a00000", "b00000", "a00001", "b00001", *names("a", WINDOW - 4, 2)]
    assert lanes.backlog(LANE).tenants == {"a"}
    assert lanes.backlog(LANE).refusals == 5
    assert push(lanes, "a", 1, 100) == 0, "rows of its own wait outside"
    assert push(lanes, "b", 1, 2) == 1


def test_a_lane_never_holds_more_than_its_window_however_many_tenants_there_are(lanes: LaneBackend) -> None:
    lanes.window = WINDOW
    for tenant in "abcdefghij":
        push(lanes, tenant, 5 * WINDOW)
        assert lanes.depths([LANE])[LANE] == WINDOW
    had = Counter(job_id[0] for job_id in lanes.contents(LANE))
    assert set(had) == set("abcdefghij")
    assert max(had.values()) - min(had.values()) <= 1
    assert lanes.backlog(LANE).tenants == set("abcdefghij")


def test_what_went_out_comes_back_in_its_order(lanes: LaneBackend) -> None:
    lanes.window = WINDOW
    push(lanes, "a", WINDOW)
    push(lanes, "b", 2)
    taken = take(lanes, 6)
    seen = lanes.backlog(LANE).refusals
    rest = [Lack("a", (), names("a", 2, WINDOW - 2), complete=True)]
    assert lanes.refill(LANE, rest, refusals_seen=seen) == 2
    assert not lanes.backlog(LANE).waiting
    own = [job_id for job_id in taken + lanes.contents(LANE) if job_id[0] == "a"]
    assert own == names("a", WINDOW)


def test_who_was_put_out_is_let_in_again_at_the_turns_it_had(lanes: LaneBackend) -> None:
    lanes.window = WINDOW
    push(lanes, "a", WINDOW)
    push(lanes, "b", 4)
    take(lanes, 8)
    push(lanes, "b", 8, 4)
    lanes.refill(LANE, [Lack("a", (), names("a", 4, 8), complete=True)], refusals_seen=100)
    assert [job_id[0] for job_id in lanes.contents(LANE)] == ["a", "b"] * 4 + ["b", "a", "b", "a"]


def test_a_mark_falls_only_for_whom_nothing_was_refused_since(lanes: LaneBackend) -> None:
    lanes.window = WINDOW
    push(lanes, "a", WINDOW + 1)
    push(lanes, "b", WINDOW)
    take(lanes, WINDOW)
    seen = lanes.backlog(LANE).refusals
    push(lanes, "a", 1, 100)
    done = [Lack("a", (), (), complete=True), Lack("b", (), (), complete=True)]
    lanes.refill(LANE, done, refusals_seen=seen)
    assert lanes.backlog(LANE).tenants == {"a"}


def test_after_a_loss_all_line_up_by_turns(lanes: LaneBackend) -> None:
    lacks = [Lack("a", (), names("a", 1000), complete=False), Lack("b", (), names("b", 10), complete=True)]
    assert lanes.refill(LANE, lacks, refusals_seen=0) == 1010
    assert [job_id[0] for job_id in take(lanes, 22)] == ["a", "b"] * 10 + ["a", "a"]


def test_who_pushed_between_a_loss_and_the_repair_gains_nothing(lanes: LaneBackend) -> None:
    push(lanes, "a", 1, 2000)
    lacks = [Lack("a", names("a", 1000), (), complete=True), Lack("b", (), names("b", 10), complete=True)]
    lanes.refill(LANE, lacks, refusals_seen=0)
    order = take(lanes, 2000)
    assert [job_id[0] for job_id in order[:20]] == ["a", "b"] * 10
    assert order[-1] == "a02000"


def test_what_is_handed_back_is_first_again(lanes: LaneBackend) -> None:
    push(lanes, "a", 100)
    push(lanes, "b", 100)
    taken = take(lanes, 10)
    lacks = [Lack(tenant, [i for i in taken if i[0] == tenant], (), complete=True) for tenant in "ab"]
    assert lanes.refill(LANE, lacks, refusals_seen=0) == 10
    push(lanes, "c", 4)
    order = take(lanes, 212)
    assert [job_id[0] for job_id in order[:12]] == ["a", "b", "c"] * 4
    assert [job_id for job_id in order if job_id[0] != "c"][:10] == taken
    assert [job_id for job_id in order if job_id[0] == "a"] == names("a", 100)


def test_tenants_that_left_a_lane_are_forgotten(redis_lanes: RqLanes) -> None:
    redis_lanes.window = 10_000
    push(redis_lanes, "busy", 2)
    most = 0
    for number in range(2 * FORGET_EVERY):
        redis_lanes.push([Due(LANE, f"j{number}", f"t{number}")])
        push(redis_lanes, "busy", 1, 2 + number)
        take(redis_lanes, 2)
        most = max(most, redis_lanes._redis.hlen(turns_key(LANE)))
    assert FORGET_EVERY / 2 < most <= FORGET_EVERY + 1
    take(redis_lanes, 10_000)
    push(redis_lanes, "busy", 1)
    assert redis_lanes._redis.hkeys(turns_key(LANE)) == ["busy"]


TENANTS = st.sampled_from("abc")
STEPS = st.one_of(
    st.tuples(st.just("push"), st.lists(st.tuples(TENANTS, st.integers(1, 8)), min_size=1, max_size=3)),
    st.tuples(st.just("take"), st.integers(1, 6)),
    st.tuples(st.just("remove"), st.sets(st.integers(0, 30), max_size=4)),
    st.tuples(st.just("refill"), st.sampled_from([True, True, False])),
    st.tuples(st.just("lose"), st.integers(1, 4)),
    st.tuples(st.just("purge"), st.just(0)),
    st.tuples(st.just("weigh"), st.dictionaries(TENANTS, st.sampled_from([1, 2, 3, 7, 100]), max_size=3)),
)


class Queue:
    """The rows behind a lane, and what became of them: as workers and the reconciler treat a lane."""

    def __init__(self, lanes: LaneBackend) -> None:
        self.lanes = lanes
        self.rows: dict[str, list[str]] = {}  # of each tenant, in order
        self.run: list[str] = []
        self._numbers = count()

    def step(self, kind: str, what: object) -> object:
        return getattr(self, f"_{kind}")(what)

    def _push(self, parts: list[tuple[str, int]]) -> int:
        items = []
        for tenant, number in parts:
            ids = [f"{tenant}{next(self._numbers):05}" for _ in range(number)]
            self.rows.setdefault(tenant, []).extend(ids)
            items += [Due(LANE, job_id, tenant) for job_id in ids]
        return self.lanes.push(items)

    def _take(self, number: int) -> list[str]:
        taken = take(self.lanes, number)
        for job_id in taken:
            if job_id in self.rows[job_id[0]]:
                self.rows[job_id[0]].remove(job_id)
                self.run.append(job_id)
        return taken

    def _lose(self, number: int) -> list[str]:
        return take(self.lanes, number)

    def _remove(self, places: set[int]) -> int:
        everything = [job_id for ids in self.rows.values() for job_id in ids]
        gone = [job_id for place, job_id in enumerate(everything) if place in places]
        for job_id in gone:
            self.rows[job_id[0]].remove(job_id)
        return self.lanes.remove(LANE, gone)

    def _purge(self, _: int) -> int:
        return self.lanes.purge(LANE)

    def _weigh(self, weights: dict[str, int]) -> None:
        self.lanes.weigh(weights)

    def _refill(self, whole: bool) -> int:
        backlog = self.lanes.backlog(LANE)
        present = set(self.lanes.contents(LANE))
        lacks = []
        for tenant in sorted(self.rows):
            rows = self.rows[tenant][: None if whole else 3]
            met = [place for place, job_id in enumerate(rows) if job_id in present]
            first = met[0] if met else 0
            head = [job_id for job_id in rows[:first] if job_id not in present]
            tail = [job_id for job_id in rows[first:] if job_id not in present]
            lacks.append(Lack(tenant, head, tail, len(rows) == len(self.rows[tenant])))
        return self.lanes.refill(LANE, lacks, refusals_seen=backlog.refusals)

    def state(self) -> object:
        return self.lanes.contents(LANE), self.lanes.backlog(LANE)


@given(steps=st.lists(STEPS, max_size=25), window=st.sampled_from([3, WINDOW, 200]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_redis_and_memory_do_the_same_and_nothing_is_lost_doubled_or_overtaken(
    redis_lanes: RqLanes, steps: list[tuple[str, object]], window: int
) -> None:
    redis_lanes._redis.flushall()
    redis_lanes.window = window
    real, twin = Queue(redis_lanes), Queue(MemoryLanes(window=window))
    for kind, what in steps:
        assert real.step(kind, what) == twin.step(kind, what), (kind, what)
        assert real.state() == twin.state(), (kind, what)
        inside = real.lanes.contents(LANE)
        assert len(inside) <= window
        assert len(inside) == len(set(inside))
    for _ in range(2000):
        if not any(real.rows.values()):
            break
        real.step("refill", True)
        real.step("take", window)
    assert not any(real.rows.values())
    assert len(real.run) == len(set(real.run))


@given(
    steps=st.lists(st.one_of(STEPS.filter(lambda step: step[0] in ("push", "take", "refill"))), max_size=25),
    window=st.sampled_from([3, WINDOW, 200]),
)
@settings(max_examples=200, deadline=None)
def test_a_tenant_is_first_in_first_out_through_windows_and_refills(
    steps: list[tuple[str, object]], window: int
) -> None:
    queue = Queue(MemoryLanes(window=window))
    for kind, what in steps:
        queue.step(kind, what)
    for _ in range(2000):
        if not any(queue.rows.values()):
            break
        queue.step("refill", True)
        queue.step("take", 5)
    for tenant in queue.rows:
        own = [job_id for job_id in queue.run if job_id[0] == tenant]
        assert own == sorted(own)


@given(
    weights=st.dictionaries(TENANTS, st.integers(1, 100), max_size=3),
    steps=st.lists(
        st.one_of(
            st.tuples(
                st.just("push"), st.lists(st.tuples(TENANTS, st.integers(1, 30)), min_size=1, max_size=3)
            ),
            st.tuples(st.just("take"), st.integers(1, 20)),
        ),
        max_size=30,
    ),
)
@settings(max_examples=300, deadline=None)
def test_while_two_tenants_wait_neither_gets_ahead_by_more_than_a_turn_each(
    weights: dict[str, int], steps: list[tuple[str, object]]
) -> None:
    """Theorem 1 of Goyal, Vin and Cheng: |W_f / r_f - W_m / r_m| <= l_f / r_f + l_m / r_m, over any interval
    in which both wait; a job's length is 1."""
    queue = Queue(MemoryLanes())
    queue.lanes.weigh(weights)
    since: dict[tuple[str, str], int] = {}
    for kind, what in [*steps, ("take", 1000)]:
        for _ in range(what if kind == "take" and isinstance(what, int) else 1):
            queue.step(kind, 1 if kind == "take" else what)
            for pair in ("ab", "ac", "bc"):
                one, other = pair
                if not (queue.rows.get(one) and queue.rows.get(other)):
                    since.pop((one, other), None)
                    continue
                began = since.setdefault((one, other), len(queue.run))
                had = Counter(job_id[0] for job_id in queue.run[began:])
                share = {tenant: Fraction(had[tenant], weights.get(tenant, 1)) for tenant in pair}
                bound = Fraction(1, weights.get(one, 1)) + Fraction(1, weights.get(other, 1))
                assert abs(share[one] - share[other]) <= bound + Fraction(1, 100), (pair, had)
        if kind == "take" and not any(queue.rows.values()):
            break
