"""The keys of issuers: given with the settings, or fetched from a JWKS URL (RFC 7517) and kept.

A fetched set is good for FRESH_SECONDS. After that one thread fetches it again while the others go on
with what is there; for KEPT_SECONDS when the issuer does not answer. A key id that is not in the set may
be a new one: then it is fetched at most once in RETRY_SECONDS, however many tokens name it. Nobody waits
for a fetch of somebody else: that request is answered 503, and tried again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from laneway.clock import Clock
from laneway.errors import Unavailable
from laneway.log import get_logger

FRESH_SECONDS = 600.0
RETRY_SECONDS = 30.0
KEPT_SECONDS = 24 * 3600.0
FETCH_SECONDS = 5.0
MAX_SET_BYTES = 256 * 1024
MAX_KEYS_OF_A_SET = 100
MIN_RSA_BITS = 2048

JwtKey = RSAKey | ECKey | OKPKey | OctKey

log = get_logger("jwt")


class KeySource(Protocol):
    """Where an issuer's keys are."""

    def find(self, key_id: str | None, algorithm: str) -> JwtKey | None:
        """The key with that id or, without an id, the only one for `algorithm`. May raise Unavailable."""
        ...

    def refresh(self) -> None:
        """Fetch what is due, if anything is to be fetched."""
        ...


class GivenKey:
    """The one key that stands in the settings."""

    def __init__(self, key: JwtKey) -> None:
        self._key = key

    def find(self, key_id: str | None, algorithm: str) -> JwtKey | None:
        if key_id is not None and self._key.kid is not None and key_id != self._key.kid:
            return None
        return self._key if fits(self._key, algorithm) else None

    def refresh(self) -> None:
        pass


class FetchedKeys:
    """The set behind a URL."""

    def __init__(self, url: str, clock: Clock, *, transport: httpx.BaseTransport | None = None) -> None:
        if not url.startswith("https://"):
            raise ValueError("jwks_url must be an https:// URL")
        self._url = url
        self._clock = clock
        self._transport = transport
        self._fetching = threading.Lock()
        self._keys: Sequence[JwtKey] | None = None
        self._fetched_at = 0.0
        self._tried_at: float | None = None

    def find(self, key_id: str | None, algorithm: str) -> JwtKey | None:
        if self._age() > FRESH_SECONDS:
            self._fetch()
        found = self._pick(key_id, algorithm)
        if found is None and self._fetch(at_once=False):
            found = self._pick(key_id, algorithm)
        return found

    def refresh(self) -> None:
        with suppress(Unavailable):
            if self._age() > FRESH_SECONDS:
                self._fetch()

    def _age(self) -> float:
        return float("inf") if self._keys is None else self._clock.monotonic() - self._fetched_at

    def _pick(self, key_id: str | None, algorithm: str) -> JwtKey | None:
        if self._keys is None or self._age() > KEPT_SECONDS:
            raise Unavailable("the keys of the token's issuer cannot be fetched")
        possible = [key for key in self._keys if fits(key, algorithm) and key_id in (None, key.kid)]
        return possible[0] if len(possible) == 1 else None

    def _fetch(self, *, at_once: bool = True) -> bool:
        """True when the set was fetched just now. Not more often than every RETRY_SECONDS.

        With `at_once` False the caller misses a key, and raises Unavailable rather than refuse a token that
        another thread is fetching the key of.
        """
        if not self._fetching.acquire(blocking=False):
            if at_once and self._keys is not None:
                return False
            raise Unavailable("the keys of the token's issuer are being fetched", retry_after_seconds=1)
        try:
            now = self._clock.monotonic()
            if self._tried_at is not None and now - self._tried_at < RETRY_SECONDS:
                return False
            self._tried_at = now
            try:
                self._keys = read_set(self._get())
            except (httpx.HTTPError, ValueError) as error:
                log.warning("jwks_fetch_failed", url=self._url, reason=f"{type(error).__name__}: {error}")
                return False
            self._fetched_at = now
            log.info("jwks_fetched", url=self._url, keys=len(self._keys))
            return True
        finally:
            self._fetching.release()

    def _get(self) -> bytes:
        """The body: from this URL, no other, and no longer than it may be."""
        with (
            httpx.Client(
                transport=self._transport, timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False
            ) as client,
            client.stream("GET", self._url, headers={"Accept": "application/json"}) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"it answers {response.status_code}")
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_SET_BYTES:
                    raise ValueError(f"it is longer than {MAX_SET_BYTES} bytes")
            return body


def read_set(body: bytes) -> Sequence[JwtKey]:
    """The public signature keys of a JWKS; others are left out. Raises ValueError when it holds none."""
    try:
        listed = json.loads(body)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is no JWKS") from None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS_OF_A_SET:
        raise ValueError(f"it is no JWKS of at most {MAX_KEYS_OF_A_SET} keys")
    keys = [key for each in listed if (key := _public_key(each)) is not None]
    if not keys:
        raise ValueError("it holds no signature key that can be used")
    return keys


def _public_key(jwk: Any) -> JwtKey | None:
    """None for what is no public key to verify with: a shared secret in a public place is none."""
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig":
        return None
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    with suppress(ValueError):
        return public_key(jwk)
    return None


_PUBLIC_MEMBERS = frozenset({"kty", "kid", "alg", "use", "n", "e", "crv", "x", "y"})


# No "oct": what verifies with a shared secret must never come from a public place.
_KINDS: Mapping[str, type[RSAKey | ECKey | OKPKey]] = {"RSA": RSAKey, "EC": ECKey, "OKP": OKPKey}


def public_key(given: str | Mapping[str, Any]) -> JwtKey:
    """The public key in PEM or a JWK. Raises ValueError that does not repeat it."""
    try:
        if isinstance(given, str):
            key = _KINDS[_kind_of_pem(given)].import_key(given)
        else:
            public = {name: value for name, value in given.items() if name in _PUBLIC_MEMBERS}
            key = _KINDS[public["kty"]].import_key(public)
    except (JoseError, ValueError, KeyError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"no public key that can be used ({type(error).__name__})") from None
    if isinstance(key, RSAKey) and key.raw_value.key_size < MIN_RSA_BITS:
        raise ValueError(f"an RSA key of less than {MIN_RSA_BITS} bits")
    return key


def _kind_of_pem(text: str) -> str:
    key = load_pem_public_key(text.encode())
    if isinstance(key, RSAPublicKey):
        return "RSA"
    return "EC" if isinstance(key, EllipticCurvePublicKey) else "OKP"


_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_EDWARDS = {"EdDSA": ("Ed25519", "Ed448"), "Ed25519": ("Ed25519",)}


def fits(key: JwtKey, algorithm: str) -> bool:
    """Whether signatures by `algorithm` may be of this key."""
    if key.get("alg") not in (None, algorithm):
        return False
    if algorithm in _CURVES:
        return isinstance(key, ECKey) and key.curve_name == _CURVES[algorithm]
    if algorithm.startswith("Ed"):
        return isinstance(key, OKPKey) and key.curve_name in _EDWARDS[algorithm]
    return isinstance(key, OctKey if algorithm.startswith("HS") else RSAKey)
