"""Following a batch or a chain by server-sent events: each frame is the whole state.

So nothing is replayed: whoever comes back after a break is told where things are now. The id of a frame
says what it told; with the id of the last one, after the end, a reader gets 204 and stops.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response, StreamingResponse

from laneway.api.events import PING_SECONDS, RETRY, STREAM_SECONDS, sse_frame
from laneway.api.hub import Watch
from laneway.api.runtime import Runtime, in_thread
from laneway.errors import LanewayError

View = dict[str, Any]

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    204: {"description": "It has ended and its end was seen: stop reconnecting."},
}


async def follow(
    runtime: Runtime,
    look: Callable[[], View],
    *,
    noun: str,
    told: Callable[[View], tuple[str, ...]],
    last_event_id: str | None,
) -> Response:
    """The stream of what `look` sees, a frame whenever what is `told` changes, until `finished_at` is set.

    Raises what `look` does when there is nothing to follow.
    """

    def id_of(view: View) -> str:
        return ":".join(told(view))

    first = await in_thread(look)
    if first["finished_at"] is not None and last_event_id == id_of(first):
        return Response(status_code=204)

    async def frames() -> AsyncIterator[bytes]:
        yield RETRY
        seen = last_event_id
        spoke_at = time.monotonic()
        until = spoke_at + STREAM_SECONDS
        watch = Watch()  # of nothing: rows are looked at once a second
        view = first
        while True:
            ended = view["finished_at"] is not None
            if (event_id := id_of(view)) != seen:
                seen = event_id
                yield sse_frame(event_id, f"{noun}.{view['status'] if ended else 'progress'}", view)
                spoke_at = time.monotonic()
            elif time.monotonic() - spoke_at > PING_SECONDS:
                yield b": ping\n\n"
                spoke_at = time.monotonic()
            if ended or time.monotonic() > until or runtime.leaving.closing:
                return
            await watch.changed(PING_SECONDS)
            try:
                view = await in_thread(look)
            except LanewayError:
                return  # the database or what is followed is gone: the client comes back and is told so

    return StreamingResponse(frames(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
