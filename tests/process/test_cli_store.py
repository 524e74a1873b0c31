"""`laneway db`, `keys`, `webhooks`, `doctor`, and how fast and how clearly the command line speaks."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from laneway.cli import migrate
from laneway.clock import SystemClock
from laneway.db import Database
from laneway.engine.access.callers import Caller, Role
from laneway.engine.access.credentials import Callers
from laneway_process import environment, laneway
from webhook_receiver import Receiver

NOWHERE = "redis://127.0.0.1:1/0"


def test_help_loads_none_of_the_libraries_that_commands_need() -> None:
    heavy = ("fastapi", "sqlalchemy", "rq", "redis", "httpx", "uvicorn", "aiohttp", "alembic", "pydantic")
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {heavy} if m in sys.modules], file=sys.stderr))\n"
        "from laneway.cli import main; main(['--help'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert "demo" in shown.stdout
    assert shown.stderr.strip() == "[]"


@pytest.mark.parametrize("command", ["worker", "scheduler"])
def test_the_scripts_at_the_top_are_the_commands_of_their_names(command: str) -> None:
    script = Path(__file__).parents[2] / f"{command}.py"
    shown = subprocess.run(
        [sys.executable, script, "--help"], env=environment(), capture_output=True, text=True, check=True
    )
    assert f"Usage: laneway {command}" in shown.stdout


def test_upgrade_may_be_run_twice(tmp_path: Path) -> None:
    first = laneway("db", "upgrade", LANEWAY_DATA_DIR=tmp_path)
    again = laneway("db", "upgrade", LANEWAY_DATA_DIR=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert first.stdout.strip() == f"the database is at {migrate.head()}"
    assert again.stdout.strip() == f"the database is at {migrate.head()} already"


def test_what_the_containers_run_first_is_the_upgrade(tmp_path: Path) -> None:
    assert laneway("migrate", LANEWAY_DATA_DIR=tmp_path).returncode == 0
    assert migrate.current(f"sqlite:///{tmp_path / 'laneway.db'}") == migrate.head()


def test_current_prints_the_revision_and_fails_where_it_is_not_this_versions(tmp_path: Path) -> None:
    before = laneway("db", "current", LANEWAY_DATA_DIR=tmp_path)
    assert (before.returncode, before.stdout) == (1, "none\n")
    assert "laneway db upgrade" in before.stderr
    laneway("db", "upgrade", LANEWAY_DATA_DIR=tmp_path)
    after = laneway("db", "current", LANEWAY_DATA_DIR=tmp_path)
    assert (after.returncode, after.stdout, after.stderr) == (0, f"{migrate.head()}\n", "")


@pytest.mark.parametrize("command", ["api", "worker", "scheduler", "courier"])
def test_a_process_refuses_a_database_that_is_not_migrated(command: str, tmp_path: Path) -> None:
    refused = laneway(command, LANEWAY_DATA_DIR=tmp_path, LANEWAY_REDIS_URL=NOWHERE)
    assert refused.returncode == 1
    assert refused.stderr == "laneway: the database is not migrated; run `laneway db upgrade`\n"


def test_the_release_before_works_on_a_database_that_is_ahead(sqlite_url: str) -> None:
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as store:
        store.execute("UPDATE alembic_version SET version_num = 'from_the_next_release'")
    store.close()
    made = laneway("keys", "create", "--tenant", "t", "--role", "user", LANEWAY_DATABASE_URL=sqlite_url)
    assert made.returncode == 0, made.stderr
    upgraded = laneway("db", "upgrade", LANEWAY_DATABASE_URL=sqlite_url)
    assert "newer than this version" in upgraded.stdout


def test_a_key_is_printed_alone_and_opens_the_door(database_url: str, tmp_path: Path) -> None:
    made = laneway(
        *("keys", "create", "--tenant", "acme", "--role", "operator", "--subject", "ci"),
        LANEWAY_DATABASE_URL=database_url.replace("+psycopg", ""),
        LANEWAY_DATA_DIR=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    (key,) = made.stdout.splitlines()
    database = Database(database_url)
    try:
        caller = Callers(database, SystemClock()).authenticate(key)
    finally:
        database.dispose()
    assert caller == Caller(caller.tenant_id, "ci", Role.OPERATOR, caller.key_id)


def test_the_webhook_secret_is_printed_alone_and_stays_the_same(sqlite_url: str, tmp_path: Path) -> None:
    store = {"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_DATA_DIR": tmp_path}
    laneway("keys", "create", "--tenant", "acme", "--role", "user", **store)
    first, again = (laneway("webhooks", "secret", "--tenant", "acme", **store) for _ in range(2))
    assert first.stdout.startswith("whsec_")
    assert first.stdout.count("\n") == 1
    assert (first.stdout, first.stderr) == (again.stdout, "")


def test_an_unknown_tenant_is_not_found(sqlite_url: str, tmp_path: Path) -> None:
    asked = laneway(
        "webhooks", "secret", "--tenant", "nobody", LANEWAY_DATABASE_URL=sqlite_url, LANEWAY_DATA_DIR=tmp_path
    )
    assert (asked.returncode, asked.stdout) == (3, "")
    assert "laneway keys create" in asked.stderr


def test_a_secret_under_another_key_is_one_line(sqlite_url: str, tmp_path: Path) -> None:
    store = {"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_DATA_DIR": tmp_path}
    laneway("keys", "create", "--tenant", "acme", "--role", "user", **store)
    (tmp_path / "encryption.key").unlink()
    asked = laneway("webhooks", "secret", "--tenant", "acme", **store)
    assert (asked.returncode, asked.stdout, asked.stderr.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"LANEWAY_DATABASE_URL": "mysql://u:hunter2@127.0.0.1/x"}, 2, "LANEWAY_DATABASE_URL"),
        ({"LANEWAY_DATABASE_URL": "hunter2"}, 2, "LANEWAY_DATABASE_URL"),
        ({"LANEWAY_DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/x"}, 6, "check LANEWAY_DATABASE_URL"),
        ({"LANEWAY_DATABASE_URL": "sqlite:////proc/none/x.db"}, 6, "check LANEWAY_DATABASE_URL"),
        ({"LANEWAY_PORT": "hunter2"}, 2, "LANEWAY_PORT"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_without_the_secret(
    variables: dict[str, str], code: int, said: str
) -> None:
    refused = laneway("db", "current", **variables)
    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert "hunter2" not in refused.stderr


def findings(*arguments: str, **variables: object) -> tuple[int, list[dict[str, object]]]:
    """Doctor's exit code, and the checks that found trouble."""
    examined = laneway("doctor", *arguments, **variables)
    checks = [json.loads(line) for line in examined.stdout.splitlines()]
    assert checks, examined.stderr
    return examined.returncode, [check for check in checks if not check["ok"]]


def test_doctor_finds_a_database_that_is_not_migrated(tmp_path: Path, redis_url: str) -> None:
    code, found = findings("--json", LANEWAY_DATA_DIR=tmp_path, LANEWAY_REDIS_URL=redis_url)
    assert code == 1
    assert (found[0]["check"], found[0]["detail"]) == ("database", "the database is not migrated")
    assert found[0]["remedy"] == "run `laneway db upgrade`"


def test_doctor_names_the_variable_that_was_meant(tmp_path: Path) -> None:
    _, found = findings(LANEWAY_DATA_DIR=tmp_path, LANEWAY_REDIS_URL=NOWHERE, LANEWAY_REDISURL="x")
    assert found[0]["detail"] == "LANEWAY_REDISURL sets nothing"
    assert found[0]["remedy"] == "it may be meant for LANEWAY_REDIS_URL"


def test_doctor_finds_what_is_wrong_with_redis_and_that_nobody_works(
    sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    store = {"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_DATA_DIR": tmp_path}
    code, found = findings(**store, LANEWAY_REDIS_URL=NOWHERE)
    assert (code, [check["check"] for check in found]) == (1, ["workers", "redis"])
    code, found = findings(**store, LANEWAY_REDIS_URL=redis_url)  # the tests' Redis keeps no file
    assert (code, [check["detail"] for check in found]) == (
        1,
        ["queue default: 0 alive", "append-only file off"],
    )


def test_nobody_there_is_six_and_says_what_to_start(tmp_path: Path) -> None:
    asked = laneway("stats", LANEWAY_URL="http://127.0.0.1:1", LANEWAY_API_KEY="x", LANEWAY_DATA_DIR=tmp_path)
    assert asked.returncode == 6
    assert asked.stderr.startswith("laneway: cannot reach http://127.0.0.1:1; start it with `laneway dev`")
    assert asked.stderr.count("\n") == 1


def test_a_server_that_is_no_laneway_is_six() -> None:
    with Receiver() as other:
        asked = laneway("stats", LANEWAY_URL=other.url(""), LANEWAY_API_KEY="x")
    assert asked.returncode == 6
    assert "check LANEWAY_URL" in asked.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://[::1"])
def test_a_url_that_is_none_is_a_usage_error(url: str) -> None:
    asked = laneway("stats", LANEWAY_URL=url, LANEWAY_API_KEY="x")
    assert asked.returncode == 2, asked.stderr
    assert "LANEWAY_URL" in asked.stderr
    assert asked.stderr.count("\n") == 1
