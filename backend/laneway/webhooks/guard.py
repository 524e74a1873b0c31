"""Which URLs may be called: the guard against server-side request forgery (SSRF). Fails closed.

A webhook URL comes from a caller and is opened by us, inside our network. Two questions are asked:
`check_url`, of the text, when a job is created and again before each attempt; `classify`, of each
address, after the name was looked up and again of the socket's own address (`dial.py`), since a name may
answer with something else each time it is asked.

IPv4 is judged by a list of what is refused, IPv6 by a list of what may pass: `ipaddress.is_global` of
Python 3.11 lets through 168.63.129.16, 64:ff9b::7f00:1, ::127.0.0.1 and 224.0.0.1, among others.

What an operator may open, and what not:

- `LANEWAY_WEBHOOK_ALLOWED_CIDRS` opens private addresses; metadata services stay closed whatever it says.
- `LANEWAY_WEBHOOK_ALLOWED_HOSTS` opens names that look internal; what they resolve to is still judged.
- A target opened by either may use any port from 1024 up (developers' receivers listen on 9000 and the
  like), other targets only `LANEWAY_WEBHOOK_ALLOWED_PORTS`. Ports of known services stay closed.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import SplitResult, urlsplit

from laneway.errors import WebhookUrlRefused

if TYPE_CHECKING:
    from laneway.settings import Settings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_CHARACTERS = 2048
MAX_HOST_CHARACTERS = 253  # RFC 1035 section 3.1, without the root's dot
FIRST_FREE_PORT = 1024
DEFAULT_PORTS = {"https": 443, "http": 80}

ALLOW_HTTP = "LANEWAY_WEBHOOK_ALLOW_HTTP"
ALLOWED_CIDRS = "LANEWAY_WEBHOOK_ALLOWED_CIDRS"
ALLOWED_HOSTS = "LANEWAY_WEBHOOK_ALLOWED_HOSTS"
ALLOWED_PORTS = "LANEWAY_WEBHOOK_ALLOWED_PORTS"


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ip_network(cidr) for cidr in text.split())


def _ports(text: str) -> frozenset[int]:
    return frozenset(int(port) for port in text.split())


# The IANA registry of special-purpose addresses (RFC 6890 and later), multicast, reserved, Azure's host.
_REFUSED_V4 = _networks("""
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15
    198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 168.63.129.16/32
""")
_PUBLIC_V6 = IPv6Network("2000::/3")
_REFUSED_V6 = _networks("2001::/23 2001:db8::/32 2002::/16 3fff::/20 2620:4f:8000::/48")
# Where clouds hand out credentials: AWS (EC2, ECS, EKS), Google, Azure, Alibaba, Oracle.
_METADATA = _networks("""
    169.254.169.254 169.254.170.2 169.254.170.23 fd00:ec2::254 fd00:ec2::23 fd20:ce::254 168.63.129.16
    100.100.100.200 192.0.0.192
""")
# The WHATWG Fetch standard's "bad ports".
_FETCH_BAD_PORTS = _ports("""
    1 7 9 11 13 15 17 19 20 21 22 23 25 37 42 43 53 69 77 79 87 95 101 102 103 104 109 110 111 113 115 117
    119 123 135 137 139 143 161 179 389 427 465 512 513 514 515 526 530 531 532 540 548 554 556 563 587 601
    636 989 990 993 995 1719 1720 1723 2049 3659 4045 4190 5060 5061 6000 6566 6665 6666 6667 6668 6669 6679
    6697 10080
""")
# Databases, caches, brokers, orchestrators, remote desktops.
_SERVICE_PORTS = _ports("""
    445 1433 1521 2181 2375 2376 2379 2380 3306 3389 5432 5672 5900 5984 5985 5986 6379 6443 9042 9092 9200
    9300 10250 10255 11211 15672 26379 27017 50070
""")
BLOCKED_PORTS = _FETCH_BAD_PORTS | _SERVICE_PORTS

_INTERNAL_NAMES = (
    ".localhost",
    ".local",
    ".localdomain",
    ".internal",
    ".intranet",
    ".lan",
    ".corp",
    ".home",
    ".arpa",
    ".onion",
    ".test",
    ".invalid",
    ".svc",
    ".consul",
)
_BAD_CHARACTER = re.compile(r"[\x00-\x20\x7f\\<>\"^`{|}]")
_BAD_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"})
_UNICODE_DOTS = frozenset("\u3002\uff0e\uff61\u2024")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # WHATWG URL, "ends in a number"
_NOT_PRINTABLE = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator opens. `ports` None: all but those of known services."""

    allow_http: bool = False
    ports: frozenset[int] | None = frozenset({443, 8443})
    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()
    own: tuple[str, int] | None = None  # host and port of this service, which must not call itself

    @classmethod
    def from_settings(cls, settings: Settings) -> Policy:
        """Raises ValueError, naming the variable, for a port that is none."""
        return cls(
            allow_http=settings.webhook_allow_http,
            ports=_allowed_ports(settings.webhook_allowed_ports),
            networks=settings.allowed_networks,
            hosts=frozenset(host.lower().removesuffix(".") for host in settings.webhook_allowed_hosts),
            own=_origin(settings.public_url),
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that passed: `host` is ASCII, lower case, an IPv6 address without brackets.

    `url` is the one canonical spelling: default port and fragment gone, the path at least `/`, all of it
    printable ASCII. Store and send this one.
    """

    host: str
    port: int
    url: str


def check_url(url: str, policy: Policy) -> Target:
    """The target that `url` names, judged by its text alone: no look-up, no connection.

    Raises WebhookUrlRefused with the facts `reason` and `setting`, the variable that would allow it
    (None when nothing does).
    """
    parts, port = _split(url, policy)
    host = _host(parts)
    address = _address(host, bracketed="[" in parts.netloc)
    opened = host in policy.hosts
    if address is not None:
        reason = classify(address, policy)
        if reason is not None:
            _refuse(
                "address",
                f"{host} is not a public address ({reason})",
                setting=None if reason in (_IS_METADATA, _IS_MAPPED) else ALLOWED_CIDRS,
            )
        opened = opened or _within(address, policy.networks)
        host = address.compressed
    elif not opened:
        _check_name(host)
    _check_port(port, opened=opened, scheme=parts.scheme, policy=policy)
    if (host, port) == policy.own and host not in policy.hosts:
        _refuse("loop", "the URL is this service's own", setting=ALLOWED_HOSTS)
    return Target(host, port, _canonical(parts, host, port))


_IS_METADATA = "a metadata service"
_IS_MAPPED = "an IPv4 address written as IPv6"


def classify(address: str | Address, policy: Policy) -> str | None:
    """Why `address` may not be dialled, or None when it may."""
    ip = ip_address(address) if isinstance(address, str) else address
    if _is_metadata(ip):
        return _IS_METADATA
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            return "bound to one interface"
        if ip.ipv4_mapped is not None:
            return _IS_MAPPED
    if _within(ip, policy.networks):
        return None
    if isinstance(ip, IPv6Address) and ip not in _PUBLIC_V6:
        return "not global unicast"
    refused: tuple[Network, ...] = _REFUSED_V4 if isinstance(ip, IPv4Address) else _REFUSED_V6
    return next((str(network) for network in refused if ip in network), None)


def _is_metadata(ip: Address) -> bool:
    """Also in the IPv6 forms that carry an IPv4 address: mapped, compatible, NAT64, 6to4, Teredo."""
    if isinstance(ip, IPv4Address):
        return _within(ip, _METADATA)
    inner = (IPv4Address(int(ip) & 0xFFFF_FFFF), ip.sixtofour, ip.teredo and ip.teredo[1])
    return _within(ip, _METADATA) or any(each is not None and _within(each, _METADATA) for each in inner)


def _within(ip: Address, networks: tuple[Network, ...]) -> bool:
    return any(ip.version == network.version and ip in network for network in networks)


def _split(url: str, policy: Policy) -> tuple[SplitResult, int]:
    """Steps 1 and 2: characters, scheme, and an authority of host and port only."""
    if not isinstance(url, str) or not url:
        _refuse("not_text", "a URL is needed")
    if len(url) > MAX_URL_CHARACTERS:
        _refuse("too_long", f"a URL may have {MAX_URL_CHARACTERS} characters, and this has {len(url)}")
    if _BAD_CHARACTER.search(url) or (
        not url.isascii() and any(unicodedata.category(character) in _BAD_CATEGORIES for character in url)
    ):
        _refuse("bad_character", "the URL holds a space, a control or another character that none may hold")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        _refuse("unreadable", "the URL cannot be read")
    if parts.scheme == "http" and not policy.allow_http:
        _refuse("scheme", "http:// is not allowed, use https://", setting=ALLOW_HTTP)
    if parts.scheme not in DEFAULT_PORTS:
        _refuse("scheme", "the URL must start with https://")
    if not url[len(parts.scheme) :].startswith("://"):
        _refuse("no_authority", f"the URL must start with {parts.scheme}://")
    if "@" in parts.netloc:
        _refuse("userinfo", "the URL must not hold a user or a password")
    if "#" in url:
        _refuse("fragment", "the URL must not hold a fragment")
    if "%" in parts.netloc:
        _refuse("percent_in_host", "the host must not be percent-encoded")
    if parts.netloc.endswith(":"):
        _refuse("empty_port", "the URL has a colon without a port")
    return parts, DEFAULT_PORTS[parts.scheme] if port is None else port


def _host(parts: SplitResult) -> str:
    """Step 5: the host in ASCII; digits and dots that only Unicode mapping makes are refused."""
    host = parts.hostname or ""
    if not host:
        _refuse("no_host", "the URL names no host")
    if "[" in parts.netloc:
        return host
    host = host.removesuffix(".")
    if not host.isascii():
        if not _UNICODE_DOTS.isdisjoint(host):
            _refuse("unicode_dot", "the host holds a character that only looks like a dot")
        import idna  # its tables are large, and most hosts need none

        try:
            host = idna.encode(host, uts46=True, std3_rules=True).decode("ascii").lower()
        except idna.IDNAError:
            _refuse("idna", "the host is not a valid international name (IDNA)")
        if _NUMBER.fullmatch(host.rpartition(".")[2]):
            _refuse("unicode_address", "the host spells an address in characters that are no digits")
    if len(host) > MAX_HOST_CHARACTERS or not all(_LABEL.fullmatch(label) for label in host.split(".")):
        _refuse("bad_host", "the host is not a valid name")
    return host


def _address(host: str, *, bracketed: bool) -> Address | None:
    """Steps 4 and 6: the address a host is, or None for a name.

    `getaddrinfo` takes 127.1, 0x7f.1, 0177.0.0.1 and 2130706433 for 127.0.0.1; only four plain decimals pass.
    """
    try:
        if bracketed:
            return IPv6Address(host)
        if _NUMBER.fullmatch(host.rpartition(".")[2]):
            return IPv4Address(host)
    except ValueError:
        _refuse("bad_address", "the host is not an address in its usual form")
    return None


def _check_name(host: str) -> None:
    """Step 7: names that mean something only inside a network."""
    if "." not in host:
        _refuse("single_label", f"{host!r} is a name without a domain", setting=ALLOWED_HOSTS)
    if host.endswith(_INTERNAL_NAMES):
        _refuse("internal_name", f"{host!r} looks like an internal name", setting=ALLOWED_HOSTS)


def _check_port(port: int, *, opened: bool, scheme: str, policy: Policy) -> None:
    """Step 3, asked last: who is opened by name or network has more of them."""
    if port == 0 or port in BLOCKED_PORTS:
        _refuse("port", f"port {port} belongs to another kind of service")
    if port == DEFAULT_PORTS[scheme] or policy.ports is None or port in policy.ports:
        return
    if not (opened and port >= FIRST_FREE_PORT):
        _refuse("port", f"port {port} is not allowed", setting=ALLOWED_PORTS)


def _canonical(parts: SplitResult, host: str, port: int) -> str:
    authority = f"[{host}]" if ":" in host else host
    if port != DEFAULT_PORTS[parts.scheme]:
        authority = f"{authority}:{port}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    path = _NOT_PRINTABLE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), path)
    url = f"{parts.scheme}://{authority}{path}"
    if len(url) > MAX_URL_CHARACTERS:
        _refuse("too_long", f"percent-encoded, the URL has more than {MAX_URL_CHARACTERS} characters")
    return url


def _allowed_ports(values: tuple[str, ...]) -> frozenset[int] | None:
    if "*" in values:
        return None
    for value in values:
        if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 65535):
            raise ValueError(f"{ALLOWED_PORTS}: {value!r} is neither a port from 1 to 65535 nor `*`")
    return frozenset(int(value) for value in values)


def _origin(url: str) -> tuple[str, int] | None:
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        return None
    return parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme]


def _refuse(reason: str, message: str, *, setting: str | None = None) -> NoReturn:
    hint = "" if setting is None else f"; {setting} could allow it"
    raise WebhookUrlRefused(message + hint, reason=reason, setting=setting)
