"""What a process in production refuses to start with, and what to do about each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from laneway.clock import SystemClock
from laneway.errors import LanewayError, Unprocessable
from laneway.settings import Settings, is_loopback
from laneway.webhooks.secrets import KEY_BYTES, parse_keys

MIN_DISTINCT_BYTES = 16  # 32 random bytes have fewer once in 10¹⁰ keys


class NotForProduction(LanewayError):
    """Settings that only a developer's machine may have."""

    code, title = "not_for_production", "These settings are not for production"


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong, without any secret: `remedy` says what to do."""

    setting: str
    detail: str
    remedy: str


def need_fit_for_production(settings: Settings, *, api: bool) -> None:
    """Raise NotForProduction with all that is wrong, when LANEWAY_ENVIRONMENT is `production`."""
    if settings.environment != "production":
        return
    found = [f"{each.setting}: {each.detail}; {each.remedy}" for each in troubles(settings, api=api)]
    if found:
        raise NotForProduction("not fit for production:\n  " + "\n  ".join(found))


def troubles(settings: Settings, *, api: bool = True) -> Iterator[Trouble]:
    """What is wrong with the settings of a process in production; of an API also what it lets in."""
    yield from _encryption_keys(settings)
    if not api:
        return
    yield from _doors(settings)
    if not settings.jwt_issuers.get_secret_value():
        return

    from laneway.engine.access.jwt_issuers import issuers_of  # loaded only where issuers are named

    try:
        issuers_of(settings, SystemClock())
    except Unprocessable as error:
        name, _, detail = str(error).partition(": ")
        yield Trouble(name, detail, "see docs/how-to/accept_jwts.md")


def _encryption_keys(settings: Settings) -> Iterator[Trouble]:
    name, remedy = "LANEWAY_ENCRYPTION_KEYS", "set it to k1:$(openssl rand -base64 32)"
    given = settings.encryption_keys.get_secret_value()
    if not given:
        if not settings.accept_key_file:
            detail = "not set, so that each machine would make a key file of its own"
            way_out = "or share the file, back it up, and set LANEWAY_ACCEPT_KEY_FILE=1"
            yield Trouble(name, detail, f"{remedy}, {way_out}")
        return
    try:
        keys = parse_keys(given, source=name)
    except ValueError as error:
        yield Trouble(name, str(error).removeprefix(f"{name}: "), remedy)
        return
    for key_id, key in keys.items():
        if not _is_random(key):
            detail = f"the key {key_id!r} is a text or a pattern, not {KEY_BYTES} random bytes"
            yield Trouble(name, detail, remedy)


def _is_random(key: bytes) -> bool:
    """Whether `key` may be random: no text, no repetition."""
    return len(set(key)) >= MIN_DISTINCT_BYTES and not all(32 <= byte < 127 for byte in key)


def _doors(settings: Settings) -> Iterator[Trouble]:
    if not is_loopback(settings.host) and not settings.allowed_hosts and not settings.public_url:
        yield Trouble(
            "LANEWAY_ALLOWED_HOSTS",
            f"not set, while the API listens on {settings.host}",
            "list the names it is called by, or set LANEWAY_PUBLIC_URL",
        )
    if any(network.prefixlen == 0 for network in settings.proxy_networks):
        yield Trouble(
            "LANEWAY_TRUSTED_PROXIES",
            "everybody is trusted, so that a client says itself where it comes from",
            "name the networks of the proxies",
        )
