"""What is sent wrongly is refused clearly, is charged for, and never breaks anything."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from api_client import LocalApi, reference
from laneway.clock import new_id
from laneway.engine.access.callers import Role
from laneway.engine.access.job_tokens import JobTokens
from laneway.webhooks.secrets import SecretBox

MIB = 1024 * 1024
JSON = {"Content-Type": "application/json"}
OPERATIONS = [
    (
        method.upper(),
        "/" + path.format_map(defaultdict(new_id, name="default", policy="queue")),
        operation,
    )
    for path, methods in reference().document["paths"].items()
    for method, operation in methods.items()
]


def send(api: LocalApi, body: bytes | str, **headers: str) -> Any:
    return api.post("/jobs", content=body, headers=JSON | headers)


def with_parameters(text: str) -> str:
    return f'{{"job_type":"demo.echo","parameters":{text}}}'


def nested(depth: int) -> str:
    """JSON whose objects and arrays are `depth` deep, the parameters' own object among them."""
    return with_parameters('{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}")


NOT_READABLE: dict[str, bytes | str] = {
    "nothing but a brace": b"{",
    "trailing text": b'{"job_type":"demo.echo"} x',
    "single quotes": b"{'job_type':'demo.echo'}",
    "no UTF-8": b'{"job_type":"\xff\xfe"}',
    "a byte order mark": b"\xef\xbb\xbf" + b'{"job_type":"demo.echo"}',
    "UTF-16": '{"job_type":"demo.echo"}'.encode("utf-16"),
    "a name twice": '{"job_type":"demo.echo","job_type":"demo.noop"}',
    "a name twice, spelled differently": '{"job_type":"demo.echo","job\\u005ftype":"demo.noop"}',
    "a name twice deep inside": with_parameters('{"a":[{"b":1,"b":1}]}'),
    "a control character": with_parameters('{"a":"\n"}'),
    "a comment": '{"job_type":"demo.echo"/**/}',
    "a comma too many": '{"job_type":"demo.echo",}',
    "a number with a leading zero": with_parameters('{"n":01}'),
    "a number with a plus": with_parameters('{"n":+1}'),
    "a hexadecimal number": with_parameters('{"n":0x1}'),
    "an unfinished escape": b'{"job_type":"\\u12"}',
    "NUL bytes": b"\0\0\0\0",
    "nothing": b"",
}


def test_what_is_no_json_is_a_bad_request(api: LocalApi) -> None:
    for name, body in NOT_READABLE.items():
        response = send(api, body)
        assert (response.status_code, response.json()["code"]) == (400, "bad_request"), name
    assert api.count_jobs() == 0


WRONG: dict[str, tuple[object, str, str]] = {
    # what: the body, the pointer of its first error, that error's code
    "a list": ([], "", "model_type"),
    "a text": ("x", "", "model_type"),
    "null": (None, "", "model_type"),
    "no job type": ({}, "/job_type", "missing"),
    "an unknown field": ({"job_type": "demo.echo", "parametres": {}}, "/parametres", "extra_forbidden"),
    "an awkward unknown field": ({"job_type": "demo.echo", "a/b~c": 1}, "/a~1b~0c", "extra_forbidden"),
    "an unknown job type": ({"job_type": "no.such"}, "/job_type", "unknown_job_type"),
    "a job type that is none": ({"job_type": "../x"}, "/job_type", "string_pattern_mismatch"),
    "a list as parameters": ({"job_type": "demo.echo", "parameters": []}, "/parameters", "dict_type"),
    "a wrong parameter": (
        {"job_type": "demo.sleep", "parameters": {"seconds": "long"}},
        "/parameters/seconds",
        "float_parsing",
    ),
    "an unknown parameter": (
        {"job_type": "demo.noop", "parameters": {"x": 1}},
        "/parameters/x",
        "extra_forbidden",
    ),
    "a priority without a name": ({"job_type": "demo.echo", "priority": 7}, "/priority", "enum"),
    "a priority that is a truth": ({"job_type": "demo.echo", "priority": True}, "/priority", "enum"),
    "a lane as a queue": ({"job_type": "demo.echo", "queue": "high"}, "", "value_error"),
    "a queue with a dash": ({"job_type": "demo.echo", "queue": "a-b"}, "/queue", "string_pattern_mismatch"),
    "both times": (
        {"job_type": "demo.echo", "delay_seconds": 1, "scheduled_for": "2099-01-01T00:00:00Z"},
        "",
        "value_error",
    ),
    "a time without a zone": (
        {"job_type": "demo.echo", "scheduled_for": "2099-01-01T00:00:00"},
        "/scheduled_for",
        "timezone_aware",
    ),
    "a time that UTC does not have": (
        {"job_type": "demo.echo", "scheduled_for": "9999-12-31T23:59:59-14:00"},
        "/scheduled_for",
        "moment_out_of_range",
    ),
    "an end that UTC does not have": (
        {"job_type": "demo.echo", "expires_at": "0001-01-01T00:00:00+14:00"},
        "/expires_at",
        "moment_out_of_range",
    ),
    "events without a target": (
        {"job_type": "demo.echo", "webhook_events": ["job.completed"]},
        "",
        "value_error",
    ),
    "a private webhook": (
        {"job_type": "demo.echo", "webhook_url": "https://127.0.0.1/"},
        "/webhook_url",
        "webhook_url_refused",
    ),
    "NUL in a parameter": (
        {"job_type": "demo.echo", "parameters": {"a": ["\0"]}},
        "/parameters/a/0",
        "nul",
    ),
    **{
        f"NUL in {name}": ({"job_type": "demo.echo", name: "a\0b"}, f"/{name}", "nul")
        for name in ("title", "description", "unique_key")
    },
    "NUL in a tag": ({"job_type": "demo.echo", "tags": ["a\0"]}, "/tags/0", "nul"),
    "NUL in metadata": ({"job_type": "demo.echo", "metadata": {"a\0": 1}}, "/metadata", "nul"),
    "a huge integer": (
        {"job_type": "demo.echo", "parameters": {"n": 2**63}},
        "/parameters/n",
        "integer_too_large",
    ),
    "no number": (
        {"job_type": "demo.echo", "parameters": {"n": float("nan")}},
        "/parameters/n",
        "not_finite",
    ),
    "no number in metadata": (
        {"job_type": "demo.echo", "metadata": {"n": float("inf")}},
        "/metadata/n",
        "not_finite",
    ),
    "no number of seconds": (
        {"job_type": "demo.echo", "delay_seconds": float("nan")},
        "/delay_seconds",
        "not_finite",
    ),
}


# What is JSON by its grammar, and holds what nobody could keep.
UNKEEPABLE: dict[str, tuple[str, str, str]] = {
    "half a character": (with_parameters('{"a":"\\ud800"}'), "/parameters/a", "not_unicode"),
    "half a character in a key": (with_parameters('{"\\udfff":1}'), "/parameters", "not_unicode"),
    "half a character in the title": (
        '{"job_type":"demo.echo","title":"\\ud800"}',
        "/title",
        "not_unicode",
    ),
    "an integer of 200,000 digits": (
        with_parameters('{"n":' + "9" * 200_000 + "}"),
        "/parameters/n",
        "integer_too_large",
    ),
    "one past the largest integer": (
        with_parameters('{"n":[9223372036854775808]}'),
        "/parameters/n/0",
        "integer_too_large",
    ),
    "one past the smallest integer": (
        with_parameters('{"n":-9223372036854775809}'),
        "/parameters/n",
        "integer_too_large",
    ),
    "a number past every double": (with_parameters('{"n":1e999}'), "/parameters/n", "not_finite"),
    "minus infinity": (with_parameters('{"n":-Infinity}'), "/parameters/n", "not_finite"),
    "NUL as an escape": (with_parameters('{"a":"\\u0000"}'), "/parameters/a", "nul"),
    "100,000 levels": (nested(100_000), "", "too_deep"),
    "100,000 open objects": ('{"a":' * 100_000, "", "too_deep"),
}


def test_what_nobody_could_keep_is_pointed_at(api: LocalApi) -> None:
    for name, (body, pointer, code) in UNKEEPABLE.items():
        response = send(api, body)
        assert response.status_code == 422, (name, response.text)
        error = response.json()["errors"][0]
        assert (error["pointer"], error["code"]) == (pointer, code), name
    assert api.count_jobs() == 0


def test_what_is_at_the_edge_of_what_can_be_kept_is_kept(api: LocalApi) -> None:
    text = '{"n":[9223372036854775807,-9223372036854775808,1e308,5e-324,-0.0],"a":"\\ud83d\\ude00 \\u0001"}'
    job = send(api, with_parameters(text)).json()
    assert job["parameters"] == {
        "n": [2**63 - 1, -(2**63), 1e308, 5e-324, -0.0],
        "a": "\U0001f600 \x01",
    }


def test_a_body_nests_at_most_48_levels_wherever_it_is_sent(api: LocalApi) -> None:
    job = f"/jobs/{api.make()['id']}/cancel"
    for path in ("/jobs", job):
        for levels, code in ((48, "extra_forbidden"), (49, "too_deep")):
            body = '{"x":' + "[" * (levels - 1) + "]" * (levels - 1) + "}"
            response = api.post(path, content=body, headers=JSON)
            codes = [error["code"] for error in response.json()["errors"]]
            assert response.status_code == 422, path
            assert code in codes, (path, levels)


def test_every_operation_that_reads_a_body_refuses_what_is_not_plain_json(api: LocalApi) -> None:
    admin = api.key(Role.ADMIN)
    tokens = JobTokens(SecretBox.from_settings(api.settings))
    tried = 0
    for method, path, operation in OPERATIONS:
        if "requestBody" not in operation:
            continue
        tried += 1
        reports = operation.get("security") == [{"job_token": []}]
        key = tokens.make(api.tenant_id, path.split("/")[-2], 1) if reports else admin
        for body, status in (
            (b"\xef\xbb\xbf{}", 400),
            (b'{"a":1,"a":2}', 400),
            (b'{"a":"\xff"}', 400),
            (b'{"a":NaN}', 422),
            (b'{"a":"\\u0000"}', 422),
            (b'{"a":"\\udc00"}', 422),
            (b'{"a":' + b"[" * 2000, 422 if not path.endswith("/batches") else 400),
        ):
            response = api.request(method, path, content=body, headers=JSON, key=key)
            assert response.status_code == status, (method, path, body, response.text)
        text = api.request(method, path, content=b"{}", headers={"Content-Type": "text/plain"}, key=key)
        assert text.status_code == 415, (method, path)
    assert tried >= 10


def test_what_cannot_be_meant_is_pointed_at(each_api: LocalApi) -> None:
    for name, (body, pointer, code) in WRONG.items():
        response = send(each_api, json.dumps(body))
        problem = response.json()
        assert response.status_code == 422, (name, problem)
        first = problem["errors"][0]
        assert (first["pointer"], first["code"]) == (pointer, code), (name, problem)
    assert each_api.count_jobs() == 0


LIMITS: list[tuple[str, Any, Any]] = [
    # field, the largest or smallest value, one past it
    ("title", "x" * 200, "x" * 201),
    ("title", "ü" * 200, "ü" * 201),
    ("description", "x" * 2000, "x" * 2001),
    ("tags", ["x"] * 20, ["x"] * 21),
    ("tags", ["x" * 100], ["x" * 101]),
    ("tags", ["x"], [""]),
    ("max_retries", 100, 101),
    ("max_retries", 0, -1),
    ("timeout_seconds", 1, 0),
    ("timeout_seconds", 366 * 24 * 3600, 366 * 24 * 3600 + 1),
    ("delay_seconds", 366 * 24 * 3600, 366 * 24 * 3600 + 1),
    ("delay_seconds", 0, -0.001),
    ("retry_delay_seconds", 366 * 24 * 3600, 366 * 24 * 3600 + 1),
    ("retry_backoff", 1, 0.999),
    ("retry_backoff", 10, 10.001),
    ("queue", "q" * 50, "q" * 51),
    ("unique_key", "k" * 200, "k" * 201),
    ("unique_key", "k", ""),
    ("concurrency_key", "k" * 200, "k" * 201),
    ("concurrency_key", "k", ""),
    ("metadata", {"x": "y" * (16 * 1024 - 8)}, None),
]


def test_each_field_is_taken_at_its_limit_and_refused_one_past_it(each_api: LocalApi) -> None:
    for field, within, past in LIMITS:
        each_api.make(**{field: within})
        if past is not None:
            response = each_api.post("/jobs", json={"job_type": "demo.echo", field: past})
            assert response.status_code == 422, field
            assert response.json()["errors"][0]["pointer"].startswith(f"/{field}"), field


def test_parameters_have_at_most_256_kib(api: LocalApi) -> None:
    within = "x" * (256 * 1024 - len('{"a":""}'))
    assert api.make(parameters={"a": within})["parameters"]["a"] == within
    response = api.post("/jobs", json={"job_type": "demo.echo", "parameters": {"a": within + "x"}})
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")
    assert response.json()["facts"] == {"what": "parameters", "limit_bytes": 256 * 1024}


def test_metadata_has_at_most_16_kib(api: LocalApi) -> None:
    within = "x" * (16 * 1024 - len('{"a":""}'))
    api.make(metadata={"a": within})
    response = api.post("/jobs", json={"job_type": "demo.echo", "metadata": {"a": within + "x"}})
    assert (response.status_code, response.json()["facts"]["what"]) == (413, "metadata")


def test_parameters_are_at_most_32_levels_deep(api: LocalApi) -> None:
    assert send(api, nested(32)).status_code == 202
    response = send(api, nested(33))
    assert (response.status_code, response.json()["errors"][0]["code"]) == (422, "too_deep")


def test_a_body_has_at_most_one_mebibyte(api: LocalApi) -> None:
    body = b'{"job_type":"demo.echo"}'
    assert send(api, body + b" " * (MIB - len(body))).status_code == 202
    response = send(api, body + b" " * (MIB + 1 - len(body)))
    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")


def test_a_body_of_unsaid_length_has_at_most_one_mebibyte_too(api: LocalApi) -> None:
    async def chunks(size: int) -> Any:
        yield b'{"job_type":"demo.echo"}'
        for _ in range(size // 1024):
            yield b" " * 1024

    assert api.post("/jobs", content=chunks(MIB // 2), headers=JSON).status_code == 202
    assert api.post("/jobs", content=chunks(MIB), headers=JSON).status_code == 413
    cancel = f"/jobs/{api.make()['id']}/cancel"
    assert api.post(cancel, content=chunks(MIB), headers=JSON).status_code == 413


@pytest.mark.parametrize("given", ["text/plain", "application/xml", "text/json", "application/xjson", ""])
def test_another_media_type_is_refused(api: LocalApi, given: str) -> None:
    async def chunks() -> Any:
        yield b'{"job_type":"demo.echo"}'

    for body in (b'{"job_type":"demo.echo"}', chunks()):
        response = api.post("/jobs", content=body, headers={"Content-Type": given})
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_every_spelling_of_json_is_taken(api: LocalApi) -> None:
    for given in ("application/json; charset=utf-8", "Application/JSON", "application/problem+json"):
        response = api.post("/jobs", content=b'{"job_type":"demo.echo"}', headers={"Content-Type": given})
        assert response.status_code == 202, given


def test_an_answer_stays_small_however_much_was_wrong(api: LocalApi) -> None:
    many = {f"field-{n}" + "x" * 300: n for n in range(500)}
    response = api.post("/jobs", json={"job_type": "demo.echo"} | many)
    assert (response.status_code, len(response.json()["errors"])) == (422, 100)
    assert len(response.content) < 50_000
    response = api.post("/jobs", json={"job_type": "demo.sleep", "parameters": many})
    assert (response.status_code, len(response.json()["errors"])) == (422, 100)
    assert len(response.content) < 50_000


def test_what_was_refused_is_charged_for_all_the_same(local: Any) -> None:
    api: LocalApi = local(rate_limits="queue=6/60@user")
    statuses = [
        send(api, b"{").status_code,
        send(api, nested(100_000)).status_code,
        send(api, b"x", **{"Content-Type": "text/plain"}).status_code,
        send(api, b" " * (MIB + 1)).status_code,
        send(api, b"{}").status_code,
        send(api, with_parameters('{"n":NaN}')).status_code,
        send(api, b'{"job_type":"demo.echo"}').status_code,
    ]
    assert statuses == [400, 422, 415, 413, 422, 422, 429]


def test_a_request_id_of_64_plain_characters_is_taken_over(api: LocalApi) -> None:
    given = "Aa0._-" + "x" * 58
    assert api.get("/job-types", headers={"X-Request-Id": given}).headers["x-request-id"] == given
    for bad in (given + "x", "", "a b", "a/b", "ä".encode().decode("latin-1"), "a%0a"):
        response = api.get("/job-types", headers={"X-Request-Id": bad.encode("latin-1")})
        assert response.headers["x-request-id"] != bad
        assert len(response.headers["x-request-id"]) == 36


def test_an_unknown_path_is_not_found(api: LocalApi) -> None:
    for path in ("/nothing", "//", "//jobs", "//api/v2/jobs", "/queues/a/b/c", "/job-types/"):
        response = api.get(path)
        assert (response.status_code, response.json()["code"]) == (404, "not_found"), path


def test_another_method_is_not_allowed(api: LocalApi) -> None:
    for method, path, allowed in (
        ("DELETE", "/jobs", {"GET", "HEAD", "POST"}),
        ("PUT", "/job-types", {"GET", "HEAD"}),
        ("OPTIONS", "/job-types", {"GET", "HEAD"}),
        ("BREW", "/jobs", {"GET", "HEAD", "POST"}),
        ("HEAD", f"/jobs/{new_id()}/cancel", {"POST"}),
    ):
        response = api.send(method, f"/api/v1{path}", headers=api.headers())
        assert response.status_code == 405, (method, path)
        assert response.headers["content-type"] == "application/problem+json"
        assert set(response.headers["allow"].split(", ")) == allowed
