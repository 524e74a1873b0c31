"""The OpenAPI document: what FastAPI makes of the routes, and what all of them share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from laneway.api.problems import codes
from laneway.api.schemas import Problem

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
    "Location": ("The job; of many, their list.", _TEXT),
    "ETag": ("The job's version.", _TEXT),
}
_ON_EVERY = ("X-Request-Id",)
_ON_LIMITED = tuple(name for name in _HEADERS if "Rate" in name)
_ON_STATUS = {"202": ("Location", "Retry-After"), "429": ("Retry-After",), "503": ("Retry-After",)}


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
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    components["headers"] = {
        name: {"description": text, "schema": schema} for name, (text, schema) in _HEADERS.items()
    }
    document["security"] = [{"key": []}]
    for operation in _operations(document):
        limited = operation.get("security") != []
        versioned = "304" in operation["responses"]
        for status, response in operation["responses"].items():
            names = [*_ON_EVERY, *(_ON_LIMITED if limited else ()), *_ON_STATUS.get(status, ())]
            if versioned and status in ("200", "304"):
                names.append("ETag")
            response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from (path[method] for method in _METHODS if method in path)
