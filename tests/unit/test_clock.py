from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from laneway import clock as clock_module
from laneway.clock import FrozenClock, SystemClock, new_id


def milliseconds(identifier: str) -> int:
    return uuid.UUID(identifier).int >> 80


def test_an_id_is_a_uuid_of_version_7_in_its_usual_text() -> None:
    for _ in range(1000):
        identifier = new_id()
        parsed = uuid.UUID(identifier)
        assert str(parsed) == identifier
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)


def test_an_id_carries_the_moment_it_was_made() -> None:
    before = time.time_ns() // 1_000_000
    identifier = new_id()
    after = time.time_ns() // 1_000_000
    assert before <= milliseconds(identifier) <= after + 10  # the counter may have run ahead of the clock


def test_ids_sort_in_the_order_they_were_made_even_past_4096_a_millisecond() -> None:
    made = [new_id() for _ in range(20_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_ids_keep_their_order_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_id()
    monkeypatch.setattr(clock_module.time, "time_ns", lambda: 0)
    assert first < new_id() < new_id()


def test_threads_that_make_ids_together_make_different_ones_each_in_order() -> None:
    barrier = threading.Barrier(4)

    def make() -> list[str]:
        barrier.wait(10)
        return [new_id() for _ in range(5_000)]

    with ThreadPoolExecutor(4) as pool:
        made = [future.result() for future in [pool.submit(make) for _ in range(4)]]
    assert all(own == sorted(own) for own in made)
    assert len({identifier for own in made for identifier in own}) == 20_000


def test_the_last_62_bits_are_random() -> None:
    tails = {uuid.UUID(new_id()).int & (1 << 62) - 1 for _ in range(1000)}
    assert len(tails) == 1000
    seen_set, seen_unset = 0, 0
    for tail in tails:
        seen_set |= tail
        seen_unset |= ~tail
    assert seen_set & seen_unset & (1 << 62) - 1 == (1 << 62) - 1, "every bit is sometimes 1 and sometimes 0"


def test_the_system_clock_is_aware_utc_and_its_other_face_never_goes_back() -> None:
    clock = SystemClock()
    now = clock.now()
    assert now.utcoffset() == timedelta(0)
    assert abs(now.timestamp() - time.time()) < 60
    ticks = [clock.monotonic() for _ in range(1000)]
    assert ticks == sorted(ticks)


def test_a_frozen_clock_moves_only_when_told_and_both_faces_together() -> None:
    clock = FrozenClock(datetime(2026, 3, 29, tzinfo=UTC))
    moment, ticks = clock.now(), clock.monotonic()
    assert (clock.now(), clock.monotonic()) == (moment, ticks)
    assert clock.advance(minutes=2, seconds=0.5) == moment + timedelta(seconds=120.5) == clock.now()
    assert clock.monotonic() == ticks + 120.5
