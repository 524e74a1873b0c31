"""Finds the caller behind what a request carries: an API key, a browser token or a JWT.

Callers are remembered for CACHE_SECONDS, so that most requests cost no I/O. What changes meanwhile is
forgotten at once by whoever changes it here, and within two WATCH_SECONDS of the commit by every other
process (`KeyLooks`, engine/access/watch.py); CACHE_SECONDS is the bound for what is written past Laneway.

A wrong key costs the same whatever is wrong with it: a well-formed one is always looked up, and its
secret's hash compared with something, so that answers do not tell by their time which ids exist.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock
from laneway.db import Database
from laneway.engine.access.callers import (
    ROLE_SCOPES,
    AccessScope,
    Caller,
    Role,
    at_least,
    digest_of,
    key_id_of,
)
from laneway.engine.access.job_tokens import JOB_TOKEN_PREFIX, JobTokens
from laneway.engine.access.tokens import TOKEN_PREFIX, Token, TokenSigner
from laneway.errors import Forbidden, Unauthenticated
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox

if TYPE_CHECKING:
    from laneway.engine.access.jwt import JwtVerifier

CACHE_SECONDS = 30.0
CACHE_SIZE = 10_000
LAST_USED_SECONDS = 60.0
_NO_DIGEST = bytes(32)

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Key:
    """A row of `api_keys`, as far as it decides who passes."""

    id: str
    digest: bytes
    caller: Caller
    version: int
    revoked_at: datetime | None
    networks: tuple[str, ...]  # read only once the secret was right: it takes time

    def refusal(self, now: datetime, *, address: str | None, of_token: bool = False) -> str | None:
        """Why the key does not open now, from there; None: it does. Tokens are used where browsers are."""
        if self.revoked_at is not None:
            return "the API key was revoked"
        if self.caller.expires_at is not None and self.caller.expires_at <= now:
            return "the API key has expired"
        if self.networks and not of_token and not _is_in(address, self.networks):
            return "the API key is not for this address"
        return None


class Remembered(Generic[V]):
    """Values by name, for CACHE_SECONDS each, the CACHE_SIZE that were kept last. Safe between threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._values: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self._forgotten = 0

    def get(self, name: str) -> V | None:
        with self._lock:
            found = self._values.get(name)
        if found is None or self._clock.monotonic() - found[0] > CACHE_SECONDS:
            return None
        return found[1]

    def mark(self) -> int:
        """To be taken before a value is read, and handed to `keep`."""
        return self._forgotten

    def keep(self, name: str, value: V, mark: int) -> None:
        """Remember what was read, unless something was forgotten since the mark: it may be older."""
        with self._lock:
            if mark != self._forgotten:
                return
            self._values[name] = (self._clock.monotonic(), value)
            self._values.move_to_end(name)
            while len(self._values) > CACHE_SIZE:
                self._values.popitem(last=False)

    def forget(self, names: Iterable[str]) -> None:
        with self._lock:
            self._forgotten += 1
            for name in names:
                self._values.pop(name, None)

    def forget_if(self, names: Iterable[str], wrong: Callable[[str, V], bool]) -> None:
        """Forget those of the values that are `wrong`; what is being read meanwhile may be kept."""
        with self._lock:
            for name in names:
                if (found := self._values.get(name)) is not None and wrong(name, found[1]):
                    del self._values[name]


class Callers:
    """Who calls. Both ways in raise Unauthenticated; its message is for the log and not for the caller."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        tokens: TokenSigner | None = None,
        job_tokens: JobTokens | None = None,
        jwts: JwtVerifier | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._tokens = tokens
        self._job_tokens = job_tokens
        self._jwts = jwts
        self._keys: Remembered[Key] = Remembered(clock)
        self._newest: Mapping[str, int] = {}  # versions of keys that were changed lately
        self._bearers: Remembered[Caller] = Remembered(clock)
        self._used_lock = threading.Lock()
        self._noted: dict[str, float] = {}
        self._used: dict[str, tuple[datetime, str | None]] = {}

    @classmethod
    def from_settings(cls, settings: Settings, database: Database, clock: Clock) -> Callers:
        """Those that the settings let in. Raises Unprocessable for settings that cannot be used."""
        box = SecretBox.from_settings(settings)
        return cls(
            database,
            clock,
            tokens=TokenSigner(box),
            job_tokens=JobTokens(box),
            jwts=_jwts_of(settings, clock) if settings.jwt_issuers.get_secret_value() else None,
        )

    def refresh(self) -> None:
        """Fetch the keys of JWT issuers that are due."""
        if self._jwts is not None:
            self._jwts.refresh()

    def remembered(self, text: str, *, address: str | None = None) -> Caller | None:
        """The caller, if that can be told without I/O; None: ask `authenticate`."""
        if text.startswith(JOB_TOKEN_PREFIX):
            if self._job_tokens is None:
                raise Unauthenticated("no jobs' tokens are read here")
            return self._job_tokens.read(text)
        if text.startswith(TOKEN_PREFIX):
            token = self._token(text)
            if not token.key_id:
                return token.caller
            key = self._keys.get(token.key_id)
            return None if key is None else self._of_token(token, key)
        if self._is_jwt(text):
            caller = self._bearers.get(_fingerprint(text))
            return caller if caller is not None and self._lives(caller) else None
        key = self._keys.get(key_id_of(text))
        right = _opens(text, _NO_DIGEST if key is None else key.digest)
        if key is None or not right or key.refusal(self._clock.now(), address=address) is not None:
            return None  # wrong keys take the long way, all of them
        self._note(key.id, address)
        return key.caller

    def authenticate(self, text: str, *, address: str | None = None) -> Caller:
        """The caller, looked up. Raises Unauthenticated, Unavailable when nobody can tell."""
        mark = self._keys.mark()
        if text.startswith(TOKEN_PREFIX):
            token = self._token(text)
            if not token.key_id:
                return token.caller
            row = self._look_up(token.key_id)
            key = None if row is None else _key(token.key_id, row)
            caller = self._of_token(token, key)
        elif self._is_jwt(text):
            return self._of_jwt(text)
        else:
            key_id = key_id_of(text)
            row = self._look_up(key_id)
            right = _opens(text, _NO_DIGEST if row is None else bytes(row.digest))
            if row is None or not right:
                raise Unauthenticated("the API key is not known")
            key = _key(key_id, row)
            if (refusal := key.refusal(self._clock.now(), address=address)) is not None:
                raise Unauthenticated(refusal)
            self._note(key_id, address)
            caller = key.caller
        if key is not None and key.version >= self._newest.get(key.id, 0):
            self._keys.keep(key.id, key, mark)
        return caller

    def make_token(
        self,
        caller: Caller,
        *,
        scopes: Collection[AccessScope] | None,
        job_id: str | None,
        expires_at: datetime,
    ) -> tuple[str, Caller]:
        """A token for a browser, and whom it speaks for (engine/access/tokens.py)."""
        if self._tokens is None:
            raise Forbidden("no tokens are made here")
        return self._tokens.make(caller, scopes=scopes, job_id=job_id, expires_at=expires_at)

    def forget(self, key_ids: Iterable[str]) -> None:
        """Read these keys anew before they open again: they were changed."""
        self._keys.forget(key_ids)

    def forget_before(self, versions: Mapping[str, int]) -> None:
        """Remember nothing of these keys, by their ids, that is older than these versions.

        Says the same again while they are young: what was read before, and kept since, is found then.
        """
        self._newest = versions
        self._keys.forget_if(versions, lambda key_id, key: key.version < versions[key_id])

    def take_used(self) -> dict[str, tuple[datetime, str | None]]:
        """When, and from where, keys were used: of each at most once in LAST_USED_SECONDS."""
        with self._used_lock:
            used, self._used = self._used, {}
        return used

    # Keys

    def _look_up(self, key_id: str) -> sa.Row[*tuple[Any, ...]] | None:
        k = models.api_keys.c
        query = sa.select(
            *(k.tenant_id, k.subject, k.role, k.scopes, k.digest),
            *(k.version, k.expires_at, k.revoked_at, k.allowed_cidrs),
        )
        with self._database.read() as connection:
            return connection.execute(query.where(k.id == key_id)).first()

    def _note(self, key_id: str, address: str | None) -> None:
        now = self._clock.monotonic()
        before = self._noted.get(key_id)
        if before is not None and now - before < LAST_USED_SECONDS:
            return
        with self._used_lock:
            if len(self._noted) >= CACHE_SIZE:
                self._noted = {k: at for k, at in self._noted.items() if now - at < LAST_USED_SECONDS}
            self._noted[key_id] = now
            self._used[key_id] = (self._clock.now(), address)

    # Tokens

    def _token(self, text: str) -> Token:
        if self._tokens is None:
            raise Unauthenticated("no tokens are made here")
        return self._tokens.read(text, now=self._clock.now())

    def _of_token(self, token: Token, key: Key | None) -> Caller:
        """The token's caller: it may do no more than the key that it was made with may do now."""
        if key is None:
            raise Unauthenticated("the token's API key is not known")
        refusal = key.refusal(self._clock.now(), address=None, of_token=True)
        if refusal is not None or key.caller.tenant_id != token.caller.tenant_id:
            raise Unauthenticated(refusal or "the token's API key is another tenant's")
        if not at_least(key.caller.role, token.caller.role):
            raise Unauthenticated("the token's API key has a lesser role")
        return replace(token.caller, allowed=token.caller.scopes & key.caller.scopes)

    # JWTs

    def _is_jwt(self, text: str) -> bool:
        return self._jwts is not None and not text.startswith("lw_")

    def _lives(self, caller: Caller) -> bool:
        return caller.expires_at is not None and self._clock.now() < caller.expires_at

    def _of_jwt(self, text: str) -> Caller:
        assert self._jwts is not None  # noqa: S101 - for mypy
        mark = self._bearers.mark()
        claims = self._jwts.verify(text)
        tenant_id = find_tenant(self._database, claims.tenant)
        if tenant_id is None:
            raise Unauthenticated("the JWT names no tenant that is here")
        caller = Caller(tenant_id, claims.subject, claims.role, expires_at=claims.expires_at)
        self._bearers.keep(_fingerprint(text), caller, mark)
        return caller


def _opens(text: str, digest: bytes) -> bool:
    """Whether the secret in the key `text` has this hash."""
    return hmac.compare_digest(digest_of(text), digest)


def _key(key_id: str, row: sa.Row[*tuple[Any, ...]]) -> Key:
    caller = Caller(
        row.tenant_id,
        row.subject,
        Role(row.role),
        key_id,
        allowed=None if row.scopes is None else known_scopes(row.scopes),
        expires_at=row.expires_at,
    )
    networks = tuple(row.allowed_cidrs or ())
    return Key(key_id, bytes(row.digest), caller, row.version, row.revoked_at, networks)


def known_scopes(names: Iterable[str]) -> frozenset[AccessScope]:
    """Those of `names` that this release knows: what a newer one gave opens nothing here."""
    every = {scope.value: scope for scope in ROLE_SCOPES[Role.ADMIN]}
    return frozenset(every[name] for name in names if name in every)


def find_tenant(database: Database, name: str) -> str | None:
    """The id of the tenant with this id or, when there is none, with this name."""
    t = models.tenants.c
    ways = [t.name == name]
    with suppress(ValueError):
        ways.insert(0, t.id == str(UUID(name)))
    with database.read() as connection:
        for way in ways:
            found = connection.execute(sa.select(t.id).where(way)).scalar()
            if found is not None:
                return str(found)
    return None


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


_network = lru_cache(CACHE_SIZE)(ip_network)


def _is_in(address: str | None, networks: Iterable[str]) -> bool:
    try:
        here = ip_address(address or "")
    except ValueError:
        return False
    return any(here in _network(cidr) for cidr in networks)


def _jwts_of(settings: Settings, clock: Clock) -> JwtVerifier | None:
    # Loaded only where issuers are named: what reads JWTs is a tenth of what an API loads.
    from laneway.engine.access.jwt import JwtVerifier
    from laneway.engine.access.jwt_issuers import issuers_of

    issuers = issuers_of(settings, clock)
    return JwtVerifier(issuers, clock) if issuers else None
