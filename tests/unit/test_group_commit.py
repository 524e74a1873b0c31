"""Many callers, few commits: results in order, a bad item alone, nobody left waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from laneway.clock import FrozenClock
from laneway.engine.group_commit import GroupCommit, commit_each
from laneway.errors import LanewayError, StorageUnavailable, UniqueKeyTaken
from servers import wait_until

BAD_ROWS = [
    sa.exc.IntegrityError("INSERT", {}, Exception("unique")),
    sa.exc.DataError("INSERT", {}, Exception("NUL")),
    UniqueKeyTaken("held"),
]
AWAY = [sa.exc.OperationalError("SELECT", {}, Exception("gone")), sa.exc.TimeoutError("no connection")]


class Store:
    """Doubles numbers, group by group. `bad` ones are refused; `open` lets commits through."""

    def __init__(self, *, bad: set[int] | None = None, refusal: Exception = BAD_ROWS[0]) -> None:
        self.bad = bad or set()
        self.refusal = refusal
        self.groups: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()

    def commit(self, items: Sequence[int]) -> list[int]:
        self.groups.append(list(items))
        assert self.open.wait(30)
        if self.bad & set(items):
            raise self.refusal
        return [2 * item for item in items]

    @property
    def busy(self) -> bool:
        return bool(self.groups)


# commit_each


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40, unique=True), st.sets(st.integers(0, 9)))
def test_a_refused_row_never_fails_its_neighbours(items: list[int], bad: set[int]) -> None:
    outcomes = commit_each(Store(bad=bad).commit, items)
    assert outcomes == [BAD_ROWS[0] if item in bad else 2 * item for item in items]


@pytest.mark.parametrize("refusal", BAD_ROWS, ids=lambda e: type(e).__name__)
def test_the_bad_row_of_a_full_group_is_found_in_few_commits(refusal: Exception) -> None:
    store = Store(bad={200}, refusal=refusal)
    outcomes = commit_each(store.commit, range(256))
    assert [n for n, outcome in enumerate(outcomes) if outcome is refusal] == [200]
    assert len(store.groups) == 1 + 2 * 8


@pytest.mark.parametrize("error", AWAY, ids=lambda e: type(e).__name__)
def test_a_store_that_is_away_is_everybodys_and_is_asked_once(error: Exception) -> None:
    store = Store(bad={3}, refusal=error)
    outcomes = commit_each(store.commit, range(8))
    assert all(type(outcome) is StorageUnavailable for outcome in outcomes)
    assert all(outcome.retry_after_seconds for outcome in outcomes)  # type: ignore[union-attr]
    assert len({id(outcome) for outcome in outcomes}) == 8  # each caller raises one of its own
    assert len(store.groups) == 1


def test_an_error_of_the_code_is_raised_and_not_bisected() -> None:
    store = Store(bad={3}, refusal=KeyError("bug"))
    with pytest.raises(KeyError):
        commit_each(store.commit, range(8))
    assert len(store.groups) == 1


# GroupCommit


def run(group: GroupCommit[int, int], *steps: Callable[[], Any]) -> None:
    """Run each step as a coroutine in one event loop, then close the group."""

    async def main() -> None:
        for step in steps:
            await step()

    try:
        asyncio.run(main())
    finally:
        group.close()


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition, what="the group commit got there")


def test_an_idle_group_commits_the_first_item_alone_and_at_once() -> None:
    store = Store()
    group = GroupCommit(store.commit)

    async def one() -> None:
        assert await group.add(21) == 42

    run(group, one, one)
    assert store.groups == [[21], [21]]


def test_two_hundred_adds_at_once_are_few_commits_with_each_its_own_result() -> None:
    store = Store()
    group = GroupCommit(store.commit)

    async def many() -> None:
        store.open.clear()
        adds = [asyncio.create_task(group.add(n)) for n in range(200)]
        await until(lambda: store.busy)
        store.open.set()
        assert await asyncio.gather(*adds) == [2 * n for n in range(200)]

    run(group, many)
    assert len(store.groups) <= 3
    assert [n for items in store.groups for n in items] == list(range(200))


@pytest.mark.parametrize("refusal", BAD_ROWS, ids=lambda e: type(e).__name__)
def test_a_bad_item_alone_is_told_so(refusal: Exception) -> None:
    group = GroupCommit(Store(bad={7}, refusal=refusal).commit)

    async def many() -> None:
        results = await asyncio.gather(*(group.add(n) for n in range(50)), return_exceptions=True)
        assert results == [refusal if n == 7 else 2 * n for n in range(50)]

    run(group, many)


@pytest.mark.parametrize(("max_items", "sizes"), [(4, [1, 4, 4, 1]), (9, [1, 9]), (8, [1, 8, 1])])
def test_a_group_holds_its_number_of_items_and_no_more(max_items: int, sizes: list[int]) -> None:
    store = Store()
    store.open.clear()
    group = GroupCommit(store.commit, max_items=max_items)

    async def ten() -> None:
        first = asyncio.create_task(group.add(0))
        await until(lambda: store.busy)
        rest = [asyncio.create_task(group.add(n)) for n in range(1, 10)]
        await asyncio.sleep(0)
        store.open.set()
        await asyncio.gather(first, *rest)

    run(group, ten)
    assert [len(items) for items in store.groups] == sizes


@pytest.mark.parametrize(
    ("max_bytes", "groups"),
    [(30, [[0], [10, 20], [5]]), (29, [[0], [10], [20, 5]]), (1, [[0], [10], [20], [5]])],
)
def test_a_group_holds_its_bytes_and_no_more_but_always_one_item(
    max_bytes: int, groups: list[list[int]]
) -> None:
    store = Store()
    store.open.clear()
    group = GroupCommit(store.commit, weigh=int, max_bytes=max_bytes)

    async def four() -> None:
        first = asyncio.create_task(group.add(0))
        await until(lambda: store.busy)
        rest = [asyncio.create_task(group.add(n)) for n in (10, 20, 5)]
        await asyncio.sleep(0)
        store.open.set()
        await asyncio.gather(first, *rest)

    run(group, four)
    assert store.groups == groups


def test_as_many_wait_as_may_and_one_more_is_turned_away() -> None:
    store = Store()
    store.open.clear()
    group = GroupCommit(store.commit, max_waiting=3)

    async def five() -> None:
        under_way = asyncio.create_task(group.add(0))
        await until(lambda: store.busy)
        waiting = [asyncio.create_task(group.add(n)) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(StorageUnavailable) as caught:
            await group.add(4)
        assert caught.value.retry_after_seconds
        store.open.set()
        assert await asyncio.gather(under_way, *waiting) == [0, 2, 4, 6]
        assert await group.add(5) == 10

    run(group, five)


def test_what_waited_too_long_for_a_stuck_store_is_not_written_any_more() -> None:
    store = Store()
    store.open.clear()
    clock = FrozenClock()
    group = GroupCommit(store.commit, patience_seconds=2, monotonic=clock.monotonic)

    async def several() -> None:
        under_way = asyncio.create_task(group.add(0))
        await until(lambda: store.busy)
        early = asyncio.create_task(group.add(1))
        await asyncio.sleep(0)
        clock.advance(seconds=2)
        later = asyncio.create_task(group.add(2))
        await asyncio.sleep(0)
        clock.advance(seconds=0.001)
        with pytest.raises(StorageUnavailable):  # at once: the store is stuck
            await group.add(3)
        store.open.set()
        assert await under_way == 0
        with pytest.raises(StorageUnavailable):
            await early
        assert await later == 4
        assert await group.add(5) == 10

    run(group, several)
    assert store.groups == [[0], [2], [5]]


def test_close_commits_what_waits_and_turns_later_ones_away() -> None:
    store = Store()
    store.open.clear()
    group = GroupCommit(store.commit)

    async def three() -> None:
        adds = [asyncio.create_task(group.add(n)) for n in range(3)]
        await until(lambda: store.busy)
        closing = asyncio.create_task(asyncio.to_thread(group.close))
        store.open.set()
        await closing
        assert await asyncio.gather(*adds) == [0, 2, 4]
        with pytest.raises(StorageUnavailable):
            await group.add(9)

    run(group, three)


def test_a_caller_that_goes_away_disturbs_nobody() -> None:
    store = Store()
    store.open.clear()
    group = GroupCommit(store.commit)

    async def three() -> None:
        adds = [asyncio.create_task(group.add(n)) for n in range(3)]
        await until(lambda: store.busy)
        adds[0].cancel()  # its commit is under way
        adds[1].cancel()  # waits
        await asyncio.sleep(0)
        store.open.set()
        assert await adds[2] == 4
        assert [add.cancelled() for add in adds] == [True, True, False]
        assert await group.add(5) == 10

    run(group, three)
    assert sorted(n for items in store.groups for n in items) == [0, 1, 2, 5]  # handed over is written


def test_an_event_loop_that_ended_disturbs_no_other() -> None:
    store = Store()
    store.open.clear()
    group = GroupCommit(store.commit)

    async def leave() -> None:
        add = asyncio.create_task(group.add(1))
        await until(lambda: store.busy)
        add.cancel()

    asyncio.run(leave())
    store.open.set()

    async def next_loop() -> None:
        assert await group.add(2) == 4

    run(group, next_loop)


def test_callers_in_several_event_loops_get_their_own_results() -> None:
    group = GroupCommit(Store().commit)
    results: dict[int, list[int]] = {}

    def loop(start: int) -> None:
        async def adds() -> list[int]:
            return await asyncio.gather(*(group.add(n) for n in range(start, start + 50)))

        results[start] = asyncio.run(adds())

    threads = [threading.Thread(target=loop, args=(start,)) for start in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    group.close()
    assert results == {start: [2 * n for n in range(start, start + 50)] for start in (0, 100, 200)}


@pytest.mark.parametrize("broken", [lambda items: 1 / 0, lambda items: [], lambda items: None])
def test_a_commit_with_a_bug_is_its_callers_error_and_not_the_end_of_the_thread(
    broken: Callable[[Sequence[int]], Any],
) -> None:
    store = Store()
    commits = [broken, store.commit]

    def next_commit(items: Sequence[int]) -> Any:
        return commits.pop(0)(items)

    group: GroupCommit[int, int] = GroupCommit(next_commit)

    async def two() -> None:
        with pytest.raises((ZeroDivisionError, RuntimeError, TypeError)) as caught:
            await group.add(1)
        assert not isinstance(caught.value, LanewayError)
        assert await group.add(2) == 4

    run(group, two)
