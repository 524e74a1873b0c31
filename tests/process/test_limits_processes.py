"""The limiter behind several API processes: one quota, however the requests are spread."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from api_client import ServedApi, environment
from laneway.settings import Settings

PROCESSES = 4
CLIENTS = 200
QUOTA = 50
TRIALS = int(os.environ.get("TRIALS", "2"))


class PatientApi(ServedApi):
    """A uvicorn process whose limiter does not take a busy machine for a silent Redis."""

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", "patient_app:create_app"]
        self.run(
            [*command, "--uds", self.socket, "--no-access-log"],
            ready=self._answers,
            dying=signal.SIGKILL,
            env=environment(self.settings),
        )


@pytest.fixture
def apis(sqlite_url: str, redis_url: str, tmp_path: Path) -> Iterator[list[ServedApi]]:
    """Four processes on one store and one Redis."""
    settings = Settings(
        database_url=sqlite_url,
        redis_url=redis_url,
        data_dir=tmp_path / "data",
        rate_limits=f"default={QUOTA}/3600",
    )
    with ExitStack() as stack:
        yield [stack.enter_context(PatientApi(settings)) for _ in range(PROCESSES)]


def test_of_200_parallel_clients_four_processes_admit_exactly_the_quota(apis: list[ServedApi]) -> None:
    """`TRIALS=10` runs it ten times."""
    for trial in range(TRIALS):
        key = apis[0].key(subject=f"caller-{trial}")
        sockets = [api.socket for api in apis] * (CLIENTS // PROCESSES)
        statuses = asyncio.run(_ask_all_at_once(sockets, key))
        assert (statuses.count(200), statuses.count(429)) == (QUOTA, CLIENTS - QUOTA), trial


async def _ask_all_at_once(sockets: Sequence[Path], key: str) -> list[int]:
    """The statuses of as many requests, each on a connection of its own, sent when all are open."""
    head = f"GET /api/v1/job-types HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n"
    opened = await asyncio.gather(*[asyncio.open_unix_connection(socket) for socket in sockets])
    for _, writer in opened:
        writer.write(head.encode())
    statuses = [int((await reader.readline()).split()[1]) for reader, _ in opened]
    for _, writer in opened:
        writer.close()
    return statuses
