"""Texts that only we can have made: what they claim, and a mark under a key of ours.

    <prefix><key id>.<claims>.<HMAC-SHA256>

They are kept nowhere: who holds the encryption keys can check one. The key of the mark is derived from
those (HKDF) for one purpose alone; the first signs, all verify.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

from laneway.errors import Unauthenticated
from laneway.webhooks.secrets import SecretBox


class SignedTexts:
    """Makes and reads those of one `purpose`; `name` is what refusals call them. Needs no store."""

    def __init__(self, box: SecretBox, *, purpose: str, prefix: str, most: int, name: str) -> None:
        self._keys = box.derived(purpose)
        self._prefix = prefix
        self._most = most
        self._name = name

    def make(self, claims: Any) -> str:
        """The text that says this, as JSON."""
        key_id = next(iter(self._keys))
        body = _base64(json.dumps(claims, separators=(",", ":")).encode())
        signed = f"{self._prefix}{key_id}.{body}"
        return f"{signed}.{self._mac(key_id, signed)}"

    def read(self, text: str) -> Any:
        """What it claims. Raises Unauthenticated: longer than `most` characters, none of ours, or changed."""
        signed, _, mac = text.rpartition(".")
        key_id, _, claims = signed.removeprefix(self._prefix).partition(".")
        if len(text) > self._most or not text.isascii() or key_id not in self._keys:
            raise Unauthenticated(f"{self._name} is malformed")
        if not hmac.compare_digest(self._mac(key_id, signed), mac):
            raise Unauthenticated(f"{self._name} was not made here")
        return json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))

    def _mac(self, key_id: str, text: str) -> str:
        return _base64(hmac.digest(self._keys[key_id], text.encode(), hashlib.sha256))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
