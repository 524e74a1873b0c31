"""Endpoints with an authority of their own, and receivers that ask who is calling: mutual TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from laneway.db import Database
from laneway.webhooks import papers
from laneway.webhooks.endpoints import EndpointChange
from webhook_desk import Desk
from webhook_office import Office
from webhook_receiver import Receiver


@dataclass(frozen=True)
class Authority:
    """Signs certificates. `pem` is its own."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, name, key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(
        self, name: str, *, address: str | None = None, encryption: KeySerializationEncryption | None = None
    ) -> str:
        """A certificate, then its key, as PEM; for a server at `address`, else for a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, self.certificate.subject, key.public_key())
        if address is not None:
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
        return (certificate + secret).decode()


def _builder(
    subject: str, issuer: str | x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer) if isinstance(issuer, str) else issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@pytest.fixture(scope="module")
def ours() -> Authority:
    """Who signed the receiver's certificate."""
    return Authority.new("ours")


@pytest.fixture(scope="module")
def partner() -> Authority:
    """Whose certificates the receiver takes from clients."""
    return Authority.new("partner")


@pytest.fixture
def receiver_tls(ours: Authority, partner: Authority, tmp_path: Path) -> ssl.SSLContext:
    """A receiver's context that wants a client certificate."""
    path = tmp_path / "server.pem"
    path.write_text(ours.issue("receiver", address="127.0.0.1"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.load_verify_locations(cadata=partner.pem)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(Office(database))


def test_a_receiver_that_asks_who_is_calling_is_shown_the_endpoints_certificate(
    desk: Desk, receiver_tls: ssl.SSLContext, ours: Authority, partner: Authority
) -> None:
    with Receiver(tls=receiver_tls) as receiver, desk.office.open():
        endpoint_id, _ = desk.register(
            receiver.url(scheme="https"), client_certificate=partner.issue("laneway"), ca_certificate=ours.pem
        )
        desk.complete()
        [delivery] = desk.wait(endpoint_id, "delivered")
        [attempt] = desk.attempts(delivery["id"])
        assert (attempt["status_code"], attempt["error_class"]) == (200, None)
        assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"]
)
@pytest.mark.parametrize("case", ["no certificate", "another client's", "another authority", "no authority"])
def test_who_does_not_know_the_other_sends_nothing(
    sqlite_url: str,
    receiver_tls: ssl.SSLContext,
    ours: Authority,
    partner: Authority,
    case: str,
    version: ssl.TLSVersion,
) -> None:
    receiver_tls.maximum_version = version
    certificate: str | None = partner.issue("laneway")
    authority: str | None = ours.pem
    if case == "no certificate":
        certificate = None
    elif case == "another client's":
        certificate = Authority.new("stranger").issue("laneway")
    else:
        authority = Authority.new("stranger").pem if case == "another authority" else None
    database = Database(sqlite_url)
    desk = Desk(Office(database))
    with Receiver(tls=receiver_tls) as receiver, desk.office.open():
        endpoint_id, _ = desk.register(
            receiver.url(scheme="https"), client_certificate=certificate, ca_certificate=authority
        )
        desk.complete()
        [delivery] = desk.wait(endpoint_id, "retrying")
        [attempt] = desk.attempts(delivery["id"])
    assert (attempt["error_class"], attempt["status_code"], receiver.requests) == ("tls", None, [])
    assert "127.0.0.1" not in attempt["error"]
    database.dispose()


def test_a_context_is_made_once_for_each_version_of_an_endpoint(
    desk: Desk,
    receiver_tls: ssl.SSLContext,
    ours: Authority,
    partner: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[ssl.SSLContext] = []
    make = papers.make_context
    monkeypatch.setattr(
        papers, "make_context", lambda *parts: made.append(context := make(*parts)) or context
    )
    with Receiver(tls=receiver_tls) as receiver, desk.office.open():
        own = {"client_certificate": partner.issue("laneway"), "ca_certificate": ours.pem}
        endpoint_id, _ = desk.register(receiver.url(scheme="https"), **own)
        for count in range(1, 4):
            desk.complete()
            desk.wait(endpoint_id, *["delivered"] * count)
        assert len(made) == 1
        desk.change(endpoint_id, client_certificate=Authority.new("stranger").issue("laneway"))
        desk.complete()
        desk.wait(endpoint_id, *["delivered"] * 3, "retrying")  # not over a connection of before
        assert (len(made), len(receiver.requests)) == (2, 3)


def test_what_is_no_certificate_is_refused_where_it_stands_and_not_repeated(
    ours: Authority, partner: Authority
) -> None:
    locked = partner.issue("laneway", encryption=BestAvailableEncryption(b"password"))
    pem = partner.issue("laneway")
    certificate, key = (pem[: pem.index("-----BEGIN PRIVATE")], pem[pem.index("-----BEGIN PRIVATE") :])
    other_key = partner.issue("x")
    other_key = other_key[other_key.index("-----BEGIN PRIVATE") :]
    for wrong in ("canary", locked, certificate, key, certificate + other_key, "\u00fc", "\0"):
        with pytest.raises(ValidationError) as refused:
            EndpointChange(client_certificate=wrong)
        [error] = refused.value.errors(include_input=False)
        assert error["loc"] == ("client_certificate",)
        assert wrong not in error["msg"]
    for wrong in ("canary", key, "\u00fc", "\0"):
        with pytest.raises(ValidationError) as refused:
            EndpointChange(ca_certificate=wrong)
        assert refused.value.errors()[0]["loc"] == ("ca_certificate",)
    assert EndpointChange(client_certificate=pem, ca_certificate=ours.pem + partner.pem)


def test_certificates_are_kept_sealed_and_never_shown(
    desk: Desk, ours: Authority, partner: Authority
) -> None:
    pem = partner.issue("laneway")
    endpoint_id, _ = desk.register(
        "https://hooks.example.org/", client_certificate=pem, ca_certificate=ours.pem
    )
    office = desk.office
    view = desk.endpoints.get(office.tenant_id, endpoint_id, now=office.clock.now())
    assert (view["has_client_certificate"], view["has_ca_certificate"]) == (True, True)
    assert "BEGIN" not in str(view)
    gone = desk.change(endpoint_id, client_certificate=None, ca_certificate=None)
    assert (gone["has_client_certificate"], gone["has_ca_certificate"]) == (False, False)
