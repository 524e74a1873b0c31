"""JSON Web Tokens of issuers that the installation trusts (RFC 7519, RFC 8725, RFC 9068).

Laneway makes none: it is a resource server. What a token says counts only when all of this holds: its
issuer is configured; its algorithm is one of that issuer's; its signature fits a key of that issuer's;
it is for us (`aud`), in time, short-lived, and names a tenant. Whatever is wrong is one refusal outside;
the reason is for the log.

An issuer is trusted for every tenant and every role that its tokens name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError

from laneway.clock import Clock
from laneway.engine.access.callers import Role
from laneway.engine.access.key_sets import JwtKey, KeySource
from laneway.errors import Unauthenticated

MAX_JWT_CHARACTERS = 8192
MAX_JWT_HOURS = 24
LEEWAY_SECONDS = 30
MAX_NAME_CHARACTERS = 100  # of a tenant or subject

_FORM = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
_FORBIDDEN_HEADERS = frozenset({"jku", "x5u", "x5c", "jwk", "crit", "b64", "cty", "zip", "enc"})


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who may sign tokens, how, and where in them tenant and roles stand."""

    issuer: str
    audience: str
    algorithms: frozenset[str]
    tenant_claim: str
    roles_claim: str
    keys: KeySource


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says. `tenant` is a name or an id."""

    tenant: str
    subject: str
    role: Role
    expires_at: datetime


class JwtVerifier:
    """Checks tokens. Safe to use from many threads; may fetch keys, and so is not for an event loop."""

    def __init__(self, issuers: Sequence[Issuer], clock: Clock) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._clock = clock

    def verify(self, text: str) -> Claims:
        """What the token says. Raises Unauthenticated; Unavailable while its issuer's keys cannot be had."""
        if len(text) > MAX_JWT_CHARACTERS or not _FORM.fullmatch(text):
            raise Unauthenticated("the JWT is malformed")
        header, said = (_object(part) for part in text.split(".")[:2])
        issuer = self._issuer(said)
        algorithm = _algorithm(header, issuer)
        claims = self._claims(said, issuer)
        key = issuer.keys.find(_key_id(header), algorithm)
        if key is None:
            raise Unauthenticated("the JWT is signed with an unknown key")
        _check_signature(text, key, algorithm)
        return claims

    def refresh(self) -> None:
        """Fetch the keys that are due. For a thread in the background; failures are only logged."""
        for issuer in self._issuers.values():
            issuer.keys.refresh()

    def _issuer(self, said: Mapping[str, Any]) -> Issuer:
        name = said.get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise Unauthenticated("the JWT's issuer is not configured")
        return issuer

    def _claims(self, said: Mapping[str, Any], issuer: Issuer) -> Claims:
        audience = said.get("aud")
        audiences = [audience] if isinstance(audience, str) else audience
        if not isinstance(audiences, list) or issuer.audience not in audiences:
            raise Unauthenticated("the JWT is for somebody else")
        now = self._clock.now()
        soon = now + timedelta(seconds=LEEWAY_SECONDS)
        expires_at, issued_at = _moment(said, "exp"), _moment(said, "iat")
        if expires_at <= now:
            raise Unauthenticated("the JWT has expired")
        if issued_at > soon or ("nbf" in said and _moment(said, "nbf") > soon):
            raise Unauthenticated("the JWT is of the future")
        if not timedelta() < expires_at - issued_at <= timedelta(hours=MAX_JWT_HOURS):
            raise Unauthenticated(f"the JWT lives longer than {MAX_JWT_HOURS} hours")
        tenant, subject = _name(said, issuer.tenant_claim), _name(said, "sub", longest=255)
        return Claims(tenant, _subject(subject, issuer.issuer), _role(said, issuer.roles_claim), expires_at)


def _object(part: str) -> dict[str, Any]:
    """One part as the JSON object it is: UTF-8, each name once, no NaN."""
    try:
        read = json.loads(
            base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True).decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError):
        raise Unauthenticated("the JWT is malformed") from None
    if not isinstance(read, dict):
        raise Unauthenticated("the JWT is malformed")
    return read


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("a name is there twice")
    return read


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _algorithm(header: Mapping[str, Any], issuer: Issuer) -> str:
    if not _FORBIDDEN_HEADERS.isdisjoint(header):
        raise Unauthenticated("the JWT brings keys or extensions of its own")
    kind = header.get("typ")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise Unauthenticated("the JWT is of another type")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
        raise Unauthenticated("the JWT's algorithm is not its issuer's")
    return algorithm


def _key_id(header: Mapping[str, Any]) -> str | None:
    key_id = header.get("kid")
    if key_id is not None and not (isinstance(key_id, str) and 0 < len(key_id) <= 200):
        raise Unauthenticated("the JWT's key id is malformed")
    return key_id


class _Registry(jws.JWSRegistry):
    """Without joserfc's warnings about algorithms that are on their way out: EdDSA is what issuers use."""

    def get_alg(self, name: str) -> Any:
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


def _check_signature(text: str, key: JwtKey, algorithm: str) -> None:
    registry = _Registry(algorithms=[algorithm], strict_check_header=False)
    try:
        jws.deserialize_compact(text, key, registry=registry)
    except (JoseError, ValueError, TypeError):
        raise Unauthenticated("the JWT's signature is wrong") from None


def _moment(said: Mapping[str, Any], name: str) -> datetime:
    seconds = said.get(name)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise Unauthenticated(f"the JWT has no {name}")
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise Unauthenticated(f"the JWT's {name} is out of range") from None


def _name(said: Mapping[str, Any], claim: str, *, longest: int = MAX_NAME_CHARACTERS) -> str:
    name = said.get(claim)
    if not isinstance(name, str) or not 0 < len(name) <= longest or not name.isprintable():
        raise Unauthenticated(f"the JWT has no usable {claim}")
    return name


def _subject(subject: str, issuer: str) -> str:
    """Unique over issuers: `sub` is unique only within one (OpenID Connect Core 1.0, section 2)."""
    text = f"{subject}@{issuer.removeprefix('https://')}"
    return text if len(text) <= MAX_NAME_CHARACTERS else f"jwt:{hashlib.sha256(text.encode()).hexdigest()}"


def _role(said: Mapping[str, Any], claim: str) -> Role:
    """The strongest role that is named; a user when none is."""
    named = said.get(claim, [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Unauthenticated("the JWT's roles are malformed")
    return next((role for role in reversed(Role) if role.value in names), Role.USER)
