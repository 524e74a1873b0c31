"""Receivers of webhooks on this machine, checking every signature.

One is what `laneway demo` gives its jobs as `webhook_url`; `laneway webhooks listen` is another.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from laneway.cli.environment import listen
from laneway.errors import WebhookNotVerified
from laneway.webhooks.signing import ID_HEADER, verify_webhook

MAX_BODY_BYTES = 1024 * 1024
IDLE_SECONDS = 60.0

Verify = Callable[[bytes, dict[str, str]], Any]


def reference_verifier(secret: str) -> Verify | None:
    """The check of the `standardwebhooks` package, which is not ours; None where it is not installed."""
    try:
        from standardwebhooks import Webhook, WebhookVerificationError
    except ImportError:
        return None
    webhook = Webhook(secret)

    def verify(body: bytes, headers: dict[str, str]) -> Any:
        try:
            return webhook.verify(body, headers)
        except WebhookVerificationError as error:
            raise WebhookNotVerified(f"standardwebhooks: {error}") from None

    return verify


@dataclass
class Deliveries:
    """What came. `verified` has the `webhook-id` of each job's first good delivery."""

    verifiers: tuple[Verify, ...]
    received: int = 0
    verified: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    refused: list[str] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: bytes, headers: dict[str, str]) -> bool:
        """Count one delivery. True when every verifier accepts it."""
        with self._lock:
            self.received += 1
            try:
                payloads = [verify(body, headers) for verify in self.verifiers]
            except (WebhookNotVerified, ValueError) as error:
                self.refused.append(str(error))
                return False
            if headers[ID_HEADER] in self._ids:
                self.duplicates += 1
            else:
                self._ids.add(headers[ID_HEADER])
                self.verified[payloads[0]["data"]["job_id"]] = headers[ID_HEADER]
            return True


class Listener:
    """Hands over what is POSTed between `with` and its end. Answers 204, or 401 where `take` says False.

    Header names come in lower case. A body past 1 MiB, or without a length, is answered 413 or 411.
    """

    def __init__(self, take: Callable[[bytes, dict[str, str]], bool], listener: socket.socket) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = IDLE_SECONDS

            def do_POST(self) -> None:
                size = self.headers.get("Content-Length", "")
                if not (size.isascii() and size.isdigit()):
                    self._answer(411)
                elif int(size) > MAX_BODY_BYTES:
                    self._answer(413)
                else:
                    body = self.rfile.read(int(size))
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    self._answer(204 if take(body, headers) else 401)

            def _answer(self, status: int) -> None:
                self.close_connection = self.close_connection or status in (411, 413)  # the body is unread
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._server.daemon_threads = True
        host, port = listener.getsockname()[:2]
        self.origin = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def __enter__(self) -> Self:
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Receiver(Listener):
    """Counts what comes to `url`, on 127.0.0.1."""

    def __init__(self, secret: str) -> None:
        reference = reference_verifier(secret)
        ours: Verify = lambda body, headers: verify_webhook(body, headers, secret)  # noqa: E731
        self.by_reference = reference is not None
        self.deliveries = Deliveries((ours,) if reference is None else (ours, reference))
        super().__init__(self.deliveries.take, listen("127.0.0.1", 0))
        self.url = f"{self.origin}/summaries"
