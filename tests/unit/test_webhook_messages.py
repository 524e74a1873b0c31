import json
from datetime import UTC, datetime, timedelta, timezone

from laneway.webhooks.messages import MAX_PAYLOAD_BYTES, message_id, payload

AT = datetime(2026, 1, 1, 12, 0, 0, 5, tzinfo=UTC)


def test_the_payload_is_type_timestamp_and_data() -> None:
    body = payload("job.completed", {"job_id": "j", "result": {"text": "\u00fc"}}, at=AT)
    expected = '{"type":"job.completed","timestamp":"2026-01-01T12:00:00.000005Z",'
    assert body.decode() == expected + '"data":{"job_id":"j","result":{"text":"\u00fc"}}}'


def test_the_timestamp_is_utc_wherever_the_moment_comes_from() -> None:
    elsewhere = AT.astimezone(timezone(timedelta(hours=5)))
    assert payload("t", {}, at=elsewhere) == payload("t", {}, at=AT)


def test_a_payload_may_have_256_kib_and_one_byte_more_costs_it_its_result() -> None:
    room = MAX_PAYLOAD_BYTES - len(payload("t", {"job_id": "j", "result": ""}, at=AT))
    fits = {"job_id": "j", "result": "x" * room}
    assert json.loads(payload("t", fits, at=AT))["data"] == fits
    too_much = {"job_id": "j", "result": "x" * (room + 1)}
    data = json.loads(payload("t", too_much, at=AT))["data"]
    assert data == {"job_id": "j", "result": None, "result_truncated": True}


def test_the_cap_counts_bytes_not_characters() -> None:
    data = json.loads(payload("t", {"result": "\u00fc" * (MAX_PAYLOAD_BYTES // 2)}, at=AT))["data"]
    assert data["result_truncated"] is True


def test_half_a_surrogate_pair_keeps_nothing_from_being_told() -> None:
    assert (
        json.loads(payload("t", {"error": {"message": "a\ud800b"}}, at=AT))["data"]["error"]["message"]
        == "a?b"
    )


def test_the_same_end_has_the_same_id_and_another_end_another() -> None:
    first = message_id("job", 3, "job.failed")
    assert first == message_id("job", 3, "job.failed")
    assert first.startswith("msg_")
    assert len(first) == 30
    assert "." not in first
    assert (
        len(
            {
                first,
                message_id("job", 4, "job.failed"),
                message_id("job", 3, "job.x"),
                message_id("k", 3, "job.failed"),
            }
        )
        == 4
    )
