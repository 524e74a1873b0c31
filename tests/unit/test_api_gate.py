"""The rules of the API's edge that need no server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from laneway.api import (
    admin,
    api_keys,
    auth_tokens,
    batches,
    cancels,
    chains,
    compat,
    dead_letters,
    deliveries,
    events,
    health,
    job_history,
    job_reports,
    jobs,
    me,
    metrics,
    queues,
    rate_limits,
    scheduled_jobs,
    webhooks,
    workers,
)
from laneway.api.gate import Access, GatedRoute, access
from laneway.api.jobs import as_json, wait_asked
from laneway.api.problems import codes, of_error, problem
from laneway.api.streams import Streams
from laneway.engine.access.callers import Caller, Role
from laneway.errors import FieldError, InvalidPayload, JobNotFound, RateLimited, StorageUnavailable
from laneway.limits.rules import RateClass

ALICE = Caller("t", "alice", Role.USER)
ROUTES = [
    route
    for module in (
        health,
        admin,
        api_keys,
        auth_tokens,
        me,
        jobs,
        job_history,
        job_reports,
        batches,
        chains,
        cancels,
        dead_letters,
        deliveries,
        events,
        metrics,
        queues,
        rate_limits,
        scheduled_jobs,
        webhooks,
        workers,
    )
    for route in module.router.routes
    if isinstance(route, APIRoute)
]
CLASSES = {
    "createJob": (RateClass.QUEUE, Role.USER),
    "listJobs": (RateClass.DEFAULT, Role.USER),
    "getJob": (RateClass.POLL, Role.USER),
    "getJobStatus": (RateClass.POLL, Role.USER),
    "getJobResult": (RateClass.DEFAULT, Role.USER),
    "streamJobEvents": (RateClass.STREAM, Role.USER),
    "streamEvents": (RateClass.STREAM, Role.USER),
    "changeJob": (RateClass.DEFAULT, Role.USER),
    "cancelJob": (RateClass.DEFAULT, Role.USER),
    "retryJob": (RateClass.QUEUE, Role.USER),
    "deleteJob": (RateClass.DEFAULT, Role.OPERATOR),
    "listJobAttempts": (RateClass.DEFAULT, Role.USER),
    "getJobTimeline": (RateClass.DEFAULT, Role.USER),
    "reportJobProgress": (RateClass.DEFAULT, Role.USER),
    "reportJobComplete": (RateClass.DEFAULT, Role.USER),
    "reportJobFailure": (RateClass.DEFAULT, Role.USER),
    "cancelJobs": (RateClass.BATCH, Role.OPERATOR),
    "listDeadLetters": (RateClass.DEFAULT, Role.USER),
    "getDeadLetter": (RateClass.DEFAULT, Role.USER),
    "retryDeadLetter": (RateClass.QUEUE, Role.USER),
    "deleteDeadLetter": (RateClass.DEFAULT, Role.OPERATOR),
    "retryDeadLetters": (RateClass.BATCH, Role.OPERATOR),
    "purgeDeadLetters": (RateClass.BATCH, Role.OPERATOR),
    "listWorkers": (RateClass.DEFAULT, Role.OPERATOR),
    "getWorker": (RateClass.DEFAULT, Role.OPERATOR),
    "listJobTypes": (RateClass.DEFAULT, Role.USER),
    "getJobType": (RateClass.DEFAULT, Role.USER),
    "getQueueStats": (RateClass.DEFAULT, Role.USER),
    "getQueueHealth": (RateClass.DEFAULT, Role.USER),
    "listQueues": (RateClass.DEFAULT, Role.USER),
    "getQueue": (RateClass.DEFAULT, Role.USER),
    "pauseQueue": (RateClass.DEFAULT, Role.ADMIN),
    "resumeQueue": (RateClass.DEFAULT, Role.ADMIN),
    "purgeQueue": (RateClass.DEFAULT, Role.ADMIN),
    "listAllJobs": (RateClass.DEFAULT, Role.ADMIN),
    "getStatistics": (RateClass.DEFAULT, Role.ADMIN),
    "getQueueStatus": (RateClass.DEFAULT, Role.ADMIN),
    "forceCompleteJob": (RateClass.DEFAULT, Role.ADMIN),
    "cleanUpJobs": (RateClass.DEFAULT, Role.ADMIN),
    "listAuditLog": (RateClass.DEFAULT, Role.ADMIN),
    "listTenants": (RateClass.DEFAULT, Role.ADMIN),
    "createTenant": (RateClass.DEFAULT, Role.ADMIN),
    "getTenant": (RateClass.DEFAULT, Role.ADMIN),
    "changeTenant": (RateClass.DEFAULT, Role.ADMIN),
    "listTenantRateLimits": (RateClass.DEFAULT, Role.ADMIN),
    "getTenantRateLimit": (RateClass.DEFAULT, Role.ADMIN),
    "setTenantRateLimit": (RateClass.DEFAULT, Role.ADMIN),
    "deleteTenantRateLimit": (RateClass.DEFAULT, Role.ADMIN),
    "getWebhookSecret": (RateClass.DEFAULT, Role.OPERATOR),
    "rotateWebhookSecret": (RateClass.DEFAULT, Role.OPERATOR),
    "getWebhookPublicKey": (RateClass.DEFAULT, Role.USER),
    "createWebhookEndpoint": (RateClass.DEFAULT, Role.OPERATOR),
    "listWebhookEndpoints": (RateClass.DEFAULT, Role.OPERATOR),
    "getWebhookEndpoint": (RateClass.DEFAULT, Role.OPERATOR),
    "changeWebhookEndpoint": (RateClass.DEFAULT, Role.OPERATOR),
    "deleteWebhookEndpoint": (RateClass.DEFAULT, Role.OPERATOR),
    "rotateWebhookEndpointSecret": (RateClass.DEFAULT, Role.OPERATOR),
    "testWebhookEndpoint": (RateClass.DEFAULT, Role.OPERATOR),
    "listWebhookDeliveries": (RateClass.DEFAULT, Role.USER),
    "listJobWebhooks": (RateClass.DEFAULT, Role.USER),
    "getWebhookDelivery": (RateClass.DEFAULT, Role.USER),
    "redeliverWebhook": (RateClass.QUEUE, Role.USER),
    "recoverWebhookEndpoint": (RateClass.DEFAULT, Role.OPERATOR),
    "getWebhookRecovery": (RateClass.DEFAULT, Role.OPERATOR),
    "cancelWebhookRecovery": (RateClass.DEFAULT, Role.OPERATOR),
    "getRateLimits": (RateClass.FREE, Role.USER),
    "createApiKey": (RateClass.DEFAULT, Role.OPERATOR),
    "listApiKeys": (RateClass.DEFAULT, Role.OPERATOR),
    "getApiKey": (RateClass.DEFAULT, Role.OPERATOR),
    "changeApiKey": (RateClass.DEFAULT, Role.OPERATOR),
    "rotateApiKey": (RateClass.DEFAULT, Role.OPERATOR),
    "revokeApiKey": (RateClass.DEFAULT, Role.OPERATOR),
    "createToken": (RateClass.DEFAULT, Role.USER),
    "getMe": (RateClass.FREE, Role.USER),
    "createBatch": (RateClass.BATCH, Role.USER),
    "listBatches": (RateClass.DEFAULT, Role.USER),
    "getBatch": (RateClass.DEFAULT, Role.USER),
    "listBatchJobs": (RateClass.DEFAULT, Role.USER),
    "streamBatchEvents": (RateClass.STREAM, Role.USER),
    "cancelBatch": (RateClass.BATCH, Role.USER),
    "retryFailedOfBatch": (RateClass.BATCH, Role.USER),
    "createChain": (RateClass.DEFAULT, Role.USER),
    "listChains": (RateClass.DEFAULT, Role.USER),
    "getChain": (RateClass.DEFAULT, Role.USER),
    "changeChain": (RateClass.DEFAULT, Role.USER),
    "deleteChain": (RateClass.DEFAULT, Role.USER),
    "executeChain": (RateClass.QUEUE, Role.USER),
    "cancelChain": (RateClass.QUEUE, Role.USER),
    "listChainRuns": (RateClass.DEFAULT, Role.USER),
    "getChainRun": (RateClass.DEFAULT, Role.USER),
    "streamChainEvents": (RateClass.STREAM, Role.USER),
    "createScheduledJob": (RateClass.DEFAULT, Role.USER),
    "listScheduledJobs": (RateClass.DEFAULT, Role.USER),
    "previewScheduledJob": (RateClass.DEFAULT, Role.USER),
    "getScheduledJob": (RateClass.DEFAULT, Role.USER),
    "changeScheduledJob": (RateClass.DEFAULT, Role.USER),
    "deleteScheduledJob": (RateClass.DEFAULT, Role.USER),
    "toggleScheduledJob": (RateClass.DEFAULT, Role.USER),
    "runScheduledJob": (RateClass.QUEUE, Role.USER),
    "listScheduledJobRuns": (RateClass.DEFAULT, Role.USER),
    "livez": (RateClass.FREE, None),
    "readyz": (RateClass.FREE, None),
    "metrics": (RateClass.FREE, None),
}


def test_each_route_has_the_rate_class_and_role_of_the_reference() -> None:
    declared: dict[str | None, Access] = {
        route.operation_id: route.endpoint.__laneway_access__  # type: ignore[attr-defined]
        for route in ROUTES
    }
    assert {name: (a.rate, a.role) for name, a in declared.items()} == CLASSES


def test_every_route_stands_behind_the_gate() -> None:
    assert len(ROUTES) == len(CLASSES)
    for route in ROUTES:
        assert isinstance(route, GatedRoute), route.path


def test_a_second_path_has_the_gate_of_the_first() -> None:
    aliases = [route for route in compat.router.routes if isinstance(route, APIRoute)]
    assert len(aliases) >= 28
    for route in aliases:
        assert isinstance(route, GatedRoute), route.path
        declared: Access = route.endpoint.__laneway_access__  # type: ignore[attr-defined]
        assert route.operation_id is not None
        assert CLASSES[route.operation_id.removesuffix("Alias")] == (declared.rate, declared.role), route.path


def test_a_route_without_access_cannot_be_made() -> None:
    router = APIRouter(route_class=GatedRoute)

    async def open_door() -> None: ...

    with pytest.raises(TypeError, match=r"/open declares no @access"):
        router.add_api_route("/open", open_door)
    router.add_api_route("/shut", access(RateClass.DEFAULT)(open_door))


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("wait=5", 5),
        ("wait=30", 30),
        ("wait=31", 30),
        ("wait=999999", 30),
        ('respond-async, wait="7"', 7),
        ("Wait = 7; foo=bar", 7),
        ("return=minimal,wait=2", 2),
        (None, 0),
        ("", 0),
        ("wait=0", 0),
        ("wait=-1", 0),
        ("wait=1.5", 0),
        ("await=5", 0),
        ("wait=" + "9" * 5000, 0),
    ],
)
def test_a_preference_to_wait_is_read_as_rfc_7240_says(prefer: str | None, seconds: int) -> None:
    assert wait_asked(prefer) == seconds


def body_of(response: Any) -> dict[str, Any]:
    return dict(json.loads(response.body))


def test_an_error_becomes_a_problem_with_its_facts() -> None:
    scope = {"path": "/api/v1/jobs/7", "laneway.request_id": "r"}
    response = of_error(scope, JobNotFound("there is no job 7", job_id="7"))
    assert (response.status_code, response.media_type) == (404, "application/problem+json")
    assert body_of(response) == {
        "type": "/problems/job_not_found",
        "title": "There is no such job",
        "status": 404,
        "detail": "there is no job 7",
        "instance": "/api/v1/jobs/7",
        "code": "job_not_found",
        "request_id": "r",
        "facts": {"job_id": "7"},
    }


def test_a_problem_says_when_to_come_back() -> None:
    assert of_error({}, StorageUnavailable(retry_after_seconds=2)).headers["retry-after"] == "2"
    limited = of_error({}, RateLimited("slower", retry_after_seconds=5))
    assert limited.headers["retry-after"] == "5"
    assert body_of(limited)["type"].startswith("https://iana.org/assignments/http-problem-types#")


def test_a_problem_holds_at_most_100_errors_with_short_pointers() -> None:
    errors = tuple(FieldError("/" + "x" * 300, "no", "c") for _ in range(101))
    told = body_of(of_error({}, InvalidPayload("no", errors=errors)))["errors"]
    assert len(told) == 100
    assert told[0]["pointer"] == "/" + "x" * 199


def test_what_is_no_unicode_is_still_answered() -> None:
    response = problem(
        {"path": "/\ud800"}, status=422, code="c", title="t", detail="\udfff", facts={"x": object}
    )
    assert body_of(response)["detail"] == "?"
    assert json.loads(bytes(as_json({"a": "\ud800"}).body)) == {"a": "?"}


def test_the_codes_are_a_closed_list() -> None:
    assert codes() == {
        *("idempotency_in_progress", "idempotency_key_reused", "precondition_failed"),
        *("bad_request", "conflict", "forbidden", "http_error", "illegal_transition", "internal_error"),
        *("invalid_cursor", "invalid_parameters", "invalid_payload", "invalid_request", "job_not_found"),
        *("job_type_not_found", "method_not_allowed", "not_acceptable", "not_finished", "not_found"),
        *("payload_too_large", "rate_limited", "storage_unavailable", "unauthenticated", "unavailable"),
        *(
            "dead_letter_not_found",
            "delivery_not_found",
            "endpoint_not_found",
            "overloaded",
            "quota_queued",
            "unique_key_taken",
            "unknown_job_type",
            "unsupported_media_type",
        ),
        *("webhook_not_verified", "webhook_url_refused"),
        *("request_timeout", "headers_too_large"),
        *("queue_not_found", "tenant_not_found"),
        "schedule_not_found",
        *("batch_not_found", "chain_not_found", "chain_run_not_found", "unknown_dependency"),
        *("host_not_allowed", "key_not_found", "origin_not_allowed"),
        *("abnormal_usage_detected", "concurrent_requests", "cost_exceeds_quota"),
        "temporary_reduced_capacity",
    }


def test_a_caller_holds_as_many_places_as_the_limit_says() -> None:
    streams = Streams(limit=2)
    with streams.open(ALICE), streams.open(ALICE):
        with pytest.raises(RateLimited), streams.open(ALICE):
            raise AssertionError("a third place")
        with streams.open(Caller("t", "bob", Role.USER)), streams.open(Caller("other", "alice", Role.USER)):
            pass
    with streams.open(ALICE), streams.open(ALICE):
        pass


def test_a_crash_frees_the_place() -> None:
    streams = Streams(limit=1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), streams.open(ALICE):
            raise ZeroDivisionError
