"""Markdown as the reference pages use it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells may hold anything, also line breaks and bars."""
    return "\n".join([_line(head), _line(["---"] * len(head)), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def code(text: object) -> str:
    """`text` as code."""
    return f"`{text}`"


def codes(values: Iterable[object]) -> str:
    """Values as code, with commas between them."""
    return ", ".join(code(value) for value in values)


def docstring(thing: object) -> str:
    """A docstring without its indentation; empty when there is none."""
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def first_paragraph(text: str) -> str:
    """The first paragraph on one line."""
    return " ".join(text.partition("\n\n")[0].split())
