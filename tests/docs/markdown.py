"""The project's Markdown: its pages, their headings, their code blocks and what is said of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference"

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_CODE = re.compile(r"^```.*?^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page; `mark` is the comment on the line above it, empty when there is none."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page that people read."""
    top = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONVENTIONS.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The page's code blocks, in order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["mark"] or "", found["language"], found["text"])


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What `page#…` may name, spelled as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
