"""One attempt: a signed POST to a URL that somebody else chose, in bounded time and memory.

Redirects are not followed, proxies and .netrc of the environment not used, cookies not kept, answers not
decompressed: each is a way for a receiver, or for whoever set a variable, to send the request elsewhere
or to make it cost more.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from http import HTTPStatus
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from laneway import __version__
from laneway.clock import Clock
from laneway.errors import WebhookUrlRefused
from laneway.webhooks.deliveries import Claimed
from laneway.webhooks.dial import AddressRefused, GetAddrInfo, GuardResolver, socket_factory
from laneway.webhooks.guard import Policy, check_url
from laneway.webhooks.retries import Answer, ErrorClass
from laneway.webhooks.signing import signature_headers

MAX_CONNECTIONS = 256
MAX_RESPONSE_BYTES = 4096
# Below the 5 s after which common servers (Node, uvicorn) close an idle connection: a POST that meets
# the close on its way is lost, and must count as failed.
KEEPALIVE_SECONDS = 4.0
DNS_CACHE_SECONDS = 10
_HEADERS = {
    "User-Agent": f"laneway/{__version__}",
    "Content-Type": "application/json",
    "Accept-Encoding": "identity",
}


class Sender:
    """Makes attempts over one pool of connections. An async context manager."""

    def __init__(
        self,
        policy: Policy,
        *,
        timeout_seconds: float,
        clock: Clock,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
    ) -> None:
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._getaddrinfo = getaddrinfo

    async def __aenter__(self) -> Self:
        self._resolver = GuardResolver(self._policy, getaddrinfo=self._getaddrinfo)
        connector = aiohttp.TCPConnector(
            limit=MAX_CONNECTIONS,
            keepalive_timeout=KEEPALIVE_SECONDS,
            resolver=self._resolver,
            ttl_dns_cache=DNS_CACHE_SECONDS,
            socket_factory=socket_factory(self._policy),
            ssl=ssl.create_default_context(),
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=_HEADERS,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=MAX_RESPONSE_BYTES,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=None
            ),  # `send` has one deadline for all of it
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    async def send(self, delivery: Claimed, secret: str) -> Answer:
        """What the receiver answered, or why it did not: never raises for anything a receiver can do.

        The status line decides. What follows it is read for the log, up to 4 KiB and the deadline.
        """
        started_at, start = self._clock.now(), self._clock.monotonic()
        status: int | None = None
        retry_after: str | None = None
        body = bytearray()
        failure: tuple[ErrorClass, str] | None = None
        try:
            target = check_url(delivery.url, self._policy)
            headers = {
                "webhook-event": delivery.event_type,
                "webhook-attempt": str(delivery.attempt),
                **signature_headers(
                    secret,
                    message_id=delivery.message_id,
                    timestamp=int(started_at.timestamp()),
                    body=delivery.payload,
                ),
            }
            async with (
                asyncio.timeout(self._timeout_seconds),
                self._session.post(
                    URL(target.url, encoded=True),
                    data=delivery.payload,
                    headers=headers,
                    allow_redirects=False,
                ) as response,
            ):
                status, retry_after = response.status, response.headers.get("Retry-After")
                await _read_start(response, body)
        except Exception as error:  # whatever a hostile receiver provokes in the stack is a failed attempt
            failure = _explain(error)
        if status is not None:
            failure = _explain_status(status)
        return Answer(
            started_at=started_at,
            total_ms=round((self._clock.monotonic() - start) * 1000),
            status_code=status,
            error_class=failure and failure[0],
            error=failure and failure[1],
            body=_text(body) if status is not None else None,
            retry_after=retry_after,
        )


async def _read_start(response: aiohttp.ClientResponse, body: bytearray) -> None:
    while len(body) < MAX_RESPONSE_BYTES:
        chunk = await response.content.read(MAX_RESPONSE_BYTES - len(body))
        if not chunk:
            return  # all of it; the connection may be used again
        body += chunk
    response.close()


def _text(body: bytearray) -> str:
    return body.decode("utf-8", "replace").replace("\0", "\ufffd")  # PostgreSQL's text holds no NUL


def _explain_status(status: int) -> tuple[ErrorClass, str] | None:
    match status // 100:
        case 2:
            return None
        case 3:
            return ErrorClass.REDIRECT, f"answered {status}: redirects are not followed, use the final URL"
        case 4 if status == HTTPStatus.GONE:
            return ErrorClass.HTTP_4XX, "answered 410: nobody wants this any more"
        case 4:
            return ErrorClass.HTTP_4XX, f"answered {status}"
        case 5:
            return ErrorClass.HTTP_5XX, f"answered {status}"
        case _:
            return ErrorClass.PROTOCOL, f"answered {status}, which ends no request"


def _explain(error: Exception) -> tuple[ErrorClass, str]:
    """The class, and a sentence that tells no address: the URL's owner may not know our network."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else None
    match error:
        case WebhookUrlRefused():
            found = ErrorClass.SSRF_BLOCKED, str(error)
        case _ if isinstance(cause, AddressRefused):
            found = ErrorClass.SSRF_BLOCKED, str(cause)
        case TimeoutError():
            found = ErrorClass.TIMEOUT, "no answer in time"
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", "")
            found = ErrorClass.TLS, f"the certificate was not accepted: {reason}"[:500]
        case aiohttp.ClientSSLError():
            found = ErrorClass.TLS, "the TLS handshake failed"
        case aiohttp.ClientConnectorDNSError():
            found = ErrorClass.DNS, "the name was not found, or its name server did not answer"
        case aiohttp.ClientConnectorError():
            reason = os.strerror(cause.errno) if cause is not None and cause.errno else "no connection"
            found = ErrorClass.CONNECT, f"connecting failed: {reason}"
        case aiohttp.ServerDisconnectedError() | OSError():
            found = ErrorClass.RESET, "the connection was closed before an answer"
        case _:
            found = ErrorClass.PROTOCOL, f"the answer is not HTTP as it should be ({type(error).__name__})"
    return found
