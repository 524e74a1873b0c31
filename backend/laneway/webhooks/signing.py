"""Standard Webhooks 1.0.0 (standardwebhooks.com): how a receiver knows that a request is ours.

The signed bytes are `id.timestamp.body`, the body exactly as it travels. An id therefore holds no dot.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from laneway.clock import SystemClock
from laneway.errors import WebhookNotVerified
from laneway.webhooks.secrets import SECRET_PREFIX

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"
TOLERANCE_SECONDS = 300
_VERSION = "v1"


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature `v1,<base64 of the HMAC-SHA256>`; `timestamp` is Unix seconds of this attempt.

    Raises ValueError when `secret` is not base64 (after its `whsec_`) or the id holds a dot.
    """
    return _signature(secret, signed_bytes(message_id, timestamp, body))


def signed_bytes(message_id: str, timestamp: int, body: bytes) -> bytes:
    """What every kind of signature is made of. Raises ValueError when the id holds a dot."""
    if "." in message_id:
        raise ValueError("a message id must not hold a dot: it would sign the bytes of another message")
    return b"%b.%d.%b" % (message_id.encode(), timestamp, body)


def signature_headers(signatures: Sequence[str], *, message_id: str, timestamp: int) -> dict[str, str]:
    """The three headers of one attempt. Of several signatures one must fit (a rotation, v1a)."""
    return {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(timestamp),
        SIGNATURE_HEADER: " ".join(signatures),
    }


def verify_webhook(
    payload: bytes,
    headers: Mapping[str, str],
    secret: str,
    *,
    tolerance_seconds: int = TOLERANCE_SECONDS,
    now: datetime | None = None,
) -> Any:
    """The payload's JSON, once the headers prove that the holder of `secret` sent it just now.

    For receivers: hand over the raw body, never re-encoded JSON. Header names match in any case; of
    several signatures (a secret being rotated) one must fit. Raises WebhookNotVerified with the fact
    `reason`: missing_header, bad_timestamp, too_old, too_new, no_match. Remember the `webhook-id` of what
    you have handled: a delivery may come twice.
    """
    given = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, stamp, signatures = (
            given[name] for name in (ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER)
        )
    except KeyError as missing:
        raise _refused("missing_header", f"the header {missing.args[0]} is missing") from None
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise _refused("bad_timestamp", f"{TIMESTAMP_HEADER} is not a number of seconds")
    age = (now or SystemClock().now()).timestamp() - int(stamp)
    if age > tolerance_seconds:
        raise _refused("too_old", f"signed {age:.0f} s ago; at most {tolerance_seconds} s are accepted")
    if age < -tolerance_seconds:
        raise _refused("too_new", f"signed {-age:.0f} s ahead; at most {tolerance_seconds} s are accepted")
    expected = _signature(secret, _bytes(f"{message_id}.{stamp}.") + payload).encode()
    if not any(hmac.compare_digest(expected, _bytes(each)) for each in signatures.split(" ")):
        raise _refused("no_match", "no signature fits the payload and the secret")
    return json.loads(payload)


def _signature(secret: str, signed: bytes) -> str:
    # Not hmac.digest: it lets go of the GIL for every message, and waits to get it back from a busy thread.
    digest = hmac.new(_key(secret), signed, hashlib.sha256).digest()
    return f"{_VERSION},{base64.b64encode(digest).decode('ascii')}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # frameworks hand over any header as text, surrogates and all


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"a webhook secret is `{SECRET_PREFIX}` and base64") from None


def _refused(reason: str, message: str) -> WebhookNotVerified:
    return WebhookNotVerified(f"webhook not verified: {message}", reason=reason)
