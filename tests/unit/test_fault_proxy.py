"""The proxy that other tests trust: each order does what it says, and healing ends it."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fault_proxy import FaultProxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[FaultProxy]:
    with _Server(str(tmp_path / "echo.sock"), _Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with FaultProxy(tmp_path / "echo.sock") as started:
            yield started
        server.shutdown()


def _dial(proxy: FaultProxy, *, timeout: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout)


def _says(client: socket.socket, words: bytes) -> bytes:
    client.sendall(words)
    return client.recv(65536)


def test_bytes_pass_both_ways(proxy: FaultProxy) -> None:
    with _dial(proxy) as client:
        assert _says(client, b"hello") == b"hello"


@pytest.mark.parametrize("order", ["delay", "slow"])
def test_a_slow_network_delivers_all_the_same(proxy: FaultProxy, order: str) -> None:
    proxy.delay(0.05) if order == "delay" else proxy.slow(1000)
    with _dial(proxy) as client:
        assert _says(client, b"x" * 50) == b"x" * 50


def test_a_blackhole_accepts_and_says_nothing_until_it_heals(proxy: FaultProxy) -> None:
    with _dial(proxy) as open_before:
        assert _says(open_before, b"a") == b"a"
        proxy.blackhole()
        with _dial(proxy, timeout=0.2) as dialled_in_it:
            for client in (open_before, dialled_in_it):
                client.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    _says(client, b"b")
                client.settimeout(5)
            proxy.heal()
            assert [client.recv(10) for client in (open_before, dialled_in_it)] == [b"b", b"b"]


def test_a_reset_hits_open_connections_and_new_ones(proxy: FaultProxy) -> None:
    with _dial(proxy) as client:
        assert _says(client, b"a") == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    with pytest.raises(ConnectionResetError):
        _dial(proxy).recv(10)
    proxy.heal()
    with _dial(proxy) as client:
        assert _says(client, b"a") == b"a"


def test_a_refused_dial_fails_and_the_port_stays_the_same(proxy: FaultProxy) -> None:
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        _dial(proxy)
    proxy.heal()
    assert proxy.port == port
    with _dial(proxy) as client:
        assert _says(client, b"a") == b"a"


def test_a_cut_counts_reply_bytes_from_the_order_on(proxy: FaultProxy) -> None:
    with _dial(proxy) as client:
        assert _says(client, b"x" * 100) == b"x" * 100
        proxy.cut(after_bytes=10)
        assert _says(client, b"y" * 10) == b"y" * 10
        with pytest.raises(ConnectionResetError):
            _says(client, b"z")


def test_only_the_reply_to_the_named_request_is_lost(proxy: FaultProxy) -> None:
    proxy.lose_reply(to=b"COMMIT")
    with _dial(proxy) as client:
        assert _says(client, b"BEGIN") == b"BEGIN"
        with pytest.raises(ConnectionResetError):
            _says(client, b"COMMIT")
    assert proxy.lost == 1


def test_replies_are_lost_so_often_as_was_ordered(proxy: FaultProxy) -> None:
    proxy.lose_reply(to=b"COMMIT", times=1)
    with _dial(proxy) as client, pytest.raises(ConnectionResetError):
        _says(client, b"COMMIT")
    with _dial(proxy) as client:
        assert _says(client, b"COMMIT") == b"COMMIT"
    assert proxy.lost == 1
