"""The container files, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from laneway.cli.processes import OPEN_CONNECTIONS_SECONDS
from laneway.settings import Settings, unknown_variables

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("laneway:")}


def test_the_services_are_the_two_stores_and_our_processes() -> None:
    assert set(SERVICES) == {"postgres", "redis", "migrate", "api", "worker", "scheduler"}
    assert {name: service["command"] for name, service in OURS.items()} == {
        name: [name] for name in ("migrate", "api", "worker", "scheduler")
    }


def test_a_process_starts_after_the_migration_and_the_stores_it_needs() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], (
                    f"{name} waits for {needed}, which has no health check"
                )
    for name in set(OURS) - {"migrate"}:
        assert OURS[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "postgres": {"condition": "service_healthy"},
            "redis": {"condition": "service_healthy"},
        }


def test_no_secret_has_a_value_or_a_default() -> None:
    secret = r"\$\{(?:POSTGRES_PASSWORD|REDIS_PASSWORD|LANEWAY_ENCRYPTION_KEYS)(?!:\?)"
    assert re.findall(secret, TEXT) == []
    environments = [service.get("environment", {}) for service in SERVICES.values()]
    for name, value in [pair for environment in environments for pair in environment.items()]:
        if re.search("PASSWORD|KEYS|AUTH", name):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), name


def test_every_variable_is_a_setting() -> None:
    for service in OURS.values():
        assert list(unknown_variables(service["environment"])) == []


def test_a_worker_is_left_the_time_to_drain() -> None:
    seconds = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    defaults = Settings()
    assert seconds > defaults.drain_seconds + defaults.timeout_grace_seconds


def test_an_api_is_left_the_time_to_stop() -> None:
    seconds = int(SERVICES["api"].get("stop_grace_period", "10s").removesuffix("s"))
    assert seconds > Settings().unready_seconds + OPEN_CONNECTIONS_SECONDS


def test_redis_never_evicts_and_keeps_what_it_has() -> None:
    command = SERVICES["redis"]["command"]
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command


def test_nothing_but_the_api_is_reachable_and_that_only_from_this_machine() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "api": ["127.0.0.1:${LANEWAY_PORT:-8000}:8000"]
    }


@pytest.mark.parametrize(
    "line", [line for line in (ROOT / "Dockerfile").read_text().splitlines() if "COPY" in line]
)
def test_the_image_copies_only_what_docker_may_see(line: str) -> None:
    words = line.split()[1:]
    if words[0].startswith("--from"):
        return
    allowed = {
        entry[1:] for entry in (ROOT / ".dockerignore").read_text().splitlines() if entry.startswith("!")
    }
    assert set(words[:-1]) <= allowed
    assert all((ROOT / word).exists() for word in words[:-1])


def test_the_image_does_not_run_as_root() -> None:
    final = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root|0)\S+$", final, re.M)
