"""The reference page of the HTTP API, from its OpenAPI document and the gates of its routes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from laneway.cli.markdown import code, codes, first_paragraph, table

if TYPE_CHECKING:
    from fastapi import FastAPI

    from laneway.api.gate import Access

MOST_CHOICES = 12  # in a cell; error codes have a page of their own
_BOUNDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "above {}",
    "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "like `{}`",
}


def openapi_text() -> str:
    """The OpenAPI document of an API with its defaults, as it is committed."""
    from laneway.api import openapi
    from laneway.api.app import create_api
    from laneway.settings import Settings

    return openapi.text_of(create_api(Settings.model_construct()))


def http() -> Iterable[str]:
    """The page's paragraphs."""
    from laneway.api.app import BASE, create_api
    from laneway.engine.access.callers import Role
    from laneway.settings import Settings

    app = create_api(Settings.model_construct())  # the defaults, whatever the environment says
    document = app.openapi()
    access = _access(app)
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    yield "# HTTP API"
    yield (
        f"Everything is below `{BASE}`, but for the health checks. A running API serves the same as OpenAPI "
        f"{document['openapi']} at `/openapi.json`, and pages to try it at `/docs`. Send the key as "
        "`Authorization: Bearer <key>` or `X-API-Key: <key>`."
    )
    yield (
        f"Roles are {codes(Role)}; each may do what those before it may. A key or token may also have fewer "
        "scopes than its role; a missing one is a 403 that names it. What belongs to another tenant is a 404."
    )
    yield (
        "Every answer has `X-Request-Id`, taken over from the request when it is 1 to 64 letters, digits, "
        "`.`, `_` and `-`. Limited ones have `RateLimit-Policy`, `RateLimit` and `X-RateLimit-*`; the rate "
        "classes are in [Limits](limits.md#requests). What goes wrong is answered as a "
        "[problem](errors.md)."
    )
    yield (
        "`HEAD` is `GET` without the body; a method that a path does not take is 405, with those it takes in "
        "`Allow`. A path, query and headers that are too large together are 431. A `traceparent` (W3C Trace "
        "Context) of `POST /api/v1/jobs` goes into the job's `metadata`, unless that has one."
    )
    yield table(
        ("operation", "what it does"),
        (
            (f"[`{name}`](#{of['operationId'].lower()})", first_paragraph(of["description"]))
            for name, of in operations
        ),
    )
    yield "## Operations"
    for name, operation in operations:
        yield from _operation(name, operation, access[name])
    yield "## Schemas"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield f"### {name}"
        yield "The values of `code`: [Errors](errors.md)." if name == "Problem" else ""
        yield first_paragraph(schema.get("description", ""))
        yield f"One of {codes(schema['enum'])}." if "enum" in schema else fields(schema)


def _access(app: FastAPI) -> dict[str, Access]:
    """What each operation declares with `@access`, under `METHOD path`."""
    from fastapi.routing import APIRoute, iter_route_contexts

    declared: dict[str, Access] = {}
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, APIRoute):
            for method in route.methods or ():
                declared[f"{method} {context.path}"] = getattr(route.endpoint, "__laneway_access__")  # noqa: B009
    return declared


def _operation(name: str, operation: dict[str, Any], access: Access) -> Iterable[str]:
    from laneway.api.authentication import scope_of

    yield f"### {operation['operationId']}"
    yield code(name)
    yield inspect.cleandoc(operation["description"])
    method, _, path = name.partition(" ")
    scope = scope_of(path, method) if access.role else None
    yield (
        f"Rate class `{access.rate}`"
        + (f", role `{access.role}`" if access.role else "; needs no key")
        + (f", scope `{scope}`." if scope else ".")
    )
    if parameters := operation.get("parameters"):
        yield table(
            ("parameter", "in", "type", "meaning"),
            (
                (
                    code(each["name"]),
                    each["in"],
                    _type(each["schema"]),
                    _about(each["schema"] | {"description": each.get("description", "")}),
                )
                for each in parameters
            ),
        )
    if body := operation.get("requestBody"):
        schema = body["content"]["application/json"]["schema"]
        yield f"Body: {_type(schema)}" + ("" if body.get("required") else " or nothing") + "."
    answers = operation["responses"]
    problems = [status for status in answers if _is_problem(answers[status])]
    yield table(
        ("status", "body", "meaning"),
        (
            (status, _content(answer), answer["description"])
            for status, answer in sorted(answers.items())
            if status not in problems
        ),
    )
    yield f"[Problems](errors.md): {codes(sorted(problems))}." if problems else ""


def _is_problem(answer: dict[str, Any]) -> bool:
    return "application/problem+json" in answer.get("content", {})


def _content(answer: dict[str, Any]) -> str:
    return " or ".join(
        (f"{_type(content['schema'])}" if "schema" in content else "events")
        + ("" if media_type == "application/json" else f" as `{media_type}`")
        for media_type, content in answer.get("content", {}).items()
    )


def fields(schema: dict[str, Any]) -> str:
    """The properties of an object's JSON Schema as a table; a sentence when it has none."""
    properties = schema.get("properties", {})
    if not properties:
        return "Any fields." if schema.get("additionalProperties") else "No fields."
    required = schema.get("required", ())
    optional = any(name not in required for name in properties)
    rows = [
        [code(name), _type(of), *([_default(name, of, required)] if optional else []), _about(of)]
        for name, of in properties.items()
    ]
    return table(["field", "type", *(["default"] if optional else []), "meaning"], rows)


def _default(name: str, schema: dict[str, Any], required: Iterable[str]) -> str:
    if name in required:
        return "required"
    return code(json.dumps(schema["default"])) if "default" in schema else ""


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema and len(schema["enum"]) <= MOST_CHOICES:
        return codes(schema["enum"])
    kind = schema.get("type", "any JSON")
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    return f"{kind} ({schema['format']})" if "format" in schema else str(kind)


def _about(schema: dict[str, Any]) -> str:
    """The description, then the bounds, of the schema or of its alternative to null."""
    concrete = next((each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)
    bounds = [
        text.format(concrete[name] if isinstance(concrete[name], str) else f"{concrete[name]:.10g}")
        for name, text in _BOUNDS.items()
        if name in concrete
    ]
    sentence = ", ".join(bounds)
    sentence = f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""
    return f"{schema.get('description', '').strip()} {sentence}".strip()
