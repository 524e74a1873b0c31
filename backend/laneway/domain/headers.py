"""Request headers that a caller chose and that we send: which names and values may be."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

MAX_HEADERS = 20
MAX_HEADER_VALUE = 1000
HOP_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""What belongs to the connection, or to how the body travels."""

_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


def check_headers(
    headers: Mapping[str, str], *, reserved: Collection[str], prefixes: tuple[str, ...]
) -> None:
    """Raise ValueError unless they may be sent: none is `reserved` or starts with a prefix of ours."""
    for name, value in headers.items():
        lower = name.lower()
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no header name")
        if lower in reserved or lower.startswith(prefixes):
            raise ValueError(f"{name!r} is set by Laneway itself")
        if len(value) > MAX_HEADER_VALUE or not _VALUE.fullmatch(value):
            raise ValueError(f"{name!r} needs 1 to {MAX_HEADER_VALUE} visible ASCII characters")
    if len({name.lower() for name in headers}) != len(headers):
        raise ValueError("a header is there twice")
