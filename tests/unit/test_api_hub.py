"""What a waiter of the hub is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from laneway.api.hub import MAX_STEPS, Hub, Step, Watch


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


def overheard(*messages: object, looks: int = 1) -> list[dict[str, Step]]:
    """What somebody who watches all jobs takes, look by look."""

    async def listen() -> list[dict[str, Step]]:
        hub = Hub("redis://127.0.0.1:1/0")
        with hub.watch_all() as everything:
            for message in messages:
                hub._hear(json.dumps(message).encode())
            return [await everything.changed(0.0) for _ in range(looks)]

    return asyncio.run(listen())


def test_whoever_watches_all_jobs_gets_the_newest_progress_of_each_once() -> None:
    reports = [["a", 1, 10, None, None], ["b", 1, 20, "b", None], ["a", 1, 30, None, "[1]"]]
    first, second = overheard(reports, ["c"], 5, [["x"]], looks=2)
    assert first == {"a": Step(1, 30, None, [1]), "b": Step(1, 20, "b", None)}
    assert second == {}


def test_progress_of_so_many_jobs_waits_and_the_oldest_gives_way() -> None:
    reports = [[f"job {n}", 1, n % 100, None, None] for n in range(MAX_STEPS + 1)]
    [full] = overheard(reports[:MAX_STEPS])
    assert len(full) == MAX_STEPS
    [over] = overheard(reports)
    assert (len(over), "job 0" in over, f"job {MAX_STEPS}" in over) == (MAX_STEPS, False, True)
