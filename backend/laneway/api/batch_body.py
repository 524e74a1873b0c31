"""The body of `POST /batches`: up to 10,000 jobs, read one at a time.

What ten thousand jobs are as Python objects need never be in memory together: a first walk through the
text finds where each one begins and ends, and they are parsed, checked and made rows one after the other.
A job is looked at in a window that grows up to MAX_JOB_CHARACTERS, so a single huge one is refused before
it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from laneway.api import body_gate
from laneway.engine.batches import MAX_JOBS
from laneway.errors import BadRequest, FieldError, LanewayError, PayloadTooLarge, Unprocessable

MAX_JOB_CHARACTERS = 1024 * 1024

_WINDOWS = (4 * 1024, 64 * 1024, MAX_JOB_CHARACTERS)
_LONGEST_WORD = 10  # of JSON, as `-Infinity` or an escape: so near its end a window may have cut one
_LISTS = ("items", "jobs")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outline:
    """A batch's text, the members beside its jobs, and where each job is. `of` is items or jobs."""

    text: str
    head: dict[str, Any]
    of: str
    spans: list[Span]

    def jobs(self) -> Iterator[tuple[str, Mapping[str, Any] | LanewayError]]:
        """Each job with the JSON Pointer to it, or why it is none."""
        for number, (start, end) in enumerate(self.spans):
            pointer = f"/{self.of}/{number}"
            try:
                value = body_gate.parse(self.text[start:end].encode())
            except LanewayError as error:
                yield pointer, error
                continue
            if not isinstance(value, dict):
                told = FieldError("", "must be an object", "not_an_object")
                yield pointer, Unprocessable(f"{pointer} must be an object", errors=(told,))
            else:
                yield pointer, value if self.of == "jobs" else {"parameters": value}


def read(body: bytes) -> Outline:
    """The outline of a body.

    Raises BadRequest for what is no JSON object, PayloadTooLarge for a member or job beyond its window,
    Unprocessable unless it has one list of 1 to MAX_JOBS jobs, and what `body_gate.parse` does.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    walk = _Walk(text)
    try:
        walk.through()
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"the body is not JSON: {error.msg}, at {where}") from None
    given = [name for name in _LISTS if name in walk.lists or name in walk.members]
    if len(given) != 1 or given[0] not in walk.lists:
        pointer = f"/{given[0]}" if len(given) == 1 else ""
        detail = "give a list `items` (parameters of job_type) or `jobs` (whole jobs), one of the two"
        raise Unprocessable(detail, errors=(FieldError(pointer, detail, "jobs_missing"),))
    [(of, spans)] = walk.lists.items()
    if not spans:
        raise _wrong_count(of)
    return Outline(text, walk.members, of, spans)


def _wrong_count(of: str) -> Unprocessable:
    detail = f"a batch has 1 to {MAX_JOBS} jobs"
    return Unprocessable(detail, errors=(FieldError(f"/{of}", detail, "jobs_count"),))


class _Walk:
    """One way through the text of an object; `place` is how far it has come."""

    def __init__(self, text: str) -> None:
        self.members: dict[str, Any] = {}
        self.lists: dict[str, list[Span]] = {}
        self._text = text
        self._place = 0

    def through(self) -> None:
        """Raises JSONDecodeError, RecursionError, and what `read` does."""
        self._expect("{", "the body must be a JSON object")
        while not self._comes("}"):
            if self.members or self.lists:
                self._expect(",", "Expecting ',' delimiter")
            name = self._name()
            if name in self.members or name in self.lists:
                raise BadRequest(f"the body names {json.dumps(name[:100])} more than once in one object")
            self._expect(":", "Expecting ':' delimiter")
            if name in _LISTS and self._comes("["):
                self.lists[name] = self._elements(name)
            else:
                start, end = self._value(name)
                self.members[name] = body_gate.parse(self._text[start:end].encode())
        self._expect("}", "Expecting ',' delimiter")
        self._skip_space()
        if self._place != len(self._text):
            raise JSONDecodeError("Extra data", self._text, self._place)

    def _elements(self, of: str) -> list[Span]:
        self._expect("[", "Expecting a list")
        spans: list[Span] = []
        while not self._comes("]"):
            if spans:
                self._expect(",", "Expecting ',' delimiter")
            if len(spans) == MAX_JOBS:
                raise _wrong_count(of)
            spans.append(self._value(f"{of}/{len(spans)}"))
        self._expect("]", "Expecting ',' delimiter")
        return spans

    def _name(self) -> str:
        if not self._comes('"'):
            raise JSONDecodeError(
                "Expecting property name enclosed in double quotes", self._text, self._place
            )
        name, self._place = _DECODER.raw_decode(self._text, self._place)
        return str(name)

    def _value(self, name: str) -> Span:
        """Where the next value begins and ends; it is behind us then."""
        self._skip_space()
        start = self._place
        if self._text[start : start + 1] not in ("{", "["):
            self._place = int(_DECODER.raw_decode(self._text, start)[1])
            return start, self._place
        for size in _WINDOWS:
            try:
                self._place = start + int(_DECODER.raw_decode(self._text[start : start + size])[1])
            except JSONDecodeError as error:
                cut = error.pos >= size - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if start + size >= len(self._text) or not cut:
                    raise JSONDecodeError(error.msg, self._text, start + error.pos) from None
            else:
                return start, self._place
        raise PayloadTooLarge(
            f"/{name} is longer than {MAX_JOB_CHARACTERS} characters",
            what=name,
            limit_bytes=MAX_JOB_CHARACTERS,
        )

    def _comes(self, sign: str) -> bool:
        self._skip_space()
        return self._text.startswith(sign, self._place)

    def _expect(self, sign: str, message: str) -> None:
        if not self._comes(sign):
            raise JSONDecodeError(message, self._text, self._place)
        self._place += 1

    def _skip_space(self) -> None:
        found = _SPACE.match(self._text, self._place)
        self._place = found.end() if found else self._place
