"""Group commit: what many callers want written at the same moment becomes one transaction.

The first caller's item is written at once; what arrives while that commit is under way forms the next
group. So an idle service adds no wait, and a busy one pays one commit for up to `max_items` callers
(after the group commit of databases: DeWitt et al., Implementation Techniques for Main Memory Database
Systems, SIGMOD 1984). A bad item never fails its neighbours: a refused group is cut in halves until the
bad one stands alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import sqlalchemy as sa

from laneway.errors import LanewayError, StorageUnavailable
from laneway.log import get_logger

T = TypeVar("T")
R = TypeVar("R")

_Waiting = tuple[T, asyncio.Future[R], asyncio.AbstractEventLoop, float]  # since when

log = get_logger("group_commit")

_BAD_ROW = (sa.exc.IntegrityError, sa.exc.DataError)


def commit_each(commit: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R | Exception]:
    """`commit(items)` in one transaction; when a row is refused, again in halves, down to the bad one.

    The outcomes come in the order of the items: a result, or the exception of that item alone. Errors
    that are not about one row (the database is away) are every item's.
    """
    try:
        return list(commit(items))
    except (*_BAD_ROW, LanewayError) as error:
        if len(items) == 1:
            return [error]
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        log.warning("group_refused", items=len(items), error=type(error).__name__)
        return [_away(error) for _ in items]
    half = len(items) // 2
    return commit_each(commit, items[:half]) + commit_each(commit, items[half:])


def _away(error: Exception) -> StorageUnavailable:
    away = StorageUnavailable()
    away.__cause__ = error
    return away


def _too_many() -> StorageUnavailable:
    return StorageUnavailable("too many requests wait for the database")


class GroupCommit(Generic[T, R]):
    """A thread that commits what coroutines hand it.

    `after` is told of each group between its commit and its answers. `weigh` is an item's bytes. What has
    waited for `patience_seconds` when a commit ends is not written any more: a store that was stuck for so
    long would keep the others waiting for as long again.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[T]], Sequence[R | Exception]],
        *,
        after: Callable[[Sequence[T], Sequence[R | Exception]], None] = lambda _items, _outcomes: None,
        weigh: Callable[[T], int] = lambda _: 0,
        max_items: int = 256,
        max_bytes: int = 4 * 1024 * 1024,
        max_waiting: int = 10_000,
        patience_seconds: float = 2.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._commit = commit
        self._after = after
        self._weigh = weigh
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._max_waiting = max_waiting
        self._patience_seconds = patience_seconds
        self._monotonic = monotonic
        self._waiting: deque[_Waiting[T, R]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    async def add(self, item: T) -> R:
        """Wait until `item` is committed; its result.

        Raises what its commit raised, StorageUnavailable when too many wait or somebody waits too long, or
        after `close`.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        with self._wake:
            if self._stopping or len(self._waiting) >= self._max_waiting or self._is_late():
                raise _too_many()
            self._waiting.append((item, future, loop, self._monotonic()))
            if len(self._waiting) == 1:
                self._wake.notify()
        return await future

    def close(self) -> None:
        """Commit what waits, then stop."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if not self._waiting:
                    return
                late, group = self._late_ones(), self._next_group()
            _hand_out([(entry, _too_many()) for entry in late])
            if not group:
                continue
            items = [item for item, *_ in group]
            try:
                outcomes = commit_each(self._commit, items)
                if len(outcomes) != len(group):
                    raise RuntimeError(f"{len(outcomes)} outcomes for {len(group)} items")
            except Exception as error:
                log.exception("group_failed", items=len(group))
                outcomes = [error] * len(group)
            try:
                self._after(items, outcomes)
            except Exception:
                log.exception("after_commit_failed", items=len(group))
            _hand_out(list(zip(group, outcomes, strict=True)))

    def _is_late(self) -> bool:
        """Whether the first that waits has lost patience."""
        return bool(self._waiting) and self._monotonic() - self._waiting[0][3] > self._patience_seconds

    def _late_ones(self) -> list[_Waiting[T, R]]:
        late: list[_Waiting[T, R]] = []
        while self._is_late():
            late.append(self._waiting.popleft())
        return late

    def _next_group(self) -> list[_Waiting[T, R]]:
        group: list[_Waiting[T, R]] = []
        size = 0
        while self._waiting and len(group) < self._max_items:
            size += self._weigh(self._waiting[0][0])
            if group and size > self._max_bytes:
                break
            group.append(self._waiting.popleft())
        return group


def _hand_out(outcomes: Sequence[tuple[_Waiting[T, R], R | Exception]]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[R], R | Exception]]] = {}
    for (_, future, loop, _), outcome in outcomes:
        by_loop.setdefault(loop, []).append((future, outcome))
    for loop, answers in by_loop.items():
        try:
            loop.call_soon_threadsafe(_answer, answers)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more


def _answer(answers: list[tuple[asyncio.Future[R], R | Exception]]) -> None:
    for future, outcome in answers:
        if future.done():  # the client went away
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
