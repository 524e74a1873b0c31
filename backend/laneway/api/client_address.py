"""Which machine a request comes from, when proxies stand in between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network

_WITH_PORT = re.compile(r"\[(?P<six>[^\]]+)\](:\d{1,5})?|(?P<four>[0-9.]+):\d{1,5}")


def client_address(
    peer: str | None, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network]
) -> str | None:
    """The address of the client: the peer's own, unless the peer is a proxy in one of the `trusted` networks.

    Each proxy adds at the right of `X-Forwarded-For` whom it got the request from. So the header is read
    from the right, for as long as who wrote the entry is trusted: what a client wrote itself is never
    reached. An entry that is no address ends the walk at the proxy that passed it on. `headers` are those
    of the ASGI scope. IPv4 in IPv6 clothes (`::ffff:192.0.2.1`) is given as IPv4.
    """
    here = _address(peer or "")
    if here is None:
        return peer
    if trusted and _is_in(here, trusted):
        said = ",".join(value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for")
        for entry in reversed(said.split(",")) if said else ():
            before = _address(entry.strip())
            if before is None:
                break
            here = before
            if not _is_in(here, trusted):
                break
    return str(here)


def _is_in(address: IPv4Address | IPv6Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address in `text`, with or without a port; None when there is none."""
    if found := _WITH_PORT.fullmatch(text):
        text = found["six"] or found["four"]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return None
        return address.ipv4_mapped or address
    return address
