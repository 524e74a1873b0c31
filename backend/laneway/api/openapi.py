"""The OpenAPI document: what FastAPI makes of the routes, and what all of them share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from laneway.api.event_payloads import PAYLOADS, example, schemas
from laneway.api.examples import EXAMPLES
from laneway.api.job_reports import JOB_TOKEN_SCHEME
from laneway.api.problems import codes
from laneway.api.schemas import Problem, problems
from laneway.domain.events import CATALOGUE

VERSION = "3.2.0"  # 3.1 cannot describe server-sent events

_METHODS = ("get", "post", "put", "patch", "delete")
_TEXT = {"type": "string"}
_NUMBER = {"type": "integer", "minimum": 0}
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("Finds the request in the log; the caller's own when that is well formed.", _TEXT),
    "RateLimit-Policy": ("The rules of this operation: quota and window in seconds.", _TEXT),
    "RateLimit": ("What is left of each rule, and the seconds until more comes free.", _TEXT),
    "X-RateLimit-Limit": ("Quota of the tightest rule.", _NUMBER),
    "X-RateLimit-Remaining": ("What is left of it.", _NUMBER),
    "X-RateLimit-Reset": ("Epoch second at which more comes free.", _NUMBER),
    "Retry-After": ("Seconds after which to ask again.", _NUMBER),
    "Location": ("Where what was made is; of many, their list.", _TEXT),
    "ETag": ("The version of what is answered.", _TEXT),
    "Link": ('The next page, as `rel="next"`; not on the last one.', _TEXT),
    "Idempotency-Replayed": ("`true`: the answer to an earlier request with this key.", _TEXT),
    "Preference-Applied": ("How long was waited at most, when `Prefer` asked for it.", _TEXT),
    "WWW-Authenticate": ("`Bearer`.", _TEXT),
}
_OPTIONAL = {"Location", "Link", "Idempotency-Replayed", "Preference-Applied"}
_SIGNED = {
    "webhook-id": "The message's id: the same in every try. What has it was handled already.",
    "webhook-timestamp": "Epoch second of this try.",
    "webhook-signature": "Signatures with spaces between them, as Standard Webhooks say.",
    "webhook-event": "The event.",
    "webhook-attempt": "The number of this try, counted from 1.",
}
_ANSWERS = {
    "2XX": "It arrived, and is not sent again.",
    "410": "Nobody wants it any more: it is not sent again, and a registered endpoint is disabled.",
    "default": "It is sent again, by the schedule or as `Retry-After` asks.",
}
_EVENT = {  # as 3.2 describes a stream: the schema of one event
    "type": "object",
    "required": ["data"],
    "properties": {
        "id": {"type": "string", "description": "For `Last-Event-ID`."},
        "event": {"type": "string", "description": "Like `job.progress`."},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "retry": {"type": "integer", "description": "Milliseconds until a client comes back."},
    },
}
_ON_EVERY = ("X-Request-Id",)
_ON_LIMITED = tuple(name for name in _HEADERS if "Rate" in name)
_ON_STATUS = {
    "201": ("Location",),
    "202": ("Location", "Retry-After"),
    "401": ("WWW-Authenticate",),
    "429": ("Retry-After",),
    "503": ("Retry-After",),
}
_OF_A_BODY = (400, 408, 413, 415)  # what may be wrong with any


def finish(app: FastAPI) -> None:
    """Make `app.openapi()` complete: keys, the shared problem schema, and the headers of every answer."""
    generate = app.openapi
    app.openapi_version = VERSION

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def text_of(app: FastAPI) -> str:
    """The document as it is committed: docs/reference/openapi.json."""
    return json.dumps(app.openapi(), ensure_ascii=False, indent=2) + "\n"


def _complete(document: dict[str, Any]) -> None:
    schema = Problem.model_json_schema()
    schema["properties"]["code"]["enum"] = sorted(codes())
    components = document.setdefault("components", {})
    components.setdefault("schemas", {})["Problem"] = schema
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        JOB_TOKEN_SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": "The `Laneway-Job-Token` of the call of an HTTP job: for one attempt of it.",
        },
    }
    components["headers"] = {
        name: {
            "description": text,
            "schema": schema,
            "required": name not in _OPTIONAL and name not in _ON_LIMITED,  # limits may be off
        }
        for name, (text, schema) in _HEADERS.items()
    }
    document["security"] = [{"key": []}]
    document["webhooks"] = {event: {"post": _webhook(event)} for event in PAYLOADS}
    for name, definition in schemas().items():
        components["schemas"].setdefault(name, definition)
    for operation in _operations(document):
        _complete_operation(operation, components["schemas"])


def _complete_operation(operation: dict[str, Any], known: dict[str, Any]) -> None:
    responses = operation["responses"]
    if "requestBody" in operation:
        for status in _OF_A_BODY:
            responses.setdefault(str(status), problems(status)[status])
        given = EXAMPLES.get(operation["operationId"].removesuffix("Alias"))
        if given is not None:
            operation["requestBody"]["content"]["application/json"]["examples"] = {
                name: {"value": value} for name, value in given.items()
            }
    if operation["operationId"] == "createJob":
        operation["callbacks"] = {
            event: {"{$request.body#/webhook_url}": {"$ref": f"#/webhooks/{event}"}}
            for event in PAYLOADS
            if event.startswith("job.")
        }
    operation["responses"] = dict(sorted(responses.items()))
    for status, response in responses.items():
        if "text/event-stream" in response.get("content", {}):
            response["content"]["text/event-stream"] = {"itemSchema": _EVENT}
        names = _headers_of(operation, status, known)
        response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _headers_of(operation: dict[str, Any], status: str, known: dict[str, Any]) -> list[str]:
    limited = operation.get("x-rate-class", "free") != "free"
    names = [*_ON_EVERY, *(_ON_LIMITED if limited else ()), *_ON_STATUS.get(status, ())]
    if "304" in operation["responses"] and status in ("200", "304"):
        names.append("ETag")
    if status.startswith("2"):
        taken = {each["name"].lower() for each in operation.get("parameters", ())}
        if "idempotency-key" in taken:
            names.append("Idempotency-Replayed")
        if "prefer" in taken:
            names.append("Preference-Applied")
        if _is_page(operation["responses"][status], known):
            names.append("Link")
    return names


def _is_page(response: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether the answer is a page of a list, that knows where its next one is."""
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    named = known.get(str(schema.get("$ref", "")).rpartition("/")[2], {})
    return "next_cursor" in named.get("properties", {})


def _webhook(event: str) -> dict[str, Any]:
    """The request that tells of `event`, in the standard format."""
    envelope = {
        "type": "object",
        "required": ["type", "timestamp", "data"],
        "properties": {
            "type": {"const": event},
            "timestamp": {"type": "string", "format": "date-time"},
            "data": {"$ref": f"#/components/schemas/{PAYLOADS[event].__name__}"},
        },
    }
    return {
        "summary": event,
        "description": CATALOGUE[event],
        "tags": [event.partition(".")[0]],
        "security": [],
        "parameters": [
            {"name": name, "in": "header", "required": True, "description": text, "schema": _TEXT}
            for name, text in _SIGNED.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": envelope, "example": example(event)}},
        },
        "responses": {status: {"description": text} for status, text in _ANSWERS.items()},
    }


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from (path[method] for method in _METHODS if method in path)
