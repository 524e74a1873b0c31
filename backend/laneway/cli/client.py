"""The API as the command line sees it: requests that answer JSON or raise, and a job followed by SSE."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from laneway.cli.environment import api_key, api_url, read_settings
from laneway.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    LanewayError,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unauthenticated,
    Unavailable,
    Unprocessable,
)

if TYPE_CHECKING:
    import httpx

BASE = "/api/v1"
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 40.0  # past the longest `Prefer: wait` of the API, and its pings on a stream
RECONNECTS = 10  # in a row, to a stream that was there before
RECONNECT_SECONDS = 1.0

_ERRORS: dict[int, type[LanewayError]] = {
    400: BadRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    422: Unprocessable,
    429: RateLimited,
    503: Unavailable,
}
_NEXT_STEP = {
    401: "; check LANEWAY_API_KEY, or make a key with `laneway keys create`",
    403: "; ask for a key with that role",
}

Job = dict[str, Any]
PAGE = 200  # entries, the most the API gives at once


class Client:
    """The API at a URL, called with a key. Every failure is a LanewayError that says the next step."""

    def __init__(self, url: str, key: str) -> None:
        import httpx

        self.url = url
        self._stopping = threading.Event()
        try:
            self._http = httpx.Client(
                base_url=url + BASE,
                headers={"Authorization": f"Bearer {key}"},
                timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
                trust_env=not _is_loopback(httpx.URL(url).host),  # a proxy leads away from this machine
            )
        except (httpx.InvalidURL, UnicodeEncodeError):
            raise Unprocessable(f"LANEWAY_URL {url!r} or the API key cannot be sent; check both") from None

    @classmethod
    def from_environment(cls) -> Self:
        settings = read_settings()
        return cls(api_url(settings), api_key(settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """The answer's JSON."""
        with self._reaching():
            return self._answer(self._http.get(path, params=query))

    def pages(self, path: str, *, limit: int, **query: Any) -> list[Job]:
        """The first `limit` entries of a list, over as many pages as it takes."""
        found: list[Job] = []
        while len(found) < limit:
            page = self.get(path, **query, limit=min(PAGE, limit - len(found)))
            found += page["data"]
            if not page["has_more"]:
                break
            query["cursor"] = page["next_cursor"]
        return found

    def post(self, path: str, body: Any) -> Any:
        """The answer's JSON."""
        with self._reaching():
            return self._answer(self._http.post(path, json=body))

    def follow(self, job_id: str) -> Iterator[Job]:
        """What the job's stream tells, as it comes; the last one says how the job ended.

        A stream that breaks off is taken up where it was.
        """
        last_event_id = ""
        failures = 0
        while True:
            try:
                with self._reaching(), self._stream(job_id, last_event_id) as frames:
                    for event_id, news in frames:
                        last_event_id, failures = event_id, 0
                        yield news
                        if news.get("finished_at"):
                            return
            except Unavailable:
                failures += 1
                if not last_event_id or failures > RECONNECTS:
                    raise
            else:
                job = self.get(job_path(job_id))  # the stream's time was over, or it has nothing new
                if job["finished_at"]:
                    yield job
                    return
            self._stopping.wait(RECONNECT_SECONDS)

    @contextmanager
    def _stream(self, job_id: str, last_event_id: str) -> Iterator[Iterator[tuple[str, Job]]]:
        headers = {"Accept": "text/event-stream"} | (
            {"Last-Event-ID": last_event_id} if last_event_id else {}
        )
        with self._http.stream("GET", f"{job_path(job_id)}/events", headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                self._answer(response)
            yield read_events(response.iter_lines())

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.UnsupportedProtocol:
            raise Unprocessable(f"LANEWAY_URL {self.url!r} is no http:// or https:// URL") from None
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise Unavailable(
                f"cannot reach {self.url}; start it with `laneway dev`, or set LANEWAY_URL to where it runs"
            ) from None
        except httpx.HTTPError as error:
            raise Unavailable(
                f"{self.url} did not answer ({type(error).__name__}); try again, or look at the API's log"
            ) from None

    def _answer(self, response: httpx.Response) -> Any:
        try:
            content = response.json() if response.content else None
        except ValueError:
            content = None
        if response.is_success and content is not None:
            return content
        if not isinstance(content, dict) or "code" not in content:
            raise Unavailable(
                f"{self.url} answers {response.status_code}, and not as Laneway does; check LANEWAY_URL"
            )
        raise _error(response.status_code, content, response.headers.get("Retry-After", ""))


def job_path(job_id: str) -> str:
    """Where the job is, whatever stands in the id."""
    return f"/jobs/{quote(job_id, safe='')}"


def _error(status: int, problem: dict[str, Any], retry_after: str) -> LanewayError:
    """A problem+json answer as the error that it was."""
    errors = problem.get("errors") or []
    text = "; ".join(f"{e['pointer']}: {e['detail']}" for e in errors) or str(problem.get("detail"))
    if status not in _ERRORS:
        text += f" (request {problem.get('request_id')}); look at the API's log"
    return _ERRORS.get(status, LanewayError)(
        text + _NEXT_STEP.get(status, ""),
        retry_after_seconds=int(retry_after) if retry_after.isdigit() else None,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_events(lines: Iterator[str]) -> Iterator[tuple[str, Job]]:
    """The (id, data) of each event of an SSE stream (WHATWG HTML, 9.2.6), as far as the API uses it."""
    event_id, data = "", []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            event_id = value
        elif name == "data":
            data.append(value)
        elif not line and data:
            yield event_id, json.loads("\n".join(data))
            data = []
