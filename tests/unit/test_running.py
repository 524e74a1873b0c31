"""What a handler raises, and the ending that it makes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from laneway.domain.retry import Category, RetryPolicy
from laneway.engine.context import Progress
from laneway.engine.endings import Ending, Raised
from laneway.engine.outcomes import Claimed, decide
from laneway.engine.registry import JobType
from laneway.engine.running import Runner
from laneway.engine.transitions import BackOff, Fail
from laneway.errors import PermanentError, Retry, Snooze, StorageUnavailable, TransientError
from laneway.worker.alarm import Alarm

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
ERRORS: dict[str, BaseException] = {
    "permanent": PermanentError("no"),
    "transient": TransientError("later"),
    "retry": Retry(30),
    "snooze": Snooze(300),
    "away": StorageUnavailable("away"),
    "network": ConnectionResetError("reset"),
    "missing": FileNotFoundError("gone"),
    "value": ValueError("bad"),
    "exit": SystemExit(3),
}


class Deaf:
    def report(self, progress: Progress) -> None: ...

    def cancelled(self) -> bool:
        return False


def fails(error: str) -> None:
    raise ERRORS[error]


async def fails_later(error: str) -> None:
    raise ERRORS[error]


def ending_of(error: str, function: Any = fails, **lists: Any) -> Ending:
    return Runner(Alarm()).run(
        JobType("demo.fails", function, **lists),
        job_id="j",
        attempt=1,
        parameters=json.dumps({"error": error}),
        timeout_seconds=60,
        line=Deaf(),
    )


def decided(ending: Ending) -> tuple[str, Any]:
    """The category that is kept, and the dead letter's reason or the seconds until the next attempt."""
    job = Claimed("j", 1, "t", "tenant", "normal", "demo.fails", "{}", 60, 0, 0, RetryPolicy(jitter=False))
    move = decide(job, ending, now=NOW, rng=Random(1), crash_limit=3)
    assert isinstance(move, Fail | BackOff)
    error = json.loads(move.error or "")
    if isinstance(move, Fail):
        return error["category"], move.reason
    return error["category"], (move.next_retry_at - NOW).total_seconds()


@pytest.mark.parametrize("function", [fails, fails_later])
@pytest.mark.parametrize(
    ("error", "category", "follows"),
    [
        ("permanent", Category.PERMANENT, "permanent"),
        ("transient", Category.TRANSIENT, 120),
        ("retry", Category.TRANSIENT, 30),
        ("snooze", Category.SNOOZE, 300),
        ("away", Category.TRANSIENT, 120),
        ("network", Category.TRANSIENT, 120),
        ("value", Category.TRANSIENT, 120),
    ],
)
def test_what_a_handler_raises_decides_what_follows(
    function: Any, error: str, category: Category, follows: object
) -> None:
    assert decided(ending_of(error, function)) == (category, follows)


@pytest.mark.parametrize(
    ("error", "follows"),
    [("network", 120), ("missing", "permanent"), ("value", "permanent"), ("transient", 120), ("retry", 30)],
)
def test_a_job_types_lists_decide_about_exceptions_that_are_not_ours(error: str, follows: object) -> None:
    ending = ending_of(error, retry_on=(OSError,), no_retry_on=(FileNotFoundError,))
    assert decided(ending)[1] == follows


def test_a_failed_attempt_is_recorded_with_type_message_and_traceback() -> None:
    ending = ending_of("value")
    assert isinstance(ending, Raised)
    assert (ending.type, ending.message) == ("ValueError", "bad")
    assert ending.traceback.startswith("Traceback")
    assert "in fails" in ending.traceback
    left = ending_of("exit")
    assert isinstance(left, Raised)
    assert left.message == "the handler called sys.exit(3)"


def test_parameters_that_no_longer_fit_are_a_dead_letter_whatever_is_retried() -> None:
    ending = Runner(Alarm()).run(
        JobType("demo.fails", fails, retry_on=(Exception,)),
        job_id="j",
        attempt=1,
        parameters="{}",
        timeout_seconds=60,
        line=Deaf(),
    )
    assert decided(ending) == (Category.PERMANENT, "permanent")
