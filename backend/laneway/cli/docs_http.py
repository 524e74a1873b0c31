# The HTTP API


def _http() -> Iterable[str]:
    from laneway.api.app import BASE, create_api
    from laneway.engine.callers import Role

    app = create_api(_plain_settings())
    document = app.openapi()
    gates = {(method, route.path): route for route in _routes(app) for method in route.methods}
    yield "# HTTP API"
    yield (
        f"Everything is below `{BASE}`, but for the health checks. A running API serves the same as OpenAPI "
        f"{document['openapi']} at `/openapi.json`, and pages to try it at `/docs`. Send the key as "
        "`Authorization: Bearer <key>` or `X-API-Key: <key>`."
    )
    yield (
        "A role is the least that may call: "
        + ", ".join(f"`{role}`" for role in Role)
        + ", each with all that those before it may. What belongs to another tenant is a 404."
    )
    yield (
        "Every answer has `X-Request-Id`, taken over from the request when it is 1 to 64 letters, digits, "
        "`.`, `_` and `-`. Limited ones have `RateLimit-Policy`, `RateLimit` and `X-RateLimit-*`. "
        "What the statuses from 400 up carry: [Errors](errors.md)."
    )
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    yield table(
        ("operation", "what it does"),
        (
            (
                f"[`{method} {path}`](#{operation['operationId'].lower()})",
                _first_paragraph(operation["description"]),
            )
            for method, path, operation in operations
        ),
    )
    for method, path, operation in operations:
        route = gates[method, path].endpoint.__laneway_access__
        yield f"## {operation['operationId']}"
        yield f"`{method} {path}`"
        yield inspect.cleandoc(operation["description"])
        yield (
            f"Rate class `{route.rate}`" + (f", role `{route.role}`." if route.role else "; needs no key.")
        )
        if parameters := operation.get("parameters"):
            yield table(
                ("parameter", "in", "type", "meaning"),
                (
                    (
                        code(each["name"]),
                        each["in"] + (", required" if each["required"] and each["in"] != "path" else ""),
                        _type(each["schema"]),
                        _about(each["schema"] | {"description": each.get("description", "")}),
                    )
                    for each in parameters
                ),
            )
        if body := operation.get("requestBody"):
            schema = body["content"]["application/json"]["schema"]
            yield f"Body: {_type(schema)}" + ("" if body.get("required") else " or nothing") + "."
        yield table(
            ("status", "body", "meaning"),
            (
                (status, _body(answer), answer["description"])
                for status, answer in sorted(operation["responses"].items())
            ),
        )
    yield "# Schemas"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _schema(name, schema)


def _routes(app: FastAPI) -> Iterable[Any]:
    from fastapi.routing import APIRoute, iter_route_contexts

    return [route for route in iter_route_contexts(app.routes) if isinstance(route.original_route, APIRoute)]


def _schema(name: str, schema: dict[str, Any]) -> Iterable[str]:
    yield f"## {name}"
    yield _first_paragraph(schema.get("description"))
    if "enum" in schema:
        yield f"One of {codes(schema['enum'])}."
        return
    required = schema.get("required", ())
    yield table(
        ("field", "type", "default", "meaning"),
        (
            (
                code(field),
                _type(of),
                "required" if field in required else _shown_default(of),
                _about(of),
            )
            for field, of in schema["properties"].items()
        ),
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "allOf" in schema and len(schema["allOf"]) == 1:
        return _type(schema["allOf"][0])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return codes(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any JSON")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return f"{kind} ({schema['format']})" if "format" in schema else str(kind)


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


def _about(schema: dict[str, Any]) -> str:
    """The description, then the bounds, of the schema or of its one alternative to null."""
    concrete = next((each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)
    bounds = [
        text.format(f"{concrete[name]:g}" if isinstance(concrete[name], float) else concrete[name])
        for name, text in _BOUNDS.items()
        if name in concrete
    ]
    description = str(schema.get("description", "")).strip()
    sentence = (", ".join(bounds)).capitalize() + "." if bounds else ""
    return f"{description} {sentence}".strip()


def _shown_default(schema: dict[str, Any]) -> str:
    return code(json.dumps(schema["default"])) if "default" in schema else ""


def _body(answer: dict[str, Any]) -> str:
    return " or ".join(
        f"{_type(content['schema'])}" + ("" if media_type == "application/json" else f" as `{media_type}`")
        for media_type, content in answer.get("content", {}).items()
    )
