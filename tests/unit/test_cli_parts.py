"""What the command line decides by itself: parameters, exit codes, addresses, the demo's verdict."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from laneway import errors
from laneway.cli.client import read_events
from laneway.cli.demo import EVALUATIONS, STUDENTS, drained, missing_from, plan
from laneway.cli.dev import curl_line
from laneway.cli.environment import api_key, api_url, read_settings
from laneway.cli.exits import ExitCode, exit_code, exit_code_of_end
from laneway.cli.jobs import parse_parameters
from laneway.cli.receiver import Deliveries, reference_verifier
from laneway.domain.states import FINAL
from laneway.errors import LanewayError, Unauthenticated, Unprocessable
from laneway.settings import Settings, unknown_variables
from laneway.webhooks.secrets import new_webhook_secret
from laneway.webhooks.signing import sign, signature_headers, verify_webhook


@pytest.mark.parametrize(
    ("word", "parsed"),
    [
        ("a=1", {"a": "1"}),
        ("a:=1", {"a": 1}),
        ("a=", {"a": ""}),
        ("a==b", {"a": "=b"}),
        ("a=b:=c", {"a": "b:=c"}),
        ("a:b=c", {"a:b": "c"}),
        ('a:={"b": [1, null]}', {"a": {"b": [1, None]}}),
        ("a=two\nlines", {"a": "two\nlines"}),
    ],
)
def test_a_parameter_is_text_after_an_equals_sign_and_json_after_a_colon_too(
    word: str, parsed: object
) -> None:
    assert parse_parameters([word]) == parsed


@pytest.mark.parametrize(
    "words", [["a"], ["=1"], ["a:=x"], ["a:="], ["a:=NaN"], ["a:=-Infinity"], ["a=1", "a=2"]]
)
def test_a_parameter_of_another_form_is_refused(words: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        parse_parameters(words)


def test_every_end_of_a_job_has_an_exit_code_and_only_completed_is_zero() -> None:
    assert {status for status in FINAL if exit_code_of_end(status) is ExitCode.OK} == {"completed"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadRequest, 2),
        (errors.InvalidParameters, 2),
        (errors.PayloadTooLarge, 2),
        (errors.JobNotFound, 3),
        (errors.StorageUnavailable, 6),
        (errors.Unauthenticated, 7),
        (errors.Forbidden, 7),
        (errors.RateLimited, 7),
        (errors.IllegalTransition, 1),
        (errors.LanewayError, 1),
    ],
)
def test_an_error_has_the_exit_code_of_its_kind(error: type[LanewayError], code: int) -> None:
    assert exit_code(error()) == code


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 81}, "http://127.0.0.1:81"),
        ({"host": "::", "port": 81}, "http://[::1]:81"),
        ({"url": "https://jobs.example.org/"}, "https://jobs.example.org"),
    ],
)
def test_the_api_is_looked_for_where_it_listens_unless_a_url_is_set(
    settings: dict[str, object], url: str
) -> None:
    assert api_url(Settings(**settings)) == url


def test_the_url_and_the_key_are_settings() -> None:
    assert list(unknown_variables({"LANEWAY_URL": "x", "LANEWAY_API_KEY": "y"})) == []


def test_a_missing_key_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match="set LANEWAY_API_KEY"):
        api_key(Settings(data_dir=tmp_path))


def test_a_bad_setting_is_named_and_its_value_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANEWAY_PORT", "hunter2")
    with pytest.raises(Unprocessable) as refused:
        read_settings()
    assert "LANEWAY_PORT" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_the_curl_line_stands_a_folder_with_a_space() -> None:
    line = curl_line("http://127.0.0.1:1", Path("/my data/admin.key"))
    assert "$(cat '/my data/admin.key')" in line
    assert "\n" not in line


def test_events_are_read_with_their_ids_and_comments_are_passed_over() -> None:
    stream = 'retry: 2000\n\nid: 1\nevent: job.queued\ndata: {"a":\ndata: 1}\n\n: ping\n\n'
    stream += "id: 1.40\ndata:2\n\ndata: cut off"
    assert list(read_events(iter(stream.split("\n")))) == [("1", {"a": 1}), ("1.40", 2)]


@pytest.mark.parametrize("batches", range(5, 9))
def test_the_demo_asks_for_low_then_normal_then_high(batches: int) -> None:
    evaluations, priorities = zip(*plan(batches), strict=True)
    assert len(set(evaluations)) == batches
    assert sorted(priorities, key=["low", "normal", "high"].index) == list(priorities)
    assert set(priorities) == {"low", "normal", "high"}


def test_the_demo_knows_what_the_example_has() -> None:
    from feedback_summaries import store

    assert {e.evaluation_id: len(e.students) for e in store.evaluations()} == dict.fromkeys(
        EVALUATIONS, STUDENTS
    )


def test_the_order_of_draining_is_told_in_runs() -> None:
    assert drained([{"priority": p} for p in ("low", "high", "high", "low")]) == "1 low, 2 high, 1 low"


# What decides whether the demo worked


SECRET = new_webhook_secret()


def delivery(job_id: str, message_id: str = "msg_1", *, secret: str = SECRET) -> tuple[bytes, dict[str, str]]:
    body = json.dumps({"type": "job.completed", "data": {"job_id": job_id}}).encode()
    timestamp = int(datetime.now(UTC).timestamp())
    return body, signature_headers(
        [sign(secret, message_id, timestamp, body)], message_id=message_id, timestamp=timestamp
    )


@pytest.fixture
def deliveries() -> Deliveries:
    reference = reference_verifier(SECRET)
    assert reference is not None
    return Deliveries((lambda body, headers: verify_webhook(body, headers, SECRET), reference))


def ended(*statuses: str) -> list[dict[str, str]]:
    return [{"id": f"j{number}", "status": status} for number, status in enumerate(statuses)]


def test_the_demo_has_worked_when_every_job_completed_and_every_webhook_verified(
    deliveries: Deliveries,
) -> None:
    assert deliveries.take(*delivery("j0"))
    assert missing_from(ended("completed"), deliveries, total=1) == []


def test_a_webhook_that_came_twice_is_one_duplicate(deliveries: Deliveries) -> None:
    assert deliveries.take(*delivery("j0"))
    assert deliveries.take(*delivery("j0"))
    assert (deliveries.received, deliveries.duplicates, len(deliveries.verified)) == (2, 1, 1)


@pytest.mark.parametrize("which", [0, 1])
def test_each_verifier_alone_refuses_another_secret(which: int, deliveries: Deliveries) -> None:
    alone = Deliveries((deliveries.verifiers[which],))
    assert not alone.take(*delivery("j0", secret=new_webhook_secret()))
    assert missing_from(ended("completed"), alone, total=1)


def test_a_changed_body_is_refused_and_the_demo_has_failed(deliveries: Deliveries) -> None:
    body, headers = delivery("j0")
    assert not deliveries.take(body.replace(b"j0", b"j1"), headers)
    missing = missing_from(ended("completed"), deliveries, total=1)
    assert [sentence.split(",")[0].split(":")[0] for sentence in missing] == [
        "1 webhooks did not arrive",
        "1 webhooks were refused",
    ]


def test_a_job_that_did_not_complete_is_named(deliveries: Deliveries) -> None:
    deliveries.take(*delivery("j0"))
    (missing,) = missing_from(ended("completed", "failed"), deliveries, total=2)
    assert missing == "1 of 2 summaries were not completed: j1 is failed"
