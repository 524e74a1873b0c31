"""The one gate for bodies: how long they may be, how slowly they may come, and that they are plain JSON.

What passes means the same to every parser: UTF-8 without a byte order mark, no name twice in an object, no
NaN, no number that a double or 64 bits cannot hold, no NUL, no half of a surrogate pair (RFC 7493). The
walk that points at a wrong value is made only where the text holds a sign of one, so that an ordinary body
costs one pass of the C parser. What is kept passes `domain/payload.py` too, which is stricter on depth.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from laneway.domain.payload import MAX_INTEGER, to_json
from laneway.errors import BadRequest, FieldError, InvalidPayload

MAX_BODY_DEPTH = 48  # of objects and arrays: room for 32 levels of parameters inside of a batch or a chain

_JSON = re.compile(r"application/([^/]+\+)?json")
_SUSPECT = re.compile(r"\\u(0000|[dD][89a-fA-F])")  # NUL; a half of a surrogate pair, or both
_SAFE_DIGITS = len(str(MAX_INTEGER)) - 1  # a number of so many fits, whatever they are


def check_media_type(request: Request) -> None:
    """Raise HTTPException 415 for a body that is not said to be JSON."""
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return  # no body
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _JSON.fullmatch(media_type):
        raise HTTPException(415, "send the body as application/json")


def bounded(request: Request, limit: int) -> Request:
    """The request, whose body ends in a 413 once it is longer than `limit` bytes, said or sent."""
    too_long = HTTPException(413, f"the body may have at most {limit} bytes")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > limit:
        raise too_long
    left = limit

    async def receive() -> Message:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise too_long
        return message

    return Request(request.scope, receive)


async def read(request: Request) -> None:
    """Read the body and keep what it says, for `request.json()`. Raises BadRequest, InvalidPayload."""
    body = await request.body()
    if body:
        request._json = parse(body)


def parse(body: bytes) -> Any:
    """The JSON of a body.

    Raises BadRequest for what is no JSON or says a name twice, InvalidPayload with a pointer for a value
    that cannot be kept.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    if text.startswith("\ufeff"):
        raise BadRequest("the body starts with a byte order mark; send UTF-8 without one")
    reader = _Reader()
    try:
        value = reader.read(text)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"the body is not JSON: {error.msg}, at {where}") from None
    if text.count("{") + text.count("[") > MAX_BODY_DEPTH and _is_deeper(value, MAX_BODY_DEPTH):
        raise _too_deep()
    if reader.suspect or _SUSPECT.search(text):
        _refuse_what_is_wrong(value, "")
    return value


class _Reader:
    """Reads one text; `suspect` says that it holds a number that may be wrong."""

    def __init__(self) -> None:
        self.suspect = False
        self.read = json.JSONDecoder(
            object_pairs_hook=_object,
            parse_int=self._integer,
            parse_float=self._number,
            parse_constant=self._constant,
        ).decode

    def _integer(self, digits: str) -> int:
        if len(digits) <= _SAFE_DIGITS:
            return int(digits)
        self.suspect = True  # a very long one is not worth its reading: as wrong is what follows the largest
        return int(digits) if len(digits) <= _SAFE_DIGITS + 2 else MAX_INTEGER + 1

    def _number(self, text: str) -> float:
        number = float(text)
        self.suspect |= math.isinf(number)
        return number

    def _constant(self, name: str) -> float:
        self.suspect = True
        return float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise BadRequest(f"the body names {json.dumps(twice[:100])} more than once in one object")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays are nested in more than so many levels."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


def _too_deep() -> InvalidPayload:
    detail = f"nested deeper than {MAX_BODY_DEPTH} levels"
    return InvalidPayload(f"the body: {detail}", errors=(FieldError("", detail, "too_deep"),))


def _refuse_what_is_wrong(value: Any, pointer: str) -> None:
    """Raise InvalidPayload at the first name, text or number that cannot be kept."""
    match value:
        case dict():
            for name, item in value.items():
                _refuse_if_wrong(name, pointer)
                _refuse_what_is_wrong(item, f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}")
        case list():
            for index, item in enumerate(value):
                _refuse_what_is_wrong(item, f"{pointer}/{index}")
        case _:
            _refuse_if_wrong(value, pointer)


def _refuse_if_wrong(value: Any, pointer: str) -> None:
    try:
        to_json(value, max_bytes=sys.maxsize)
    except InvalidPayload as refused:
        [error] = refused.errors
        told = f"{pointer or 'the body'}: {error.detail}"
        raise InvalidPayload(told, errors=(FieldError(pointer, error.detail, error.code),)) from None
