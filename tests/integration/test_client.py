"""The Python client against a served API: what it is told is what happened."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest

from api_client import ServedApi, claim, complete, reference, report
from laneway import errors
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Role
from laneway.sdk import answers
from laneway.sdk.client import AsyncLanewayClient, LanewayClient


@pytest.fixture
def api(served: Callable[..., ServedApi]) -> ServedApi:
    return served(webhook_allow_http=True, webhook_allowed_cidrs="127.0.0.0/8", webhook_allowed_ports="*")


@pytest.fixture
def client(api: ServedApi) -> Iterator[LanewayClient]:
    """A client of an operator."""
    transport = httpx.HTTPTransport(uds=str(api.socket))
    with LanewayClient("http://localhost", api.key(Role.OPERATOR), transport=transport) as client:
        yield client


def test_a_job_from_its_making_to_its_end(api: ServedApi, client: LanewayClient) -> None:
    made = client.enqueue("demo.echo", {"a": 1}, priority="high", tags=["x", "y"], idempotency_key="one")
    again = client.enqueue("demo.echo", {"a": 1}, priority="high", tags=["x", "y"], idempotency_key="one")
    assert made == again
    assert client.get(made.id) == dataclasses.replace(made, position=1)
    with pytest.raises(errors.NotFinished):
        client.result(made.id)
    assert client.change(made.id, priority="low").priority == "low"
    watching = Event()
    with ThreadPoolExecutor() as threads:

        def watch() -> list[Any]:
            events = []
            for event in client.watch(made.id):
                events.append(event)
                watching.set()
            return events

        watched, waited = threads.submit(watch), threads.submit(client.wait, made.id, timeout_seconds=60)
        assert watching.wait(60)
        held = claim(api, made.id)
        report(api, held, 40, "almost")
        complete(api, held, '{"b": 2}')
        events, ended = watched.result(60), waited.result(60)
    names = [event.name for event in events]
    assert (names[0], names[-1]) == ("job.queued", "job.completed")
    assert events[-1].is_last
    assert [event.progress for event in events if event.name == "job.progress"] in ([], [40])
    assert (ended.status, ended.result, ended.progress) == (JobStatus.COMPLETED, {"b": 2}, 100)
    assert client.result(made.id).result == {"b": 2}
    assert [(each.attempt, each.outcome) for each in client.attempts(made.id)] == [(1, "completed")]
    assert len(list(client.timeline(made.id))) >= 3
    client.delete(made.id)
    with pytest.raises(errors.JobNotFound):
        client.get(made.id)


def test_many_jobs_are_listed_filtered_and_cancelled(client: LanewayClient) -> None:
    made = [client.enqueue("demo.echo", tags=["odd"] if n % 2 else []).id for n in range(7)]
    assert [job.id for job in client.jobs()] == made[::-1]
    assert [job.id for job in client.jobs(tag="odd", status=["queued"])] == made[1::2][::-1]
    assert client.cancel(made[0], reason="no").status is JobStatus.CANCELLED
    assert client.cancel_many({"ids": made}, dry_run=True).matched == 6
    assert client.cancel_many({"ids": made}).cancelled == 6
    assert {job.status for job in client.jobs()} == {JobStatus.CANCELLED}
    assert client.retry(made[0], parameters={"again": True}).status is JobStatus.QUEUED
    with pytest.raises(errors.IllegalTransition):
        client.retry(made[0])


def test_what_the_client_says_of_queues_types_workers_and_dead_letters(client: LanewayClient) -> None:
    client.enqueue("demo.echo")
    assert client.queue_stats().jobs["queued"] == 1
    health = client.queue_health()
    assert not health.healthy
    assert health.reasons
    assert client.job_type("demo.echo") in client.job_types()
    assert list(client.workers()) == list(client.dead_letters()) == []
    assert client.retry_dead_letters({}).count == client.purge_dead_letters({}, dry_run=True).count == 0
    with pytest.raises(errors.DeadLetterNotFound):
        client.retry_dead_letter("01a202ab-90aa-7000-be84-3f7113b801a5")
    assert client.me().role == client.request("GET", "/me")["role"] == "operator"
    policies = {policy for limit in client.rate_limits()["data"] for policy in limit["policies"]}
    assert {"queue", "default"} <= policies


def test_endpoints_and_deliveries(client: LanewayClient) -> None:
    assert client.webhook_secret().startswith("whsec_")
    made = client.create_endpoint("http://127.0.0.1:8080/", event_types=["job.*"], description="mine")
    assert (made.secret or "").startswith("whsec_")
    assert made.secret not in repr(made)
    assert client.endpoint(made.id).secret is None
    assert [each.id for each in client.endpoints()] == [made.id]
    delivery = client.delivery(client.send_test(made.id))
    assert (delivery.event_type, delivery.endpoint_id) == ("endpoint.test", made.id)
    assert [each.id for each in client.deliveries(endpoint_id=made.id)] == [delivery.id]
    assert client.rotate_endpoint_secret(made.id, grace_seconds=0).secret != made.secret
    assert client.change_endpoint(made.id, status="paused").status == "paused"
    client.delete_endpoint(made.id)
    with pytest.raises(errors.EndpointNotFound):
        client.endpoint(made.id)


def test_batches_chains_and_schedules(client: LanewayClient) -> None:
    batch = client.create_batch(job_type="demo.echo", items=[{"n": 1}, {"n": 2}])
    assert (batch.total, batch.enqueued, batch.rejected) == (2, 2, ())
    assert len(list(client.batch_jobs(batch.id))) == 2
    assert client.cancel_batch(batch.id).counts["cancelled"] == 2
    assert client.retry_failed(batch.id).total == 2
    assert [each.id for each in client.batches()] == [client.batch(batch.id).id]

    chain = client.create_chain("two", [{"job_type": "demo.echo"}, {"job_type": "demo.noop"}], execute=True)
    assert (chain.total_steps, chain.name) == (2, "two")
    assert client.cancel_chain(chain.id).status == "cancelled"
    assert client.execute_chain(chain.id).run_id != chain.run_id
    assert client.cancel_chain(chain.id).id == client.chain(chain.id).id == next(client.chains()).id
    client.delete_chain(chain.id)

    schedule = client.create_schedule("demo.echo", {"a": 1}, cron_expression="0 6 * * *", timezone="UTC")
    assert (schedule.is_active, schedule.parameters) == (True, {"a": 1})
    assert not client.toggle_schedule(schedule.id, is_active=False).is_active
    assert client.run_schedule(schedule.id).scheduled_job_id == schedule.id
    assert client.change_schedule(schedule.id, overlap="allow").overlap == "allow"
    assert [each.id for each in client.schedules(is_active=False)] == [client.schedule(schedule.id).id]
    client.delete_schedule(schedule.id)


def test_a_wrong_key_and_a_wrong_job_say_what_is_wrong(api: ServedApi, client: LanewayClient) -> None:
    transport = httpx.HTTPTransport(uds=str(api.socket))
    with (
        LanewayClient("http://localhost", "wrong", transport=transport) as stranger,
        pytest.raises(errors.Unauthenticated),
    ):
        stranger.me()
    with pytest.raises(errors.UnknownJobType) as caught:
        client.enqueue("no.such")
    assert caught.value.errors[0].pointer == "/job_type"
    with pytest.raises(errors.InvalidParameters, match="/parameters/seconds"):
        client.enqueue("demo.sleep", {"seconds": "long"})


def test_the_awaited_client_does_the_same(api: ServedApi) -> None:
    key = api.key(Role.OPERATOR)

    async def work() -> None:
        transport = httpx.AsyncHTTPTransport(uds=str(api.socket))
        async with AsyncLanewayClient("http://localhost", key, transport=transport) as client:
            made = await asyncio.gather(*(client.enqueue("demo.echo", {"n": n}) for n in range(5)))
            assert {job.id async for job in client.jobs()} == {job.id for job in made}
            first = made[0]
            watched = asyncio.create_task(_all(client, first.id))
            await asyncio.to_thread(complete, api, await asyncio.to_thread(claim, api, first.id), "7")
            assert (await client.wait(first.id, timeout_seconds=60)).result == 7
            assert (await watched)[-1] == "job.completed"
            with pytest.raises(errors.JobNotFound):
                await client.get("01a202ab-90aa-7000-be84-3f7113b801a5")

    asyncio.run(work())


async def _all(client: AsyncLanewayClient, job_id: str) -> list[str]:
    return [event.name async for event in client.watch(job_id)]


def test_every_answer_that_has_a_value_fits_it() -> None:
    """What `answers.py` wants of a job is there: no field that the API does not send is without a default."""
    sent = reference().document["components"]["schemas"]
    for value, schema in {
        "Job": "JobView",
        "JobError": "ErrorView",
        "JobResult": "ResultView",
        "Attempt": "AttemptView",
        "JobType": "JobTypeView",
        "Cancelled": "CancelledView",
        "Bulk": "BulkView",
        "Lane": "LaneView",
        "Worker": "RegisteredWorker",
        "Endpoint": "EndpointView",
        "Delivery": "DeliveryView",
        "Batch": "BatchView",
        "Chain": "ChainView",
        "Schedule": "ScheduleView",
        "Me": "MeView",
        "QueueStats": "QueueStats",
        "QueueHealth": "QueueHealth",
    }.items():
        fields = dataclasses.fields(getattr(answers, value))
        needed = {
            each.name
            for each in fields
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        }
        assert needed <= set(sent[schema]["properties"]), value
