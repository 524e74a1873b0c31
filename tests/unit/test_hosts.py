"""Which names the API answers to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError

from laneway.api.hosts import HostCheck, allowed_hosts
from laneway.settings import Settings


def asked(
    settings: Settings, *hosts: str, origin: str | None = None, path: str = "/api/v1/jobs"
) -> tuple[int, str]:
    """The status and the problem's text, of a request that an inner app would answer 200."""
    sent: list[Any] = []

    async def inner(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def collect(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    headers += [] if origin is None else [(b"origin", origin.encode())]
    allowed = allowed_hosts(settings)
    app: Any = inner if allowed is None else HostCheck(inner, allowed)
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    asyncio.run(app(scope, None, collect))
    return sent[0]["status"], sent[1]["body"].decode()


LOCAL = Settings()
NAMED = Settings(host="0.0.0.0", allowed_hosts="jobs.example.org, 10.0.0.0/8")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("localhost.", 200),
        ("127.0.0.1:8000", 200),
        ("127.255.255.254", 200),
        ("[::1]:8000", 200),
        ("localhost.evil.example", 403),
        ("evil-localhost", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1.nip.io", 403),
        ("128.0.0.1", 403),
        ("0.0.0.0", 403),
        ("[::]", 403),
        ("[::ffff:127.0.0.1]", 403),
        ("2130706433", 403),
        ("127.1", 403),
        ("localhost@evil.example", 403),
        ("localhost:80:80", 403),
        ("localhost:", 403),
        ("localhost/", 403),
        (" localhost", 403),
        ("", 403),
        ("l\xf6calhost", 403),
    ],
)
def test_on_loopback_only_this_machines_names_are_answered(host: str, status: int) -> None:
    assert asked(LOCAL, host)[0] == status


def test_a_missing_or_double_host_is_refused() -> None:
    for hosts in ((), ("localhost", "localhost"), ("localhost", "evil.example")):
        status, text = asked(LOCAL, *hosts)
        assert (status, '"code": "host_not_allowed"' in text) == (403, True)
    assert "LANEWAY_ALLOWED_HOSTS" in text


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://[::1]:8000", 200),
        ("null", 403),
        ("", 403),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost@evil.example", 403),
        ("file://", 403),
        ("moz-extension://localhost", 403),
    ],
)
def test_pages_of_other_sites_may_not_call(origin: str | None, status: int) -> None:
    assert asked(LOCAL, "localhost:8000", origin=origin)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("jobs.example.org", 200), ("10.1.2.3:80", 200), ("localhost", 403), ("x.jobs.example.org", 403)],
)
def test_names_and_networks_can_be_given(host: str, status: int) -> None:
    assert asked(NAMED, host)[0] == status


def test_probes_are_answered_by_any_name() -> None:
    assert asked(LOCAL, "10.9.8.7:8000", path="/livez")[0] == 200
    assert asked(LOCAL, "10.9.8.7:8000", path="/readyz")[0] == 200
    assert asked(LOCAL, "10.9.8.7:8000", path="/metrics")[0] == 403


def test_an_open_bind_answers_to_all_names_until_some_are_given() -> None:
    open_bind = Settings(host="0.0.0.0")
    assert asked(open_bind, "anything.example", origin="https://evil.example")[0] == 200
    public = Settings(host="0.0.0.0", public_url="https://jobs.example.org/laneway")
    assert asked(public, "anything.example")[0] == 200
    local = Settings(public_url="https://jobs.example.org")
    assert asked(local, "jobs.example.org")[0] == 200
    assert asked(local, "localhost")[0] == 200


@pytest.mark.parametrize("bad", ["*", "a b", "http://localhost", "10.0.0.1/8", "localhost:80"])
def test_what_is_no_name_is_no_setting(bad: str) -> None:
    with pytest.raises(ValidationError):
        Settings(allowed_hosts=bad)
