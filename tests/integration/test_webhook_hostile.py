"""Receivers, names and environments that try to send a webhook where it should not go, or to keep it."""

import asyncio
import socket
import ssl
import threading
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from laneway.db import Database
from laneway.webhooks import dial
from laneway.webhooks import sender as sender_module
from laneway.webhooks.dial import AddressRefused, GuardResolver, socket_factory
from laneway.webhooks.guard import BLOCKED_PORTS, Policy
from laneway.webhooks.sender import MAX_RESPONSE_BYTES
from webhook_office import Office
from webhook_receiver import (
    Exchange,
    Mode,
    Receiver,
    drip_body,
    drip_headers,
    endless_body,
    endless_continue,
    hang,
    in_turn,
    nonsense,
    ok,
    reset,
)

NAME = "hooks.example.com"


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    store = Database(sqlite_url)
    yield store
    store.dispose()


@pytest.fixture
def office(database: Database) -> Office:
    return Office(database, webhook_timeout_seconds=0.5)


def answers(*addresses: str) -> Any:
    """A name server that gives these addresses for every name."""

    def getaddrinfo(_host: str, port: int, **_: object) -> list[Any]:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    return getaddrinfo


def fails(office: Office, url: str, error_class: str, *, status: str = "retrying", **courier: Any) -> Any:
    """The one attempt at `url`, which fails like this."""
    job_id = office.post(url)
    with office.open(office.courier(**courier)):
        office.wait(job_id, status=status)
    [attempt] = office.attempts(job_id)
    assert (attempt["error_class"], office.job(job_id)["webhook_delivered"]) == (error_class, False)
    return attempt


@pytest.mark.parametrize(
    ("mode", "error_class"),
    [
        (hang, "timeout"),
        (drip_headers, "timeout"),
        (endless_continue, "timeout"),
        (reset, "reset"),
        (nonsense, "protocol"),
        (in_turn(101), "protocol"),
        (in_turn(404), "http_4xx"),
        (in_turn(401, WWW_Authenticate="Digest realm=x"), "http_4xx"),
        (in_turn(500), "http_5xx"),
        (lambda exchange: exchange.answer(200, X_Long="x" * 10_000_000), "protocol"),
    ],
    ids=["hang", "drip", "continue", "reset", "nonsense", "101", "404", "401", "500", "long-header"],
)
def test_a_bad_answer_is_one_failed_attempt_of_its_class(
    office: Office, mode: Mode, error_class: str
) -> None:
    with Receiver(mode) as receiver:
        fails(office, receiver.url(), error_class)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("mode", [endless_body, drip_body], ids=["endless", "drip"])
def test_a_2xx_counts_whatever_follows_and_little_of_it_is_kept(office: Office, mode: Mode) -> None:
    with Receiver(mode) as receiver, office.open():
        job_id = office.post(receiver.url())
        office.wait(job_id, status="delivered")
    [attempt] = office.attempts(job_id)
    assert 0 < len(attempt["response_body"]) <= MAX_RESPONSE_BYTES
    assert len(receiver.requests) == 1


def test_4_kib_of_an_answer_are_kept_and_not_a_byte_more(office: Office) -> None:
    for size in (MAX_RESPONSE_BYTES, MAX_RESPONSE_BYTES + 1):
        body = b"x" * size
        with Receiver(lambda exchange, body=body: exchange.answer(200, body=body)) as receiver:  # type: ignore[misc]
            job_id = office.post(receiver.url())
            with office.open():
                office.wait(job_id, status="delivered")
        assert office.attempts(job_id)[0]["response_body"] == "x" * MAX_RESPONSE_BYTES


def test_an_answer_of_any_bytes_is_kept_as_text(office: Office) -> None:
    def gzip_bomb(exchange: Exchange) -> None:
        exchange.answer(200, body=b"\x1f\x8b\x00\xff", Content_Encoding="gzip")

    with Receiver(gzip_bomb) as receiver, office.open():
        job_id = office.post(receiver.url())
        office.wait(job_id, status="delivered")
    assert office.attempts(job_id)[0]["response_body"] == "\x1f\ufffd\ufffd\ufffd"


def test_what_is_small_on_the_wire_is_not_made_large(office: Office) -> None:
    """200 MB of zeros in 200 KB: kept as it came."""
    squeeze = zlib.compressobj(level=9, wbits=31)
    bomb = b"".join([*(squeeze.compress(bytes(10_000_000)) for _ in range(20)), squeeze.flush()])
    assert len(bomb) < 250_000
    with (
        Receiver(lambda exchange: exchange.answer(200, body=bomb, Content_Encoding="gzip")) as receiver,
        office.open(),
    ):
        job_id = office.post(receiver.url())
        office.wait(job_id, status="delivered")
    kept = office.attempts(job_id)[0]["response_body"]
    assert kept[0] == "\x1f"
    assert len(kept) <= MAX_RESPONSE_BYTES


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(office: Office, status: int) -> None:
    with Receiver() as elsewhere:
        for location in (elsewhere.url(), "http://169.254.169.254/", "/again"):
            with Receiver(in_turn(status, Location=location)) as receiver:
                attempt = fails(office, receiver.url(), "redirect")
            assert attempt["status_code"] == status
            assert len(receiver.requests) == 1
    assert elsewhere.connections == 0


def test_a_redirect_to_nowhere_fails_and_a_refresh_is_not_heeded(office: Office) -> None:
    with Receiver(in_turn(302)) as receiver:
        fails(office, receiver.url(), "redirect")
    with Receiver() as elsewhere:
        page = f'<meta http-equiv="refresh" content="0; url={elsewhere.url()}">'.encode()
        refresh = {"Refresh": f"0; url={elsewhere.url()}", "Content_Type": "text/html"}
        with Receiver(lambda exchange: exchange.answer(200, body=page, **refresh)) as receiver, office.open():
            office.wait(office.post(receiver.url()), status="delivered")
        assert (len(receiver.requests), elsewhere.connections) == (1, 0)


def test_cookies_are_not_kept(office: Office) -> None:
    with Receiver(lambda exchange: exchange.answer(200, Set_Cookie="a=b")) as receiver, office.open():
        for _ in range(2):
            office.wait(office.post(receiver.url()), status="delivered")
    assert not any("cookie" in request.headers for request in receiver.requests)


def test_proxies_and_netrc_of_the_environment_are_ignored(
    office: Office, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password hush\n")
    netrc.chmod(0o600)
    with Receiver() as proxy, Receiver() as receiver:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
            monkeypatch.setenv(name.lower(), proxy.url(""))
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("NETRC", str(netrc))
        with office.open():
            office.wait(office.post(receiver.url()), status="delivered")
    assert "authorization" not in receiver.requests[0].headers
    assert proxy.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("169.254.169.254",),
        ("fd00:ec2::254",),
        ("::ffff:127.0.0.1",),
        ("8.8.8.8", "127.0.0.1"),
        ("127.0.0.1", "2606:4700:4700::1111"),
        (*(f"8.8.8.{number}" for number in range(63)), "127.0.0.1"),
    ],
    ids=["loopback", "metadata", "metadata-v6", "mapped", "mixed", "mixed-v6", "one-of-64"],
)
def test_a_name_with_a_refused_address_is_never_dialled(
    database: Database, addresses: tuple[str, ...]
) -> None:
    office = Office(database, webhook_allowed_cidrs=(), webhook_allowed_ports=("*",))
    with Receiver() as listener:
        url = listener.url(host=NAME)
        attempt = fails(office, url, "ssrf_blocked", status="dead", getaddrinfo=answers(*addresses))
        assert listener.connections == 0
    assert "LANEWAY_WEBHOOK_ALLOWED_CIDRS" in attempt["error"]
    assert not any(address in attempt["error"] for address in addresses)
    assert attempt["response_body"] is None


def test_metadata_services_are_not_dialled_even_when_everything_is_allowed(database: Database) -> None:
    office = Office(database, webhook_allowed_cidrs=("0.0.0.0/0", "::/0"), webhook_allowed_ports=("*",))
    for address in ("169.254.169.254", "168.63.129.16", "fd00:ec2::254"):
        url = f"http://{NAME}/latest/meta-data"
        fails(office, url, "ssrf_blocked", status="dead", getaddrinfo=answers(address))


@pytest.mark.parametrize("now", [{"webhook_allowed_cidrs": ()}, {"webhook_allow_http": False}], ids=str)
def test_what_was_allowed_at_create_is_judged_again_at_each_attempt(
    database: Database, now: dict[str, Any]
) -> None:
    office = Office(database)
    with Receiver(in_turn(503)) as listener:
        job_id = office.post(listener.url())
        with office.open():
            office.wait(job_id, status="retrying")
        stricter = Office(database, **now)
        stricter.clock.advance(seconds=7)
        with stricter.open():
            stricter.wait(job_id, status="dead", attempts=2)
        assert (len(listener.requests), listener.connections) == (1, 1)
    assert [row["error_class"] for row in office.attempts(job_id)] == ["http_5xx", "ssrf_blocked"]


def test_the_address_that_was_judged_is_the_address_that_is_dialled(database: Database) -> None:
    flips = iter([answers("127.0.0.1"), answers("169.254.169.254")])
    asked = []

    def rebinding(*where: Any, **how: Any) -> Any:
        asked.append(where)
        return next(flips)(*where, **how)

    office = Office(database, webhook_allowed_ports=("*",))
    with Receiver() as receiver:
        job_id = office.post(receiver.url(host=NAME))
        with office.open(office.courier(getaddrinfo=rebinding)):
            office.wait(job_id, status="delivered")
    assert len(asked) == 1
    assert receiver.requests[0].headers["host"] == f"{NAME}:{receiver.port}"


@pytest.mark.parametrize(("seconds", "status"), [(4.0, "delivered"), (0.0, "dead")], ids=["kept", "new"])
def test_after_a_name_moved_only_a_connection_that_was_judged_is_used(
    database: Database, monkeypatch: pytest.MonkeyPatch, seconds: float, status: str
) -> None:
    monkeypatch.setattr(sender_module, "KEEPALIVE_SECONDS", seconds)
    monkeypatch.setattr(sender_module, "DNS_CACHE_SECONDS", 0)
    now: list[Any] = [answers("127.0.0.1")]
    office = Office(database, webhook_allowed_ports=("*",))
    with Receiver() as receiver:

        def newest(*where: Any, **how: Any) -> Any:
            return now[-1](*where, **how)

        with office.open(office.courier(getaddrinfo=newest)):
            office.wait(office.post(receiver.url(host=NAME)), status="delivered")
            now.append(answers("10.0.0.1"))
            office.wait(office.post(receiver.url(host=NAME)), status=status)
        assert receiver.connections == 1


@pytest.mark.parametrize("error", [socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_FAIL], ids=str)
def test_a_name_that_does_not_resolve_is_tried_again(office: Office, error: int) -> None:
    """NXDOMAIN, no answer in time, SERVFAIL."""

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(error, "what the name server said")

    fails(office, f"http://{NAME}/", "dns", getaddrinfo=unknown)


@pytest.mark.parametrize(
    ("alias", "address"), [("localhost", "127.0.0.1"), ("metadata.google.internal", "169.254.169.254")]
)
def test_a_chain_of_names_is_judged_by_where_it_ends(database: Database, alias: str, address: str) -> None:
    def through_an_alias(host: str, port: int, **how: Any) -> Any:
        return [(*found[:3], alias, found[4]) for found in answers(address)(host, port, **how)]

    office = Office(database, webhook_allowed_cidrs=(), webhook_allowed_ports=("*",))
    with Receiver() as listener:
        url = listener.url(host=NAME)
        fails(office, url, "ssrf_blocked", status="dead", getaddrinfo=through_an_alias)
        assert listener.connections == 0


def test_this_service_does_not_call_itself(database: Database) -> None:
    with Receiver() as itself:
        office = Office(database, public_url=itself.url(""))
        fails(office, itself.url(), "ssrf_blocked", status="dead")
        assert itself.connections == 0


def test_an_opened_network_opens_no_other(database: Database) -> None:
    office = Office(database, webhook_allowed_cidrs=("127.0.0.2/32",), webhook_allowed_ports=("*",))
    with Receiver() as listener:
        fails(office, listener.url(), "ssrf_blocked", status="dead")
        fails(
            office, listener.url(host=NAME), "ssrf_blocked", status="dead", getaddrinfo=answers("127.0.0.1")
        )
        assert listener.connections == 0


def test_no_port_of_a_known_service_is_dialled(database: Database) -> None:
    office = Office(database, webhook_allowed_ports=("*",))
    for port in sorted(BLOCKED_PORTS):
        if port < 1024:
            continue
        try:
            listener = socket.create_server(("127.0.0.1", port))
        except OSError:
            continue  # the service is here itself
        with listener:
            listener.setblocking(False)
            fails(office, f"http://127.0.0.1:{port}/", "ssrf_blocked", status="dead")
            with pytest.raises(BlockingIOError):
                listener.accept()
            return
    pytest.fail("none of these ports is free")


def test_nobody_listening_is_told_without_an_address(office: Office) -> None:
    with Receiver() as receiver:
        url = receiver.url()
    assert fails(office, url, "connect")["error"] == "connecting failed: Connection refused"


def test_the_socket_is_judged_even_when_no_resolver_was_asked() -> None:
    make = socket_factory(Policy())
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with pytest.raises(AddressRefused):
            make((family, socket.SOCK_STREAM, 6, "", (address, 443)))
    with pytest.raises(AddressRefused):
        make((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%lo", 443, 0, 1)))
    make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443))).close()


def test_a_name_server_that_hangs_is_given_up_on() -> None:
    async def scenario() -> None:
        hung = threading.Event()

        def hang_up(*_: object, **__: object) -> list[Any]:
            hung.wait()
            return []

        resolver = GuardResolver(Policy(), timeout_seconds=0.1, getaddrinfo=hang_up)
        with pytest.raises(OSError, match="did not answer in time"):
            await resolver.resolve(NAME, 443)
        hung.set()
        await resolver.close()

    asyncio.run(scenario())


def test_slow_names_leave_threads_to_the_others() -> None:
    async def scenario() -> None:
        hung, asked = threading.Event(), []

        def sometimes(host: str, port: int, **how: object) -> list[Any]:
            asked.append(host)
            if host.startswith("slow"):
                hung.wait()
            return list(answers("8.8.8.8")(host, port, **how))

        resolver = GuardResolver(Policy(), timeout_seconds=0.1, getaddrinfo=sometimes)
        slow = [f"slow{number}.example.com" for number in range(dial.DNS_THREADS // 2)]
        for _ in range(3):
            results = await asyncio.gather(*(resolver.resolve(each) for each in slow), return_exceptions=True)
            assert all(isinstance(result, OSError) for result in results)
        assert len(asked) == len(slow)  # nobody asks again while so many are out
        assert [found["host"] for found in await resolver.resolve(NAME)] == ["8.8.8.8"]
        hung.set()
        while not all(each.done() for each in resolver._stuck):
            await asyncio.sleep(0.001)
        assert len(await resolver.resolve(slow[0])) == 1
        await resolver.close()

    asyncio.run(scenario())


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        authority = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=None))
        self.file = folder / "authority.pem"
        self.file.write_bytes(authority.public_bytes(serialization.Encoding.PEM))

    def serve(self, host: str, *, expired: bool = False) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        file = self._folder / f"{host}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + self._sign(subject, key, names, expired=expired).public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extension: x509.ExtensionType,
        *,
        expired: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=-1 if expired else 1))
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that this process trusts, as an operator would make it: by SSL_CERT_FILE."""
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.file))
    return made


def test_over_tls_name_and_certificate_are_the_urls(database: Database, authority: Authority) -> None:
    office = Office(database, webhook_allowed_ports=("*",))
    with Receiver(ok, tls=authority.serve(NAME)) as receiver:
        job_id = office.post(receiver.url(host=NAME, scheme="https"))
        with office.open(office.courier(getaddrinfo=answers("127.0.0.1"))):
            office.wait(job_id, status="delivered")
    assert receiver.requests[0].headers["host"] == f"{NAME}:{receiver.port}"


def test_two_names_of_one_address_share_no_connection(database: Database, authority: Authority) -> None:
    names = ("one.example.com", "two.example.com")
    contexts = {name: authority.serve(name) for name in names}
    asked: list[str] = []

    def choose(connection: ssl.SSLSocket, name: str, _context: ssl.SSLContext) -> None:
        asked.append(name)
        connection.context = contexts[name]

    contexts[names[0]].sni_callback = choose  # type: ignore[assignment]
    office = Office(database, webhook_allowed_ports=("*",))
    with Receiver(ok, tls=contexts[names[0]]) as receiver:
        posted = [office.post(receiver.url(host=name, scheme="https")) for name in names]
        with office.open(office.courier(getaddrinfo=answers("127.0.0.1"))):
            for job_id in posted:
                office.wait(job_id, status="delivered")
    assert sorted(asked) == sorted(names)
    assert receiver.connections == len(names)


@pytest.mark.parametrize("fault", ["another name", "expired", "unknown authority"])
def test_a_certificate_that_does_not_hold_gets_no_request(
    database: Database, authority: Authority, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "unknown authority":
        monkeypatch.delenv("SSL_CERT_FILE")
    certified = "other.example.com" if fault == "another name" else NAME
    office = Office(database, webhook_allowed_ports=("*",))
    with Receiver(ok, tls=authority.serve(certified, expired=fault == "expired")) as receiver:
        url = receiver.url(host=NAME, scheme="https")
        fails(office, url, "tls", getaddrinfo=answers("127.0.0.1"))
        assert receiver.requests == []


def test_speaking_plainly_to_a_tls_client_is_a_tls_failure(database: Database) -> None:
    office = Office(database, webhook_allowed_ports=("*",))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"https://{NAME}:{server.getsockname()[1]}/"
        fails(office, url, "tls", getaddrinfo=answers("127.0.0.1"))
        thread.join()
