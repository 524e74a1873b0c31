"""The text of a batch is read job by job: where each one is, and what is refused before it is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laneway.api import batch_body
from laneway.api.batch_body import MAX_JOB_CHARACTERS
from laneway.engine.batches import MAX_JOBS
from laneway.errors import BadRequest, LanewayError, PayloadTooLarge, Unprocessable

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\{}[],: é', max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


def text(**members: Any) -> bytes:
    return json.dumps(members).encode()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    items=st.lists(
        st.dictionaries(st.text('xy{}[]"\\,', max_size=4), ANY_JSON, max_size=3), min_size=1, max_size=5
    ),
    head=st.dictionaries(st.sampled_from(["job_type", "defaults", "on_invalid", "ü"]), ANY_JSON, max_size=3),
    before=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_a_body_is_read_as_json_reads_it(
    items: list[dict[str, Any]], head: dict[str, Any], before: bool, indent: int | None, ascii_only: bool
) -> None:
    whole = {"items": items} | head if before else head | {"items": items}
    outline = batch_body.read(json.dumps(whole, indent=indent, ensure_ascii=ascii_only).encode())
    assert outline.head == head
    assert [job for _, job in outline.jobs()] == [{"parameters": item} for item in items]


def test_jobs_come_with_their_pointers() -> None:
    outline = batch_body.read(text(jobs=[{"job_type": "a"}, {}]))
    assert list(outline.jobs()) == [("/jobs/0", {"job_type": "a"}), ("/jobs/1", {})]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"jobs":[{}]',
        b'{"jobs":[{}]}}',
        b'{"jobs":[{}],}',
        b'{"jobs":[{},]}',
        b'{"jobs":[{} {}]}',
        b'{"jobs":[,{}]}',
        b'{"jobs" [{}]}',
        b"{jobs:[{}]}",
        b'{"jobs":[{"a":}]}',
        b'{"jobs":[{"a":"unterminated}]}',
        b'{"jobs":[{]}',
        b'{"jobs":[tru]}',
        b'{"jobs":[{}],"jobs":[{}]}',
        b'{"job_type":"a","job_type":"b","jobs":[{}]}',
        b'{"jobs":[{}]}\xff',
        b'\xef\xbb\xbf{"jobs":[{}]}',
        b'{"jobs":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises((BadRequest, PayloadTooLarge)):
        batch_body.read(body)


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        ({}, ""),
        ({"items": [{}], "jobs": [{}]}, ""),
        ({"items": {}}, "/items"),
        ({"jobs": None}, "/jobs"),
        ({"jobs": []}, "/jobs"),
    ],
)
def test_a_batch_has_one_list_of_jobs(members: dict[str, Any], pointer: str) -> None:
    with pytest.raises(Unprocessable) as refused:
        batch_body.read(text(**members))
    assert [e.pointer for e in refused.value.errors] == [pointer]


def test_a_batch_has_as_many_jobs_as_the_limit_says_and_no_more() -> None:
    assert len(batch_body.read(text(jobs=[{}] * MAX_JOBS)).spans) == MAX_JOBS
    with pytest.raises(Unprocessable):
        batch_body.read(text(jobs=[{}] * (MAX_JOBS + 1)))


def test_a_job_is_as_long_as_the_limit_says_and_no_longer() -> None:
    frame = len(json.dumps({"x": ""}))
    longest = {"x": "a" * (MAX_JOB_CHARACTERS - frame)}
    assert len(list(batch_body.read(text(jobs=[{}, longest, {}])).jobs())) == 3
    with pytest.raises(PayloadTooLarge, match="/jobs/1"):
        batch_body.read(text(jobs=[{}, longest | {"x": longest["x"] + "a"}, {}]))


@pytest.mark.parametrize(
    "job", [b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":"\\u0000"}', b'{"a":1e999}', b"7", b"[]", b'"x"']
)
def test_a_bad_job_is_told_by_its_place(job: bytes) -> None:
    outline = batch_body.read(b'{"jobs":[{},' + job + b"]}")
    first, second = outline.jobs()
    assert first == ("/jobs/0", {})
    assert second[0] == "/jobs/1"
    assert isinstance(second[1], LanewayError)


@pytest.mark.parametrize("size", [4 * 1024, 64 * 1024])
@pytest.mark.parametrize("around", range(-12, 3))
def test_a_job_may_end_anywhere_in_a_window(size: int, around: int) -> None:
    for end in ("true}", "-0.5}", '"\\u00e9\\n"}', 'null,"y":[]}'):
        start = '{"x":"'
        job = start + "a" * (size + around - len(start) - len(end) - 6) + '","z":' + end
        outline = batch_body.read(f'{{"jobs":[{job},{{"last":1}}]}}'.encode())
        assert [value for _, value in outline.jobs()] == [json.loads(job), {"last": 1}]
