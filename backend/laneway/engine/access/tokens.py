"""Tokens for browsers: short-lived, with fewer rights, maybe for one job only.

A token is a signed text (signed.py) that begins with `lwt_`. It dies with the API key it was made with.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from laneway.engine.access.callers import AccessScope, Caller, Role
from laneway.engine.access.signed import SignedTexts
from laneway.errors import FieldError, Forbidden, Unauthenticated, Unprocessable
from laneway.webhooks.secrets import SecretBox

TOKEN_PREFIX = "lwt_"  # noqa: S105 - the name of the form
MAX_TOKEN_SECONDS = 900
MAX_TOKEN_CHARACTERS = 2048
NEVER_IN_TOKENS = frozenset({AccessScope.KEYS_MANAGE})  # or a stolen token could make a key that stays
OF_A_JOB = frozenset({AccessScope.JOBS_READ, AccessScope.JOBS_WRITE})


@dataclass(frozen=True, slots=True)
class Token:
    """Whom a token speaks for, and the API key it was made with: empty when it was made with a JWT."""

    caller: Caller
    key_id: str


class TokenSigner:
    """Makes and reads tokens. Needs no store."""

    def __init__(self, box: SecretBox) -> None:
        self._texts = SignedTexts(
            box, purpose="browser-tokens", prefix=TOKEN_PREFIX, most=MAX_TOKEN_CHARACTERS, name="the token"
        )

    def make(
        self,
        caller: Caller,
        *,
        scopes: Collection[AccessScope] | None,
        job_id: str | None,
        expires_at: datetime,
    ) -> tuple[str, Caller]:
        """A token of `caller`, and whom it speaks for.

        Without `scopes` it may do what the caller may, or look at its job. Whether the caller may see that
        job is for others to check. Raises Forbidden for a caller that is a token itself and for scopes that
        the caller has not, Unprocessable for those that no token has.
        """
        if caller.is_token:
            raise Forbidden("a token makes no tokens; use the API key")
        possible = frozenset(AccessScope) - NEVER_IN_TOKENS if job_id is None else OF_A_JOB
        usual = caller.scopes if job_id is None else frozenset({AccessScope.JOBS_READ})
        if job_id is not None:
            caller.need_scope(AccessScope.JOBS_READ)
        for scope in scopes or ():
            if scope not in possible:
                detail = f"no {'token' if job_id is None else 'token of one job'} has the scope {scope}"
                raise Unprocessable(detail, errors=(FieldError("/scopes", detail, "scope_not_possible"),))
            caller.need_scope(scope)
        granted = (usual if scopes is None else frozenset(scopes)) & possible & caller.scopes
        ends = [expires_at] + ([caller.expires_at] if caller.expires_at is not None else [])
        expires_at = datetime.fromtimestamp(int(min(ends).timestamp()), UTC)
        made = replace(caller, allowed=granted, expires_at=expires_at, job_id=job_id, is_token=True)
        claims = {
            "t": made.tenant_id,
            "s": made.subject,
            "r": made.role.value,
            "c": sorted(granted),
            "k": made.key_id,
            "j": job_id,
            "e": int(expires_at.timestamp()),
        }
        return self._texts.make(claims), made

    def read(self, text: str, *, now: datetime) -> Token:
        """What a token says. Raises Unauthenticated: none of ours, changed, or over."""
        said = self._texts.read(text)
        expires_at = datetime.fromtimestamp(said["e"], UTC)
        if expires_at <= now:
            raise Unauthenticated("the token has expired")
        caller = Caller(
            said["t"],
            said["s"],
            Role(said["r"]),
            said["k"],
            allowed=frozenset(AccessScope(scope) for scope in said["c"]),
            expires_at=expires_at,
            job_id=said["j"],
            is_token=True,
        )
        return Token(caller, said["k"])


def token_end(now: datetime, seconds: int) -> datetime:
    """When a token of `seconds` ends; at most MAX_TOKEN_SECONDS from now."""
    return now + timedelta(seconds=min(seconds, MAX_TOKEN_SECONDS))
