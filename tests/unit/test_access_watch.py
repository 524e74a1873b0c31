"""The thread that keeps what an API process remembers up to date."""

from __future__ import annotations

import threading

from structlog.testing import capture_logs

from laneway.engine.access.watch import WATCH_SECONDS, Look, Watch


def test_a_look_that_fails_keeps_no_other_from_being_called_and_is_told_of_once() -> None:
    calls: list[str] = []
    away = [ConnectionError(), ValueError()]

    def broken() -> None:
        calls.append("broken")
        if away:
            raise away.pop()

    watch = Watch(Look("broken", broken), Look("sound", lambda: calls.append("sound")))
    with capture_logs() as logs:
        for _ in range(3):
            watch.look()
        away.append(ConnectionError())
        watch.look()
    assert calls == ["broken", "sound"] * 4
    assert [(line["look"], line["error"]) for line in logs] == [
        ("broken", "ValueError"),
        ("broken", "ConnectionError"),
    ]


def test_a_watch_looks_again_and_again_and_at_its_end_once_more_where_that_is_wanted() -> None:
    seen, rare = threading.Semaphore(0), []
    watch = Watch(
        Look("often", seen.release),
        Look("rare", lambda: rare.append(1), every_seconds=3600 * WATCH_SECONDS, at_end=True),
    )
    watch.start()
    for _ in range(2):
        assert seen.acquire(timeout=20)
    assert not rare
    watch.close()
    assert rare == [1]
