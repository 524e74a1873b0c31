"""One call of an HTTP job: a request to a URL that somebody else chose, in bounded time and memory.

As in `sender.py`, redirects are not followed, proxies of the environment not used, cookies not kept and
answers not decompressed. Here the body of the answer counts, so that one which breaks off is no answer.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import aiohttp
from yarl import URL

from laneway import __version__
from laneway.webhooks.dial import GetAddrInfo, GuardResolver, guarded_session
from laneway.webhooks.guard import Policy, check_url
from laneway.webhooks.retries import ErrorClass
from laneway.webhooks.sender import explain

MAX_BODY_BYTES = 64 * 1024
_OURS = {"User-Agent": f"laneway/{__version__}", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What the target answered. `headers` by their names in lower case; `body` is cut where it is long."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    truncated: bool


class NoReply(Exception):
    """The target was not called, or did not answer: why, in a sentence that tells no address."""

    def __init__(self, kind: ErrorClass, message: str) -> None:
        super().__init__(message)
        self.kind = kind


async def call(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes | None,
    timeout_seconds: float,
    policy: Policy,
    getaddrinfo: GetAddrInfo = socket.getaddrinfo,
) -> Reply:
    """The answer; `timeout_seconds` bounds all of it. Raises NoReply."""
    resolver = GuardResolver(policy, getaddrinfo=getaddrinfo)
    try:
        target = check_url(url, policy)
        async with (
            asyncio.timeout(timeout_seconds),
            guarded_session(
                policy,
                resolver,
                connections={
                    "ssl": _tls() if target.url.startswith("https:") else False,
                    "force_close": True,
                },
                headers=_OURS,
                read_bufsize=MAX_BODY_BYTES,
                skip_auto_headers=("Content-Type",),
            ) as session,
            session.request(
                method, URL(target.url, encoded=True), data=body, headers=headers, allow_redirects=False
            ) as response,
        ):
            kept = {name.lower(): value for name, value in response.headers.items()}
            content, truncated = await _read(response)
            return Reply(response.status, kept, content, truncated)
    except Exception as error:  # whatever a hostile target provokes in the stack is a failed call
        raise NoReply(*explain(error)) from None
    finally:
        await resolver.close()


async def _read(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    content = bytearray()
    while len(content) <= MAX_BODY_BYTES:
        chunk = await response.content.read(MAX_BODY_BYTES + 1 - len(content))
        if not chunk:
            return bytes(content), False
        content += chunk
    response.close()
    return bytes(content[:MAX_BODY_BYTES]), True


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
