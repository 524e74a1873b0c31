"""Paths that other job services have, for the operations that they mean: the same services, thinly.

Each alias is a second path of a route: its endpoint, its rate class, its role, its answers. What is listed
may also be asked for by page number (`page` and `per_page` or `page_size`), which is walked over the
list's own cursors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from laneway.api import admin, chains, jobs, queues, scheduled_jobs
from laneway.api.admin import CleanedUpView, CleanupRequest, clean_up_jobs
from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import MAX_PAGE
from laneway.api.runtime import CallerDep, ServiceDep
from laneway.api.schemas import problems
from laneway.engine.access.callers import Role
from laneway.limits.rules import RateClass

MAX_PAGE_NUMBER = 100

ALIASES = (
    ("GET", "/jobs/", "/jobs"),
    ("POST", "/jobs/", "/jobs"),
    ("GET", "/jobs/admin/all", "/admin/jobs"),
    ("GET", "/jobs/admin/statistics", "/admin/statistics"),
    ("GET", "/jobs/admin/queue-status", "/admin/queue-status"),
    ("POST", "/jobs/admin/{job_id}/force-complete", "/admin/jobs/{job_id}/force-complete"),
    ("GET", "/queue/stats", "/queues/stats"),
    ("GET", "/queue/health", "/queues/health"),
)
"""Method, the other path, ours."""

PREFIXES = (
    (scheduled_jobs.router, "/jobs/scheduler/scheduled-jobs", "/scheduled-jobs"),
    (chains.router, "/jobs/scheduler/chains", "/chains"),
)
"""A router, what the paths of its aliases begin with, and what ours do: each of its routes gets one."""


class PageNumber(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="ignore")

    page: Annotated[int, Field(ge=1, le=MAX_PAGE_NUMBER)] = 1
    size: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


_NAMES = {"page": "page", "per_page": "size", "page_size": "size"}
_PARAMETERS = [
    {
        "name": name,
        "in": "query",
        "description": text,
        "schema": {"type": "integer", "minimum": 1, "maximum": most},
    }
    for name, text, most in (
        ("page", "Counted from 1; further pages are reached by `cursor`.", MAX_PAGE_NUMBER),
        ("per_page", "Instead of `limit`, with `page`.", MAX_PAGE),
        ("page_size", "The same.", MAX_PAGE),
    )
]

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _Paged(APIRoute):
    """A list's route that knows page numbers."""

    def get_route_handler(self) -> _Handler:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            asked = {n: v for n, v in request.query_params.multi_items() if n in _NAMES}
            if not asked:
                return await inner(request)
            try:
                wanted = PageNumber.model_validate({_NAMES[name]: value for name, value in asked.items()})
            except ValidationError as error:
                spelled = {_NAMES[name]: name for name in asked}
                found = error.errors(include_url=False, include_context=False, include_input=False)
                raise RequestValidationError(
                    [each | {"loc": ("query", spelled[str(each["loc"][0])])} for each in found]
                ) from None
            others = [(n, v) for n, v in request.query_params.multi_items() if n not in _NAMES]
            query = [(n, v) for n, v in others if n not in ("limit", "cursor")] + [("limit", wanted.size)]
            response = await inner(_asking(request, query))
            for _ in range(wanted.page - 1):
                cursor = json.loads(bytes(response.body))["next_cursor"]
                if cursor is None:
                    return jobs.page_answer(request, [], None)
                response = await inner(_asking(request, [*query, ("cursor", cursor)]))
            return response

        return handle


class PagedRoute(GatedRoute, _Paged):
    """The gate first, once a request."""


def _asking(request: Request, query: list[tuple[str, Any]]) -> Request:
    """The request with another query."""
    return Request({**request.scope, "query_string": urlencode(query).encode()}, request.receive)


class OldCleanup(BaseModel):
    """Which jobs to delete."""

    model_config = ConfigDict(extra="forbid")

    days_old: Annotated[int, Field(ge=0, le=36_500)] = Field(30, description="Since they ended.")


async def _clean_up(
    caller: CallerDep, service: ServiceDep, asked: Annotated[OldCleanup, Query()]
) -> Response:
    """`POST /admin/cleanup` without statuses: failed and timed-out jobs are kept."""
    return await clean_up_jobs(CleanupRequest(older_than_days=asked.days_old), caller, service)


def _routes(router: APIRouter) -> Iterator[APIRoute]:
    return (route for route in router.routes if isinstance(route, APIRoute))


def _methods(route: APIRoute) -> list[str]:
    return sorted(route.methods or ())


def add_alias(
    router: APIRouter, path: str, route: APIRoute, *, suffix: str = "Alias", tag: str = "compatibility"
) -> None:
    """Another path for a route. `suffix` makes its operation's id another one."""
    is_list = "next_cursor" in getattr(route.response_model, "model_fields", ())
    router.add_api_route(
        path,
        route.endpoint,
        methods=_methods(route),
        status_code=route.status_code,
        response_model=route.response_model,
        response_class=route.response_class,
        responses=route.responses,
        dependencies=route.dependencies,
        tags=[tag],
        operation_id=f"{route.operation_id}{suffix}",
        deprecated=True,
        description=f"The same as `{'/'.join(_methods(route))} {route.path}`.",
        openapi_extra={"parameters": _PARAMETERS} if is_list else None,
        route_class_override=PagedRoute if is_list else GatedRoute,
    )


def _build() -> APIRouter:
    router = APIRouter(route_class=GatedRoute)
    ours = {
        (method, route.path): route
        for module in (jobs, queues, admin)
        for route in _routes(module.router)
        for method in _methods(route)
    }
    for method, path, canonical in ALIASES:
        add_alias(router, path, ours[method, canonical])
    for prefixed, old, new in PREFIXES:
        for route in _routes(prefixed):
            add_alias(router, old + route.path.removeprefix(new), route)
    router.add_api_route(
        "/jobs/admin/cleanup",
        access(RateClass.DEFAULT, Role.ADMIN)(_clean_up),
        methods=["DELETE"],
        response_model=CleanedUpView,
        responses=problems(),
        tags=["compatibility"],
        operation_id="cleanUpJobsAlias",
        deprecated=True,
    )
    return router


router = _build()
