"""Notifications: rules, channels, and that what was promised arrives, whatever is away meanwhile."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from standardwebhooks.webhooks import Webhook

from factories import add_endpoint, add_job, change, hold_of, rows_of
from laneway import models
from laneway.api.event_payloads import PAYLOADS
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.events import SystemEvent
from laneway.domain.retry import RetryPolicy
from laneway.domain.states import JobStatus
from laneway.engine import progress
from laneway.engine.context import Progress
from laneway.engine.outcomes import Claimed, carry_out, error_record
from laneway.engine.transitions import BackOff, Complete, Fail
from laneway.errors import Unprocessable
from laneway.notify import rules
from laneway.settings import get_settings
from laneway.webhooks import endpoint_health
from mail_server import MailServer
from webhook_office import Office
from webhook_receiver import Receiver

ERROR = error_record("KeyError", "no such order", category="permanent", traceback="secret frames")
DEAD = '[[rules]]\nevents = ["job.dead_lettered"]\nchannels = ["ops"]\n'

Configure = Callable[[str], rules.Notifications]


@pytest.fixture
def office(database: Database) -> Office:
    return Office(database)


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Makes a text this process's notifications."""

    def write(text: str) -> rules.Notifications:
        path = tmp_path / f"{new_id()}.toml"
        path.write_text(text)
        monkeypatch.setenv("LANEWAY_NOTIFICATIONS", str(path))
        get_settings.cache_clear()
        return rules.current()

    return write


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 that signs itself, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mail")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    public, private = tmp_path / "mail.pem", tmp_path / "mail.key"
    public.write_bytes(made.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context


def mail(port: int, **options: str) -> str:
    lines = {"host": "127.0.0.1", "from": "laneway@example.org", "security": "none"} | options
    texts = "".join(f'{name} = "{value}"\n' for name, value in lines.items())
    to = 'to = ["ops@example.org", "boss@example.org"]\n'
    return f'[channels.ops]\nkind = "email"\nport = {port}\n{texts}{to}'


def fail(office: Office, **columns: Any) -> str:
    """The id of a job that has just become a dead letter."""
    hold = hold_of(
        office.database,
        add_job(office.database, JobStatus.RUNNING, tenant_id=office.tenant_id, **columns),
    )
    with office.database.write() as connection:
        carry_out(connection, [Fail(*hold, error=ERROR)], now=office.clock.now(), actor="t")
    return hold[0]


# Channels


def test_a_dead_letter_is_mailed_to_everybody_the_channel_names(office: Office, configure: Configure) -> None:
    with MailServer() as server:
        configure(DEAD + mail(server.port))
        job_id = fail(office, job_type="billing.charge")
        with office.open():
            delivery = office.wait(job_id, status="delivered")
    [received] = server.mails
    assert received.to == ("ops@example.org", "boss@example.org")
    assert received.message["Subject"] == "[laneway] job.dead_lettered billing.charge"
    assert received.message["From"] == "laneway@example.org"
    assert received.message["Message-ID"] == f"<{delivery['message_id']}@laneway.invalid>"
    text = received.message.get_content()
    assert f"job_id: {job_id}" in text
    assert "dead_letter_reason: exhausted" in text
    assert "error: KeyError: no such order" in text
    assert "secret" not in text
    assert (delivery["channel"], delivery["url"], delivery["endpoint_id"]) == ("email", "email:ops", None)
    job = office.job(job_id)
    assert (job["webhook_attempts"], job["webhook_delivered"]) == (0, False)  # it has no webhook of its own


def test_a_mail_waits_for_its_server_and_for_who_refused_it(office: Office, configure: Configure) -> None:
    with MailServer("451 later", "550 never") as server:
        configure(DEAD + mail(server.port))
        job_id = fail(office)
        with office.open():
            office.wait(job_id, status="retrying", attempts=1)
            office.clock.advance(hours=1)
            office.wait(job_id, status="delivered", attempts=2)
    errors = [attempt["error"] for attempt in office.attempts(job_id)]
    assert errors == ["the mail server refused the recipients: 451", None]
    with MailServer() as gone:
        pass
    configure(DEAD + mail(gone.port))
    job_id = fail(office)
    with office.open():
        delivery = office.wait(job_id, status="retrying", attempts=1)
    assert delivery["last_error"] == "the mail server was not reached: ConnectionRefusedError"
    assert office.attempts(job_id)[0]["error_class"] == "channel"


def test_a_mail_whose_courier_was_killed_is_sent_by_the_next(office: Office, configure: Configure) -> None:
    with MailServer() as server:
        configure(DEAD + mail(server.port))
        job_id = fail(office)
        held = {"lease_owner": new_id(), "lease_until": office.clock.now() - timedelta(seconds=1)}
        table = models.webhook_deliveries
        change(office.database, table, office.delivery(job_id)["id"], status="sending", **held)
        with office.open():
            office.wait(job_id, status="delivered")
        assert len(server.mails) == 1


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_password_travels_encrypted_to_a_server_whose_certificate_is_good(
    office: Office,
    configure: Configure,
    security: str,
    certificate: tuple[Path, ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, tls = certificate
    with MailServer(tls=tls, implicit=security == "tls") as server:
        configure(DEAD + mail(server.port, security=security, username="me", password="hunter2"))
        refused = fail(office)
        with office.open():
            office.wait(refused, status="retrying", attempts=1)
        assert server.mails == []  # nobody we know signed that certificate
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        job_id = fail(office)
        with office.open():
            office.wait(job_id, status="delivered")
    [received] = server.mails
    assert received.encrypted
    assert base64.b64decode(received.credentials or "") == b"\0me\0hunter2"


def test_the_log_channel_writes_ids_and_nothing_that_a_job_said(office: Office, configure: Configure) -> None:
    configure(DEAD + '[channels.ops]\nkind = "log"\nlevel = "error"\n')
    job_id = fail(office, parameters={"card": "4111"}, title="4111")
    with structlog.testing.capture_logs() as lines, office.open():
        delivery = office.wait(job_id, status="delivered")
    assert [line for line in lines if line["event"] == "notification"] == [
        {
            "event": "notification",
            "component": "laneway.notify",
            "log_level": "error",
            "event_type": "job.dead_lettered",
            "message_id": delivery["message_id"],
            "job_id": job_id,
            "job_type": "demo.echo",
            "status": "failed",
            "attempt": 1,
            "dead_letter_reason": "exhausted",
        }
    ]
    assert "4111" not in str(lines)


def test_the_webhook_channel_is_signed_and_no_webhook_of_the_jobs_own(
    office: Office, configure: Configure
) -> None:
    with Receiver() as receiver:
        configure(DEAD + f'[channels.ops]\nkind = "webhook"\nurl = "{receiver.url("/pager")}"\n')
        job_id = fail(office)
        with office.open():
            delivery = office.wait(job_id, status="delivered")
        [request] = receiver.requests
    assert request.path == "/pager"
    body = Webhook(office.secret).verify(request.body, request.headers)
    assert (body["type"], body["data"]["job_id"]) == ("job.dead_lettered", job_id)
    assert (delivery["channel"], delivery["url"]) == ("webhook", "webhook:ops")
    assert office.job(job_id)["webhook_attempts"] == 0


def test_a_channel_that_was_removed_meanwhile_fails_with_the_reason(
    office: Office, configure: Configure
) -> None:
    configure(DEAD + '[channels.ops]\nkind = "log"\n')
    job_id = fail(office)
    configure("")
    with office.open():
        delivery = office.wait(job_id, status="retrying", attempts=1)
    assert delivery["last_error"] == "LANEWAY_NOTIFICATIONS has no channel 'log:ops' any more"


def test_a_channel_that_breaks_does_not_break_the_courier(
    office: Office, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("hunter2")

    monkeypatch.setattr("smtplib.SMTP.send_message", explode)
    with MailServer() as server, Receiver() as receiver:
        configure(DEAD + mail(server.port))
        job_id, other = fail(office), office.post(receiver.url())
        with office.open():
            delivery = office.wait(job_id, status="retrying", attempts=1)
            office.wait(other, status="delivered")
    assert delivery["last_error"] == "the channel raised RuntimeError"


# Rules


def test_a_rule_is_for_its_events_and_job_types(office: Office, configure: Configure) -> None:
    configure(
        '[channels.log]\nkind = "log"\n[channels.mail]\nkind = "log"\n'
        '[[rules]]\nevents = ["job.failed"]\njob_types = ["billing.*"]\nchannels = ["log", "mail"]\n'
        '[[rules]]\nevents = ["job.*"]\njob_types = ["billing.charge", "x"]\nchannels = ["log"]\n'
    )

    def told() -> list[tuple[str, str, str]]:
        events = {row["id"]: row["event_type"] for row in rows_of(office.database, models.webhook_messages)}
        types = {row["id"]: row["job_type"] for row in rows_of(office.database, models.jobs)}
        rows = rows_of(office.database, models.webhook_deliveries)
        return sorted((types[row["job_id"]], events[row["message_id"]], row["url"]) for row in rows)

    for job_type in ("billing.charge", "billing.refund", "report"):
        fail(office, job_type=job_type)
    assert told() == [
        ("billing.charge", "job.dead_lettered", "log:log"),
        ("billing.charge", "job.failed", "log:log"),
        ("billing.charge", "job.failed", "log:mail"),
        ("billing.refund", "job.failed", "log:log"),
        ("billing.refund", "job.failed", "log:mail"),
    ]


def test_operators_hear_of_an_endpoint_that_was_disabled(office: Office, configure: Configure) -> None:
    configure('[channels.ops]\nkind = "log"\n[[rules]]\nevents = ["endpoint.*"]\nchannels = ["ops"]\n')
    endpoint_id = add_endpoint(office.database, "*", tenant_id=office.tenant_id)
    [row] = rows_of(office.database, models.webhook_endpoints)
    with office.database.write() as connection:
        endpoint_health.disable(connection, row, reason="failing", now=office.clock.now())
    [delivery] = rows_of(office.database, models.webhook_deliveries)
    [message] = rows_of(office.database, models.webhook_messages)
    assert (delivery["url"], message["event_type"]) == ("log:ops", "endpoint.disabled")
    data = json.loads(message["payload"])["data"]
    PAYLOADS[SystemEvent.ENDPOINT_DISABLED].model_validate(data)
    assert data == {"endpoint_id": endpoint_id, "url": row["url"], "reason": "failing"}


def test_progress_is_nothing_to_be_notified_of(office: Office, configure: Configure) -> None:
    configure('[channels.ops]\nkind = "log"\n[[rules]]\nevents = ["*"]\nchannels = ["ops"]\n')
    given = {"tenant_id": office.tenant_id, "webhook_url": "https://example.org/"}
    wanted = given | {"webhook_events": ["job.progress"]}
    hold = hold_of(office.database, add_job(office.database, JobStatus.RUNNING, **wanted))
    now = office.clock.now()
    claimed = Claimed(*hold, office.tenant_id, "normal", "demo.echo", "{}", 60, 0, 0, RetryPolicy())
    with office.database.write() as connection:
        assert progress.save_and_tell(connection, [(claimed, Progress(10))], now=now)
    assert [row["channel"] for row in rows_of(office.database, models.webhook_deliveries)] == ["webhook"]
    with office.database.write() as connection:
        carry_out(connection, [BackOff(*hold, now)], now=now, actor="t")
    events = {row["event_type"] for row in rows_of(office.database, models.webhook_messages)}
    assert events == {"job.progress", "job.retrying"}


def test_without_rules_nothing_is_told_and_nothing_read(office: Office, configure: Configure) -> None:
    configure('[channels.ops]\nkind = "log"\n')
    fail(office)
    hold = hold_of(office.database, add_job(office.database, JobStatus.RUNNING, tenant_id=office.tenant_id))
    configure(DEAD + '[channels.ops]\nkind = "log"\n')
    with office.database.write() as connection:
        carry_out(connection, [Complete(*hold)], now=office.clock.now(), actor="t")
    assert rows_of(office.database, models.webhook_messages) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("channels = 1", "channels: Input should be a valid dictionary"),
        ("[channels.ops]", "channels.ops: Unable to extract tag using discriminator 'kind'"),
        (
            '[channels.ops]\nkind = "fax"',
            "does not match any of the expected tags: 'log', 'email', 'webhook'",
        ),
        ('[channels.ops]\nkind = "log"\ncolour = 1', "channels.ops.log.colour: Extra inputs"),
        ('[channels."Ops 1"]\nkind = "log"', "String should match pattern"),
        (DEAD, "a rule names the channel 'ops'; there are: none"),
        ('[channels.a]\nkind = "log"\n' + DEAD, "a rule names the channel 'ops'; there are: a"),
        (
            '[channels.ops]\nkind = "log"\n' + DEAD.replace("dead_lettered", "exploded"),
            "rule 1: 'job.exploded' fits no event",
        ),
        (mail(25, username="me"), "username and password belong together"),
        (mail(25, username="me", password="hunter2"), 'a password needs security = "starttls" or "tls"'),
        (mail(0), "channels.ops.email.port: Input should be greater than or equal to 1"),
        (mail(65536), "channels.ops.email.port: Input should be less than or equal to 65535"),
        (mail(25).replace("ops@", "ops@x\\r\\nBcc: you@"), "channels.ops.email.to.0: String should match"),
        ('[[failure_rates]]\nchannels = ["ops"]', "a rule names the channel 'ops'"),
        ('[[failure_rates]]\nchannels = ["a"]\npercent = 100', "percent: Input should be less than 100"),
        ('[[failure_rates]]\nchannels = ["a"]\nwithin_seconds = 59', "greater than or equal to 60"),
        ("[[rules]]\nevents = []\nchannels = []", "rules.0.events: Tuple should have at least 1 item"),
        ("nonsense", "is not TOML"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_place(
    configure: Configure, text: str, why: str
) -> None:
    with pytest.raises(Unprocessable) as raised:
        configure(text)
    assert why in str(raised.value)
    assert str(raised.value).startswith("LANEWAY_NOTIFICATIONS: ")
    assert "hunter2" not in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unprocessable, match=r"none\.toml cannot be read: No such file or directory"):
        rules.load(tmp_path / "none.toml")


def test_the_example_of_the_how_to_is_a_file_as_it_should_be(configure: Configure) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "get_notified.md").read_text()
    [text] = [block.partition("```")[0] for block in page.split("```toml\n")[1:]]
    notifications = configure(text)
    assert {channel.kind for channel in notifications.channels.values()} == {"log", "email", "webhook"}
    assert json.loads(json.dumps(notifications.addresses("job.dead_lettered", "billing.charge")))
