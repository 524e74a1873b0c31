"""The commands that speak to the API: what goes to standard output, and what the exit code tells."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from laneway_process import Running, environment, laneway
from webhook_receiver import Receiver

pytestmark = pytest.mark.xdist_group("dev stack")  # one stack serves the module

Client = dict[str, object]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The variables that lead to a running stack."""
    folder = tmp_path_factory.mktemp("dev")
    data = folder / "data"
    variables = {"LANEWAY_RATE_LIMITS": "off"}
    with Running(folder, "dev", "--port", 0, "--data-dir", data, "--workers", 2, **variables) as dev:
        dev.says("curl -sS")
        yield {"LANEWAY_URL": dev.out.split("API")[1].split()[0], "LANEWAY_DATA_DIR": data}
        assert dev.stop() == 0, dev.evidence()


def lines(text: str) -> list[Any]:
    """Each line as the JSON that it is."""
    return [json.loads(line) for line in text.splitlines()]


def test_enqueue_prints_the_id_alone(client: Client) -> None:
    made = laneway("enqueue", "demo.noop", **client)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout == f"{uuid.UUID(made.stdout.strip())}\n"
    as_json = laneway("enqueue", "demo.noop", "--json", **client)
    assert lines(as_json.stdout)[0]["job_type"] == "demo.noop"


def test_wait_prints_the_result_alone(client: Client) -> None:
    ended = laneway("enqueue", "demo.echo", "text=1", "json:=[1,null]", "--wait", **client)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert lines(ended.stdout) == [{"text": "1", "json": [1, None]}]


def test_watch_shows_progress_on_stderr_and_the_result_on_stdout(client: Client) -> None:
    ended = laneway("enqueue", "demo.sleep", "seconds:=1.5", "--watch", **client)
    assert ended.returncode == 0, ended.stderr
    assert lines(ended.stdout) == [{"slept_seconds": 1.5, "steps": 10}]
    news = lines(ended.stderr)
    assert [each["status"] for each in news][:2] == ["queued", "running"]
    assert news[-1]["status"] == "completed"
    assert "\x1b" not in ended.stderr


def test_what_is_asked_for_reaches_the_job(client: Client) -> None:
    with Receiver() as receiver:
        made = laneway(
            *("enqueue", "demo.noop", "--priority", "low", "--queue", "emails", "--delay", "3600"),
            *("--webhook-url", receiver.url(), "--json"),
            **client,
        )
    (job,) = lines(made.stdout)
    assert {
        "priority": "low",
        "queue": "emails",
        "status": "scheduled",
        "webhook_url": receiver.url(),
    }.items() <= (job.items())


def test_a_cancelled_job_is_five(client: Client) -> None:
    job_id = laneway("enqueue", "demo.noop", "--delay", "3600", **client).stdout.strip()
    cancelled = laneway("cancel", job_id, **client)
    assert (cancelled.returncode, lines(cancelled.stdout)[0]["status"]) == (0, "cancelled")
    watched = laneway("watch", job_id, **client)
    assert (watched.returncode, watched.stdout) == (5, "")
    assert lines(laneway("get", job_id, **client).stdout)[0]["status"] == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("enqueue", "demo.fail", "kind=permanent", "--wait"), 1, "PermanentError: attempt 1 fails as asked"),
        (("enqueue", "demo.nope"), 2, "there is no job type 'demo.nope'"),
        (("enqueue", "demo.sleep", "seconds=x"), 2, "/parameters/seconds"),
        (("enqueue", "demo.sleep", "seconds"), 2, "neither KEY=TEXT nor KEY:=JSON"),
        (("enqueue", "demo.noop", "--priority", "asap"), 2, "/priority"),
        (("enqueue", "demo.noop", "--webhook-url", "http://10.0.0.1/"), 2, "LANEWAY_WEBHOOK_ALLOWED_CIDRS"),
        (("get", "00000000-0000-7000-8000-000000000000"), 3, "there is no job"),
        (("watch", "00000000-0000-7000-8000-000000000000"), 3, "there is no job"),
        (("get", "../job-types"), 3, "there is nothing at"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_a_failure_has_its_exit_code_and_says_why(
    arguments: tuple[str, ...], code: int, said: str, client: Client
) -> None:
    failed = laneway(*arguments, **client)
    assert (failed.returncode, failed.stdout) == (code, ""), failed.stderr
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_job_that_runs_out_of_time_is_four(client: Client) -> None:
    made = laneway("enqueue", "demo.noop", "--delay", "1", "--json", **client)
    assert made.returncode == 0
    job_id = expiring(client)
    watched = laneway("watch", job_id, **client)
    assert watched.returncode == 4, watched.stderr


def expiring(client: Client) -> str:
    """A job that times out, which takes a field that `enqueue` has no option for."""
    import httpx

    key = (Path(str(client["LANEWAY_DATA_DIR"])) / "admin.key").read_text().strip()
    answer = httpx.post(
        f"{client['LANEWAY_URL']}/api/v1/jobs",
        headers={"Authorization": f"Bearer {key}"},
        json={
            "job_type": "demo.sleep",
            "parameters": {"seconds": 60},
            "timeout_seconds": 1,
            "max_retries": 0,
        },
        trust_env=False,
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_a_wrong_key_is_seven(client: Client) -> None:
    refused = laneway("stats", **client | {"LANEWAY_API_KEY": "wrong"})
    assert (refused.returncode, refused.stdout) == (7, "")
    assert "laneway keys create" in refused.stderr


def test_no_key_at_all_is_seven(client: Client, tmp_path: Path) -> None:
    refused = laneway("stats", **client | {"LANEWAY_DATA_DIR": tmp_path})
    assert refused.returncode == 7
    assert "set LANEWAY_API_KEY" in refused.stderr


def test_a_proxy_does_not_come_between_this_machine_and_itself(client: Client) -> None:
    asked = laneway("stats", **client, HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1")
    assert asked.returncode == 0, asked.stderr


def test_types_and_stats_are_json_lines_where_nobody_looks(client: Client) -> None:
    known = lines(laneway("types", **client).stdout)
    assert "demo.sleep" in [each["name"] for each in known]
    (stats,) = lines(laneway("stats", **client).stdout)
    assert "default" in [queue["name"] for queue in stats["queues"]]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_terminal_gets_bars_and_colours_and_json_has_none(options: tuple[str, ...], client: Client) -> None:
    shown = on_a_terminal("enqueue", "demo.sleep", "seconds:=0.5", "--watch", *options, **client)
    assert ("\x1b[" in shown) is not bool(options)
    assert ("100%" in shown) is not bool(options)
    assert "slept_seconds" in shown


def test_a_terminal_gets_tables(client: Client) -> None:
    assert "demo.sleep" in on_a_terminal("types", **client)
    assert "oldest, seconds" in on_a_terminal("stats", **client)
    assert "healthy" in on_a_terminal("doctor", **client)


def on_a_terminal(*arguments: str, **variables: object) -> str:
    """What `laneway …` writes to a terminal of its own; it must end with 0."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "laneway", *arguments],
            env=environment(**variables, TERM="xterm-256color"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(30) == 0, shown.decode()
    finally:
        os.close(ours)
    return shown.decode()
