"""The OpenAPI document: valid, complete, and the one that is committed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV32SpecValidator

from laneway.api import openapi
from laneway.api.app import create_api
from laneway.api.event_payloads import PAYLOADS
from laneway.domain.events import CATALOGUE
from laneway.settings import Settings

SNAPSHOT = Path(__file__).parents[2] / "docs" / "reference" / "openapi.json"
ANY_OPERATION = {"401", "403", "422", "429", "500", "503"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(json.loads(openapi.text_of(create_api(Settings()))))


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_the_document_is_valid_openapi_3_2(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.2.0"
    errors = [error.message for error in OpenAPIV32SpecValidator(document).iter_errors()]
    assert errors == []


def test_the_committed_document_is_the_present_one(document: dict[str, Any]) -> None:
    assert SNAPSHOT.exists(), "docs/reference/openapi.json is missing: run `make docs` and commit it"
    committed = SNAPSHOT.read_text()
    if committed != openapi.text_of(create_api(Settings())):
        before, now = operations(json.loads(committed)), operations(document)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        pytest.fail(
            "docs/reference/openapi.json is not what the code says: run `make docs`, look at the diff, and "
            f"commit it. Operations that differ: {changed or 'none; shared parts do'}"
        )


def test_operation_ids_are_unique_and_camel_case(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(ids) == len(set(ids)) >= 90
    assert all(re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", name) for name in ids)


def test_every_limited_operation_documents_the_answers_that_any_may_give(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        if operation.get("security") == []:
            continue
        assert set(operation["responses"]) >= ANY_OPERATION, name
        for status in ANY_OPERATION - {"503"}:
            content = operation["responses"][status]["content"]
            assert list(content) == ["application/problem+json"], (name, status)


def test_every_body_that_is_read_may_be_too_large_or_no_json(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        if "requestBody" in operation:
            assert {"400", "408", "413", "415"} <= set(operation["responses"]), name


def test_every_operation_says_what_it_is_for(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        assert operation["summary"], name
        assert len(operation["description"]) > 15, name
        assert operation["tags"], name


def test_only_probes_and_metrics_want_no_key(document: dict[str, Any]) -> None:
    assert document["security"] == [{"key": []}]
    keyless = {name for name, operation in operations(document).items() if operation.get("security") == []}
    assert keyless == {"GET /livez", "GET /readyz", "GET /metrics"}


def test_fastapis_own_error_shape_is_nowhere(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in json.dumps(document)


def headers(operation: dict[str, Any], status: str) -> set[str]:
    return set(operation["responses"][status]["headers"])


def test_the_headers_of_an_answer_are_documented(document: dict[str, Any]) -> None:
    found = {operation["operationId"]: operation for operation in operations(document).values()}
    for operation in found.values():
        for status in operation["responses"]:
            assert "X-Request-Id" in headers(operation, status)
            if status in ("429", "503"):
                assert "Retry-After" in headers(operation, status)
            if operation["x-rate-class"] != "free":
                assert {"RateLimit-Policy", "RateLimit"} <= headers(operation, status)
    assert {"Location", "Retry-After", "Idempotency-Replayed"} <= headers(found["createJob"], "202")
    assert {"ETag", "Preference-Applied"} <= headers(found["getJob"], "200")
    assert "ETag" in headers(found["getJob"], "304")
    assert "WWW-Authenticate" in headers(found["getJob"], "401")
    for name in ("listJobs", "listDeadLetters", "listWebhookDeliveries", "listBatches"):
        assert "Link" in headers(found[name], "200"), name


def test_a_stream_is_described_event_by_event(document: dict[str, Any]) -> None:
    streams = {
        operation["operationId"]: response["content"]["text/event-stream"]
        for operation in operations(document).values()
        for response in operation["responses"].values()
        if "text/event-stream" in response.get("content", {})
    }
    assert {"streamJobEvents", "streamEvents"} <= set(streams)
    for name, content in streams.items():
        assert set(content) == {"itemSchema"}, name


# Webhooks


def test_a_job_with_a_webhook_url_names_what_is_sent_there(document: dict[str, Any]) -> None:
    callbacks = document["paths"]["/api/v1/jobs"]["post"]["callbacks"]
    assert set(callbacks) == {event for event in PAYLOADS if event.startswith("job.")}
    for event, callback in callbacks.items():
        assert callback == {"{$request.body#/webhook_url}": {"$ref": f"#/webhooks/{event}"}}


def test_every_event_that_is_sent_is_in_the_document_with_its_payload(document: dict[str, Any]) -> None:
    assert set(document["webhooks"]) == set(PAYLOADS) == set(CATALOGUE)
    for event, methods in document["webhooks"].items():
        content = methods["post"]["requestBody"]["content"]["application/json"]
        reference = content["schema"]["properties"]["data"]["$ref"]
        assert reference.rpartition("/")[2] in document["components"]["schemas"]
        assert methods["post"]["description"] == CATALOGUE[event]


@pytest.mark.parametrize("event", sorted(PAYLOADS))
def test_the_example_of_an_event_is_what_its_schema_says(document: dict[str, Any], event: str) -> None:
    content = document["webhooks"][event]["post"]["requestBody"]["content"]["application/json"]
    body, schema = content["example"], content["schema"] | {"components": document["components"]}
    Draft202012Validator(schema).validate(body)
    broken = body | {"data": dict(list(body["data"].items())[1:])}
    assert not Draft202012Validator(schema).is_valid(broken)
    fields = set(PAYLOADS[event].model_fields) - {"result_truncated"}
    assert set(body["data"]) == fields
