"""The forms a message may travel in. All are made from the stored bytes, the same ones each time."""

from __future__ import annotations

import json
from enum import StrEnum

_THIN = ("job_id", "status", "batch_id", "chain_id", "scheduled_job_id", "endpoint_id")


class Format(StrEnum):
    """What an endpoint receives."""

    STANDARD = "standard"  # Standard Webhooks: {"type", "timestamp", "data"}
    CLOUDEVENTS = "cloudevents"  # CloudEvents 1.0, structured mode
    THIN = "thin"  # the same envelope with ids alone: the receiver asks for the rest

    @property
    def content_type(self) -> str:
        if self is Format.CLOUDEVENTS:
            return "application/cloudevents+json; charset=utf-8"
        return "application/json"


def render(payload: bytes, form: Format, *, message_id: str) -> bytes:
    """The body to sign and send. `payload` is the stored message, which the standard form is."""
    if form is Format.STANDARD:
        return payload
    envelope = json.loads(payload)
    data = envelope["data"]
    if form is Format.THIN:
        envelope["data"] = {name: data[name] for name in _THIN if data.get(name) is not None}
    else:
        job_id = data.get("job_id")
        envelope = {
            "specversion": "1.0",
            "id": message_id,
            "source": f"/api/v1/jobs/{job_id}" if job_id else "/api/v1",
            "type": envelope["type"],
            "time": envelope["timestamp"],
            "datacontenttype": "application/json",
            "data": data,
        }
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode()
