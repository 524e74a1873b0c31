import json
from datetime import UTC, datetime

import pytest

from laneway.domain.events import CATALOGUE
from laneway.webhooks.formats import Format, render
from laneway.webhooks.messages import payload

AT = datetime(2026, 1, 1, 12, tzinfo=UTC)
JOB = {
    "job_id": "j1",
    "status": "failed",
    "result": None,
    "error": {"message": "\u00fc\u2028"},
    "tags": ["a"],
}


def stored(data: dict[str, object], event_type: str = "job.failed") -> bytes:
    return payload(event_type, data, at=AT)


def test_the_standard_form_is_the_stored_bytes() -> None:
    body = stored(JOB)
    assert render(body, Format.STANDARD, message_id="msg_1") is body


@pytest.mark.parametrize("event_type", sorted(CATALOGUE))
def test_a_cloudevent_has_the_required_attributes_and_nothing_unknown(event_type: str) -> None:
    event = json.loads(render(stored(JOB, event_type), Format.CLOUDEVENTS, message_id="msg_1"))
    assert event == {
        "specversion": "1.0",
        "id": "msg_1",
        "source": "/api/v1/jobs/j1",
        "type": event_type,
        "time": "2026-01-01T12:00:00.000000Z",
        "datacontenttype": "application/json",
        "data": JOB,
    }


def test_what_is_told_of_no_job_comes_from_the_service() -> None:
    body = stored({"endpoint_id": "e1", "url": "https://a.example/?token=1"}, "endpoint.test")
    event = json.loads(render(body, Format.CLOUDEVENTS, message_id="msg_1"))
    assert (event["source"], event["data"]["endpoint_id"]) == ("/api/v1", "e1")


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (JOB, {"job_id": "j1", "status": "failed"}),
        ({"batch_id": "b1", "results": [1]}, {"batch_id": "b1"}),
        ({"chain_id": "c1", "step": "x"}, {"chain_id": "c1"}),
        ({"scheduled_job_id": "s1", "reason": "late"}, {"scheduled_job_id": "s1"}),
        ({"endpoint_id": "e1", "url": "https://a.example/"}, {"endpoint_id": "e1"}),
        ({}, {}),
    ],
)
def test_the_thin_form_keeps_ids_and_the_status(data: dict[str, object], kept: dict[str, object]) -> None:
    thin = json.loads(render(stored(data), Format.THIN, message_id="msg_1"))
    assert thin == {"type": "job.failed", "timestamp": "2026-01-01T12:00:00.000000Z", "data": kept}


@pytest.mark.parametrize("form", Format)
def test_each_rendering_of_a_message_is_the_same_to_the_byte(form: Format) -> None:
    numbers = {"result": [1.1, 1e300, 10**30, -0.0, "\ud800", "\0"]}
    first, second = (render(stored(JOB | numbers), form, message_id="msg_1") for _ in range(2))
    assert first == second
    json.loads(first.decode("utf-8"))


def test_only_cloudevents_have_a_content_type_of_their_own() -> None:
    assert {form: form.content_type for form in Format} == {
        Format.STANDARD: "application/json",
        Format.CLOUDEVENTS: "application/cloudevents+json; charset=utf-8",
        Format.THIN: "application/json",
    }
