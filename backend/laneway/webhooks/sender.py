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
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from laneway import __version__
from laneway.clock import Clock
from laneway.errors import WebhookUrlRefused
from laneway.webhooks.deliveries import Claimed
from laneway.webhooks.dial import AddressRefused, GetAddrInfo, GuardResolver, guarded_session
from laneway.webhooks.formats import render
from laneway.webhooks.guard import Policy, check_url
from laneway.webhooks.pace import MAX_IN_FLIGHT
from laneway.webhooks.papers import Papers, TlsContexts
from laneway.webhooks.retries import KEPT_HEADERS, Answer, ErrorClass, Timings

MAX_RESPONSE_BYTES = 4096
MAX_HEADER_CHARACTERS = 256
# Below the 5 s after which common servers (Node, uvicorn) close an idle connection: a POST that meets
# the close on its way is lost, and must count as failed.
KEEPALIVE_SECONDS = 4.0
DNS_CACHE_SECONDS = 10
REMEMBERED_URLS = 1000
_HEADERS = {
    "User-Agent": f"laneway/{__version__}",
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
        # A pure judgement of the text, the same for each message to a receiver.
        self._check = lru_cache(REMEMBERED_URLS)(lambda url: check_url(url, policy))
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._getaddrinfo = getaddrinfo
        self._tls = TlsContexts()

    async def __aenter__(self) -> Self:
        self._resolver = GuardResolver(self._policy, getaddrinfo=self._getaddrinfo)
        self._session = guarded_session(
            self._policy,
            self._resolver,
            connections={
                "limit": MAX_IN_FLIGHT,
                "keepalive_timeout": KEEPALIVE_SECONDS,
                "ttl_dns_cache": DNS_CACHE_SECONDS,
                "ssl": self._tls.default,
            },
            trace_configs=[_trace()],
            response_class=_Response,
            headers=_HEADERS,
            read_bufsize=MAX_RESPONSE_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    async def send(self, delivery: Claimed, papers: Papers) -> Answer:
        """What the receiver answered, or why it did not: never raises for anything a receiver can do.

        The status line decides. What follows it is read for the log, up to 4 KiB and the deadline.
        """
        attempt = _Attempt(self._clock)
        manner = delivery.manner
        try:
            target = self._check(delivery.url)
            body = render(delivery.payload, manner.form, message_id=delivery.message_id)
            attempt.request_bytes = len(body)
            headers = {
                **papers.headers,
                "Content-Type": manner.form.content_type,
                "webhook-event": delivery.event_type,
                "webhook-attempt": str(delivery.attempt),
                **papers.signatures(delivery.message_id, int(attempt.started_at.timestamp()), body),
            }
            async with (
                asyncio.timeout(manner.timeout_seconds or self._timeout_seconds),
                self._session.post(
                    URL(target.url, encoded=True),
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    ssl=self._tls.context(delivery, papers),
                    trace_request_ctx=attempt,
                ) as response,
            ):
                attempt.answered(response)
                await attempt.read_start(response)
        except Exception as error:  # whatever a hostile receiver provokes in the stack is a failed attempt
            attempt.failure = explain(error)
        return attempt.answer()


class _Response(aiohttp.ClientResponse):
    """One that remembers whom it came from: a short answer has let go of its connection when it is read."""

    peer: tuple[Any, ...] | None = None

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        if connection.transport is not None:
            self.peer = connection.transport.get_extra_info("peername")
        return await super().start(connection)


class _Attempt:
    """What is noted while an attempt is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start = clock.monotonic()
        self.started_at = clock.now()
        self.request_bytes = 0
        self.failure: tuple[ErrorClass, str] | None = None
        self._status: int | None = None
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._truncated = False
        self._remote_ip: str | None = None
        self._began: dict[str, float] = {}
        self._took: dict[str, int] = {}

    def begin(self, phase: str) -> None:
        self._began[phase] = self._clock.monotonic()

    def end(self, phase: str) -> None:
        if phase in self._began:
            self._took[phase] = _ms(self._clock.monotonic() - self._began[phase])

    def answered(self, response: aiohttp.ClientResponse) -> None:
        self._took["first_byte"] = _ms(self._clock.monotonic() - self._start)
        self._status = response.status
        self._headers = {
            name: value[:MAX_HEADER_CHARACTERS]
            for name in KEPT_HEADERS
            if (value := response.headers.get(name)) is not None
        }
        self._remote_ip = response.peer[0] if isinstance(response, _Response) and response.peer else None

    async def read_start(self, response: aiohttp.ClientResponse) -> None:
        while len(self._body) < MAX_RESPONSE_BYTES:
            chunk = await response.content.read(MAX_RESPONSE_BYTES - len(self._body))
            if not chunk:
                return  # all of it; the connection may be used again
            self._body += chunk
        self._truncated = True
        response.close()

    def answer(self) -> Answer:
        failure = self.failure if self._status is None else _explain_status(self._status)
        dns, connect = self._took.get("dns"), self._took.get("connect")
        return Answer(
            started_at=self.started_at,
            timings=Timings(
                _ms(self._clock.monotonic() - self._start),
                dns_ms=dns,
                connect_ms=connect if connect is None else max(connect - (dns or 0), 0),
                first_byte_ms=self._took.get("first_byte"),
            ),
            status_code=self._status,
            error_class=failure and failure[0],
            error=failure and failure[1],
            headers=self._headers,
            body=_text(self._body) if self._status is not None else None,
            truncated=self._truncated,
            remote_ip=self._remote_ip,
            request_bytes=self.request_bytes,
        )


def _trace() -> aiohttp.TraceConfig:
    """Notes where the time goes. Looking the name up is a part of connecting, for aiohttp."""
    trace = aiohttp.TraceConfig()

    def note(what: Callable[[_Attempt, str], None], phase: str) -> Any:
        async def signal(_session: aiohttp.ClientSession, context: SimpleNamespace, _: Any) -> None:
            what(context.trace_request_ctx, phase)

        return signal

    trace.on_dns_resolvehost_start.append(note(_Attempt.begin, "dns"))
    trace.on_dns_resolvehost_end.append(note(_Attempt.end, "dns"))
    trace.on_connection_create_start.append(note(_Attempt.begin, "connect"))
    trace.on_connection_create_end.append(note(_Attempt.end, "connect"))
    return trace


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


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


def explain(error: Exception) -> tuple[ErrorClass, str]:
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
        case aiohttp.ClientSSLError() | ssl.SSLError():
            found = ErrorClass.TLS, "the TLS handshake failed"
        case _ if isinstance(error.__cause__, ssl.SSLError):  # TLS 1.3 tells it after the handshake
            found = ErrorClass.TLS, "the receiver refused the TLS connection, or our certificate"
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
