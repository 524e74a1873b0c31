"""Decisions as response headers.

`RateLimit-Policy` and `RateLimit` follow the syntax of draft-ietf-httpapi-ratelimit-headers-11, a work
in progress. `X-RateLimit-*` is what clients know from GitHub, with the reset as an epoch second.
"""

from __future__ import annotations

from functools import lru_cache

from laneway.limits.decision import Decision, Standing

Header = tuple[bytes, bytes]


def render(decision: Decision) -> list[Header]:
    """The headers of a response that was charged for, lower-case names as ASGI wants them.

    Empty when no rule applied. `r` is the units left, `t` the seconds until more come free; seconds are
    rounded up. `X-RateLimit-*` describe the tightest rule, its reset taken from a stored stamp: it is
    the same in every response until a unit leaves. `Retry-After` comes only with a refusal that ends.
    """
    if not decision.rules:
        return []
    tightest = max(decision.rules, key=_tightness)
    reset_us = decision.now_us + (tightest.reset_us or tightest.window_seconds * 1_000_000)
    headers = [
        (
            b"ratelimit-policy",
            b", ".join([_policy(s.name, s.quota, s.window_seconds) for s in decision.rules]),
        ),
        (b"ratelimit", ", ".join([_available(standing) for standing in decision.rules]).encode()),
        (b"x-ratelimit-limit", b"%d" % tightest.quota),
        (b"x-ratelimit-remaining", b"%d" % tightest.remaining),
        (b"x-ratelimit-reset", b"%d" % _whole_seconds(reset_us)),
    ]
    if (seconds := decision.retry_after_seconds) is not None:
        headers.append((b"retry-after", b"%d" % seconds))
    return headers


@lru_cache(1024)
def _policy(name: str, quota: int, window_seconds: int) -> bytes:
    return f'"{name}";q={quota};w={window_seconds}'.encode()


def _available(standing: Standing) -> str:
    seconds = _whole_seconds(standing.reset_us) if standing.reset_us else standing.window_seconds
    return f'"{standing.name}";r={standing.remaining};t={seconds}'


def _tightness(standing: Standing) -> tuple[float, float]:
    """Orders rules: what refuses, by how long (never is longest), then by the share that is used."""
    refusal = float("inf") if standing.retry_us < 0 else standing.retry_us
    return refusal, -standing.remaining / standing.quota if standing.quota else 0.0


def _whole_seconds(us: int) -> int:
    return -(-us // 1_000_000)
