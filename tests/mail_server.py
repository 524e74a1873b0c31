"""A mail server on a socket of 127.0.0.1 that keeps what it is given (RFC 5321, as much as mailers need)."""

from __future__ import annotations

import email
import email.policy
import socketserver
import ssl
import threading
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Self, cast

from servers import wait_until


@dataclass(frozen=True, slots=True)
class Mail:
    """One mail as it came: whom the envelope names, and the message."""

    to: tuple[str, ...]
    message: EmailMessage
    encrypted: bool
    credentials: str | None  # as AUTH PLAIN had them, in base64


class MailServer:
    """Answers RCPT with each of `recipient_replies` in turn, then with 250.

    With `tls` it offers STARTTLS and then AUTH; `implicit` begins with TLS.
    """

    def __init__(
        self, *recipient_replies: str, tls: ssl.SSLContext | None = None, implicit: bool = False
    ) -> None:
        self.mails: list[Mail] = []
        self._replies = list(recipient_replies)
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    outer._converse(self.request, tls, implicit=implicit)
                except OSError:
                    pass  # the mailer went away

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for(self, count: int) -> list[Mail]:
        """The mails, once there are so many."""
        wait_until(lambda: len(self.mails) >= count, what=f"{count} mails", evidence=lambda: self.mails)
        return self.mails

    def _converse(self, connection: Any, tls: ssl.SSLContext | None, *, implicit: bool) -> None:
        if tls is not None and implicit:
            connection = tls.wrap_socket(connection, server_side=True)
        lines = connection.makefile("rb")
        to: list[str] = []
        credentials: str | None = None

        def say(text: str) -> None:
            connection.sendall(text.encode() + b"\r\n")

        say("220 here")
        while line := lines.readline().decode().strip():
            verb, _, rest = line.partition(" ")
            match verb.upper():
                case "EHLO" | "HELO":
                    encrypted = isinstance(connection, ssl.SSLSocket)
                    offers = "AUTH PLAIN" if encrypted else "STARTTLS" if tls else "8BITMIME"
                    say(f"250-here\r\n250 {offers}")
                case "STARTTLS" if tls is not None:
                    say("220 go on")
                    connection = tls.wrap_socket(connection, server_side=True)
                    lines = connection.makefile("rb")
                case "AUTH":
                    credentials = rest.removeprefix("PLAIN ")
                    say("235 welcome")
                case "RCPT":
                    reply = self._replies.pop(0) if self._replies else "250 yes"
                    if reply.startswith("2"):
                        to.append(rest.partition("<")[2].partition(">")[0])
                    say(reply)
                case "DATA":
                    say("354 go on")
                    body = b""
                    while not body.endswith(b"\r\n.\r\n"):
                        body += lines.readline()
                    found = email.message_from_bytes(body[:-3], policy=email.policy.default)
                    encrypted = isinstance(connection, ssl.SSLSocket)
                    self.mails.append(Mail(tuple(to), cast(EmailMessage, found), encrypted, credentials))
                    say("250 taken")
                case "QUIT":
                    say("221 bye")
                    return
                case _:
                    say("250 fine")
