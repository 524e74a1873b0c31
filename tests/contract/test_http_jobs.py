"""HTTP jobs in the store: how they are kept, handed over, reported about, and ended when nobody reports."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from factories import add_worker, at_once, change, events_of, job_row
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.http_target import HTTP_REQUEST, MASK, REMOTE_WORKER
from laneway.domain.spec import JobSpec
from laneway.engine import doctor, http_jobs, job_reports, leases
from laneway.engine.access.callers import Caller, Role, ensure_tenant
from laneway.engine.context import Progress
from laneway.engine.endings import HandedOver, Raised, Returned
from laneway.engine.exchange import Exchanged, Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.engine.queries import JobFilter
from laneway.engine.reaper import Reaper
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.errors import (
    IllegalTransition,
    InvalidParameters,
    JobNotFound,
    Unprocessable,
    WebhookUrlRefused,
)
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.scheduler.ticker import Ticker
from laneway.sdk.memory import MemoryBackend
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox, target_headers_context, tenant_context

HUSH = "Bearer hush-7f3a"
URL = "https://api.example.com/do"
TIMEOUT_SECONDS = 600
LEASE = 30.0
GRACE = 10.0


class Ground:
    """A service, a worker and a clock on one store."""

    def __init__(self, database: Database, clock: FrozenClock) -> None:
        self.database, self.clock = database, clock
        self.settings = Settings(
            encryption_keys=SecretStr(f"k1:{base64.b64encode(bytes(32)).decode()}"),
            cancel_grace_seconds=GRACE,
        )
        self.box = SecretBox.from_settings(self.settings)
        self.tenant_id = ensure_tenant(database, self.box, "default")
        self.lanes = MemoryLanes()
        self.service = JobService(database, self.lanes, self.settings, load([]), clock=clock)
        self.caller = Caller(self.tenant_id, "alice", Role.USER)
        self.worker_id = add_worker(database)
        self.holder = Holder(self.worker_id, load([]).names, 3, Random(1))

    def make(self, *, caller: Caller | None = None, target: dict[str, Any] | None = None, **spec: Any) -> str:
        asked = {"target": {"url": URL, **(target or {})}, "timeout_seconds": TIMEOUT_SECONDS, **spec}
        prepared = self.service.prepare(JobSpec.model_validate(asked), caller or self.caller)
        [answer] = self.service.enqueue([prepared])
        assert isinstance(answer, dict), answer
        return str(answer["id"])

    def exchange(self, *ended: Any, wanted: list[str] | None = None) -> Exchanged:
        claims = [(job_id, new_id()) for job_id in wanted or ()]
        now = self.clock.now()
        return exchange(self.database, self.holder, ended=ended, wanted=claims, news={}, now=now)

    def claim(self, job_id: str) -> Claimed:
        [job] = self.exchange(wanted=[job_id]).claimed
        return job

    def at_target(self, **spec: Any) -> Claimed:
        """A job whose target answered 202."""
        job = self.claim(self.make(**spec))
        done = self.exchange((job, HandedOver()))
        assert (done.stale, done.refused) == ([], [])
        return job

    def reporter(self, job: Claimed, **other: Any) -> Caller:
        said = {"job_id": job.job_id, "attempt": job.attempt} | other
        return Caller(self.tenant_id, f"job:{job.job_id}", Role.USER, is_token=True, **said)

    def end(self, job: Claimed, ending: Any, **other: Any) -> dict[str, Any]:
        return job_reports.report_end(self.service, self.reporter(job, **other), ending)

    def view(self, job: Claimed) -> dict[str, Any]:
        return self.service.get(job.job_id, self.caller)

    def sweep(self) -> http_jobs.Overdue:
        return http_jobs.end_overdue(
            self.database, now=self.clock.now(), cancel_grace_seconds=GRACE, crash_limit=3, rng=Random(1)
        )


@pytest.fixture
def ground(database: Database, clock: FrozenClock) -> Ground:
    return Ground(database, clock)


# How one is kept


def test_headers_are_sealed_in_the_row_and_masked_in_every_answer(ground: Ground) -> None:
    job_id = ground.make(target={"headers": {"Authorization": HUSH}, "body": {"a": 1}}, metadata={"m": 1})
    row = job_row(ground.database, job_id)
    assert HUSH not in json.dumps(row, default=str)
    sealed = row["parameters"]["private"]["headers"]
    assert json.loads(ground.box.open(sealed, target_headers_context(ground.tenant_id))) == {
        "Authorization": HUSH
    }
    shown = ground.service.get(job_id, ground.caller)
    assert shown["job_type"] == HTTP_REQUEST
    assert shown["parameters"] == {
        "url": URL,
        "method": "POST",
        "headers": {"Authorization": MASK},
        "body": {"a": 1},
        "success": ["2xx"],
        "timeout_seconds": 30.0,
    }
    listed = ground.service.page(ground.caller, JobFilter(), limit=5, cursor=None, mine=True)
    assert sealed not in json.dumps([shown, listed])


def test_a_url_that_may_not_be_called_is_refused_when_the_job_is_made(ground: Ground) -> None:
    for url in (
        "http://api.example.com/",
        "https://127.0.0.1/",
        "https://169.254.169.254/",
        "https://u:p@a.com/",
    ):
        with pytest.raises(WebhookUrlRefused) as refused:
            ground.make(target={"url": url})
        assert [error.pointer for error in refused.value.errors] == ["/target/url"]
    with pytest.raises(InvalidParameters):
        ground.service.prepare(
            JobSpec(job_type=HTTP_REQUEST, parameters={"url": "https://127.0.0.1/"}), ground.caller
        )


def test_a_target_cannot_be_exchanged_when_the_job_is_tried_again(ground: Ground) -> None:
    job_id = ground.make()
    ground.service.cancel(job_id, ground.caller)
    with pytest.raises(InvalidParameters):
        ground.service.retry(job_id, ground.caller, parameters={"url": "https://127.0.0.1/"})
    assert ground.service.retry(job_id, ground.caller)["status"] == "queued"


def test_a_claimed_job_brings_what_signs_its_call(ground: Ground) -> None:
    other = ensure_tenant(ground.database, ground.box, "other")
    mine, theirs = ground.make(), ground.make(caller=Caller(other, "bob", Role.USER))
    plain = ground.service.prepare(JobSpec(job_type="demo.noop"), ground.caller)
    [made] = ground.service.enqueue([plain])
    assert isinstance(made, dict)
    claimed = {job.job_id: job for job in ground.exchange(wanted=[mine, theirs, made["id"]]).claimed}
    opened = {}
    for job_id, tenant_id in ((mine, ground.tenant_id), (theirs, other)):
        sender = json.loads(claimed[job_id].parameters)["sender"]
        assert sender["tenant_id"] == tenant_id
        opened[job_id] = [ground.box.open(each, tenant_context(tenant_id)) for each in sender["secrets"]]
    assert opened[mine] != opened[theirs]
    assert claimed[made["id"]].parameters == "{}"
    assert "sender" not in job_row(ground.database, mine)["parameters"]


def test_without_an_answer_of_the_store_a_claimed_job_goes_without(ground: Ground) -> None:
    job = ground.claim(ground.make())

    class Away:
        def read(self) -> Any:
            raise sa.exc.OperationalError("SELECT", {}, Exception("away"))

    [bare] = http_jobs.equip(Away(), [job], now=ground.clock.now())  # type: ignore[arg-type]
    assert json.loads(bare.parameters)["sender"] is None


def test_the_memory_backend_says_that_it_calls_no_urls() -> None:
    backend = MemoryBackend(Settings())
    with closing(backend), pytest.raises(Unprocessable, match="calls no URLs"):
        backend.enqueue([{"target": {"url": URL}}])


# Handing over


def test_a_job_at_its_target_runs_on_and_waits_for_a_report(ground: Ground) -> None:
    job = ground.at_target()
    view = ground.view(job)
    assert (view["status"], view["status_reason"], view["worker"]) == ("running", "waits_for_report", None)
    assert job_row(ground.database, job.job_id)["lease_token"] == job.lease_token
    assert [event["action"] for event in events_of(ground.database, job.job_id)] == ["create", "claim"]


def test_no_reaper_takes_it_back_whoever_dies(ground: Ground) -> None:
    job = ground.at_target()
    reaper = Reaper(ground.database, ground.clock, lease_seconds=LEASE, crash_limit=3)
    rung = []
    for _ in range(20):
        rung += reaper.sweep()
        ground.clock.advance(seconds=5)
    with ground.database.read() as connection:
        assert connection.execute(sa.select(models.workers.c.state)).scalars().all() == ["dead"]
    leases.leave(ground.database, worker_id=ground.worker_id)
    assert (rung, ground.view(job)["status"]) == ([], "running")
    found = doctor.examine(ground.database, now=ground.clock.now(), lease_seconds=LEASE, job_types=None)
    assert "orphans" not in [finding.name for finding in found]


def test_a_worker_that_dies_before_it_handed_over_is_replaced(ground: Ground) -> None:
    job = ground.claim(ground.make())
    leases.leave(ground.database, worker_id=ground.worker_id)
    reaper = Reaper(ground.database, ground.clock, lease_seconds=LEASE, crash_limit=3)
    assert [due.job_id for due in reaper.sweep()] == [job.job_id]
    again = ground.exchange(wanted=[job.job_id]).claimed[0]
    with pytest.raises(IllegalTransition):
        ground.end(job, Returned("1"))
    assert (again.attempt, ground.end(again, Returned("2"))["result"]) == (2, 2)


@pytest.mark.parametrize("other", [{"attempt": 2}, {"lease_token": new_id()}, {"job_id": new_id()}])
def test_only_who_holds_a_job_hands_it_over(ground: Ground, other: dict[str, Any]) -> None:
    job = ground.claim(ground.make())
    ghost = replace(job, **other)
    assert ground.exchange((ghost, HandedOver())).stale == [ghost]
    assert job_row(ground.database, job.job_id)["worker_id"] == ground.worker_id


def test_to_hand_over_twice_does_no_harm(ground: Ground) -> None:
    job = ground.at_target()
    assert ground.exchange((job, HandedOver())).stale == []
    assert job_row(ground.database, job.job_id)["worker_id"] == REMOTE_WORKER


def test_jobs_end_and_are_handed_over_in_one_turn(ground: Ground) -> None:
    ended, handed = ground.claim(ground.make()), ground.claim(ground.make())
    third = ground.make()
    done = ground.exchange((ended, Returned("1")), (handed, HandedOver()), wanted=[third])
    assert [settled.job.job_id for settled in done.settled] == [ended.job_id]
    assert [job.job_id for job in done.claimed] == [third]
    assert ground.view(handed)["status_reason"] == "waits_for_report"


# Reports


def test_a_report_completes_the_job(ground: Ground) -> None:
    job = ground.at_target(webhook_url="https://hooks.example.com/")
    view = ground.end(job, Returned('{"made":7}'))
    assert (view["status"], view["result"], view["progress"]) == ("completed", {"made": 7}, 100)
    last = events_of(ground.database, job.job_id)[-1]
    assert (last["action"], last["actor"], last["attempt"]) == ("complete", f"job:{job.job_id}", 1)
    with ground.database.read() as connection:
        told = connection.execute(sa.select(models.webhook_messages.c.event_type)).scalars().all()
    assert told == ["job.completed"]


def test_a_reported_failure_is_tried_again_until_no_retry_is_left(ground: Ground) -> None:
    job = ground.at_target(max_retries=1, retry_delay_seconds=60, retry_jitter=False)
    failed = Raised("ReportedFailure", "no paper")
    view = ground.end(job, failed)
    assert (view["status"], view["error"]["message"], view["retry_count"]) == ("retrying", "no paper", 1)
    change(ground.database, models.jobs, job.job_id, status="queued", next_retry_at=None)
    again = ground.claim(job.job_id)
    assert ground.end(again, failed)["dead_letter_reason"] == "exhausted"


def test_a_reported_failure_may_say_when_to_come_back_and_that_nothing_helps(ground: Ground) -> None:
    later, never = ground.at_target(), ground.at_target()
    due = ground.end(later, Raised("ReportedFailure", "m", in_seconds=90.0))["next_retry_at"]
    assert due == ground.service.get(later.job_id, ground.caller)["next_retry_at"]
    assert job_row(ground.database, later.job_id)["next_retry_at"] == ground.clock.now() + timedelta(
        seconds=90
    )
    assert (
        ground.end(never, Raised("ReportedFailure", "m", permanent=True))["dead_letter_reason"] == "permanent"
    )


def test_progress_is_kept_and_never_falls(ground: Ground) -> None:
    job = ground.at_target()
    for percent, shown in ((40, 40), (20, 40), (60, 60)):
        news = Progress(percent, f"at {percent}", '{"page":1}')
        assert job_reports.report_progress(ground.service, ground.reporter(job), news)["progress"] == shown
    assert ground.view(job)["progress_message"] == "at 60"


def test_progress_tells_that_somebody_wants_it_to_stop(ground: Ground) -> None:
    job = ground.at_target()
    ground.service.cancel(job.job_id, ground.caller)
    view = job_reports.report_progress(ground.service, ground.reporter(job), Progress(1))
    assert (view["status"], view["cancelling"]) == ("running", True)


def test_a_report_that_overtakes_the_worker_counts(ground: Ground) -> None:
    job = ground.claim(ground.make())
    assert ground.end(job, Returned("1"))["status"] == "completed"
    assert ground.exchange((job, HandedOver())).stale == [job]
    assert ground.view(job)["result"] == 1


@pytest.mark.parametrize("other", [{"attempt": 0}, {"attempt": 2}])
def test_a_report_about_another_attempt_changes_nothing(ground: Ground, other: dict[str, Any]) -> None:
    job = ground.at_target()
    before = job_row(ground.database, job.job_id)
    reports: list[Callable[[], Any]] = [
        lambda: ground.end(job, Returned("1"), **other),
        lambda: ground.end(job, Raised("ReportedFailure", "m"), **other),
        lambda: job_reports.report_progress(ground.service, ground.reporter(job, **other), Progress(5)),
    ]
    for report in reports:
        with pytest.raises(IllegalTransition) as refused:
            report()
        assert refused.value.facts == {"current_status": "running", "attempt": 1}
    assert job_row(ground.database, job.job_id) == before


def test_a_report_about_an_ended_job_changes_nothing(ground: Ground) -> None:
    job = ground.at_target()
    ground.end(job, Returned("1"))
    before = job_row(ground.database, job.job_id)
    for ending in (Returned("2"), Raised("ReportedFailure", "m")):
        with pytest.raises(IllegalTransition):
            ground.end(job, ending)
    assert job_row(ground.database, job.job_id) == before


def test_a_report_finds_jobs_of_its_tenant_and_type_alone(ground: Ground) -> None:
    job = ground.at_target()
    stranger = Caller(new_id(), "job", Role.USER, job_id=job.job_id, attempt=1)
    with pytest.raises(JobNotFound):
        job_reports.report_end(ground.service, stranger, Returned())
    [plain] = ground.service.enqueue([ground.service.prepare(JobSpec(job_type="demo.noop"), ground.caller)])
    assert isinstance(plain, dict)
    held = ground.claim(plain["id"])
    with pytest.raises(JobNotFound):
        ground.end(held, Returned())


def test_of_eight_reports_at_once_one_ends_the_attempt(ground: Ground) -> None:
    job = ground.at_target()
    answers = at_once([lambda n=n: ground.end(job, Returned(str(n))) for n in range(8)])  # type: ignore[misc]
    ends = [answer for answer in answers if isinstance(answer, dict)]
    assert len(ends) == 1
    assert sum(isinstance(answer, IllegalTransition) for answer in answers) == 7
    assert [e["action"] for e in events_of(ground.database, job.job_id)] == ["create", "claim", "complete"]


# When nobody reports


def test_an_attempt_without_a_report_ends_at_its_timeout_and_not_before(ground: Ground) -> None:
    job = ground.at_target(max_retries=1, retry_delay_seconds=5, retry_jitter=False)
    ground.clock.advance(seconds=TIMEOUT_SECONDS - 0.1)
    assert ground.sweep().ids == ()
    ground.clock.advance(seconds=0.1)
    assert ground.sweep().ids == (job.job_id,)
    view = ground.view(job)
    assert (view["status"], view["retry_count"], view["error"]["category"]) == ("retrying", 1, "timeout")
    with pytest.raises(IllegalTransition):
        ground.end(job, Returned("late"))
    change(ground.database, models.jobs, job.job_id, status="queued", next_retry_at=None)
    again = ground.claim(job.job_id)
    ground.exchange((again, HandedOver()))
    ground.clock.advance(seconds=TIMEOUT_SECONDS)
    ground.sweep()
    assert (ground.view(job)["status"], ground.view(job)["dead_letter_reason"]) == ("timeout", "timeout")


def test_a_job_that_a_worker_holds_is_not_the_sweep_s(ground: Ground) -> None:
    job = ground.claim(ground.make())
    ground.service.cancel(job.job_id, ground.caller, terminate=True)
    ground.clock.advance(seconds=2 * TIMEOUT_SECONDS)
    assert ground.sweep().ids == ()


@pytest.mark.parametrize(
    ("how", "seconds"), [({}, GRACE), ({"grace_seconds": 3.0}, 3.0), ({"terminate": True}, 0.0)]
)
def test_a_cancel_ends_it_once_its_grace_is_over(ground: Ground, how: dict[str, Any], seconds: float) -> None:
    job = ground.at_target()
    answer = ground.service.cancel(job.job_id, ground.caller, **how)
    assert not answer.done
    if seconds:
        ground.clock.advance(seconds=seconds - 0.1)
        assert ground.sweep().ids == ()
        ground.clock.advance(seconds=0.1)
    assert ground.sweep().ids == (job.job_id,)
    assert ground.view(job)["status"] == "cancelled"
    with pytest.raises(IllegalTransition):
        ground.end(job, Returned("late"))


def test_a_target_that_fails_after_a_cancel_gets_no_other_attempt(ground: Ground) -> None:
    job = ground.at_target()
    ground.service.cancel(job.job_id, ground.caller)
    assert ground.end(job, Raised("ReportedFailure", "stopped"))["status"] == "cancelled"


def test_the_scheduler_ends_what_nobody_reports_about(ground: Ground) -> None:
    job = ground.at_target(max_retries=0)
    ticker = Ticker(ground.database, ground.lanes, ground.settings, clock=ground.clock)
    ground.clock.advance(seconds=TIMEOUT_SECONDS)
    assert ticker.tick()
    assert ground.view(job)["status"] == "timeout"


def test_eight_schedulers_end_each_attempt_once(ground: Ground) -> None:
    jobs = [ground.at_target(max_retries=0) for _ in range(5)]
    ground.clock.advance(seconds=TIMEOUT_SECONDS)
    done = [each for each in at_once([ground.sweep] * 8) if isinstance(each, http_jobs.Overdue)]
    assert sorted(job_id for each in done for job_id in each.ids) == sorted(job.job_id for job in jobs)
