"""A TCP proxy that misbehaves on order: what a network, a firewall or a dying server does to clients.

It listens on 127.0.0.1 and runs in a thread of its own. One order holds at a time, for open connections
and new ones, until the next order or `heal()`. Orders may come from any thread and hold when they return.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

CHUNK = 65536


@dataclass(frozen=True, slots=True)
class _Order:
    """How bytes travel. The defaults are a healthy network."""

    delay_seconds: float = 0.0  # each way, for each chunk
    bytes_per_second: float = 0.0  # each way; 0: no limit
    holds: bool = False
    resets: bool = False
    refuses: bool = False
    cut_after: int | None = None  # bytes of replies
    lost_after: bytes = b""  # the reply to what holds these bytes is lost
    most_lost: int = 0  # so many replies; 0: all


class _Connection:
    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.writers = (client, server)
        self.replied = 0  # bytes, since the order came
        self.doomed = False  # the next reply is lost

    def reset(self) -> None:
        for writer in self.writers:
            _reset(writer)


class FaultProxy:
    """Between clients and `upstream`: a `(host, port)`, or the path of a Unix socket."""

    def __init__(self, upstream: tuple[str, int] | Path) -> None:
        self._upstream = upstream
        self._order = _Order()
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0
        self.lost = 0  # replies that `lose_reply` ate
        self._lost_by_order = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Orders

    def heal(self) -> None:
        """Pass everything, what was held first."""
        self._obey(_Order())

    def delay(self, seconds: float) -> None:
        """Each chunk arrives so much later, in both directions."""
        self._obey(_Order(delay_seconds=seconds))

    def slow(self, bytes_per_second: float) -> None:
        self._obey(_Order(bytes_per_second=bytes_per_second))

    def blackhole(self) -> None:
        """Accept and hold: no byte and no reset either way. What is held arrives when the network heals."""
        self._obey(_Order(holds=True))

    def reset(self) -> None:
        """Open connections get a RST now, new ones at once."""
        self._obey(_Order(resets=True))

    def refuse(self) -> None:
        """Nobody listens; open connections get a RST."""
        self._obey(_Order(refuses=True))

    def cut(self, *, after_bytes: int = 0) -> None:
        """RST a connection instead of passing more than so many bytes of replies, counted from now."""
        self._obey(_Order(cut_after=after_bytes))

    def lose_reply(self, *, to: bytes, times: int = 0) -> None:
        """RST a connection instead of passing the reply to what holds `to`: nobody knows its fate.

        After so many `times` all is well again; 0: not before `heal()`.
        """
        self._obey(_Order(lost_after=to, most_lost=times))

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    # The loop's side

    def _call(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    def _obey(self, order: _Order) -> None:
        self._call(self._change(order))

    async def _change(self, order: _Order) -> None:
        self._order, self._lost_by_order = order, 0
        for connection in list(self._connections):
            connection.replied, connection.doomed = 0, False
            if order.resets or order.refuses:
                connection.reset()
        if order.refuses:
            self._stop_listening()
        elif self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _close(self) -> None:
        self._stop_listening()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _passable(self) -> None:
        while self._order.holds:
            await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passable()
        if self._order.resets or self._order.refuses:
            return _reset(writer)
        try:
            upstream_reader, upstream_writer = await self._dial()
        except OSError:
            return _reset(writer)
        connection = _Connection(writer, upstream_writer)
        self._connections.add(connection)
        ways = [
            asyncio.create_task(self._pass(reader, upstream_writer, connection, self._may_ask)),
            asyncio.create_task(self._pass(upstream_reader, writer, connection, self._may_reply)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.discard(connection)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for each in connection.writers:
                each.close()
        return None

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, Path):
            return await asyncio.open_unix_connection(self._upstream)
        return await asyncio.open_connection(*self._upstream)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: _Connection,
        may_pass: Callable[[_Connection, bytes], bool],
    ) -> None:
        try:
            while data := await reader.read(CHUNK):
                order = self._order
                if order.delay_seconds:
                    await asyncio.sleep(order.delay_seconds)
                if order.bytes_per_second:
                    await asyncio.sleep(len(data) / order.bytes_per_second)
                await self._passable()
                if not may_pass(connection, data):
                    return connection.reset()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one end has gone: the other hears of it when both are closed
        return None

    def _may_ask(self, connection: _Connection, data: bytes) -> bool:
        if self._order.lost_after:
            connection.doomed |= self._order.lost_after in data
        return True

    def _may_reply(self, connection: _Connection, data: bytes) -> bool:
        connection.replied += len(data)
        if connection.doomed:
            self.lost += 1
            self._lost_by_order += 1
            if self._lost_by_order == self._order.most_lost:
                self._order = _Order()
            return False
        return self._order.cut_after is None or connection.replied <= self._order.cut_after


def _reset(writer: asyncio.StreamWriter) -> None:
    end: socket.socket | None = writer.get_extra_info("socket")
    if end is not None and end.family != socket.AF_UNIX:
        try:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # it is closed already
    writer.transport.abort()
