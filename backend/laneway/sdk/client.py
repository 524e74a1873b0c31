"""Laneway over HTTP, from Python: `LanewayClient` blocks, `AsyncLanewayClient` is awaited.

Both carry out the same calls (`calls.py`). What fails for the moment is tried again, as long as a second
request does nothing twice: reads, cancels, and whatever makes work, which is sent with an
`Idempotency-Key`. `Retry-After` is honoured. A problem that the API answers is raised as the class of
`laneway.errors` that it was there, an API that cannot be reached as `Unavailable`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from ipaddress import ip_address
from random import Random
from typing import Any, Generic, ParamSpec, Self, TypeVar

import httpx

from laneway import __version__
from laneway.errors import LanewayError, Unavailable, Unprocessable
from laneway.sdk import calls, operations
from laneway.sdk.answers import Job, JobEvent
from laneway.sdk.calls import Call, EventReader, Listing, Tries

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 40.0  # past the longest wait of the API, and the pings of its streams
RETRIES = 4
RECONNECTS = 10  # in a row, to a stream that was there before
RECONNECT_SECONDS = 1.0

P = ParamSpec("P")
T = TypeVar("T")


class _Asked(Generic[P, T]):
    """A call as a method that blocks."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build

    def __get__(self, client: LanewayClient, _: type[LanewayClient] | None = None) -> Callable[P, T]:
        @wraps(self._build)
        def ask(*args: P.args, **kwargs: P.kwargs) -> T:
            return client._send(self._build(*args, **kwargs))

        return ask


class _Listed(Generic[P, T]):
    """A listing as a method that gives its entries, and reads pages as they are needed."""

    def __init__(self, build: Callable[P, Listing[T]]) -> None:
        self._build = build

    def __get__(
        self, client: LanewayClient, _: type[LanewayClient] | None = None
    ) -> Callable[P, Iterator[T]]:
        @wraps(self._build)
        def entries(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
            return client._entries(self._build(*args, **kwargs))

        return entries


class _Awaited(Generic[P, T]):
    """A call as a method that is awaited."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build

    def __get__(
        self, client: AsyncLanewayClient, _: type[AsyncLanewayClient] | None = None
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        @wraps(self._build)
        async def ask(*args: P.args, **kwargs: P.kwargs) -> T:
            return await client._send(self._build(*args, **kwargs))

        return ask


class _AwaitedList(Generic[P, T]):
    """A listing as a method for `async for`."""

    def __init__(self, build: Callable[P, Listing[T]]) -> None:
        self._build = build

    def __get__(
        self, client: AsyncLanewayClient, _: type[AsyncLanewayClient] | None = None
    ) -> Callable[P, AsyncIterator[T]]:
        @wraps(self._build)
        def entries(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
            return client._entries(self._build(*args, **kwargs))

        return entries


class LanewayClient:
    """A Laneway server, called with an API key. Safe to use from many threads; close it, or use `with`.

    `retries` counts tries after the first one; `timeout_seconds` bounds each.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout_seconds: float = ANSWER_SECONDS,
        retries: int = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._retries = retries
        self._rng = Random()  # noqa: S311 - jitter
        self._closed = threading.Event()
        options = _options(self.base_url, api_key, timeout_seconds)
        self._http = httpx.Client(**options, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connections. Who waits between two tries gets Unavailable."""
        self._closed.set()
        self._http.close()

    enqueue = _Asked(operations.enqueue)
    get = _Asked(operations.get)
    result = _Asked(operations.result)
    jobs = _Listed(operations.jobs)
    attempts = _Listed(operations.attempts)
    timeline = _Listed(operations.timeline)
    cancel = _Asked(operations.cancel)
    cancel_many = _Asked(operations.cancel_many)
    retry = _Asked(operations.retry)
    change = _Asked(operations.change)
    delete = _Asked(operations.delete)
    job_type = _Asked(operations.job_type)
    job_types = _Asked(operations.job_types)

    dead_letters = _Listed(operations.dead_letters)
    retry_dead_letter = _Asked(operations.retry_dead_letter)
    retry_dead_letters = _Asked(operations.retry_dead_letters)
    delete_dead_letter = _Asked(operations.delete_dead_letter)
    purge_dead_letters = _Asked(operations.purge_dead_letters)

    queue_stats = _Asked(operations.queue_stats)
    queue_health = _Asked(operations.queue_health)
    workers = _Listed(operations.workers)

    webhook_secret = _Asked(operations.webhook_secret)
    create_endpoint = _Asked(operations.create_endpoint)
    endpoint = _Asked(operations.endpoint)
    endpoints = _Asked(operations.endpoints)
    change_endpoint = _Asked(operations.change_endpoint)
    delete_endpoint = _Asked(operations.delete_endpoint)
    rotate_endpoint_secret = _Asked(operations.rotate_endpoint_secret)
    send_test = _Asked(operations.send_test)
    delivery = _Asked(operations.delivery)
    deliveries = _Listed(operations.deliveries)
    redeliver = _Asked(operations.redeliver)

    create_batch = _Asked(operations.create_batch)
    batch = _Asked(operations.batch)
    batches = _Listed(operations.batches)
    batch_jobs = _Listed(operations.batch_jobs)
    cancel_batch = _Asked(operations.cancel_batch)
    retry_failed = _Asked(operations.retry_failed)

    create_chain = _Asked(operations.create_chain)
    chain = _Asked(operations.chain)
    chains = _Listed(operations.chains)
    execute_chain = _Asked(operations.execute_chain)
    cancel_chain = _Asked(operations.cancel_chain)
    delete_chain = _Asked(operations.delete_chain)

    create_schedule = _Asked(operations.create_schedule)
    schedule = _Asked(operations.schedule)
    schedules = _Listed(operations.schedules)
    change_schedule = _Asked(operations.change_schedule)
    toggle_schedule = _Asked(operations.toggle_schedule)
    run_schedule = _Asked(operations.run_schedule)
    delete_schedule = _Asked(operations.delete_schedule)

    me = _Asked(operations.me)
    rate_limits = _Asked(operations.rate_limits)
    request = _Asked(operations.request)

    def wait(self, job_id: str, *, timeout_seconds: float | None = None) -> Job:
        """The job once it has ended, however it did. Raises TimeoutError after `timeout_seconds`."""
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            job = self.get(job_id, wait_seconds=_next_wait(until))
            if job.ended:
                return job
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_seconds:g} s")

    def watch(self, job_id: str) -> Iterator[JobEvent]:
        """What happens to the job, as it happens, progress among it, up to its end.

        A stream that breaks off is taken up where it was.
        """
        following = _Following(job_id)
        while not following.ended:
            try:
                stream = self._http.stream("GET", following.path, headers=following.headers)
                with stream as response:
                    if response.status_code == 200:
                        reader = EventReader()
                        for line in response.iter_lines():
                            if (event := reader.feed(line)) is not None:
                                following.heard(event)
                                yield event
                    else:
                        response.read()
                        following.refused(response)
            except httpx.TransportError as error:
                following.broke(calls.unreachable(self.base_url, error))
            if not following.ended:
                self._pause(following.pause_seconds)

    def _send(self, call: Call[T]) -> T:
        tries = Tries(call, retries=self._retries, rng=self._rng)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self._http.request(call.method, call.url, **call.how)
            except httpx.TransportError as error:
                outcome = error
            pause = tries.after(outcome)
            if pause is None:
                return _taken(self.base_url, call, outcome)
            self._pause(pause)

    def _entries(self, listing: Listing[T]) -> Iterator[T]:
        cursor = None
        while True:
            entries, cursor = self._send(listing.page(cursor))
            yield from entries
            if cursor is None:
                return

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise Unavailable("the client was closed")


class AsyncLanewayClient:
    """`LanewayClient` for asyncio: the same calls, awaited. Close it, or use `async with`."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout_seconds: float = ANSWER_SECONDS,
        retries: int = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._retries = retries
        self._rng = Random()  # noqa: S311 - jitter
        options = _options(self.base_url, api_key, timeout_seconds)
        self._http = httpx.AsyncClient(**options, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop the connections."""
        await self._http.aclose()

    enqueue = _Awaited(operations.enqueue)
    get = _Awaited(operations.get)
    result = _Awaited(operations.result)
    jobs = _AwaitedList(operations.jobs)
    attempts = _AwaitedList(operations.attempts)
    timeline = _AwaitedList(operations.timeline)
    cancel = _Awaited(operations.cancel)
    cancel_many = _Awaited(operations.cancel_many)
    retry = _Awaited(operations.retry)
    change = _Awaited(operations.change)
    delete = _Awaited(operations.delete)
    job_type = _Awaited(operations.job_type)
    job_types = _Awaited(operations.job_types)

    dead_letters = _AwaitedList(operations.dead_letters)
    retry_dead_letter = _Awaited(operations.retry_dead_letter)
    retry_dead_letters = _Awaited(operations.retry_dead_letters)
    delete_dead_letter = _Awaited(operations.delete_dead_letter)
    purge_dead_letters = _Awaited(operations.purge_dead_letters)

    queue_stats = _Awaited(operations.queue_stats)
    queue_health = _Awaited(operations.queue_health)
    workers = _AwaitedList(operations.workers)

    webhook_secret = _Awaited(operations.webhook_secret)
    create_endpoint = _Awaited(operations.create_endpoint)
    endpoint = _Awaited(operations.endpoint)
    endpoints = _Awaited(operations.endpoints)
    change_endpoint = _Awaited(operations.change_endpoint)
    delete_endpoint = _Awaited(operations.delete_endpoint)
    rotate_endpoint_secret = _Awaited(operations.rotate_endpoint_secret)
    send_test = _Awaited(operations.send_test)
    delivery = _Awaited(operations.delivery)
    deliveries = _AwaitedList(operations.deliveries)
    redeliver = _Awaited(operations.redeliver)

    create_batch = _Awaited(operations.create_batch)
    batch = _Awaited(operations.batch)
    batches = _AwaitedList(operations.batches)
    batch_jobs = _AwaitedList(operations.batch_jobs)
    cancel_batch = _Awaited(operations.cancel_batch)
    retry_failed = _Awaited(operations.retry_failed)

    create_chain = _Awaited(operations.create_chain)
    chain = _Awaited(operations.chain)
    chains = _AwaitedList(operations.chains)
    execute_chain = _Awaited(operations.execute_chain)
    cancel_chain = _Awaited(operations.cancel_chain)
    delete_chain = _Awaited(operations.delete_chain)

    create_schedule = _Awaited(operations.create_schedule)
    schedule = _Awaited(operations.schedule)
    schedules = _AwaitedList(operations.schedules)
    change_schedule = _Awaited(operations.change_schedule)
    toggle_schedule = _Awaited(operations.toggle_schedule)
    run_schedule = _Awaited(operations.run_schedule)
    delete_schedule = _Awaited(operations.delete_schedule)

    me = _Awaited(operations.me)
    rate_limits = _Awaited(operations.rate_limits)
    request = _Awaited(operations.request)

    async def wait(self, job_id: str, *, timeout_seconds: float | None = None) -> Job:
        """The job once it has ended, however it did. Raises TimeoutError after `timeout_seconds`."""
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            job = await self.get(job_id, wait_seconds=_next_wait(until))
            if job.ended:
                return job
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_seconds:g} s")

    async def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """What happens to the job, as it happens, progress among it, up to its end.

        A stream that breaks off is taken up where it was.
        """
        following = _Following(job_id)
        while not following.ended:
            try:
                stream = self._http.stream("GET", following.path, headers=following.headers)
                async with stream as response:
                    if response.status_code == 200:
                        reader = EventReader()
                        async for line in response.aiter_lines():
                            if (event := reader.feed(line)) is not None:
                                following.heard(event)
                                yield event
                    else:
                        await response.aread()
                        following.refused(response)
            except httpx.TransportError as error:
                following.broke(calls.unreachable(self.base_url, error))
            if not following.ended:
                await self._pause(following.pause_seconds)

    async def _send(self, call: Call[T]) -> T:
        tries = Tries(call, retries=self._retries, rng=self._rng)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self._http.request(call.method, call.url, **call.how)
            except httpx.TransportError as error:
                outcome = error
            pause = tries.after(outcome)
            if pause is None:
                return _taken(self.base_url, call, outcome)
            await self._pause(pause)

    async def _entries(self, listing: Listing[T]) -> AsyncIterator[T]:
        cursor = None
        while True:
            entries, cursor = await self._send(listing.page(cursor))
            for entry in entries:
                yield entry
            if cursor is None:
                return

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Following:
    """How far the stream of a job was followed, and whether to go on."""

    def __init__(self, job_id: str) -> None:
        self.path = calls.events_path(job_id)
        self.ended = False
        self.pause_seconds = RECONNECT_SECONDS
        self._seen = ""
        self._failures = 0

    @property
    def headers(self) -> dict[str, str]:
        last = {"Last-Event-ID": self._seen} if self._seen else {}
        return {"Accept": "text/event-stream"} | last

    def heard(self, event: JobEvent) -> None:
        self._seen, self._failures = event.id, 0
        self.pause_seconds = RECONNECT_SECONDS
        self.ended = event.is_last

    def refused(self, response: httpx.Response) -> None:
        """The API answered without a stream. Raises what it was, unless it is worth another try."""
        if response.status_code == 204:
            self.ended = True  # and all of it was heard
            return
        error = calls.problem_of(response)
        if response.status_code not in (429, 502, 503, 504):
            raise error
        self.broke(error, after_seconds=error.retry_after_seconds)

    def broke(self, error: LanewayError, *, after_seconds: int | None = None) -> None:
        """There is no stream for now. Raises the error once it is too often in a row."""
        self._failures += 1
        if not self._seen or self._failures > RECONNECTS:
            raise error
        self.pause_seconds = max(RECONNECT_SECONDS, after_seconds or 0)


def _options(base_url: str, api_key: str, timeout_seconds: float) -> dict[str, Any]:
    try:
        url = httpx.URL(base_url)
        headers = httpx.Headers(
            {"Authorization": f"Bearer {api_key}", "User-Agent": f"laneway-python/{__version__}"}
        )
    except (httpx.InvalidURL, UnicodeEncodeError):
        raise Unprocessable("the base URL or the API key cannot be sent; check both") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise Unprocessable(f"the base URL {base_url!r} is no http:// or https:// URL")
    return {
        "base_url": url,
        "headers": headers,
        "timeout": httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
        "trust_env": not _is_loopback(url.host),  # a proxy leads away from this machine
    }


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _next_wait(until: float | None) -> int:
    """Seconds to ask the API to wait for."""
    left = calls.LONGEST_WAIT_SECONDS if until is None else until - time.monotonic()
    return max(1, min(calls.LONGEST_WAIT_SECONDS, round(left)))


def _taken(base_url: str, call: Call[T], outcome: httpx.Response | httpx.TransportError) -> T:
    if isinstance(outcome, httpx.Response):
        return call.answer(outcome)
    raise calls.unreachable(base_url, outcome) from outcome
