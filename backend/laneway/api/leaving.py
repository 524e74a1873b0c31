"""How an API process goes: not ready, then closed to new connections, then gone.

A load balancer learns from `/readyz` that it should look elsewhere, which takes it a probe or two. Until
then requests are answered as ever, each with `Connection: close`, so that no client is left on a
connection that is about to end: a request sent into one would have no answer, and could not be repeated
without knowing what became of it.
"""

from __future__ import annotations

import signal
import socket
import time
from dataclasses import dataclass
from types import FrameType

import uvicorn

CLOSE = (b"connection", b"close")


@dataclass(slots=True)
class Leaving:
    """Whether this process is on its way out: `draining` fails `/readyz`, `closing` ends long waits too."""

    draining: bool = False
    closing: bool = False


class Server(uvicorn.Server):
    """On SIGTERM fails `/readyz` for `unready_seconds`, then shuts down; SIGINT, or a second SIGTERM, now."""

    def __init__(self, config: uvicorn.Config, *, leaving: Leaving, unready_seconds: float) -> None:
        super().__init__(config)
        self._leaving = leaving
        self._unready_seconds = unready_seconds
        self._close_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again, self._leaving.draining = self._leaving.draining, True
        if not again:
            self.config.encoded_headers.append(CLOSE)  # from these uvicorn makes the next ones, once a second
            self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        if sig == signal.SIGTERM and not again:
            self._close_at = time.monotonic() + self._unready_seconds
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the serving."""
        if self._close_at is not None and time.monotonic() >= self._close_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leaving.closing = True
        await super().shutdown(sockets)
