"""Tokens with which the target of an HTTP job reports about one attempt of it.

A token is a signed text (signed.py) that begins with `lwj_` and claims the tenant, the job and the attempt.
It has no end of its own: once the attempt is over, there is nothing that it could change.
"""

from __future__ import annotations

from laneway.engine.access.callers import AccessScope, Caller, Role
from laneway.engine.access.signed import SignedTexts
from laneway.webhooks.secrets import SecretBox

JOB_TOKEN_PREFIX = "lwj_"  # noqa: S105 - the name of the form
MAX_JOB_TOKEN_CHARACTERS = 512


class JobTokens:
    """Makes and reads them. Needs no store."""

    def __init__(self, box: SecretBox) -> None:
        self._texts = SignedTexts(
            box,
            purpose="job-tokens",
            prefix=JOB_TOKEN_PREFIX,
            most=MAX_JOB_TOKEN_CHARACTERS,
            name="the job's token",
        )

    def make(self, tenant_id: str, job_id: str, attempt: int) -> str:
        """The token of this attempt."""
        return self._texts.make([tenant_id, job_id, attempt])

    def read(self, text: str) -> Caller:
        """Whom it speaks for. Raises Unauthenticated: none of ours, or changed."""
        tenant_id, job_id, attempt = self._texts.read(text)
        return Caller(
            tenant_id,
            f"job:{job_id}",
            Role.USER,
            allowed=frozenset({AccessScope.JOBS_WRITE}),
            job_id=job_id,
            is_token=True,
            attempt=attempt,
        )
