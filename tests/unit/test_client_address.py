"""Who is behind the proxies: only what a trusted one wrote is believed."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from pydantic import ValidationError

from laneway.api.client_address import client_address
from laneway.settings import Settings

PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("192.0.2.1", ["203.0.113.7"], "192.0.2.1"),  # no proxy: what it says of others counts for nothing
        ("10.0.0.1", ["1.1.1.1, 203.0.113.7"], "203.0.113.7"),  # the client's own word is to the left
        ("10.0.0.1", ["1.1.1.1, 203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.7", "10.0.0.2"], "203.0.113.7"),  # several headers are one list
        ("10.0.0.1", ["10.0.0.3,10.0.0.2"], "10.0.0.3"),  # all of them proxies: the first of them
        ("10.0.0.1", ["203.0.113.7, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.7, _hidden, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["203.0.113.7, 10.0.0.2, "], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.7:4711"], "203.0.113.7"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("10.0.0.1", ["fe80::1%eth0"], "10.0.0.1"),
        ("10.0.0.1", ["::ffff:203.0.113.7"], "203.0.113.7"),
        ("::ffff:10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("fd00::1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["203.0.113.7\x00"], "10.0.0.1"),
        ("10.0.0.1", ["0x7f.1"], "10.0.0.1"),
        ("10.0.0.1", ["é"], "10.0.0.1"),
        (None, ["203.0.113.7"], None),
        ("", ["203.0.113.7"], ""),
        ("testclient", ["203.0.113.7"], "testclient"),
    ],
)
def test_the_header_is_read_from_the_right_for_as_long_as_proxies_wrote_it(
    peer: str | None, forwarded: list[str], found: str | None
) -> None:
    headers = [(b"host", b"x"), *((b"x-forwarded-for", value.encode("latin-1")) for value in forwarded)]
    assert client_address(peer, headers, PROXIES) == found


def test_nobody_is_trusted_unless_named() -> None:
    assert client_address("127.0.0.1", [(b"x-forwarded-for", b"1.1.1.1")], []) == "127.0.0.1"


def test_the_setting_takes_networks_and_a_star() -> None:
    assert [str(n) for n in Settings(trusted_proxies="10.0.0.0/8, ::1/128").proxy_networks] == [
        "10.0.0.0/8",
        "::1/128",
    ]
    everybody = Settings(trusted_proxies="*").proxy_networks
    assert client_address("192.0.2.1", [(b"x-forwarded-for", b"1.1.1.1, 2.2.2.2")], everybody) == "1.1.1.1"
    with pytest.raises(ValidationError):
        Settings(trusted_proxies="10.0.0.1/8")
