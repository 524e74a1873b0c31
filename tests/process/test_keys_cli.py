"""`laneway keys` and what production refuses, as processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laneway.clock import SystemClock
from laneway.db import Database
from laneway.engine.access.callers import AccessScope
from laneway.engine.access.credentials import Callers
from laneway.errors import Unauthenticated
from laneway_process import laneway

GOOD_KEY = "k1:0smh8EvoM3VhDH6VuNpC/xmGCl7Dd3Ln8bkD3yaMFXA="


def test_a_key_is_made_listed_rotated_and_revoked(sqlite_url: str, tmp_path: Path) -> None:
    store = {"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_DATA_DIR": tmp_path}

    def run(*words: str) -> str:
        done = laneway("keys", *words, **store)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    def listed() -> list[dict[str, Any]]:
        return [json.loads(line) for line in run("ls", "--tenant", "acme", "--json").splitlines()]

    bounds = ("--scope", "jobs:read", "--cidr", "192.0.2.0/24", "--expires-in-days", "30", "--name", "ci")
    first = run("create", "--tenant", "acme", "--role", "user", *bounds)
    [row] = listed()
    assert (row["name"], row["scopes"], row["allowed_cidrs"]) == ("ci", ["jobs:read"], ["192.0.2.0/24"])
    second = run("rotate", row["id"], "--overlap-hours", "0")
    third = run("create", "--tenant", "acme", "--role", "operator")
    assert len(listed()) == 3
    run("revoke", listed()[2]["id"])
    assert [each["replaces"] for each in listed()] == [None, row["id"]]
    database = Database(sqlite_url)
    door = Callers(database, SystemClock())
    try:
        assert door.authenticate(second, address="192.0.2.1").scopes == {AccessScope.JOBS_READ}
        for refused in (first, third):
            with pytest.raises(Unauthenticated):
                door.authenticate(refused, address="192.0.2.1")
    finally:
        database.dispose()


def test_a_key_that_cannot_be_is_one_line(sqlite_url: str, tmp_path: Path) -> None:
    store = {"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_DATA_DIR": tmp_path}
    for words, said in (
        (("create", "--tenant", "t", "--role", "user", "--scope", "moons:write"), "scopes.0"),
        (("create", "--tenant", "t", "--role", "user", "--scope", "admin"), "the role user has not"),
        (("revoke", "nobodyskey12"), "there is no API key"),
        (("ls", "--tenant", "nobody"), "there is no tenant"),
    ):
        done = laneway("keys", *words, **store)
        assert (done.returncode in (2, 3), done.stdout, done.stderr.count("\n")) == (True, "", 1), words
        assert said in done.stderr


@pytest.mark.parametrize("command", ["api", "worker"])
def test_production_does_not_start_with_a_secret_from_a_page(command: str, tmp_path: Path) -> None:
    refused = laneway(
        command,
        LANEWAY_ENVIRONMENT="production",
        LANEWAY_ENCRYPTION_KEYS="k1:Y2hhbmdlbWVjaGFuZ2VtZWNoYW5nZW1lY2hhbmdlbWU=",
        LANEWAY_DATA_DIR=tmp_path,
    )
    assert refused.returncode == 1
    assert "LANEWAY_ENCRYPTION_KEYS" in refused.stderr
    assert "Y2hhb" not in refused.stderr
    assert "Traceback" not in refused.stderr


def test_doctor_says_what_production_misses(sqlite_url: str, tmp_path: Path) -> None:
    def production(**variables: Any) -> list[dict[str, Any]]:
        said = laneway(
            "doctor",
            "--json",
            **({"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_DATA_DIR": tmp_path} | variables),
        )
        lines = [json.loads(line) for line in said.stdout.splitlines()]
        return [line for line in lines if line["check"] == "production"]

    [at_home] = production()
    assert at_home["ok"]
    assert "LANEWAY_ENCRYPTION_KEYS" in at_home["detail"]
    strict = {"LANEWAY_ENVIRONMENT": "production", "LANEWAY_HOST": "0.0.0.0"}
    found = production(**strict)
    assert [line["ok"] for line in found] == [False, False]
    assert all(line["remedy"] for line in found)
    [fit] = production(**strict, LANEWAY_ENCRYPTION_KEYS=GOOD_KEY, LANEWAY_ALLOWED_HOSTS="jobs.example.org")
    assert (fit["ok"], fit["detail"]) == (True, "fit for production")


def test_dev_serves_this_machine_only(tmp_path: Path) -> None:
    refused = laneway("dev", "--port", "0", LANEWAY_HOST="0.0.0.0", LANEWAY_DATA_DIR=tmp_path)
    assert refused.returncode == 2
    assert "this machine only" in refused.stderr
    assert list(tmp_path.iterdir()) == []
