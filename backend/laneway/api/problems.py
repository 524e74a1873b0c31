"""Errors as answers: each is RFC 9457 `application/problem+json`, and only this module makes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route, compile_path

from laneway.errors import BadRequest, LanewayError
from laneway.log import get_logger

MEDIA_TYPE = "application/problem+json"
_TYPES = {  # of draft-ietf-httpapi-ratelimit-headers-11; the others have pages of ours
    code: f"https://iana.org/assignments/http-problem-types#{name}"
    for code, name in (
        ("rate_limited", "quota-exceeded"),
        ("abnormal_usage_detected", "abnormal-usage-detected"),
        ("temporary_reduced_capacity", "temporary-reduced-capacity"),
    )
}

_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "request_timeout",
    413: "payload_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}

_HTTP_ERROR = "http_error"
_NEXT_STEPS = {
    404: "there is nothing at {path}; /docs lists what there is, all but the probes below /api/v1",
    405: "{path} does not take {method}; `Allow` says what it takes",
}
_MOST_ERRORS = 100  # of one answer
_LONGEST_POINTER = 200

log = get_logger("api")


def codes() -> frozenset[str]:
    """Every `code` that a problem may have."""
    kinds = [LanewayError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = {kind.code for kind in kinds if kind.__module__ == LanewayError.__module__}
    return frozenset(ours | {*_CODES.values(), _HTTP_ERROR})


def problem(
    request_scope: Mapping[str, Any],
    *,
    status: int,
    code: str,
    title: str,
    detail: str,
    facts: Mapping[str, Any] | None = None,
    errors: list[dict[str, str]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One problem as a response."""
    body: dict[str, Any] = {
        "type": _TYPES.get(code, f"/problems/{code}"),
        "title": title,
        "status": status,
        "detail": detail,
        "instance": request_scope.get("path", ""),
        "code": code,
        "request_id": request_scope.get("laneway.request_id", ""),
    }
    if facts:
        body["facts"] = dict(facts)
    if errors:
        body["errors"] = [
            error | {"pointer": error["pointer"][:_LONGEST_POINTER]} for error in errors[:_MOST_ERRORS]
        ]
    content = json.dumps(body, ensure_ascii=False, default=str).encode("utf-8", "replace")
    return Response(content, status, dict(headers or {}), media_type=MEDIA_TYPE)


def of_error(request_scope: Mapping[str, Any], error: LanewayError) -> Response:
    """A LanewayError as a response."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(
        request_scope,
        status=error.status,
        code=error.code,
        title=error.title,
        detail=str(error),
        facts=error.facts,
        errors=[{"pointer": e.pointer, "detail": e.detail, "code": e.code} for e in error.errors],
        headers=headers,
    )


def _pointer(location: tuple[int | str, ...]) -> str:
    """A validation error's place: a JSON Pointer (RFC 6901) into the body, or the like of `query/limit`."""
    where, *rest = location
    path = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in rest)
    return path if where == "body" else f"{where}{path}"


def install(app: FastAPI) -> None:
    """Answer every exception of `app` as a problem."""

    @app.exception_handler(LanewayError)
    async def _ours(request: Request, error: LanewayError) -> Response:
        if error.status >= 500:
            log.warning("request_failed", code=error.code, cause=type(error.__cause__).__name__)
        return of_error(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        if any(e["type"] == "json_invalid" for e in found):
            return of_error(request.scope, BadRequest("the body is not JSON"))
        errors = [
            {"pointer": _pointer(e["loc"]), "detail": e["msg"], "code": e["type"]}
            for e in found[:_MOST_ERRORS]
        ]
        where = errors[0]["pointer"][:_LONGEST_POINTER] or "the body"
        return problem(
            request.scope,
            status=422,
            code="invalid_request",
            title="The request is not valid",
            detail=f"{where}: {errors[0]['detail']}",
            errors=errors,
        )

    @app.exception_handler(Exception)
    async def _crash(request: Request, _: Exception) -> Response:
        return of_crash(request.scope)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            error.headers = {"Allow": ", ".join(_methods(app, request.scope))}
        return of_http(request.scope, error)


def of_crash(request_scope: Mapping[str, Any]) -> Response:
    """What nobody expected, as a response that tells nothing of it."""
    return problem(
        request_scope,
        status=500,
        code=LanewayError.code,
        title=LanewayError.title,
        detail="Something went wrong here; the request id finds it in the log.",
    )


def of_http(request_scope: Mapping[str, Any], error: HTTPException) -> Response:
    """What the protocol is to blame for, as a response."""
    phrase = HTTPStatus(error.status_code).phrase
    detail = str(error.detail) or phrase
    if detail == phrase and error.status_code in _NEXT_STEPS:
        detail = _NEXT_STEPS[error.status_code].format(**request_scope)
    return problem(
        request_scope,
        status=error.status_code,
        code=_CODES.get(error.status_code, _HTTP_ERROR),
        title=phrase,
        detail=detail,
        headers=error.headers,
    )


def _methods(app: FastAPI, request_scope: Mapping[str, Any]) -> list[str]:
    """Every method that the path of a request takes, which several routes may share."""
    methods: set[str] = set()
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, Route) and _pattern(context.path).match(request_scope["path"]):
            methods |= route.methods or set()
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]
