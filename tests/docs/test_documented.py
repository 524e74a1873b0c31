"""Everything a user can name has its place in the pages, and everything the pages name is there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import laneway
from docs.markdown import GENERATED, ROOT, anchors, blocks, pages, prose
from laneway.api.app import create_api
from laneway.cli import build
from laneway.cli.docs import pages as generated_pages
from laneway.domain.events import EventType
from laneway.domain.states import RULES, JobStatus
from laneway.errors import LanewayError
from laneway.settings import PREFIX, Settings, unknown_variables

PAGES = pages()
REFERENCE = {page.name: page.read_text() for page in GENERATED.glob("*.md")}
EVERYTHING = "\n".join(page.read_text() for page in PAGES)
MADE = generated_pages()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def missing(names: Iterator[str] | list[str], page: str) -> list[str]:
    return [name for name in names if f"`{name}`" not in REFERENCE[page]]


# The generated pages


@pytest.mark.parametrize("name", MADE)
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    assert (GENERATED / name).read_text() == MADE[name], f"docs/reference/{name} is stale: run `make docs`"


def test_generating_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANEWAY_PORT", "1234")
    monkeypatch.setenv("LANEWAY_RATE_LIMITS", "off")
    monkeypatch.setenv("LANEWAY_TASKS", "feedback_summaries")
    monkeypatch.setenv("COLUMNS", "40")
    importlib.import_module("feedback_summaries")
    assert generated_pages() == MADE


# Everything is documented


def test_every_route_is_documented() -> None:
    document = create_api(Settings.model_construct()).openapi()
    routes = [f"{method.upper()} {path}" for path, found in document["paths"].items() for method in found]
    assert len(routes) > 10
    assert missing(routes, "http.md") == []


def test_every_setting_is_documented_with_a_sentence() -> None:
    assert missing([PREFIX + name.upper() for name in Settings.model_fields], "settings.md") == []
    silent = [
        name for name, of in Settings.model_fields.items() if not (of.description or "").strip().endswith(".")
    ]
    assert silent == []


def test_every_status_and_action_is_documented() -> None:
    assert missing(list(JobStatus), "states.md") == []
    assert missing(list(RULES), "states.md") == []


def test_every_event_is_documented() -> None:
    assert missing(list(EventType), "events.md") == []


def test_every_error_code_is_documented() -> None:
    kinds = [LanewayError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    codes = {kind.code for kind in kinds if kind.__module__ == LanewayError.__module__} | {"http_error"}
    assert len(codes) > 20
    assert missing(sorted(codes), "errors.md") == []


def test_every_limit_that_says_so_by_its_name_is_documented() -> None:
    """Constants called MAX_… in the modules that users meet. The worker's and the store's are their own."""
    limits = [
        f"{module.__name__}.{name}"
        for package in ("api", "domain", "engine", "limits", "webhooks")
        for module in modules(f"laneway.{package}")
        for name in vars(module)
        if re.fullmatch(r"MAX_[A-Z_]+", name) and defines(module, name)
    ]
    assert len(limits) > 20
    assert missing(limits, "limits.md") == []


def modules(package: str) -> Iterator[Any]:
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        yield importlib.import_module(f"{package}.{found.name}")


def defines(module: Any, name: str) -> bool:
    source = Path(module.__file__).read_text()
    return re.search(rf"^{name}\b.*=", source, re.M) is not None


def commands(group: Any = None, path: str = "laneway") -> Iterator[str]:
    for name, command in (group or typer.main.get_command(build())).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}"


def test_every_command_is_documented() -> None:
    headings = re.findall(r"^## (laneway .+)$", REFERENCE["cli.md"], re.M)
    assert sorted(headings) == sorted(commands())


def test_every_public_name_is_documented() -> None:
    headings = set(re.findall(r"^## (\w+)$", REFERENCE["python.md"], re.M))
    assert set(laneway.__all__) <= headings


def test_every_redis_key_is_documented() -> None:
    page = REFERENCE["redis_keys.md"]
    known = {re.sub(r"<execution>", "laneway", key) for key in re.findall(r"`([a-z]+:[^`]+)`", page)}
    said = {
        key.strip().rstrip(",")
        for line in (ROOT / "backend/laneway/lanes/job.lua").read_text().splitlines()
        if (found := re.match(r"--   (\S.*?) (?:list|set|hash|zset|stream) ", line + " "))
        for key in found[1].replace("<execution>", "laneway").split(", ")
    }
    assert len(said) > 10
    assert said - known == set()


# What the pages name is there


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_the_index_leads_to_every_page() -> None:
    linked = re.findall(r"\]\(([^)#\s]+\.md)\)", (ROOT / "docs/index.md").read_text())
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(linked) == there - {"index.md"}


def test_every_test_that_a_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", EVERYTHING)
    assert len(named) > 20
    gone = [f"{path}::{name}" for path, name in named if name not in functions_in(ROOT / path)]
    assert gone == []
    every = {name for path in (ROOT / "tests").rglob("test_*.py") for name in functions_in(path)}
    assert [name for name in re.findall(r"`(test_\w+)`", EVERYTHING) if name not in every] == []


def functions_in(path: Path) -> set[str]:
    if not path.exists():
        return set()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def test_every_promise_names_a_test() -> None:
    page = (ROOT / "docs/explanation/guarantees.md").read_text().partition("## What is not promised")[0]
    promises = re.split(r"^\*\*", page, flags=re.M)[1:]
    assert len(promises) > 10
    assert [promise.partition("**")[0] for promise in promises if "::test_" not in promise] == []


def test_every_variable_that_a_page_names_is_a_setting() -> None:
    named = dict.fromkeys(re.findall(r"\bLANEWAY_[A-Z_]*[A-Z]\b", EVERYTHING), "")
    named.pop("LANEWAY_VERSION", None)  # docker-compose.yml's own
    assert list(unknown_variables(named)) == []


def test_every_command_that_a_page_names_exists() -> None:
    group = typer.main.get_command(build())
    known: dict[str, Any] = dict(group.commands)
    named = set(re.findall(r"`laneway ([a-z]+)(?: ([a-z]+))?", EVERYTHING))
    named |= set(re.findall(r"^(?:\w+=\S+ )*laneway ([a-z]+)(?: ([a-z]+))?", shell(), re.M))
    assert len(named) > 10
    wrong = [
        f"laneway {first} {second}"
        for first, second in named
        if first not in known
        or (hasattr(known[first], "commands") and second and second not in known[first].commands)
    ]
    assert wrong == []


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z]+)", EVERYTHING))
    named |= set(re.findall(r"^(?:\w+=\S+ )*make ([a-z]+)", shell(), re.M))
    assert named - targets == set()


def shell() -> str:
    return "\n".join(block.text for page in PAGES for block in blocks(page) if block.language == "sh")


def test_every_file_that_a_page_names_exists() -> None:
    roots = [ROOT, ROOT / "backend", ROOT / "backend/laneway", ROOT / "docs", ROOT / "tests"]
    named = {
        path
        for page in PAGES
        for path in re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|lua|md|yml|toml))`", prose(page))
    }
    assert len(named) > 10
    assert sorted(path for path in named if not any((root / path).exists() for root in roots)) == []


def test_the_layers_that_are_drawn_are_those_that_are_held() -> None:
    held = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    page = ROOT / "docs/explanation/architecture.md"
    drawn = next(block for block in blocks(page) if block.mark == "layers").text.splitlines()
    assert drawn == held
