from typing import Any

import pytest

from laneway.domain.events import CATALOGUE, known_pattern
from laneway.webhooks.subscriptions import Subscriber

JOB = {"queue": "emails", "job_type": "demo.echo", "tags": ["a", "b"]}


def subscriber(event_types: list[str], **filters: list[str]) -> Subscriber:
    return Subscriber("e1", "https://hooks.example.org/", "enabled", event_types, filters, ())


@pytest.mark.parametrize("pattern", [*sorted(CATALOGUE), "job.*", "endpoint.*", "schedule.*", "*"])
def test_events_and_globs_of_them_may_be_subscribed_to(pattern: str) -> None:
    assert known_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "job", "job.", "job.done", "job.com*", "*.completed", "jobs.*", "**", "job.*.*", "j?b.*"),
        *("JOB.*", "job.completed ", "job.completed\n", "[a-z]*", "*.*"),
    ],
)
def test_what_matches_no_event_or_is_no_plain_glob_may_not(pattern: str) -> None:
    assert not known_pattern(pattern)


@pytest.mark.parametrize(
    ("event_types", "heard"),
    [
        (["job.completed"], {"job.completed"}),
        (["job.completed", "job.failed"], {"job.completed", "job.failed"}),
        (["job.*"], {name for name in CATALOGUE if name.startswith("job.")}),
        (["endpoint.*"], {name for name in CATALOGUE if name.startswith("endpoint.")}),
        (["*"], set(CATALOGUE)),
    ],
)
def test_an_endpoint_hears_what_its_patterns_cover(event_types: list[str], heard: set[str]) -> None:
    assert {name for name in CATALOGUE if subscriber(event_types).wants(name, JOB)} == heard


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, True),
        ({"queues": []}, True),
        ({"queues": ["emails"]}, True),
        ({"queues": ["default"]}, False),
        ({"queues": ["default", "emails"]}, True),
        ({"job_types": ["demo.echo"]}, True),
        ({"job_types": ["demo"]}, False),
        ({"tags": ["b", "z"]}, True),
        ({"tags": ["z"]}, False),
        ({"queues": ["emails"], "job_types": ["demo.echo"], "tags": ["a"]}, True),
        ({"queues": ["emails"], "job_types": ["demo.echo"], "tags": ["z"]}, False),
        ({"queues": ["emails"], "job_types": ["other"], "tags": ["a"]}, False),
    ],
)
def test_every_filter_that_is_set_must_fit(filters: dict[str, Any], wanted: bool) -> None:
    assert subscriber(["job.*"], **filters).wants("job.completed", JOB) is wanted


def test_a_job_without_tags_fits_no_tag() -> None:
    assert not subscriber(["*"], tags=["a"]).wants("job.completed", JOB | {"tags": []})


def test_filters_are_of_jobs_and_let_everything_else_through() -> None:
    assert subscriber(["*"], queues=["other"]).wants("endpoint.disabled")
    assert not subscriber(["job.*"], queues=["other"]).wants("endpoint.disabled")
