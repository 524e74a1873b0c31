"""The reaper's judgement: who is silent, seen by the observer's own clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.engine.reaper import Verdict, Watch, WorkerSeen

LEASE = 30.0
STEP = 5.0


def seen(
    name: str, beat: int, *, held: set[str] | None = None, running: set[str] | None = None
) -> WorkerSeen:
    return WorkerSeen(name, beat, frozenset(held or ()), frozenset(running or ()))


def watch_for(watch: Watch, workers: list[WorkerSeen], *, start: float, seconds: float) -> Verdict:
    """The last verdict of looks every STEP from `start` on, the last at `start + seconds`."""
    at = start
    while at < start + seconds:
        watch.look(workers, at=at)
        at += STEP
    return watch.look(workers, at=start + seconds)


def test_a_worker_that_beats_is_never_dead() -> None:
    watch = Watch(LEASE)
    for beat in range(100):
        assert watch.look([seen("w", beat)], at=STEP * beat) == Verdict()


def test_a_worker_is_dead_after_one_lease_of_silence_and_not_before() -> None:
    watch = Watch(LEASE)
    assert watch_for(watch, [seen("w", 7)], start=0, seconds=LEASE - 0.001) == Verdict()
    assert watch.look([seen("w", 7)], at=LEASE) == Verdict(dead=(("w", 7),))


def test_one_beat_starts_the_lease_anew() -> None:
    watch = Watch(LEASE)
    watch_for(watch, [seen("w", 1)], start=0, seconds=25)
    assert watch_for(watch, [seen("w", 2)], start=29, seconds=LEASE - 0.001) == Verdict()
    assert watch.look([seen("w", 2)], at=29 + LEASE).dead == (("w", 2),)


def test_only_the_silent_one_is_dead() -> None:
    watch = Watch(LEASE)
    for look in range(7):
        verdict = watch.look([seen("quiet", 1), seen("alive", look)], at=STEP * look)
    assert verdict.dead == (("quiet", 1),)


def test_an_observer_that_did_not_look_for_a_while_starts_anew() -> None:
    watch = Watch(LEASE)
    watch_for(watch, [seen("w", 1)], start=0, seconds=25)
    resumed = 25 + LEASE / 3 + 0.001
    assert watch_for(watch, [seen("w", 1)], start=resumed, seconds=LEASE - 0.001) == Verdict()
    assert watch.look([seen("w", 1)], at=resumed + LEASE).dead == (("w", 1),)


def test_a_gap_of_exactly_a_third_of_the_lease_is_still_looking() -> None:
    watch = Watch(LEASE)
    for at in (0, 10, 20):
        watch.look([seen("w", 1)], at=at)
    assert watch.look([seen("w", 1)], at=30).dead == (("w", 1),)


def test_a_worker_that_left_the_list_is_forgotten() -> None:
    watch = Watch(LEASE)
    watch_for(watch, [seen("w", 1)], start=0, seconds=25)
    watch.look([], at=30)
    assert watch.look([seen("w", 1)], at=35) == Verdict()


@pytest.mark.parametrize(
    ("silent", "of", "held_back"),
    [(3, 4, True), (2, 4, False), (3, 3, False), (3, 5, True), (5, 10, False), (6, 10, True)],
)
def test_when_more_than_half_of_four_or_more_fall_silent_together_one_more_lease_is_waited(
    silent: int, of: int, held_back: bool
) -> None:
    watch = Watch(LEASE)
    dead_at: list[float] = []
    for look in range(13):
        workers = [seen(f"w{n}", 1 if n < silent else look) for n in range(of)]
        if watch.look(workers, at=STEP * look).dead:
            dead_at.append(STEP * look)
    assert dead_at[0] == (2 * LEASE if held_back else LEASE)


@pytest.mark.parametrize(("of", "held_back"), [(3, False), (4, True), (10, True)])
def test_workers_that_fall_silent_one_look_after_the_other_are_held_back_too(
    of: int, held_back: bool
) -> None:
    """What cuts all of them off at once finds each at another moment between two beats."""
    watch = Watch(LEASE)
    dead_at: dict[str, float] = {}
    for second in range(3 * int(LEASE)):
        beats = [min(second, n * int(STEP) // of) for n in range(of)]  # the last ones end within a beat
        verdict = watch.look([seen(f"w{n}", beat) for n, beat in enumerate(beats)], at=float(second))
        dead_at |= {name: float(second) for name, _ in verdict.dead if name not in dead_at}
    assert min(dead_at.values()) == (2 * LEASE if held_back else LEASE)


@pytest.mark.parametrize(("quiet", "held_back"), [(LEASE / 2, True), (LEASE / 2 - STEP, False)])
def test_a_worker_that_has_been_quiet_for_half_a_lease_counts_among_the_many(
    quiet: float, held_back: bool
) -> None:
    watch = Watch(LEASE)
    for look in range(7):
        at = STEP * look
        others = [seen(f"w{n}", int(min(at, LEASE - quiet))) for n in range(2)]
        verdict = watch.look([seen("first", 0), *others, seen("alive", look)], at=at)
    assert (verdict.dead == ()) == held_back


def test_the_first_look_at_many_that_are_silent_says_how_many() -> None:
    watch = Watch(LEASE)
    silent = [seen(f"w{n}", 1) for n in range(4)]
    assert watch_for(watch, silent, start=0, seconds=LEASE) == Verdict(held_back=4)
    assert watch.look(silent, at=LEASE + STEP) == Verdict()


def test_patience_ends_when_the_others_come_back_and_starts_anew_the_next_time() -> None:
    watch = Watch(LEASE)
    silent = [seen(f"w{n}", 1) for n in range(4)]
    assert watch_for(watch, silent, start=0, seconds=LEASE + STEP) == Verdict()
    back = [seen(f"w{n}", 2) for n in range(4)]
    assert watch.look(back, at=40) == Verdict()
    assert watch_for(watch, back, start=45, seconds=LEASE + 20) == Verdict()  # silent since 40: held back
    assert len(watch_for(watch, back, start=100, seconds=2).dead) == 4


def test_a_token_left_out_of_two_beats_is_a_lost_claim() -> None:
    watch = Watch(LEASE)
    assert not watch.look([seen("w", 5, running={"t"})], at=0).lost_claims
    assert not watch.look([seen("w", 5, running={"t"})], at=5).lost_claims  # no beat, no news
    assert not watch.look([seen("w", 6, running={"t"})], at=10).lost_claims
    assert watch.look([seen("w", 7, running={"t"})], at=15).lost_claims == {"t"}


def test_two_beats_between_two_looks_count_as_two() -> None:
    watch = Watch(LEASE)
    watch.look([seen("w", 5, running={"t"})], at=0)
    assert watch.look([seen("w", 7, running={"t"})], at=5).lost_claims == {"t"}


def test_a_beat_that_names_the_token_clears_it() -> None:
    watch = Watch(LEASE)
    watch.look([seen("w", 5, running={"t"})], at=0)
    watch.look([seen("w", 6, held={"t"}, running={"t"})], at=5)
    assert not watch.look([seen("w", 7, running={"t"})], at=10).lost_claims
    assert not watch.look([seen("w", 8, running={"t"})], at=15).lost_claims
    assert watch.look([seen("w", 9, running={"t"})], at=20).lost_claims == {"t"}


def test_a_lost_claim_is_found_while_most_workers_are_silent() -> None:
    watch = Watch(LEASE)
    for look in range(8):
        workers = [seen(f"w{n}", 1) for n in range(4)] + [seen("alive", look, running={"t"})]
        verdict = watch.look(workers, at=STEP * look)
    assert verdict == Verdict(lost_claims=frozenset({"t"}))


@given(st.lists(st.tuples(st.floats(0.1, LEASE / 3), st.booleans()), max_size=60))
def test_nobody_is_dead_who_was_heard_within_a_lease(looks: list[tuple[float, bool]]) -> None:
    watch, at, beat, heard = Watch(LEASE), 0.0, 0, 0.0
    watch.look([seen("w", 0)], at=0.0)
    for pause, beats in looks:
        at += pause
        if beats:
            beat, heard = beat + 1, at
        dead = watch.look([seen("w", beat)], at=at).dead
        assert bool(dead) == (at - heard >= LEASE)
