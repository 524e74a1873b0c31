from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from laneway.domain.events import EventType
from laneway.domain.spec import MAX_SECONDS, JobSpec, Priority, lane_of, lanes_of

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def spec(**fields: Any) -> JobSpec:
    return JobSpec(**{"job_type": "demo.echo", **fields})


HOOK = {"webhook_url": "https://example.org"}
LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("job_type", ["a", "a" * 100, "a.b_c.0"], ["", "a" * 101, "A", "0a", "a.", ".a", "a..b", "a-b", "a\n"]),
    ("queue", ["q", "q" * 50, "default"], ["", "q" * 51, "Q", "0q", "_q", "q-high", "q\n"]),
    ("title", ["", "t" * 200], ["t" * 201]),
    ("description", ["", "d" * 2000], ["d" * 2001]),
    ("tags", [[], ["t"] * 20, ["t" * 100]], [["t"] * 21, ["t" * 101], [""]]),
    ("timeout_seconds", [1, MAX_SECONDS], [0, MAX_SECONDS + 1, -1, 1.5]),
    ("max_retries", [0, 100], [-1, 101]),
    ("delay_seconds", [0, MAX_SECONDS], [-0.001, MAX_SECONDS + 1, float("inf"), float("nan")]),
    ("retry_delay_seconds", [0, MAX_SECONDS], [-0.001, MAX_SECONDS + 1, float("inf"), float("nan")]),
    ("retry_max_delay_seconds", [0, MAX_SECONDS], [-0.001, MAX_SECONDS + 1, float("inf"), float("nan")]),
    ("retry_backoff", [1, 10], [0.999, 10.001, float("inf"), float("nan")]),
    ("unique_key", ["k", "k" * 200], ["", "k" * 201]),
    ("webhook_url", ["u", "u" * 2048], ["", "u" * 2049]),
    ("on_conflict", ["return_existing", "reject"], ["ignore"]),
    ("scheduled_for", [NOW], [NOW.replace(tzinfo=None)]),
    ("expires_at", [NOW], [NOW.replace(tzinfo=None)]),
]


@pytest.mark.parametrize(("field", "inside", "outside"), LIMITS, ids=[field for field, _, _ in LIMITS])
def test_a_field_is_taken_at_its_limit_and_refused_one_past_it(
    field: str, inside: list[Any], outside: list[Any]
) -> None:
    for value in inside:
        spec(**{field: value})
    for value in outside:
        with pytest.raises(ValidationError) as caught:
            spec(**{field: value})
        assert [error["loc"][0] for error in caught.value.errors() if error["loc"]] in ([field], [])


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="priorty"):
        spec(priorty="high")


@pytest.mark.parametrize(
    ("written", "priority"),
    [(10, "critical"), (8, "high"), (5, "normal"), (0, "low"), *((p.value, p.value) for p in Priority)],
)
def test_a_priority_is_a_name_or_one_of_four_numbers(written: Any, priority: str) -> None:
    assert spec(priority=written).priority == priority


@pytest.mark.parametrize("written", [1, 9, 11, -1, True, False, "urgent", "HIGH", "10", None, 5.0])
def test_another_priority_is_refused(written: Any) -> None:
    with pytest.raises(ValidationError, match="priority"):
        spec(priority=written)


@pytest.mark.parametrize("queue", ["critical", "high", "normal", "low"])
def test_a_queue_may_not_be_named_like_a_lane_of_the_default_queue(queue: str) -> None:
    with pytest.raises(ValidationError, match="queue 'default' and a priority"):
        spec(queue=queue)


def test_no_two_pairs_of_queue_and_priority_share_a_lane() -> None:
    queues = ("default", "emails", "emails_high", "q")
    lanes = [lane_of(queue, priority) for queue in queues for priority in Priority]
    assert len(set(lanes)) == len(lanes)
    assert lanes[:4] == ["critical", "high", "normal", "low"]
    assert lanes[4:8] == ["emails-critical", "emails-high", "emails", "emails-low"]


def test_a_worker_drains_every_critical_lane_before_any_high_one() -> None:
    assert lanes_of(("default", "q")) == (
        *("critical", "q-critical"),
        *("high", "q-high"),
        *("normal", "q"),
        *("low", "q-low"),
    )


def test_a_job_is_given_one_start_and_not_two() -> None:
    with pytest.raises(ValidationError, match="not both"):
        spec(scheduled_for=NOW, delay_seconds=1)


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({}, None),
        ({"delay_seconds": 0}, None),
        ({"delay_seconds": 1.5}, NOW + timedelta(seconds=1.5)),
        ({"scheduled_for": NOW + timedelta(microseconds=1)}, NOW + timedelta(microseconds=1)),
        ({"scheduled_for": NOW}, None),
        ({"scheduled_for": NOW - timedelta(days=1)}, None),
    ],
)
def test_a_job_starts_when_it_is_due(fields: dict[str, Any], start: datetime | None) -> None:
    assert spec(**fields).starts_at(NOW) == start


def test_webhook_events_are_known_some_and_need_a_url() -> None:
    assert spec(**HOOK, webhook_events=["job.completed"]).webhook_events == (EventType.JOB_COMPLETED,)
    spec(**HOOK, webhook_events=list(EventType))
    for events in ([], ["job.exploded"], [*EventType, "job.failed"]):
        with pytest.raises(ValidationError, match="webhook_events"):
            spec(**HOOK, webhook_events=events)
    with pytest.raises(ValidationError, match="webhook_events needs a webhook_url"):
        spec(webhook_events=["job.failed"])


def test_a_spec_survives_its_own_json() -> None:
    one = spec(queue="q", priority=8, tags=["a"], scheduled_for=NOW, **HOOK, webhook_events=["job.failed"])
    assert JobSpec.model_validate_json(one.model_dump_json()) == one
    assert one.lane == "q-high"
