"""Tokens with which the target of an HTTP job reports about one attempt of it.

    lwj_<key id>.<claims>.<HMAC-SHA256>

The claims are the tenant, the job and the attempt. Like a browser's token (tokens.py) one is kept nowhere,
and its key is derived from the encryption keys for this purpose alone. It has no end of its own: once the
attempt is over, there is nothing that it could change.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

from laneway.engine.access.callers import AccessScope, Caller, Role
from laneway.errors import Unauthenticated
from laneway.webhooks.secrets import SecretBox

JOB_TOKEN_PREFIX = "lwj_"  # noqa: S105 - the name of the form
MAX_JOB_TOKEN_CHARACTERS = 512


class JobTokens:
    """Makes and reads them. Needs no store."""

    def __init__(self, box: SecretBox) -> None:
        self._keys = box.derived("job-tokens")

    def make(self, tenant_id: str, job_id: str, attempt: int) -> str:
        """The token of this attempt."""
        key_id = next(iter(self._keys))
        claims = json.dumps([tenant_id, job_id, attempt], separators=(",", ":"))
        text = f"{JOB_TOKEN_PREFIX}{key_id}.{_base64(claims.encode())}"
        return f"{text}.{self._mac(key_id, text)}"

    def read(self, text: str) -> Caller:
        """Whom it speaks for. Raises Unauthenticated: none of ours, or changed."""
        signed, _, mac = text.rpartition(".")
        key_id, _, claims = signed.removeprefix(JOB_TOKEN_PREFIX).partition(".")
        if len(text) > MAX_JOB_TOKEN_CHARACTERS or not text.isascii() or key_id not in self._keys:
            raise Unauthenticated("the job's token is malformed")
        if not hmac.compare_digest(self._mac(key_id, signed), mac):
            raise Unauthenticated("the job's token was not made here")
        tenant_id, job_id, attempt = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return Caller(
            tenant_id,
            f"job:{job_id}",
            Role.USER,
            allowed=frozenset({AccessScope.JOBS_WRITE}),
            job_id=job_id,
            is_token=True,
            attempt=attempt,
        )

    def _mac(self, key_id: str, text: str) -> str:
        return _base64(hmac.digest(self._keys[key_id], text.encode(), hashlib.sha256))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
