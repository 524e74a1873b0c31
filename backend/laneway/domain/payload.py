"""The one gate for JSON from outside: parameters, results, metadata, progress details.

Both stores, every client language and every later reader must be able to hold what passes, so the
gate is narrower than JSON: finite numbers, integers below 2**63, no NUL, no lone surrogates, bounded
depth and size.
"""

from __future__ import annotations

import json
import math
from typing import Any

from laneway.errors import FieldError, InvalidPayload, PayloadTooLarge

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1


def to_json(value: Any, *, what: str = "parameters", max_bytes: int = MAX_BYTES) -> str:
    """`value` as compact JSON text.

    Raises InvalidPayload, with a pointer, for what JSON or a store cannot hold, and PayloadTooLarge
    past `max_bytes` of UTF-8.
    """
    _check(value, pointer=f"/{what}", depth=0)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    size = len(text) if text.isascii() else len(text.encode())
    if size > max_bytes:
        raise PayloadTooLarge(
            f"{what} may be at most {max_bytes} bytes of JSON, and is {size}",
            what=what,
            limit_bytes=max_bytes,
        )
    return text


def _check(value: Any, *, pointer: str, depth: int) -> None:  # noqa: PLR0912 - one case a JSON type
    match value:
        case None | bool():
            return
        case str():
            _check_text(value, pointer)
        case int():
            if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
                _refuse(pointer, "integers must fit into 64 bits", "integer_too_large")
        case float():
            if not math.isfinite(value):
                _refuse(pointer, "numbers must be finite", "not_finite")
        case dict():
            if depth >= MAX_DEPTH:
                _refuse(pointer, f"nested deeper than {MAX_DEPTH} levels", "too_deep")
            for key, item in value.items():
                if not isinstance(key, str):
                    _refuse(pointer, "object keys must be text", "key_not_text")
                _check_text(key, pointer)
                _check(item, pointer=f"{pointer}/{key}", depth=depth + 1)
        case list() | tuple():
            if depth >= MAX_DEPTH:
                _refuse(pointer, f"nested deeper than {MAX_DEPTH} levels", "too_deep")
            for index, item in enumerate(value):
                _check(item, pointer=f"{pointer}/{index}", depth=depth + 1)
        case _:
            _refuse(pointer, f"{type(value).__name__} is not JSON", "not_json")


def _check_text(text: str, pointer: str) -> None:
    if text.isascii():
        if "\0" in text:
            _refuse(pointer, "text must not hold the NUL character", "nul")
        return
    if "\0" in text:
        _refuse(pointer, "text must not hold the NUL character", "nul")
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(pointer, "text must be valid Unicode, without lone surrogates", "not_unicode")


def _refuse(pointer: str, detail: str, code: str) -> None:
    safe = pointer.encode("ascii", "backslashreplace").decode()[:200]
    raise InvalidPayload(f"{safe}: {detail}", errors=(FieldError(safe, detail, code),))
