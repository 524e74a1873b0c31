"""Decisions as response headers.

`RateLimit-Policy` and `RateLimit` follow the syntax of draft-ietf-httpapi-ratelimit-headers-11, a work
in progress. `X-RateLimit-*` is what clients know from GitHub, with the reset as an epoch second.
"""

from __future__ import annotations

from functools import lru_cache

from laneway.limits.decision import Decision, Standing
from laneway.limits.rules import Rule

Header = tuple[bytes, bytes]


def render(decision: Decision) -> list[Header]:
    """The headers of a response that was charged for, lower-case names as ASGI wants them.

    Empty when no rule was enforced. `r` is the units left, `t` the seconds until more come free; seconds
    are rounded up. `qu` names the unit where it is not requests. `X-RateLimit-*` describe the tightest
    rule, its reset taken from a stored stamp: it is the same in every response until a unit leaves.
    `Retry-After` comes only with a refusal that ends.
    """
    if not decision.rules:
        return []
    tightest = max(decision.rules, key=_tightness)
    reset_us = decision.now_us + (tightest.reset_us or tightest.rule.window_us)
    headers = [
        (b"ratelimit-policy", b", ".join([_policy(standing.rule) for standing in decision.rules])),
        (b"ratelimit", ", ".join([_available(standing) for standing in decision.rules]).encode()),
        (b"x-ratelimit-limit", b"%d" % tightest.rule.quota),
        (b"x-ratelimit-remaining", b"%d" % tightest.remaining),
        (b"x-ratelimit-reset", b"%d" % whole_seconds(reset_us)),
    ]
    if (seconds := decision.retry_after_seconds) is not None:
        headers.append((b"retry-after", b"%d" % seconds))
    return headers


def whole_seconds(us: int) -> int:
    """Rounded up."""
    return -(-us // 1_000_000)


@lru_cache(1024)
def _policy(rule: Rule) -> bytes:
    unit = "" if rule.unit == "requests" else f';qu="{rule.unit}"'
    return f'"{rule.name}";q={rule.quota};w={rule.window_seconds}{unit}'.encode()


def _available(standing: Standing) -> str:
    seconds = whole_seconds(standing.reset_us) if standing.reset_us else standing.rule.window_seconds
    return f'"{standing.rule.name}";r={standing.remaining};t={seconds}'


def _tightness(standing: Standing) -> tuple[float, float]:
    """Orders rules: what refuses, by how long (never is longest), then by the share that is used."""
    refusal = float("inf") if standing.retry_us < 0 else standing.retry_us
    quota = standing.rule.quota
    return refusal, -standing.remaining / quota if quota else 0.0
