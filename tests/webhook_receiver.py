"""A receiver of webhooks on a real socket of 127.0.0.1, well-behaved or not, that remembers what came."""

from __future__ import annotations

import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from servers import wait_until


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came: header names in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]


@dataclass(slots=True)
class Exchange:
    """What a mode is handed: the request, its number counted from 1, and the socket to answer on."""

    request: Request
    number: int
    socket: socket.socket
    receiver: Receiver

    def answer(self, status: int, *, body: bytes = b"", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)


Mode = Callable[[Exchange], None]


def ok(exchange: Exchange) -> None:
    exchange.answer(200, body=b"thanks")


def in_turn(*statuses: int, **headers: Any) -> Mode:
    """The first status for the first request, and so on; the last one for the rest."""
    return lambda exchange: exchange.answer(statuses[min(exchange.number, len(statuses)) - 1], **headers)


def hang(exchange: Exchange) -> None:
    """Says nothing until the receiver is closed or told to `let_go`."""
    exchange.receiver.let_go.wait()
    exchange.answer(200)


def endless_body(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        exchange.send(b"400\r\n" + b"x" * 1024 + b"\r\n")


def drip_body(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not exchange.receiver.let_go.wait(0.02):
        exchange.send(b"x")


def drip_headers(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not exchange.receiver.let_go.wait(0.02):
        exchange.send(b"x")


def endless_continue(exchange: Exchange) -> None:
    while not exchange.receiver.let_go.wait(0.001):
        exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def reset(exchange: Exchange) -> None:
    exchange.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.socket.close()


def nonsense(exchange: Exchange) -> None:
    exchange.send(b"SSH-2.0-OpenSSH_9.9\r\n")


class Receiver:
    """Listens from `with` to its end. `mode` answers; `requests` and `connections` tell what came."""

    def __init__(self, mode: Mode = ok, *, tls: ssl.SSLContext | None = None) -> None:
        self.mode = mode
        self.requests: list[Request] = []
        self.connections = 0
        self.most_at_once = 0
        self.let_go = threading.Event()
        self._at_once = 0
        self._lock = threading.Lock()
        receiver = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with receiver._lock:
                    receiver.connections += 1
                try:
                    connection = tls.wrap_socket(self.request, server_side=True) if tls else self.request
                    while receiver._exchange(connection):
                        pass
                except OSError:
                    pass  # the sender hung up, as it may

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 256

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str = "/hook", *, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def wait_for(self, count: int) -> list[Request]:
        """The requests, as soon as there are `count`."""
        wait_until(
            lambda: len(self.requests) >= count,
            what=f"{count} requests came",
            evidence=lambda: f"{len(self.requests)} came over {self.connections} connections",
        )
        return self.requests

    def _exchange(self, connection: socket.socket) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = connection.recv(65536)
            if not chunk:
                return False
            head += chunk
        head, _, body = head.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)
        }
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        with self._lock:
            self.requests.append(request := Request(line, headers, body))
            number = len(self.requests)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.mode(Exchange(request, number, connection, self))
        finally:
            with self._lock:
                self._at_once -= 1
        return True
