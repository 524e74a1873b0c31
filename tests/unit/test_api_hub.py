"""What a waiter of the hub is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from laneway.api.hub import Hub, Step, Watch


def heard(*messages: object, then: Callable[[Watch], None] = lambda _: None) -> list[Step | None]:
    """What a waiter for job `a` takes from messages that came before it looked."""

    async def listen() -> list[Step | None]:
        hub = Hub("redis://127.0.0.1:1/0")
        with hub.watch("a") as watch:
            for message in messages:
                hub._hear(json.dumps(message).encode())
            then(watch)
            return [await watch.changed(0.0)]

    return asyncio.run(listen())


def test_progress_is_handed_over_without_a_look_at_the_row() -> None:
    assert heard([["a", 2, 40, "Rendering", '{"page": 4}']]) == [Step(2, 40, "Rendering", {"page": 4})]


def test_the_newest_of_several_reports_is_what_a_waiter_gets() -> None:
    assert heard([["a", 1, 10, None, None]], [["a", 1, 30, None, None]]) == [Step(1, 30, None, None)]


def test_a_changed_row_is_looked_at_even_when_progress_is_reported_before_or_after() -> None:
    step = ["a", 1, 10, None, None]
    assert heard([step], ["a"]) == [None]
    assert heard(["a"], [step]) == [None]


def test_news_of_other_jobs_and_bent_news_wake_nobody() -> None:
    assert heard([["b", 1, 10, None, None]], ["b"], {"x": 1}, [["a"]], [5], "a") == [None]
