"""`laneway retry` and `laneway dlq …` against a running stack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from factories import add_job, status_of
from laneway import models
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway_process import Running, laneway
from process.test_cli_jobs import on_a_terminal

pytestmark = pytest.mark.xdist_group("dev stack")

Client = dict[str, object]
NOBODY = "00000000-0000-7000-8000-000000000000"
ERROR = {"type": "ValueError", "message": "it [broke]\nbadly", "category": "transient", "traceback": None}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The variables that lead to a running stack, which works on the default queue alone."""
    folder = tmp_path_factory.mktemp("dev")
    data = folder / "data"
    variables = {"LANEWAY_RATE_LIMITS": "off"}
    with Running(folder, "dev", "--port", 0, "--data-dir", data, "--workers", 1, **variables) as dev:
        dev.says("curl -sS")
        yield {"LANEWAY_URL": dev.out.split("API")[1].split()[0], "LANEWAY_DATA_DIR": data}
        assert dev.stop() == 0, dev.evidence()


@pytest.fixture(scope="module")
def store(client: Client) -> Iterator[Database]:
    """The stack's store."""
    [file] = Path(str(client["LANEWAY_DATA_DIR"])).glob("*.db")
    database = Database(f"sqlite:///{file}")
    yield database
    database.dispose()


def dead(store: Database, queue: str = "default", status: JobStatus = JobStatus.FAILED) -> str:
    """A dead letter, past the API."""
    with store.read() as connection:
        tenant_id = connection.execute(sa.select(models.tenants.c.id)).scalar_one()
    return add_job(
        store,
        status,
        tenant_id=tenant_id,
        job_type="demo.fail",
        parameters={"times": 9},
        queue=queue,
        lane="normal" if queue == "default" else queue,
        attempt=1,
        dead_letter_reason="exhausted",
        error=ERROR,
    )


def lines(text: str) -> list[Any]:
    """Each line as the JSON that it is."""
    return [json.loads(line) for line in text.splitlines()]


def listed(client: Client, *options: str) -> list[str]:
    return [job["id"] for job in lines(laneway("dlq", "ls", *options, **client).stdout)]


def test_a_dead_letter_is_shown_and_retried_with_other_parameters(client: Client, store: Database) -> None:
    job_id = dead(store)
    (shown,) = lines(laneway("dlq", "show", job_id, **client).stdout)
    assert (shown["id"], shown["error"]) == (job_id, ERROR)
    retried = laneway("dlq", "retry", job_id, "times:=0", **client)
    assert (retried.returncode, lines(retried.stdout)[0]["parameters"]) == (0, {"times": 0})
    watched = laneway("watch", job_id, **client)
    assert (watched.returncode, lines(watched.stdout)) == (0, [{"attempt": 2}])
    gone = laneway("dlq", "show", job_id, **client)
    assert gone.returncode == 3
    assert "there is no dead letter" in gone.stderr


def test_an_ended_job_is_retried(client: Client, store: Database) -> None:
    job_id = dead(store)
    retried = laneway("retry", job_id, "times:=0", **client)
    assert (retried.returncode, lines(retried.stdout)[0]["status"]) == (0, "queued")
    assert laneway("watch", job_id, **client).returncode == 0
    again = laneway("retry", job_id, **client)
    assert (again.returncode, again.stdout) == (1, "")
    assert "completed" in again.stderr


def test_the_list_is_narrowed_by_its_options_and_as_long_as_was_asked_for(
    client: Client, store: Database
) -> None:
    ids = [dead(store, "long") for _ in range(3)]
    late = ("--type", "demo.fail", "--reason", "exhausted", "--after", "2001-01-01T00:00:00Z")
    assert listed(client, "--queue", "long", *late) == ids[::-1]
    assert listed(client, "--queue", "long", "--limit", "1") == ids[:1:-1]
    assert listed(client, "--queue", "long", "--before", "2001-01-01T00:00:00Z") == []


def test_many_are_retried_only_with_yes(client: Client, store: Database) -> None:
    ids = [dead(store, "many") for _ in range(2)]
    said = laneway("dlq", "retry", "--queue", "many", **client)
    (answer,) = lines(said.stdout)
    assert (said.returncode, answer["dry_run"], answer["sample_ids"]) == (0, True, ids)
    assert "nothing was done; repeat it with --yes" in said.stderr
    assert [status_of(store, job_id) for job_id in ids] == ["failed"] * 2
    done = laneway("dlq", "retry", "--queue", "many", "--yes", **client)
    assert (done.returncode, lines(done.stdout)[0]["count"], done.stderr) == (0, 2, "")
    assert [status_of(store, job_id) for job_id in ids] == ["queued"] * 2


def test_many_are_deleted_only_with_yes(client: Client, store: Database) -> None:
    job_id = dead(store, "old")
    said = laneway("dlq", "purge", "--queue", "old", **client)
    assert (said.returncode, lines(said.stdout)[0]["count"]) == (0, 1)
    assert status_of(store, job_id) == "failed"
    done = laneway("dlq", "purge", "--queue", "old", "--yes", **client)
    assert (done.returncode, lines(done.stdout)[0]["count"]) == (0, 1)
    assert laneway("get", job_id, **client).returncode == 3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("retry", NOBODY), 3, "there is no dead letter"),
        (("retry", NOBODY, "--all"), 2, "not both"),
        (("retry",), 2, "say --all"),
        (("purge", "--yes"), 2, "say --all"),
        (("purge", "--all", "--queue", "emails", "--yes"), 2, "say --all"),
        (("retry", "--all", "--rate", "0"), 2, "/rate"),
        (("ls", "--reason", "bored"), 2, "reason"),
    ],
)
def test_a_failure_has_its_exit_code_and_says_why(
    arguments: tuple[str, ...], code: int, said: str, client: Client
) -> None:
    failed = laneway("dlq", *arguments, **client)
    assert (failed.returncode, failed.stdout) == (code, ""), failed.stderr
    assert said in " ".join(failed.stderr.replace("│", " ").split())
    assert "Traceback" not in failed.stderr


def test_a_terminal_gets_a_table_and_words(client: Client, store: Database) -> None:
    dead(store, "seen")
    table = on_a_terminal("dlq", "ls", "--queue", "seen", **client)
    assert "ValueError: it [broke]" in table
    assert "badly" not in table
    assert "1 would be retried" in on_a_terminal("dlq", "retry", "--queue", "seen", **client)
