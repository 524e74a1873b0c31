"""Who sends a request, and what of a route is theirs: keys, tokens and JWTs at the HTTP edge.

Every bad credential gets the same 401, whatever is wrong with it; the reason is in the log. Fails closed:
503 while it cannot be checked.
"""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request

from laneway.api.runtime import Runtime, in_thread
from laneway.engine.access.callers import AccessScope, Caller
from laneway.errors import Forbidden, JobNotFound, Unauthenticated

WHAT_TO_SEND = "send a valid API key or token: Authorization: Bearer <key>"

_SCOPES: tuple[tuple[str, AccessScope | None, AccessScope | None], ...] = (
    # the path begins with · to look · to change; None: every caller may. The longest that fits counts.
    ("/jobs", AccessScope.JOBS_READ, AccessScope.JOBS_WRITE),
    ("/jobs/scheduler/scheduled-jobs", AccessScope.SCHEDULES_READ, AccessScope.SCHEDULES_WRITE),
    ("/jobs/scheduler/chains", AccessScope.CHAINS_READ, AccessScope.CHAINS_WRITE),
    ("/jobs/admin", AccessScope.ADMIN, AccessScope.ADMIN),
    ("/job-types", AccessScope.JOBS_READ, AccessScope.JOBS_WRITE),
    ("/dead-letters", AccessScope.JOBS_READ, AccessScope.JOBS_WRITE),
    ("/events", AccessScope.JOBS_READ, AccessScope.JOBS_WRITE),
    ("/batches", AccessScope.BATCHES_READ, AccessScope.BATCHES_WRITE),
    ("/chains", AccessScope.CHAINS_READ, AccessScope.CHAINS_WRITE),
    ("/scheduled-jobs", AccessScope.SCHEDULES_READ, AccessScope.SCHEDULES_WRITE),
    ("/webhooks", AccessScope.WEBHOOKS_READ, AccessScope.WEBHOOKS_WRITE),
    ("/webhooks/secret", AccessScope.WEBHOOKS_WRITE, AccessScope.WEBHOOKS_WRITE),
    ("/queues", AccessScope.QUEUES_READ, AccessScope.QUEUES_MANAGE),
    ("/queue", AccessScope.QUEUES_READ, AccessScope.QUEUES_MANAGE),
    ("/workers", AccessScope.QUEUES_READ, AccessScope.QUEUES_MANAGE),
    ("/api-keys", AccessScope.KEYS_MANAGE, AccessScope.KEYS_MANAGE),
    ("/admin", AccessScope.ADMIN, AccessScope.ADMIN),
    ("/auth/tokens", None, None),  # a token has no scope that its maker has not
    ("/me", None, None),
    ("/rate-limits", None, None),
)
_OF_MOUNTED = (AccessScope.JOBS_READ, AccessScope.JOBS_WRITE)  # what an application mounts is about jobs

_OF_AN_ATTEMPT = frozenset(  # what the token of an HTTP job opens, and no other credential
    {
        ("POST", "/jobs/{job_id}/progress"),
        ("POST", "/jobs/{job_id}/complete"),
        ("POST", "/jobs/{job_id}/fail"),
    }
)

_OF_ONE_JOB = frozenset(  # what a token that is bound to a job opens
    {
        ("GET", "/jobs/{job_id}"),
        ("GET", "/jobs/{job_id}/status"),
        ("GET", "/jobs/{job_id}/result"),
        ("GET", "/jobs/{job_id}/timeline"),
        ("GET", "/jobs/{job_id}/events"),
        ("POST", "/jobs/{job_id}/cancel"),
        ("GET", "/me"),
        ("GET", "/rate-limits"),
    }
)


def credential_of(request: Request) -> str:
    """The key, token or JWT that a request carries; empty: none."""
    given = request.headers.getlist("authorization")
    scheme, _, text = (given[0] if given else "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.getlist("x-api-key")
        text = given[0] if given else ""
    return text.strip() if len(given) < 2 else "more than one"


async def authenticate(request: Request, runtime: Runtime) -> Caller:
    """Who calls, from where. Raises Unavailable when nobody can tell.

    Raises Unauthenticated, always the same; its cause says why, for the log.
    """
    address = request.client.host if request.client else None
    text = credential_of(request)
    try:
        if not text:
            raise Unauthenticated("none was sent")
        caller = runtime.callers.remembered(text, address=address)
        if caller is None:
            caller = await in_thread(runtime.callers.authenticate, text, address=address)
    except Unauthenticated as error:
        raise Unauthenticated(WHAT_TO_SEND) from error
    return replace(caller, address=address, request_id=request.scope.get("laneway.request_id"))


def scope_of(path: str, method: str) -> AccessScope | None:
    """What a caller needs for a route; None: nothing but to be one. `path` may have the base before it."""
    path = path.removeprefix("/api/v1")
    fitting = [entry for entry in _SCOPES if path == entry[0] or path.startswith(entry[0] + "/")]
    _, to_look, to_change = max(fitting, key=lambda entry: len(entry[0]), default=("", *_OF_MOUNTED))
    return to_look if method == "GET" else to_change


def is_known(path: str) -> bool:
    """Whether a route of Laneway's own says what it needs, and is not taken for an application's."""
    path = path.removeprefix("/api/v1")
    return any(path == start or path.startswith(start + "/") for start, *_ in _SCOPES)


def check_scope(request: Request, caller: Caller, path: str, scope: AccessScope | None) -> None:
    """Raise Forbidden unless the caller may use the route with the template `path`, which needs `scope`.

    For a token that is bound to a job, another job is one that does not exist.
    """
    here = request.method, path.removeprefix("/api/v1")
    if (here in _OF_AN_ATTEMPT) != (caller.attempt is not None):
        raise Forbidden(
            "targets of HTTP jobs report with the Laneway-Job-Token they were sent, and only report"
        )
    if caller.job_id is not None:
        if caller.attempt is None and here not in _OF_ONE_JOB:
            raise Forbidden("this token is for one job only", job_id=caller.job_id)
        job_id = request.path_params.get("job_id", caller.job_id).lower()
        if job_id != caller.job_id:
            raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
    if scope is not None:
        caller.need_scope(scope)
