"""Frames between the pool and its children: four bytes of length, then one JSON value."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 16
MAX_FROM_CHILD = 1 << 22  # bytes of a frame: a result of 256 KiB grows at most threefold on the way


def pack(message: Any) -> bytes:
    """A message as one frame."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Reads the frames of one stream socket; with `limit` none larger than so many bytes."""

    def __init__(self, stream: socket.socket, *, limit: int | None = None) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()
        self.ended = False
        self.broken = False
        self.dry = False

    def read(self, *, wait: bool = True) -> list[Any]:
        """Receive once and return the messages that are whole.

        Sets `ended` when the peer has gone, and `dry` when nothing was there to receive: on a blocking
        socket that happens only without `wait`. Sets `broken`, and `ended`, when what came next is no
        frame of ours: the other side's descriptor fell into other hands.
        """
        try:
            data = self._stream.recv(_CHUNK, 0 if wait else socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            self.dry = True
            return []
        except ConnectionResetError:
            data = b""
        self.dry = False
        if not data:
            self.ended = True
            return []
        buffer = self._buffer
        buffer += data
        messages, start = [], 0
        while len(buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, start)
            self.broken = self._limit is not None and size > self._limit
            end = start + _LENGTH.size + size
            if self.broken or len(buffer) < end:
                break
            try:
                messages.append(json.loads(buffer[start + _LENGTH.size : end]))
            except ValueError:
                self.broken = True
                break
            start = end
        self.ended = self.broken
        del buffer[:start]
        return messages
