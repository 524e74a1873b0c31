"""The one gate for JSON from outside: parameters, results, metadata, progress details.

Both stores, every client language and every later reader must be able to hold what passes, so the
gate is narrower than JSON: finite numbers, integers below 2**63, no NUL, no lone surrogates, bounded
depth and size.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from laneway.errors import FieldError, InvalidPayload, PayloadTooLarge

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: Any, *, what: str = "parameters", max_bytes: int = MAX_BYTES) -> str:
    """`value` as compact JSON text.

    Raises InvalidPayload, with a pointer, for what JSON or a store cannot hold, and PayloadTooLarge
    past `max_bytes` of UTF-8.
    """
    check_storable(value, what=what)
    text = _encode(value)
    size = len(text) if text.isascii() else len(text.encode())
    if size > max_bytes:
        raise PayloadTooLarge(
            f"{what} may be at most {max_bytes} bytes of JSON, and is {size}",
            what=what,
            limit_bytes=max_bytes,
        )
    return text


def check_storable(value: Any, *, what: str) -> None:
    """Raise InvalidPayload, with a pointer, for what JSON or a store cannot hold, of whatever size."""
    _check(value, [what])


def _check(value: Any, path: list[str | int]) -> None:
    """`path` leads to `value`; it is one list for the whole walk, and text only in a refusal."""
    match value:
        case None | bool():
            return
        case str():
            _check_text(value, path)
        case int():
            if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
                _refuse(path, "integers must fit into 64 bits", "integer_too_large")
        case float():
            if not math.isfinite(value):
                _refuse(path, "numbers must be finite", "not_finite")
        case dict():
            _check_depth(path)
            path.append("")
            for key, item in value.items():
                if not isinstance(key, str):
                    _refuse(path[:-1], "object keys must be text", "key_not_text")
                _check_text(key, path[:-1])
                path[-1] = key
                _check(item, path)
            path.pop()
        case list() | tuple():
            _check_depth(path)
            path.append(0)
            for path[-1], item in enumerate(value):
                _check(item, path)
            path.pop()
        case _:
            _refuse(path, f"{type(value).__name__} is not JSON", "not_json")


def _check_depth(path: list[str | int]) -> None:
    if len(path) > MAX_DEPTH:  # its first part is the name of the whole
        _refuse(path, f"nested deeper than {MAX_DEPTH} levels", "too_deep")


def _check_text(text: str, path: list[str | int]) -> None:
    if "\0" in text:
        _refuse(path, "text must not hold the NUL character", "nul")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            _refuse(path, "text must be valid Unicode, without lone surrogates", "not_unicode")


def _refuse(path: list[str | int], detail: str, code: str) -> NoReturn:
    """Raise InvalidPayload at the JSON Pointer (RFC 6901 section 3) of `path`, in ASCII and not too long."""
    pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
    safe = pointer.encode("ascii", "backslashreplace").decode()[:200]
    raise InvalidPayload(f"{safe}: {detail}", errors=(FieldError(safe, detail, code),))
