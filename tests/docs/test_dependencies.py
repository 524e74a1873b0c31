"""Every dependency is explained, and installed from a lock that names its hashes and no index."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["embedded"]
DEVELOPMENT = PROJECT["dependency-groups"]["dev"]
LOCKS = {"requirements.lock": RUNTIME, "requirements-dev.lock": RUNTIME + DEVELOPMENT}
PIN = re.compile(
    r"^(?P<name>[a-z0-9._-]+)(?:\[[^]]+\])?==(?P<version>[^ ;]+)(?P<rest>.*?)(?=^[a-z0-9]|\Z)", re.M | re.S
)


def names(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def pins(lock: str) -> dict[str, tuple[str, str]]:
    """Library → (version, the rest of its entry: marker, hashes, comments)."""
    return {m["name"]: (m["version"], m["rest"]) for m in PIN.finditer((ROOT / lock).read_text())}


def test_the_page_explains_exactly_the_dependencies() -> None:
    page = (ROOT / "docs" / "explanation" / "dependencies.md").read_text()
    explained = re.findall(r"^\| `([^`]+)` \| (.+) \|$", page, re.M)
    assert [name for name, _ in explained] == list(dict.fromkeys(name for name, _ in explained)), (
        "named twice"
    )
    assert {name for name, _ in explained} == names(RUNTIME + DEVELOPMENT)
    assert [name for name, why in explained if not why.endswith(".")] == [], "not a sentence"


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_holds_what_the_project_asks_for(lock: str) -> None:
    pinned = pins(lock)
    for line in LOCKS[lock]:
        wanted = Requirement(line)
        version, _ = pinned[canonicalize_name(wanted.name)]
        assert version in wanted.specifier, f"{lock} has {wanted.name} {version}; run `make lock`"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes_and_none_says_where_to_get_it(lock: str) -> None:
    assert [name for name, (_, rest) in pins(lock).items() if "--hash=sha256:" not in rest] == []
    assert re.findall(r"https?://|file:|^-|index-url|find-links", (ROOT / lock).read_text(), re.M) == []


def test_both_locks_agree() -> None:
    runtime, development = pins("requirements.lock"), pins("requirements-dev.lock")
    assert {name: pin[0] for name, pin in runtime.items()} == {name: development[name][0] for name in runtime}
