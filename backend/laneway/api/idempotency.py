"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a POST that may be sent again.

Every route that makes work takes the key, and hands it to what writes:

    key = key_of(request, caller, "retryJob", await request.body(), of=job_id)
    job = await once(lambda: in_thread(runtime.service.retry, job_id, caller, key=key))
    return replayed(accepted(request, job), job)

What writes begins its transaction with `idempotency.begin`, ends it with `idempotency.keep`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request
from starlette.responses import Response

from laneway.api.runtime import Runtime, in_thread
from laneway.engine import idempotency
from laneway.engine.access.callers import Caller
from laneway.engine.idempotency import MAX_KEY_CHARACTERS, Key, Replayed
from laneway.errors import BadRequest, IdempotencyInProgress

IN_PROGRESS_SECONDS = 5.0
LOOK_SECONDS = 0.05

_BARE = re.compile(r"[\x20-\x7e]+")
_QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')  # RFC 9651 section 3.3.3

T = TypeVar("T")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description=f"1 to {MAX_KEY_CHARACTERS} characters of your choice, bare or in quotes. For 24 hours "
        "the same request with the same key is answered as the first one was, with "
        "`Idempotency-Replayed: true`, and does nothing more.",
    ),
]
"""The header as OpenAPI documents it. `key_of` reads it."""


def key_of(request: Request, caller: Caller, operation: str, body: bytes, *, of: object = "") -> Key | None:
    """The request's key for this operation, None without one.

    `of` is what else the operation is about: the id in its path. Raises BadRequest.
    """
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1:
        raise BadRequest("send one Idempotency-Key")
    text = given[0].strip()
    if text.startswith('"'):
        quoted = _QUOTED.fullmatch(text)
        text = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    if not _BARE.fullmatch(text) or len(text) > MAX_KEY_CHARACTERS:
        raise BadRequest(
            f"an Idempotency-Key is 1 to {MAX_KEY_CHARACTERS} printable ASCII characters, bare or in quotes"
        )
    asked = json.dumps([str(of), _canonical(body)], sort_keys=True, separators=(",", ":"))
    return Key.of(caller, operation, text, request=asked.encode())


async def once(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` answers; while another request with its key is under way it is asked again.

    Raises IdempotencyInProgress when that takes longer than IN_PROGRESS_SECONDS.
    """
    deadline = time.monotonic() + IN_PROGRESS_SECONDS
    while True:
        try:
            return await work()
        except IdempotencyInProgress:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(LOOK_SECONDS)


async def answered(runtime: Runtime, key: Key | None) -> Replayed | None:
    """The first answer, for routes that charge the jobs they make: an answer again makes none.

    Raises IdempotencyKeyReused.
    """
    if key is None:
        return None
    return await in_thread(idempotency.answered, runtime.database, key, now=runtime.clock.now())


def replayed(response: Response, answer: object) -> Response:
    """The response, which says so when the answer had been given before."""
    if isinstance(answer, Replayed):
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _canonical(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        raise BadRequest("the body is not JSON") from None
