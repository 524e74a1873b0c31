"""One attempt of a notification, as the courier wants it: an answer, whatever the channel does."""

from __future__ import annotations

import asyncio

from laneway.clock import Clock
from laneway.notify.channels import Notification, NotificationFailed, Sends
from laneway.webhooks.deliveries import Claimed
from laneway.webhooks.retries import MAX_TIMEOUT_SECONDS, Answer, ErrorClass, Timings


async def pass_on(delivery: Claimed, channel: Sends | None, *, clock: Clock) -> Answer:
    """What came of handing it to `channel`; None is one that the operator has removed meanwhile."""
    started_at, start = clock.now(), clock.monotonic()
    error: str | None = None
    try:
        if channel is None:
            raise NotificationFailed(f"LANEWAY_NOTIFICATIONS has no channel {delivery.url!r} any more")
        async with asyncio.timeout(MAX_TIMEOUT_SECONDS):
            await channel.send(Notification(delivery.message_id, delivery.event_type, delivery.payload))
    except NotificationFailed as failed:
        error = str(failed)
    except TimeoutError:
        error = "the channel took too long"
    except Exception as unexpected:  # a channel's fault must not end the courier
        error = f"the channel raised {type(unexpected).__name__}"
    return Answer(
        started_at,
        Timings(round((clock.monotonic() - start) * 1000)),
        error_class=None if error is None else ErrorClass.CHANNEL,
        error=error,
        request_bytes=len(delivery.payload),
    )
