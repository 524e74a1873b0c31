"""`laneway schedules …` against a running API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from laneway.cli import build
from laneway.cli.exits import ExitCode
from laneway_process import Running

CRON = {"job_type": "demo.echo", "cron_expression": "30 2 * * *", "timezone": "Europe/Berlin"}


@pytest.fixture
def variables(sqlite_url: str, redis_url: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    data = tmp_path / "data"
    stores: dict[str, Any] = {
        "LANEWAY_DATABASE_URL": sqlite_url,
        "LANEWAY_REDIS_URL": redis_url,
        "LANEWAY_DATA_DIR": data,
        "LANEWAY_LOG_FORMAT": "json",
    }
    with Running(tmp_path / "api", "api", "--port", 0, **stores) as api:
        api.says("api_starting")
        [line] = [text for text in (api.out + api.err).splitlines() if "api_starting" in text]
        host, port = json.loads(line)["address"]
        yield {"LANEWAY_URL": f"http://{host}:{port}", "LANEWAY_DATA_DIR": str(data)}


def test_schedules_are_listed_run_switched_and_linted(variables: dict[str, str]) -> None:
    """In this process: what is tried out is the commands, not how they start."""
    import httpx

    key = (Path(variables["LANEWAY_DATA_DIR"]) / "admin.key").read_text().strip()
    transport = httpx.HTTPTransport(retries=20)  # it listens, and may not serve yet
    with httpx.Client(base_url=variables["LANEWAY_URL"], transport=transport, timeout=60) as client:
        answer = client.post(
            "/api/v1/scheduled-jobs",
            json=CRON | {"name": "nightly"},
            headers={"Authorization": f"Bearer {key}"},
        )
    schedule = answer.json()

    def said(*arguments: str, status: int = 0) -> list[Any]:
        done = CliRunner().invoke(build(), ["schedules", *arguments], env=variables)
        assert done.exit_code == status, done.output
        return [json.loads(line) if line.startswith("{") else line for line in done.stdout.splitlines()]

    assert said("ls") == [schedule]
    assert said("ls", "--paused") == []
    times = said("next", schedule["id"], "--count", "3")
    assert [each["local"][11:16] for each in times][:2] == ["02:30", "02:30"]
    assert times[0]["at"] == schedule["next_run_at"]
    [job_id] = said("run", schedule["id"])
    [job] = said("run", schedule["id"], "--json")
    assert job["scheduled_job_id"] == schedule["id"] != job_id
    assert said("pause", schedule["id"]) == [f"{schedule['id']} paused"]
    assert said("ls", "--paused")[0]["next_run_at"] is None
    assert said("lint") == []
    assert said("resume", schedule["id"]) == [f"{schedule['id']} next run {schedule['next_run_at']}"]
    assert {each["finding"] for each in said("lint", status=ExitCode.FAILED)} == {"clocks"}
    done = CliRunner().invoke(build(), ["schedules", "run", "nobody"], env=variables)
    assert done.exit_code != 0
