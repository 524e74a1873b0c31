"""`laneway dev`: one command for everything, one Ctrl-C to end it, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest
import redis as redis_py

from laneway_process import Running, alive, environment, family, laneway, member
from servers import wait_until


def started(folder: Path, *options: object, **variables: object) -> Running:
    """A `laneway dev` with its data in `folder / "data"`."""
    return Running(
        folder, "dev", "--port", 0, "--data-dir", folder / "data", "--workers", 1, *options, **variables
    )


def line(dev: Running, beginning: str) -> str:
    """The line of what it printed that begins so, without that beginning."""
    dev.says("curl -sS")
    found = [each.strip() for each in dev.out.splitlines() if each.strip().startswith(beginning)]
    assert len(found) == 1, dev.out
    return found[0].removeprefix(beginning).strip()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_what_it_prints_works_and_a_signal_ends_it_all(how: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"  # with a space, as a folder may have
    with started(folder) as dev:
        everything = family(dev.process.pid)
        curl = "curl " + line(dev, "curl")
        answer = subprocess.run(
            curl, shell=True, env=environment(), capture_output=True, text=True, check=True
        )
        job = json.loads(answer.stdout)
        assert (job["job_type"], job["status"]) == ("demo.sleep", "queued")

        key_file = Path(line(dev, "key"))
        assert key_file == folder / "data" / "admin.key"
        url = line(dev, "API").split()[0]
        client = {"LANEWAY_URL": url, "LANEWAY_DATA_DIR": key_file.parent}
        assert laneway("cancel", job["id"], "--terminate", **client).returncode == 0
        watched = laneway("watch", job["id"], **client)
        assert watched.returncode == 5, watched.stderr

        socket = line(dev, "Redis").split("-s ")[1].strip("'")
        with redis_py.Redis.from_url(f"unix://{socket}") as redis:
            assert redis.ping()
        examined = laneway("doctor", **client)  # finds the embedded Redis by its folder
        assert examined.returncode == 0, examined.stdout

        everything |= family(dev.process.pid)
        assert len(everything) >= 7  # itself, Redis, API, worker, nursery, courier, scheduler
        assert dev.stop(how) == 0, dev.evidence()
        assert alive(everything) == set()
        assert "Traceback" not in dev.err


def test_killed_it_leaves_nothing_behind_and_starts_again_on_its_data(tmp_path: Path) -> None:
    with started(tmp_path) as dev:
        line(dev, "API")
        member(dev.process.pid, "courier")
        everything = family(dev.process.pid)
        dev.stop(signal.SIGKILL)
        wait_until(lambda: not alive(everything), what="nothing is left", seconds=60, evidence=dev.evidence)
    with started(tmp_path) as dev:
        line(dev, "API")
        assert dev.stop() == 0


@pytest.mark.parametrize("command", ["api", "worker", "scheduler"])
def test_a_dead_child_is_reported_and_ends_it(command: str, tmp_path: Path) -> None:
    with started(tmp_path) as dev:
        line(dev, "API")
        everything = family(dev.process.pid)
        os.kill(member(dev.process.pid, command), signal.SIGKILL)
        assert dev.ended() == 1, dev.evidence()
        assert f"laneway: the {command} ended with exit code -9" in dev.err
        assert alive(everything) == set()


def test_a_dead_redis_is_reported_and_ends_it(tmp_path: Path) -> None:
    with started(tmp_path) as dev:
        line(dev, "API")
        os.kill(int((tmp_path / "data" / "redis.pid").read_text()), signal.SIGKILL)
        assert dev.ended() == 1, dev.evidence()
        assert "redis-server ended with exit code -9" in dev.err


def test_a_second_stack_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with started(tmp_path) as dev:
        line(dev, "API")
        second = laneway("dev", "--port", 0, "--data-dir", tmp_path / "data")
        assert second.returncode == 1
        assert "Another Laneway runs on" in second.stderr
        assert dev.stop() == 0


def test_stores_that_are_named_are_used_instead(sqlite_url: str, redis_url: str, tmp_path: Path) -> None:
    with started(tmp_path, LANEWAY_DATABASE_URL=sqlite_url, LANEWAY_REDIS_URL=redis_url) as dev:
        url = line(dev, "API").split()[0]
        assert "redis-cli" not in dev.out
        ended = laneway("enqueue", "demo.noop", "--wait", LANEWAY_URL=url, LANEWAY_DATA_DIR=tmp_path / "data")
        assert (ended.returncode, ended.stdout) == (0, "null\n"), ended.stderr
        assert dev.stop() == 0
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as store:
        assert store.execute("SELECT status FROM jobs").fetchall() == [("completed",)]
    store.close()
    assert not (tmp_path / "data" / "laneway.db").exists()
    assert not (tmp_path / "data" / "redis.sock").exists()


def test_the_embedded_redis_is_opened_on_a_port_only_when_asked(tmp_path: Path, free_port: int) -> None:
    with started(tmp_path, "--redis-port", free_port) as dev:
        line(dev, "API")
        with redis_py.Redis(port=free_port) as redis:
            assert redis.config_get("bind") == {"bind": "127.0.0.1"}
        assert dev.stop() == 0


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_running_job_is_let_finish_and_a_second_signal_releases_it(tmp_path: Path) -> None:
    with started(tmp_path, LANEWAY_DRAIN_SECONDS=3600) as dev:
        url = line(dev, "API").split()[0]
        client = {"LANEWAY_URL": url, "LANEWAY_DATA_DIR": tmp_path / "data"}
        job_id = laneway("enqueue", "demo.sleep", "seconds:=600", **client).stdout.strip()
        wait_until(
            lambda: '"status":"running"' in laneway("get", job_id, **client).stdout,
            what="the job runs",
            evidence=dev.evidence,
        )
        dev.process.send_signal(signal.SIGINT)
        dev.says("worker_draining")
        assert dev.process.poll() is None
        assert dev.stop(signal.SIGINT) == 0, dev.evidence()
    with sqlite3.connect(tmp_path / "data" / "laneway.db") as store:
        assert store.execute("SELECT status, attempt FROM jobs").fetchall() == [("queued", 1)]
    store.close()
