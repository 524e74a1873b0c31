"""Which names this API answers to.

A service on loopback is not out of reach: a web page can make its own name lead to 127.0.0.1 (DNS
rebinding) or send forms there. Its requests then carry the page's name as `Host`, or as `Origin`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from laneway.api.problems import of_error
from laneway.errors import HostNotAllowed, OriginNotAllowed
from laneway.settings import Settings, is_loopback

LOOPBACK_HOSTS = ("localhost", "127.0.0.0/8", "::1")
FREE_PATHS = frozenset({"/livez", "/readyz"})  # probes name machines by their addresses
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_ORIGIN = re.compile(r"https?://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Hosts:
    """Names and networks; `host in hosts` for the text of a `Host` header without its port."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._networks = []
        for each in allowed:
            try:
                self._networks.append(ip_network(each.strip("[]")))
            except ValueError:
                self._names.add(_plain(each))

    def __contains__(self, host: str) -> bool:
        try:
            address = ip_address(host.strip("[]"))
        except ValueError:
            return _plain(host) in self._names
        return any(address in network for network in self._networks)


def allowed_hosts(settings: Settings) -> Hosts | None:
    """The names to answer to, None: to all."""
    given = settings.allowed_hosts or (LOOPBACK_HOSTS if is_loopback(settings.host) else ())
    public = urlsplit(settings.public_url).hostname
    return Hosts([*given, *([public] if public else [])]) if given else None


class HostCheck:
    """Refuses requests whose `Host` is none of `hosts`, or missing, or whose `Origin` is another site."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in FREE_PATHS:
            refusal = self._refusal(scope["headers"])
            if refusal is not None:
                await of_error(scope, refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> HostNotAllowed | OriginNotAllowed | None:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None or found["host"] not in self._hosts:
            return HostNotAllowed(
                "this API does not answer to that Host; LANEWAY_ALLOWED_HOSTS lists the names"
            )
        for name, value in headers:
            if name == b"origin":
                origin = _ORIGIN.fullmatch(value.decode("latin-1"))
                if origin is None or origin["host"] not in self._hosts:
                    return OriginNotAllowed(
                        "pages of that Origin may not call this API; LANEWAY_ALLOWED_HOSTS lists the names"
                    )
        return None


def _plain(host: str) -> str:
    return host.lower().removesuffix(".")
