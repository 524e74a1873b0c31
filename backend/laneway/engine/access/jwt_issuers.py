"""Whose JWTs are accepted: `LANEWAY_JWT_ISSUERS`, a JSON list or the path of a TOML file.

[[issuers]]
issuer = "https://login.example.org/"
audience = "laneway"
jwks_url = "https://login.example.org/.well-known/jwks.json"
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

from joserfc.jwk import OctKey
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from laneway.clock import Clock
from laneway.engine.access.jwt import Issuer
from laneway.engine.access.key_sets import FetchedKeys, GivenKey, JwtKey, KeySource, fits, public_key
from laneway.errors import Unprocessable
from laneway.settings import Settings

MAX_ISSUERS = 50
MIN_HMAC_BYTES = 32
MIN_DISTINCT_BYTES = 8  # fewer is a word or a pattern, not a random secret
HMAC = "HS256"
ASYMMETRIC = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)


class IssuerConfig(BaseModel):
    """One issuer as it is configured."""

    model_config = ConfigDict(extra="forbid")

    issuer: Annotated[str, Field(min_length=1, max_length=200)]
    audience: Annotated[str, Field(min_length=1, max_length=200)]
    jwks_url: Annotated[str, Field(pattern=r"^https://[^\s]+$")] | None = None
    key: SecretStr | None = None
    algorithms: Annotated[tuple[str, ...], Field(min_length=1)] = ("RS256", "ES256", "EdDSA", "Ed25519")
    tenant_claim: Annotated[str, Field(min_length=1, max_length=200)] = "tenant"
    roles_claim: Annotated[str, Field(min_length=1, max_length=200)] = "roles"

    @model_validator(mode="after")
    def _one_way_to_verify(self) -> Self:
        if (self.jwks_url is None) == (self.key is None):
            raise ValueError("exactly one of jwks_url and key is needed")
        if unknown := [name for name in self.algorithms if name not in (*ASYMMETRIC, HMAC)]:
            raise ValueError(
                f"unknown algorithms: {', '.join(unknown)}; known: {', '.join(ASYMMETRIC)}, {HMAC}"
            )
        if HMAC in self.algorithms and (len(self.algorithms) > 1 or self.key is None):
            raise ValueError(f"{HMAC} stands alone, and needs `key`: a public key must never verify it")
        if self.key is not None and not any(fits(self.given_key(), name) for name in self.algorithms):
            raise ValueError("the key fits none of the algorithms")
        return self

    def given_key(self) -> JwtKey:
        """`key` as a key: a shared secret for HS256, else PEM or a JWK."""
        text = self.key.get_secret_value() if self.key is not None else ""
        if self.algorithms != (HMAC,):
            return public_key(json.loads(text) if text.lstrip().startswith("{") else text)
        secret = text.encode()
        if len(secret) < MIN_HMAC_BYTES or len(set(secret)) < MIN_DISTINCT_BYTES:
            raise ValueError(f"the key of {HMAC} needs at least {MIN_HMAC_BYTES} random bytes")
        if b"-----BEGIN" in secret or text.lstrip().startswith("{"):
            raise ValueError(f"a key pair is no shared secret: leave {HMAC} out")
        return OctKey.import_key(secret)


def issuers_of(settings: Settings, clock: Clock) -> list[Issuer]:
    """Those of the setting; none when it is empty. Raises Unprocessable with what is wrong."""
    given = settings.jwt_issuers.get_secret_value()
    try:
        return parse_issuers(given, clock) if given else []
    except ValueError as error:
        raise Unprocessable(f"LANEWAY_JWT_ISSUERS: {error}") from None


def parse_issuers(
    text: str, clock: Clock, *, fetch: Callable[[str, Clock], KeySource] = FetchedKeys
) -> list[Issuer]:
    """The issuers of the setting. Raises ValueError with what is wrong, never with a key."""
    try:
        listed = json.loads(text) if text.lstrip().startswith(("[", "{")) else _of_file(Path(text))
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"neither JSON nor TOML can be read ({type(error).__name__})") from None
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_ISSUERS:
        raise ValueError(f"a list of 1 to {MAX_ISSUERS} issuers is needed")
    issuers = [_issuer(number, each, clock, fetch) for number, each in enumerate(listed, 1)]
    if len({issuer.issuer for issuer in issuers}) < len(issuers):
        raise ValueError("an issuer is there twice")
    return issuers


def _of_file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            listed = tomllib.load(file).get("issuers")
            mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    secret = isinstance(listed, list) and any(
        isinstance(each, dict) and HMAC in each.get("algorithms", ()) for each in listed
    )
    if secret and mode & 0o077:
        raise ValueError(f"{path} holds a secret and can be read by others; run: chmod 600 {path}")
    return listed


def _issuer(number: int, given: Any, clock: Clock, fetch: Callable[[str, Clock], KeySource]) -> Issuer:
    try:
        config = IssuerConfig.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        why = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in found)
        raise ValueError(f"issuer {number}: {why}") from None
    return Issuer(
        config.issuer,
        config.audience,
        frozenset(config.algorithms),
        config.tenant_claim,
        config.roles_claim,
        GivenKey(config.given_key()) if config.jwks_url is None else fetch(config.jwks_url, clock),
    )
