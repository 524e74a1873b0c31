from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from laneway import log


class Logs:
    """What the test logs: `start()` configures as a process does, `lines()` reads it back as JSON."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def start(self, **options: Any) -> Any:
        log.configure(**({"json_lines": True} | options))
        return log.get_logger("tests")

    def text(self) -> str:
        return self._capsys.readouterr().err

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def logs(capsys: pytest.CaptureFixture[str]) -> Iterator[Logs]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Logs(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_line_is_one_json_object_with_a_name_and_facts(logs: Logs) -> None:
    logs.start().info("job_completed", job_id="j1", run_ms=12)
    (line,) = logs.lines()
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "job_completed",
        "job_id": "j1",
        "run_ms": 12,
        "component": "tests",
        "level": "info",
    }


def test_a_value_with_a_line_break_stays_on_one_line(logs: Logs) -> None:
    logs.start().info("job_failed", error="first\nsecond\r\n\x1b[31mred")
    assert [line["error"] for line in logs.lines()] == ["first\nsecond\r\n\x1b[31mred"]


@pytest.mark.parametrize(
    "name", ["password", "webhook_secret", "Authorization", "api_key", "lease_token", "X_COOKIE", "tokens"]
)
def test_a_fact_whose_name_says_that_it_is_secret_is_blanked(logs: Logs, name: str) -> None:
    logs.start().info("request", **{name: "s3cr3t"})
    (line,) = logs.lines()
    assert line[name] == log.REDACTED


def test_a_count_of_tokens_is_no_secret(logs: Logs) -> None:
    logs.start().info("beat", lease_token_count=3)
    assert logs.lines()[0]["lease_token_count"] == 3


def test_a_bound_secret_is_blanked_too(logs: Logs) -> None:
    with structlog.contextvars.bound_contextvars(request_id="r1", token="s3cr3t"):
        logs.start().info("request")
    (line,) = logs.lines()
    assert (line["request_id"], line["token"]) == ("r1", log.REDACTED)


def test_an_exception_is_written_into_the_line(logs: Logs) -> None:
    logger = logs.start()
    try:
        raise ValueError("bent")
    except ValueError:
        logger.exception("job_failed")
    (line,) = logs.lines()
    assert "ValueError: bent" in line["exception"]
    assert line["level"] == "error"


def test_what_other_libraries_log_has_the_same_form(logs: Logs) -> None:
    logs.start()
    logging.getLogger("some.library").warning("careful: %s", 7)
    (line,) = logs.lines()
    assert (line["event"], line["level"]) == ("careful: 7", "warning")


def test_an_exception_of_another_library_stays_on_one_line(logs: Logs) -> None:
    logs.start()
    try:
        raise ValueError("bent")
    except ValueError:
        logging.getLogger("some.library").exception("oh")
    (line,) = logs.lines()
    assert "ValueError: bent" in line["exception"]


def test_lines_below_the_level_are_not_written(logs: Logs) -> None:
    logger = logs.start(level="WARNING")
    logger.info("quiet")
    logger.warning("loud")
    assert [line["event"] for line in logs.lines()] == ["loud"]


def test_a_debug_level_writes_our_lines_but_not_those_of_other_libraries(logs: Logs) -> None:
    logs.start(level="DEBUG").debug("ours")
    logging.getLogger("some.library").info("theirs")
    assert [line["event"] for line in logs.lines()] == ["ours"]


def test_the_console_form_is_for_people(logs: Logs) -> None:
    logs.start(json_lines=False).info("job_completed", job_id="j1")
    text = logs.text()
    assert "job_completed" in text
    assert not text.startswith("{")


def test_without_a_choice_a_pipe_gets_json(logs: Logs) -> None:
    logs.start(json_lines=None).info("job_completed")
    assert logs.lines()[0]["event"] == "job_completed"
