"""HTTP jobs without I/O: what a target may be, what answers mean, and the token of an attempt."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from pydantic import ValidationError

from laneway.clock import new_id
from laneway.domain.flow import ChainSpec
from laneway.domain.headers import MAX_HEADER_VALUE, MAX_HEADERS
from laneway.domain.http_target import (
    HTTP_REQUEST,
    MAX_CALL_SECONDS,
    MAX_SUCCESS,
    MAX_URL,
    HttpTarget,
    Meaning,
    meaning,
    shown,
)
from laneway.domain.spec import JobSpec
from laneway.engine.access.job_tokens import MAX_JOB_TOKEN_CHARACTERS, JobTokens
from laneway.engine.registry import load
from laneway.errors import InvalidParameters, Unauthenticated
from laneway.webhooks.secrets import SecretBox

URL = "https://api.example.com/do"


def wrong(**fields: Any) -> list[str]:
    """Where a job's request with these fields is wrong."""
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate_json(json.dumps(fields))
    return ["/".join(map(str, error["loc"])) for error in caught.value.errors()]


def test_a_job_has_a_type_or_a_target() -> None:
    assert JobSpec.model_validate({"target": {"url": URL}}).job_type == HTTP_REQUEST
    assert wrong() == ["job_type"]
    assert wrong(target=None) == ["job_type"]
    assert wrong(job_type=None) == ["job_type"]
    assert wrong(target={"url": URL}, job_type="demo.echo") == [""]
    assert wrong(target={"url": URL}, parameters={}) == [""]
    assert wrong(target={}) == ["target/url"]


@pytest.mark.parametrize(
    ("field", "most", "too_much"),
    [
        ("url", "h" * MAX_URL, "h" * (MAX_URL + 1)),
        ("success", [200] * MAX_SUCCESS, [200] * (MAX_SUCCESS + 1)),
        ("timeout_seconds", MAX_CALL_SECONDS, MAX_CALL_SECONDS + 0.001),
        (
            "headers",
            {f"h{n}": "v" for n in range(MAX_HEADERS)},
            {f"h{n}": "v" for n in range(MAX_HEADERS + 1)},
        ),
        ("headers", {"h": "v" * MAX_HEADER_VALUE}, {"h": "v" * (MAX_HEADER_VALUE + 1)}),
    ],
)
def test_what_a_target_has_is_bounded(field: str, most: Any, too_much: Any) -> None:
    HttpTarget.model_validate({"url": URL, field: most})
    with pytest.raises(ValidationError) as caught:
        HttpTarget.model_validate({"url": URL, field: too_much})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    "target",
    [
        {"method": "TRACE"},
        {"method": "GET", "body": {}},
        {"timeout_seconds": 0},
        {"success": []},
        {"success": [199]},
        {"success": [600]},
        {"success": ["1xx"]},
        {"success": ["200-"]},
        {"success": ["200-204\n"]},
        {"headers": {"Host": "internal"}},
        {"headers": {"webhook-signature": "v1,x"}},
        {"headers": {"LANEWAY-Job-Token": "x"}},
        {"headers": {"a b": "x"}},
        {"headers": {"a": "x\r\nb: y"}},
        {"headers": {"a": "x", "A": "y"}},
        {"redirects": 3},
    ],
)
def test_what_a_target_may_not_have_is_refused(target: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HttpTarget.model_validate({"url": URL, **target})


def test_a_refusal_repeats_no_header() -> None:
    with pytest.raises(ValidationError) as caught:
        HttpTarget.model_validate({"url": URL, "headers": {"a": "hush\n"}})
    assert "hush" not in str(caught.value.errors(include_input=False))


@pytest.mark.parametrize(
    ("status", "success", "expected"),
    [
        (200, ["2xx"], Meaning.DONE),
        (299, ["2xx"], Meaning.DONE),
        (300, ["2xx"], Meaning.NEVER),
        (204, [200], Meaning.NEVER),
        (204, ["200-204"], Meaning.DONE),
        (205, ["200-204"], Meaning.NEVER),
        (409, ["2xx", 409], Meaning.DONE),
        (500, ["500"], Meaning.DONE),
        (202, ["2xx"], Meaning.GOES_ON),
        (202, [200], Meaning.GOES_ON),
        (202, [202], Meaning.DONE),
        (202, ["202"], Meaning.DONE),
        (301, ["2xx"], Meaning.NEVER),
        (400, ["2xx"], Meaning.NEVER),
        (407, ["2xx"], Meaning.NEVER),
        (408, ["2xx"], Meaning.AGAIN),
        (409, ["2xx"], Meaning.NEVER),
        (424, ["2xx"], Meaning.NEVER),
        (425, ["2xx"], Meaning.AGAIN),
        (429, ["2xx"], Meaning.AGAIN),
        (499, ["2xx"], Meaning.NEVER),
        (500, ["2xx"], Meaning.AGAIN),
        (599, ["2xx"], Meaning.AGAIN),
    ],
)
def test_each_status_means_what_the_reference_says(
    status: int, success: list[Any], expected: Meaning
) -> None:
    target = HttpTarget.model_validate({"url": URL, "success": success})
    assert meaning(status, target.success) is expected


def test_what_is_kept_from_callers_is_not_shown() -> None:
    assert shown({"url": URL, "private": {"headers": "sealed"}, "sender": {}}) == {"url": URL}
    assert shown(None) is None


def test_jobs_of_that_type_are_made_with_a_target_only() -> None:
    known = load([]).need(HTTP_REQUEST)
    with pytest.raises(InvalidParameters, match="target"):
        known.check({"url": "http://169.254.169.254/"})
    assert known.schema["required"] == ["url"]


def test_a_step_may_call_a_url_with_results_but_without_headers() -> None:
    def chain(**target: Any) -> ChainSpec:
        steps = [{"job_type": "demo.echo"}, {"target": {"url": URL, **target}}]
        return ChainSpec.model_validate({"name": "c", "chain_definition": steps})

    assert chain(body={"given": {"$result": "step_0"}}).steps[1].job_type == HTTP_REQUEST
    for wrong_one in ({"headers": {"a": "b"}}, {"body": {"$result": "step_1"}}):
        with pytest.raises(ValidationError):
            chain(**wrong_one)


def box(*names: str) -> SecretBox:
    return SecretBox({name: os.urandom(32) for name in names})


def test_a_token_speaks_for_one_attempt_of_one_job() -> None:
    tokens, tenant, job = JobTokens(box("k")), new_id(), new_id()
    text = tokens.make(tenant, job, 3)
    caller = tokens.read(text)
    assert (caller.tenant_id, caller.job_id, caller.attempt) == (tenant, job, 3)
    assert text != tokens.make(tenant, job, 4)
    for bent in (text[:-1], text + "A", text.replace("lwj_", "lwt_"), "lwj_", f"{text[:-3]}ä€𝄞"):
        with pytest.raises(Unauthenticated):
            tokens.read(bent)
    for other in (box("k"), box("other")):
        with pytest.raises(Unauthenticated):
            JobTokens(other).read(text)


def test_a_claim_cannot_be_exchanged() -> None:
    tokens, job = JobTokens(box("k")), new_id()
    one, other = tokens.make(new_id(), job, 1).split("."), tokens.make(new_id(), job, 2).split(".")
    with pytest.raises(Unauthenticated):
        tokens.read(".".join([one[0], other[1], one[2]]))


def test_a_token_is_bounded() -> None:
    key = os.urandom(32)
    name = "k" * 32
    tokens = JobTokens(SecretBox({name: key}))
    text = tokens.make(new_id(), new_id(), 2**31)
    assert len(text) <= MAX_JOB_TOKEN_CHARACTERS
    for size in (MAX_JOB_TOKEN_CHARACTERS, MAX_JOB_TOKEN_CHARACTERS + 1):
        with pytest.raises(
            Unauthenticated, match="made here" if size == MAX_JOB_TOKEN_CHARACTERS else "malformed"
        ):
            tokens.read(f"lwj_{name}.".ljust(size - 4, "A") + ".mac")


def test_a_token_outlives_a_rotation_of_the_keys() -> None:
    old, new = os.urandom(32), os.urandom(32)
    text = JobTokens(SecretBox({"old": old})).make(new_id(), new_id(), 1)
    assert JobTokens(SecretBox({"new": new, "old": old})).read(text).attempt == 1
