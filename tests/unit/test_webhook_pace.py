from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.clock import FrozenClock
from laneway.webhooks import pace as pace_module
from laneway.webhooks.deliveries import Candidate, Claimed, Manner
from laneway.webhooks.health import FIRST_CAP, Health
from laneway.webhooks.pace import (
    MAX_IN_FLIGHT,
    MAX_PER_ORIGIN,
    MAX_PER_TARGET,
    MAX_PER_TENANT,
    RESERVED_SHARE,
    SUSPECT_SHARE,
    Pace,
)
from laneway.webhooks.retries import Answer, ErrorClass, Timings

AT = datetime(2026, 1, 1, tzinfo=UTC)
OK = Answer(AT, Timings(1), status_code=200)
FAILED = Answer(AT, Timings(1), error_class=ErrorClass.TIMEOUT)
BAD = Health(consecutive_failures=3)


class Traffic:
    """A pace, and what is in flight by it."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.pace = Pace(self.clock.monotonic)
        self.in_flight: list[Claimed] = []

    def claim(self, *wanted: Candidate) -> list[Claimed]:
        """Those of `wanted` that one claim takes, as the store would answer it."""
        room = self.pace.room()
        taken = []
        for candidate in wanted:
            hidden = (
                candidate.target_id in room.full
                or candidate.tenant_id in room.full_tenants
                or any(candidate.url.startswith(place) for place in room.full_origins)
                or (candidate.health.suspect and not room.suspects)
            )
            if not hidden and len(taken) < room.rows and room.admit(candidate):
                taken.append(claimed(candidate))
        for each in taken:
            self.pace.began(each)
        self.in_flight += taken
        return taken

    def end(self, delivery: Claimed, answer: Answer | None = OK) -> None:
        self.in_flight.remove(delivery)
        self.pace.ended(delivery, answer)


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


def due(target: str = "t", **values: Any) -> Candidate:
    given = {
        "id": "id",
        "tenant_id": f"of {target}",
        "target_id": target,
        "url": f"https://{target}.example/",
        "max_in_flight": None,
        "max_per_second": None,
        "health": Health(),
    }
    return Candidate(**given | values)


def claimed(candidate: Candidate) -> Claimed:
    return Claimed(
        id=candidate.id,
        tenant_id=candidate.tenant_id,
        message_id="msg_x",
        event_type="job.completed",
        job_id=None,
        target_id=candidate.target_id,
        url=candidate.url,
        payload=b"{}",
        trigger="auto",
        attempt=1,
        max_attempts=3,
        retry_schedule=(),
        give_up_at=None,
        manner=Manner(max_in_flight=candidate.max_in_flight, max_per_second=candidate.max_per_second),
        sealed_tenant_secrets=(),
        sealed_signing_key=None,
        health=candidate.health,
    )


def test_a_target_begins_with_two_and_gets_one_more_for_each_success(traffic: Traffic) -> None:
    crowd = [due()] * 20
    sizes = [len(traffic.claim(*crowd))]
    for _ in range(4):
        for delivery in list(traffic.in_flight):
            traffic.end(delivery)
        sizes.append(len(traffic.claim(*crowd)))
    assert sizes == [FIRST_CAP, 4, MAX_PER_TARGET, MAX_PER_TARGET, MAX_PER_TARGET]


def test_an_endpoints_own_cap_holds_from_the_first_attempt_on(traffic: Traffic) -> None:
    for _ in range(3):
        [only] = traffic.claim(*[due(max_in_flight=1)] * 5)
        assert traffic.pace.room().full == ["t"]
        traffic.end(only)
    wide = [due("wide", max_in_flight=64)] * 100
    for _ in range(10):
        for delivery in traffic.claim(*wide):
            traffic.end(delivery)
    assert len(traffic.claim(*wide)) == MAX_PER_ORIGIN


def test_failures_halve_the_cap_down_to_one(traffic: Traffic) -> None:
    for _ in range(3):
        for delivery in traffic.claim(*[due()] * 20):
            traffic.end(delivery)
    sizes = []
    for _ in range(4):
        first, *others = traffic.claim(*[due()] * 20)
        sizes.append(1 + len(others))
        traffic.end(first, FAILED)
        for delivery in others:
            traffic.end(delivery, None)
    assert sizes == [8, 4, 2, 1]


def test_what_was_not_sent_changes_no_cap(traffic: Traffic) -> None:
    for delivery in traffic.claim(due(), due()):
        traffic.end(delivery, None)
    assert len(traffic.claim(*[due()] * 9)) == FIRST_CAP


def test_a_target_another_courier_found_failing_is_tried_one_at_a_time(traffic: Traffic) -> None:
    for _ in range(3):
        for delivery in traffic.claim(*[due()] * 20):
            traffic.end(delivery)
    assert len(traffic.claim(*[due(health=BAD)] * 20)) == 1
    assert traffic.pace.room().full == ["t"]


def test_targets_that_keep_failing_share_a_quarter(traffic: Traffic) -> None:
    failing = [due(f"bad{number}", health=BAD) for number in range(200)]
    share = int(MAX_IN_FLIGHT * SUSPECT_SHARE)
    assert len(traffic.claim(*failing)) == share
    assert not traffic.pace.room().suspects
    assert len(traffic.claim(*[due(f"good{number}") for number in range(300)])) == MAX_IN_FLIGHT - share
    traffic.end(traffic.in_flight[0], FAILED)
    assert traffic.pace.room().suspects


def test_a_tenant_leaves_a_quarter_of_the_slots_to_the_others(traffic: Traffic) -> None:
    greedy = [due(f"a{number}", tenant_id="greedy") for number in range(300)]
    most = MAX_IN_FLIGHT - int(MAX_IN_FLIGHT * RESERVED_SHARE)
    assert len(traffic.claim(*greedy)) == most
    assert traffic.pace.room().full_tenants == ["greedy"]
    other = [due(f"b{number}", tenant_id="other") for number in range(300)]
    assert len(traffic.claim(*other)) == MAX_PER_TENANT
    assert traffic.pace.room().full_tenants == ["greedy", "other"]


def test_an_origin_has_32_slots_whoever_asks(traffic: Traffic) -> None:
    crowd = [due(f"t{number}", url=f"https://one.example/{number}") for number in range(100)]
    assert len(traffic.claim(*crowd)) == MAX_PER_ORIGIN
    assert traffic.pace.room().full_origins == ["https://one.example/"]
    assert len(traffic.claim(due("t", url="https://one.example.org/"))) == 1


def test_all_slots_come_back(traffic: Traffic) -> None:
    traffic.claim(*[due(f"t{number}") for number in range(MAX_IN_FLIGHT + 1)])
    assert traffic.pace.room().rows == 0
    for delivery in list(traffic.in_flight):
        traffic.end(delivery)
    room = traffic.pace.room()
    assert (room.rows, room.full, room.full_tenants, room.full_origins) == (MAX_IN_FLIGHT, [], [], [])


def test_a_rate_is_kept_and_the_wait_for_it_told(traffic: Traffic) -> None:
    slow = [due(max_per_second=2.0)] * 5
    assert traffic.pace.wait_seconds() is None
    [first] = traffic.claim(*slow)
    traffic.end(first)
    assert traffic.pace.room().full == ["t"]
    assert traffic.pace.wait_seconds() == pytest.approx(0.5)
    traffic.clock.advance(seconds=0.49)
    assert traffic.claim(*slow) == []
    traffic.clock.advance(seconds=0.01)
    assert len(traffic.claim(*slow)) == 1


@given(
    rate=st.floats(0.1, 500),
    steps=st.lists(st.floats(0.0, 0.3), min_size=1, max_size=60),
)
def test_no_second_holds_more_than_the_rate_and_a_tenth(rate: float, steps: list[float]) -> None:
    traffic, began = Traffic(), []
    for step in steps:
        traffic.clock.advance(seconds=step)
        for delivery in traffic.claim(*[due(max_per_second=rate, max_in_flight=64)] * 64):
            began.append(traffic.clock.monotonic())
            traffic.end(delivery)
    allowed = rate + max(rate * 0.1, 1.0) + 1e-3
    assert all(sum(start <= at < start + 1.0 for at in began) <= allowed for start in began)


def test_what_is_remembered_is_bounded(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "REMEMBERED_TARGETS", 10)
    for number in range(100):
        for delivery in traffic.claim(due(f"t{number}", max_per_second=100.0)):
            traffic.end(delivery)
        traffic.clock.advance(seconds=1)
    traffic.pace.room()
    kept = [len(getattr(traffic.pace, name)) for name in ("_caps", "_meters", "_by_target", "_by_tenant")]
    assert kept == [10, 0, 0, 0]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.integers(0, 5), st.booleans()),
        st.tuples(st.just("end"), st.integers(0, 300), st.booleans()),
    ),
    max_size=60,
)


@given(steps)
def test_no_share_is_ever_exceeded_and_none_is_lost(history: list[tuple[str, int, bool]]) -> None:
    traffic = Traffic()
    for what, number, flag in history:
        if what == "claim":
            health = BAD if flag else Health()
            traffic.claim(
                *[
                    due(f"t{number}-{index % 20}", tenant_id=f"tenant{number % 3}", health=health)
                    for index in range(64)
                ]
            )
        elif traffic.in_flight:
            traffic.end(traffic.in_flight[number % len(traffic.in_flight)], OK if flag else FAILED)
        flying = traffic.in_flight
        assert len(flying) <= MAX_IN_FLIGHT
        assert sum(each.health.suspect for each in flying) <= MAX_IN_FLIGHT * SUSPECT_SHARE
        assert max(Counter(each.target_id for each in flying).values(), default=0) <= MAX_PER_TARGET
    for delivery in list(traffic.in_flight):
        traffic.end(delivery)
    assert traffic.pace.room().rows == MAX_IN_FLIGHT


def test_a_candidate_that_fits_alone_is_never_hidden(traffic: Traffic) -> None:
    """What a room hides it would refuse, and what it shows it takes: else a claim finds nobody else."""
    traffic.claim(*[due(f"a{number}", tenant_id="a", max_in_flight=1) for number in range(40)])
    traffic.claim(*[due("rated", max_per_second=5.0)] * 3)
    for candidate in (due("a1", tenant_id="a"), due("rated", max_per_second=5.0), due("new"), due("bad")):
        room = traffic.pace.room()
        hidden = candidate.target_id in room.full or candidate.tenant_id in room.full_tenants
        assert room.admit(replace(candidate, max_in_flight=candidate.max_in_flight or 1)) is not hidden
