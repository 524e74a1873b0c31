"""What may be asked of the API, noun by noun: each function makes the call, and sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, TypedDict, Unpack

from laneway.domain.spec import Priority
from laneway.domain.states import JobStatus
from laneway.sdk.answers import (
    Attempt,
    Batch,
    Bulk,
    Cancelled,
    Chain,
    Delivery,
    Endpoint,
    Job,
    JobResult,
    JobType,
    Me,
    QueueHealth,
    QueueStats,
    Schedule,
    Worker,
)
from laneway.sdk.calls import Call, Json, Listing, as_value, at, nothing, plain, said, work

# Jobs


class Target(TypedDict, total=False):
    """A URL to be called in place of a handler; only `url` is needed."""

    url: str
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    headers: Mapping[str, str]
    body: Any
    success: Sequence[int | str]
    timeout_seconds: float


class JobOptions(TypedDict, total=False):
    """What a job may be asked for besides its type and parameters."""

    queue: str
    priority: Priority | Literal["critical", "high", "normal", "low"] | int
    title: str
    description: str
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    scheduled_for: datetime
    delay_seconds: float
    expires_at: datetime
    timeout_seconds: int
    max_retries: int
    retry_delay_seconds: float
    retry_backoff: float
    retry_max_delay_seconds: float
    retry_jitter: bool
    depends_on: Sequence[str]
    on_dependency_failure: Literal["cancel", "run"]
    unique_key: str
    on_conflict: Literal["return_existing", "reject"]
    debounce_seconds: int
    concurrency_key: str
    concurrency_limit: int
    webhook_url: str
    webhook_events: Sequence[str]


def enqueue(
    job_type: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    target: Target | None = None,
    wait_seconds: int = 0,
    idempotency_key: str | None = None,
    **options: Unpack[JobOptions],
) -> Call[Job]:
    """Queue a job of a type, or one that calls the URL of a `target`.

    What is returned is committed and will end. With `wait_seconds` (at most 30) it may have ended already.
    Sent with a new `Idempotency-Key` unless one is given, so that a retry makes no second job.
    """
    if target is not None and job_type is None and parameters is None:
        what: dict[str, Any] = {"target": dict(target)}
    elif target is None and job_type is not None:
        what = {"job_type": job_type, "parameters": dict(parameters or {})}
    else:
        raise TypeError("enqueue() takes a job type and its parameters, or a target")
    body = {**what, **options}
    wait = {"Prefer": f"wait={wait_seconds}"} if wait_seconds else {}
    return work("/jobs", as_value(Job), body, idempotency_key, headers=wait)


def get(job_id: str, *, wait_seconds: int = 0) -> Call[Job]:
    """The job; with `wait_seconds` (at most 30) as soon as it has ended, or as it is then."""
    wait = {"Prefer": f"wait={wait_seconds}"} if wait_seconds else {}
    return Call("GET", at("jobs", job_id), as_value(Job), headers=wait)


def result(job_id: str) -> Call[JobResult]:
    """What an ended job returned, or why it failed. Raises NotFinished before."""
    return Call("GET", f"{at('jobs', job_id)}/result", as_value(JobResult))


class JobFilters(TypedDict, total=False):
    """Which jobs a list holds; moments are exclusive."""

    status: JobStatus | str | Sequence[JobStatus | str]
    job_type: str
    queue: str
    priority: Priority | str
    tag: str
    q: str
    batch_id: str
    chain_id: str
    scheduled_job_id: str
    created_after: datetime
    created_before: datetime
    scope: Literal["mine", "tenant"]


def jobs(**filters: Unpack[JobFilters]) -> Listing[Job]:
    """The jobs that match, newest first, read page by page."""
    return Listing("/jobs", as_value(Job), filters)


def attempts(job_id: str) -> Listing[Attempt]:
    """The runs of the job's handler."""
    return Listing(f"{at('jobs', job_id)}/attempts", as_value(Attempt), {})


def timeline(job_id: str) -> Listing[Mapping[str, Any]]:
    """All that happened to the job and to its webhooks."""
    return Listing(f"{at('jobs', job_id)}/timeline", dict, {})


def cancel(
    job_id: str, *, reason: str | None = None, terminate: bool = False, grace_seconds: float | None = None
) -> Call[Job]:
    """Cancel a job: it is `cancelled`, or runs and is `cancelling`. Raises IllegalTransition once ended."""
    body = {"reason": reason, "terminate": terminate, "grace_seconds": grace_seconds}
    return Call("POST", f"{at('jobs', job_id)}/cancel", as_value(Job), body=body)


def cancel_many(
    which: Mapping[str, Any], *, dry_run: bool = False, reason: str | None = None, limit: int | None = None
) -> Call[Cancelled]:
    """Cancel the tenant's active jobs that match. For operators."""
    body = said({"filter": plain(which), "dry_run": dry_run, "reason": reason, "limit": limit})
    return Call("POST", "/jobs/cancel", as_value(Cancelled), body=body)


def retry(
    job_id: str, *, parameters: Mapping[str, Any] | None = None, idempotency_key: str | None = None
) -> Call[Job]:
    """Queue an ended job again, with other parameters where they are given."""
    return work(f"{at('jobs', job_id)}/retry", as_value(Job), {"parameters": parameters}, idempotency_key)


class JobChanges(TypedDict, total=False):
    """What may be changed of a job that waits."""

    priority: Priority | str
    scheduled_for: datetime | None
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    parameters: Mapping[str, Any]


def change(job_id: str, **changes: Unpack[JobChanges]) -> Call[Job]:
    """Change a job that waits."""
    return Call("PATCH", at("jobs", job_id), as_value(Job), body=plain(changes))


def delete(job_id: str) -> Call[None]:
    """Delete an ended job and its history. For operators."""
    return Call("DELETE", at("jobs", job_id), nothing)


def job_types() -> Call[list[JobType]]:
    """The job types that may be asked for."""
    return Call("GET", "/job-types", lambda content: [as_value(JobType)(each) for each in content["data"]])


def job_type(name: str) -> Call[JobType]:
    """One job type."""
    return Call("GET", at("job-types", name), as_value(JobType))


# Dead letters


class DeadLetterFilters(TypedDict, total=False):
    """Which dead letters; moments are exclusive."""

    job_type: str
    queue: str
    reason: str
    created_after: datetime
    created_before: datetime
    finished_after: datetime
    finished_before: datetime


def dead_letters(**filters: Unpack[DeadLetterFilters]) -> Listing[Job]:
    """The dead letters that match, newest first, read page by page."""
    return Listing("/dead-letters", as_value(Job), filters)


def retry_dead_letter(
    job_id: str, *, parameters: Mapping[str, Any] | None = None, idempotency_key: str | None = None
) -> Call[Job]:
    """Queue a dead letter again, with other parameters where they are given."""
    return work(
        f"{at('dead-letters', job_id)}/retry", as_value(Job), {"parameters": parameters}, idempotency_key
    )


def retry_dead_letters(
    which: Mapping[str, Any],
    *,
    dry_run: bool = False,
    limit: int | None = None,
    rate: float | None = None,
    idempotency_key: str | None = None,
) -> Call[Bulk]:
    """Queue the tenant's dead letters that match again, `rate` of them a second. For operators."""
    body = said({"filter": plain(which), "dry_run": dry_run, "limit": limit, "rate": rate})
    return work("/dead-letters/retry", as_value(Bulk), body, idempotency_key)


def delete_dead_letter(job_id: str) -> Call[None]:
    """Delete a dead letter. For operators."""
    return Call("DELETE", at("dead-letters", job_id), nothing)


def purge_dead_letters(
    which: Mapping[str, Any], *, dry_run: bool = False, limit: int | None = None
) -> Call[Bulk]:
    """Delete the tenant's dead letters that match. For operators."""
    body = said({"filter": plain(which), "dry_run": dry_run, "limit": limit})
    return Call("POST", "/dead-letters/purge", as_value(Bulk), body=body)


# Queues and workers


def queue_stats() -> Call[QueueStats]:
    """How many jobs wait, in which lanes, and for how long."""
    return Call("GET", "/queues/stats", as_value(QueueStats))


def queue_health() -> Call[QueueHealth]:
    """Whether somebody works."""
    return Call("GET", "/queues/health", as_value(QueueHealth), also_good=(503,))


def workers() -> Listing[Worker]:
    """The workers that live. For operators."""
    return Listing("/workers", as_value(Worker), {})


# Webhooks


def webhook_secret() -> Call[str]:
    """The secret that signs what goes to a job's `webhook_url`. For operators."""
    return Call("GET", "/webhooks/secret", lambda content: str(content["secret"]))


def create_endpoint(url: str, *, event_types: Sequence[str], **options: Any) -> Call[Endpoint]:
    """Register a receiver of webhooks; its `secret` is in the answer, this once. For operators."""
    body = {"url": url, "event_types": list(event_types), **options}
    return Call("POST", "/webhooks/endpoints", as_value(Endpoint), body=plain(body), again=False)


def endpoints() -> Call[list[Endpoint]]:
    """The registered receivers. For operators."""
    return Call(
        "GET", "/webhooks/endpoints", lambda content: [as_value(Endpoint)(e) for e in content["data"]]
    )


def endpoint(endpoint_id: str) -> Call[Endpoint]:
    """One registered receiver. For operators."""
    return Call("GET", at("webhooks/endpoints", endpoint_id), as_value(Endpoint))


def change_endpoint(endpoint_id: str, **changes: Any) -> Call[Endpoint]:
    """Change what is given of a receiver, also its `status`. For operators."""
    return Call("PATCH", at("webhooks/endpoints", endpoint_id), as_value(Endpoint), body=plain(changes))


def delete_endpoint(endpoint_id: str) -> Call[None]:
    """Forget a receiver. For operators."""
    return Call("DELETE", at("webhooks/endpoints", endpoint_id), nothing)


def rotate_endpoint_secret(endpoint_id: str, **how: Any) -> Call[Endpoint]:
    """Give a receiver a new `secret`; the old one signs too for `grace_seconds`. For operators."""
    path = f"{at('webhooks/endpoints', endpoint_id)}/rotate-secret"
    return Call("POST", path, as_value(Endpoint), body=how, again=False)


def send_test(endpoint_id: str, *, idempotency_key: str | None = None) -> Call[str]:
    """Send a receiver a test event; the id of its delivery. For operators."""
    path = f"{at('webhooks/endpoints', endpoint_id)}/test"
    return work(path, lambda content: str(content["delivery_id"]), None, idempotency_key)


class DeliveryFilters(TypedDict, total=False):
    """Which deliveries; moments are exclusive."""

    status: str | Sequence[str]
    event_type: str
    endpoint_id: str
    job_id: str
    created_after: datetime
    created_before: datetime


def deliveries(**filters: Unpack[DeliveryFilters]) -> Listing[Delivery]:
    """The deliveries of webhooks that match, newest first, read page by page."""
    return Listing("/webhooks/deliveries", as_value(Delivery), filters)


def delivery(delivery_id: str) -> Call[Delivery]:
    """One delivery with its attempts and its payload."""
    return Call("GET", at("webhooks/deliveries", delivery_id), as_value(Delivery))


def redeliver(delivery_id: str, *, idempotency_key: str | None = None) -> Call[Delivery]:
    """Send a webhook again."""
    path = f"{at('webhooks/deliveries', delivery_id)}/redeliver"
    return work(path, as_value(Delivery), None, idempotency_key)


# Batches, chains, schedules


class BatchOptions(TypedDict, total=False):
    """What a batch may be asked for; its jobs as `items` of one `job_type`, or as `jobs`."""

    job_type: str
    items: Sequence[Mapping[str, Any]]
    jobs: Sequence[Mapping[str, Any]]
    defaults: Mapping[str, Any]
    on_invalid: Literal["reject", "skip"]
    on_success: Mapping[str, Any]
    on_complete: Mapping[str, Any]
    on_failure: Mapping[str, Any]


def create_batch(*, idempotency_key: str | None = None, **options: Unpack[BatchOptions]) -> Call[Batch]:
    """Queue many jobs at once: all, or with `on_invalid="skip"` what can be; `rejected` has the rest."""
    return work("/batches", as_value(Batch), options, idempotency_key)


def batches() -> Listing[Batch]:
    """The batches, newest first, read page by page."""
    return Listing("/batches", as_value(Batch), {})


def batch(batch_id: str) -> Call[Batch]:
    """How far a batch is."""
    return Call("GET", at("batches", batch_id), as_value(Batch))


def batch_jobs(batch_id: str) -> Listing[Job]:
    """The jobs of a batch, read page by page."""
    return Listing(f"{at('batches', batch_id)}/jobs", as_value(Job), {})


def cancel_batch(batch_id: str, *, reason: str | None = None, terminate: bool = False) -> Call[Batch]:
    """Cancel what is left of a batch."""
    body = {"reason": reason, "terminate": terminate}
    return Call("POST", f"{at('batches', batch_id)}/cancel", as_value(Batch), body=body)


def retry_failed(batch_id: str, *, idempotency_key: str | None = None) -> Call[Batch]:
    """Queue the jobs of a batch again that failed."""
    return work(f"{at('batches', batch_id)}/retry-failed", as_value(Batch), None, idempotency_key)


class ChainOptions(TypedDict, total=False):
    """What a chain may be asked for besides its name and steps."""

    execution_mode: Literal["sequential", "parallel"]
    stop_on_failure: bool
    timeout_seconds: int | None


def create_chain(
    name: str,
    steps: Sequence[Any],
    *,
    execute: bool = False,
    idempotency_key: str | None = None,
    **options: Unpack[ChainOptions],
) -> Call[Chain]:
    """Keep a chain of steps, `{"job_type", "parameters", …}` each; with `execute` start it too."""
    body = {"name": name, "chain_definition": list(steps), "execute": execute, **options}
    return work("/chains", as_value(Chain), body, idempotency_key)


def chains() -> Listing[Chain]:
    """The chains, newest first, read page by page."""
    return Listing("/chains", as_value(Chain), {})


def chain(chain_id: str) -> Call[Chain]:
    """A chain, and how far its latest run is."""
    return Call("GET", at("chains", chain_id), as_value(Chain))


def execute_chain(chain_id: str, *, idempotency_key: str | None = None) -> Call[Chain]:
    """Start a run of a chain."""
    return work(f"{at('chains', chain_id)}/execute", as_value(Chain), None, idempotency_key)


def cancel_chain(chain_id: str, *, reason: str | None = None, terminate: bool = False) -> Call[Chain]:
    """Stop the run of a chain."""
    body = {"reason": reason, "terminate": terminate}
    return Call("POST", f"{at('chains', chain_id)}/cancel", as_value(Chain), body=body)


def delete_chain(chain_id: str) -> Call[None]:
    """Forget a chain that does not run."""
    return Call("DELETE", at("chains", chain_id), nothing)


def create_schedule(
    job_type: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    idempotency_key: str | None = None,
    **options: Any,
) -> Call[Schedule]:
    """Run a job again and again: by `cron_expression` in a `timezone`, or every `interval_seconds`."""
    body = {"job_type": job_type, "parameters": dict(parameters or {}), **options}
    return work("/scheduled-jobs", as_value(Schedule), body, idempotency_key)


def schedules(*, is_active: bool | None = None) -> Listing[Schedule]:
    """The schedules, newest first, read page by page."""
    return Listing("/scheduled-jobs", as_value(Schedule), {"is_active": is_active})


def schedule(schedule_id: str) -> Call[Schedule]:
    """A schedule, when it runs next, and how it went."""
    return Call("GET", at("scheduled-jobs", schedule_id), as_value(Schedule))


def change_schedule(schedule_id: str, **changes: Any) -> Call[Schedule]:
    """Change what is given of a schedule."""
    return Call("PATCH", at("scheduled-jobs", schedule_id), as_value(Schedule), body=plain(changes))


def toggle_schedule(schedule_id: str, *, is_active: bool) -> Call[Schedule]:
    """Pause a schedule, or let it go on."""
    path = f"{at('scheduled-jobs', schedule_id)}/toggle"
    return Call("POST", path, as_value(Schedule), query={"is_active": str(is_active).lower()})


def run_schedule(schedule_id: str, *, idempotency_key: str | None = None) -> Call[Job]:
    """Run a schedule's job once, now."""
    return work(f"{at('scheduled-jobs', schedule_id)}/run", as_value(Job), None, idempotency_key)


def delete_schedule(schedule_id: str) -> Call[None]:
    """Forget a schedule. Its jobs stay."""
    return Call("DELETE", at("scheduled-jobs", schedule_id), nothing)


# The caller


def me() -> Call[Me]:
    """Who calls, and what they may do."""
    return Call("GET", "/me", as_value(Me))


def rate_limits() -> Call[Mapping[str, Any]]:
    """The caller's limits, and what is left of each. It costs nothing."""
    return Call("GET", "/rate-limits", dict)


# Anything else


def request(
    method: str,
    path: str,
    *,
    query: Mapping[str, Any] | None = None,
    body: Json = None,
    idempotency_key: str | None = None,
) -> Call[Any]:
    """Any operation of the API: the JSON that it answers. `path` is below `/api/v1`.

    A POST or PATCH is sent once, unless it has an `idempotency_key`.
    """
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
    again = method in ("GET", "HEAD", "PUT", "DELETE") or bool(headers)
    return Call(
        method, path, lambda content: content, query=query or {}, body=body, headers=headers, again=again
    )
