"""Ways to reach the people who run Laneway. A channel is one small class: its options, and `send`.

The courier sends, with retries and a ledger as for webhooks: `send` makes one attempt. A new kind of
channel is a class like these, a member of `Channel`, and a name that the CHECK of
`webhook_deliveries.channel` knows.
"""

from __future__ import annotations

import asyncio
import json
import smtplib
import ssl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from laneway.log import get_logger

_JOB = ("job_id", "job_type", "status", "attempt", "dead_letter_reason")
_RATE = ("failed", "ended", "within_seconds")  # of a job type that fails too often
_LOGGED = (*_JOB, "endpoint_id", "reason", "percent", *_RATE)
_ENDPOINT = ("endpoint_id", "url", "reason", "percent")
_MAILED = (*_JOB, "queue", "created_by", "started_at", "finished_at", "next_retry_at", *_ENDPOINT, *_RATE)

SMTP_SECONDS = 10.0  # for each step of the conversation with a mail server
MAX_MESSAGE_CHARACTERS = 500

log = get_logger("laneway.notify")
_mailers = ThreadPoolExecutor(4, thread_name_prefix="laneway-mail")  # of their own: DNS needs the loop's


@dataclass(frozen=True, slots=True)
class Notification:
    """An event that somebody wants to know of; `payload` is what a webhook would carry."""

    id: str  # of the message: the same in every attempt
    event_type: str
    payload: bytes

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.payload)["data"]
        return data


class NotificationFailed(Exception):
    """This attempt did not get through, for the stated reason."""


class Sends(Protocol):
    """What the courier asks of a channel."""

    async def send(self, notification: Notification) -> None:
        """Make one attempt. Raises NotificationFailed."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LogChannel(_Options):
    """A line `notification` in the courier's log, with ids and no texts of a job."""

    kind: Literal["log"]
    level: Literal["info", "warning", "error"] = "warning"

    async def send(self, notification: Notification) -> None:
        data = notification.data
        facts = {name: data[name] for name in _LOGGED if data.get(name) is not None}
        write = getattr(log, self.level)
        write("notification", event_type=notification.event_type, message_id=notification.id, **facts)


class EmailChannel(_Options):
    """A mail to each of `to`, by way of one SMTP server."""

    kind: Literal["email"]
    host: str
    port: Annotated[int, Field(ge=1, le=65535)] = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    username: str | None = None
    password: SecretStr | None = None
    sender: Annotated[str, Field(alias="from", pattern=r"^[^\s@]+@[^\s@]+$")]
    to: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[^\s@]+@[^\s@]+$")], ...], Field(min_length=1, max_length=50)
    ]

    @model_validator(mode="after")
    def _credentials_travel_encrypted(self) -> EmailChannel:
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password belong together")
        if self.password is not None and self.security == "none":
            raise ValueError('a password needs security = "starttls" or "tls"')
        return self

    async def send(self, notification: Notification) -> None:
        mail = _mail(notification, sender=self.sender, to=self.to)
        await asyncio.get_running_loop().run_in_executor(_mailers, self._send, mail)

    def _send(self, mail: EmailMessage) -> None:
        try:
            with self._server() as server:
                if self.security == "starttls":
                    server.starttls(context=ssl.create_default_context())
                if self.username is not None and self.password is not None:
                    server.login(self.username, self.password.get_secret_value())
                if refused := server.send_message(mail):  # the others have it: it is not sent again
                    log.warning("mail_recipients_refused", replies=sorted({n for n, _ in refused.values()}))
        except smtplib.SMTPAuthenticationError:
            raise NotificationFailed("the mail server did not accept the username and password") from None
        except smtplib.SMTPRecipientsRefused as error:
            reply, _ = next(iter(error.recipients.values()))
            raise NotificationFailed(f"the mail server refused the recipients: {reply}") from None
        except smtplib.SMTPResponseException as error:
            raise NotificationFailed(f"the mail server answered {error.smtp_code}") from None
        except smtplib.SMTPException as error:
            raise NotificationFailed(f"the mail was not taken: {type(error).__name__}") from None
        except TimeoutError:
            raise NotificationFailed("the mail server did not answer in time") from None
        except OSError as error:
            raise NotificationFailed(f"the mail server was not reached: {type(error).__name__}") from None

    def _server(self) -> smtplib.SMTP:
        if self.security == "tls":
            context = ssl.create_default_context()
            return smtplib.SMTP_SSL(self.host, self.port, timeout=SMTP_SECONDS, context=context)
        return smtplib.SMTP(self.host, self.port, timeout=SMTP_SECONDS)


class WebhookChannel(_Options):
    """A signed webhook to a fixed URL, whosever the job is. The courier sends it as it does all others."""

    kind: Literal["webhook"]
    url: str


Channel = Annotated[LogChannel | EmailChannel | WebhookChannel, Field(discriminator="kind")]


def _mail(notification: Notification, *, sender: str, to: tuple[str, ...]) -> EmailMessage:
    data = notification.data
    subject = data.get("job_type") or data.get("url") or ""
    mail = EmailMessage()
    mail["Subject"] = f"[laneway] {notification.event_type} {subject}".strip()
    mail["From"] = sender
    mail["To"] = ", ".join(to)
    mail["Message-ID"] = f"<{notification.id}@laneway.invalid>"  # sent twice, it is one mail to most readers
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's holiday answers it
    lines = [f"{name}: {data[name]}" for name in _MAILED if data.get(name) is not None]
    if error := data.get("error"):
        lines.append(f"error: {error['type']}: {error['message'][:MAX_MESSAGE_CHARACTERS]}")
    mail.set_content("\n".join([notification.event_type, "", *lines, ""]))
    return mail
