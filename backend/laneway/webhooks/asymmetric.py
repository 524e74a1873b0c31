"""Standard Webhooks' v1a: ed25519 signatures (RFC 8032), for receivers that should hold no secret.

A key pair is a tenant's. Private keys are written `whsk_` and base64 of 32 bytes, public ones `whpk_`.
"""

from __future__ import annotations

import base64
import binascii

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from laneway.webhooks.signing import signed_bytes

PRIVATE_PREFIX, PUBLIC_PREFIX = "whsk_", "whpk_"


def new_private_key() -> str:
    """A fresh private key, as text."""
    return PRIVATE_PREFIX + _base64(Ed25519PrivateKey.generate().private_bytes_raw())


def public_key(private_key: str) -> str:
    """What receivers verify with. Raises ValueError."""
    return PUBLIC_PREFIX + _base64(_key(private_key).public_key().public_bytes_raw())


def sign(private_key: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature `v1a,<base64>` of the bytes that v1 signs too.

    Raises ValueError for what is no key, and when the id holds a dot.
    """
    return f"v1a,{_base64(_key(private_key).sign(signed_bytes(message_id, timestamp, body)))}"


def _key(text: str) -> Ed25519PrivateKey:
    try:
        raw = base64.b64decode(text.removeprefix(PRIVATE_PREFIX), validate=True)
        return Ed25519PrivateKey.from_private_bytes(raw)
    except (binascii.Error, ValueError):
        raise ValueError(f"a private key is `{PRIVATE_PREFIX}` and base64 of 32 bytes") from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
