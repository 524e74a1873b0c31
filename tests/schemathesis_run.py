"""schemathesis against a served API, as each role: no 5xx, nothing undocumented, nothing its schema denies.

    PYTHONPATH=tests .venv/bin/python -m schemathesis_run [--examples 120] [--seed 1]

runs all phases over all operations as user, operator and admin, more than 20,000 requests, and prints
what failed. A test runs a short, seeded part of it (tests/integration/test_schemathesis.py).

Some checks are told what Laneway means by its schema. What fits it may still be refused (422 for an
unknown job type, say). `negative_data_rejection` is left out: pydantic takes `"3"` for 3, so that what
does not fit the schema may still be taken. And 503 is no crash: health is 503 where nobody works; that
nothing else was, the API's own metrics tell. Of operations like `POST /jobs/cancel` the other methods are
not looked at: `GET /jobs/cancel` is a GET of `/jobs/{job_id}`, whose id is none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from api_client import Calls, environment
from laneway.cli import migrate
from laneway.engine.access.callers import Role
from laneway.settings import Settings
from servers import PostgresServer, RedisServer, Server

ROLES = (Role.USER, Role.OPERATOR, Role.ADMIN)
# Failed logins are counted per address, whatever the limits of callers: so each request has its own.
HOOKS = """
from random import Random

import schemathesis

rng = Random(1)


@schemathesis.hook
def before_call(context, case, kwargs):
    address = f"198.{rng.randint(18, 19)}.{rng.randint(0, 255)}.{rng.randint(0, 255)}"
    case.headers["X-Forwarded-For"] = address
"""
PHASES = "examples,coverage,fuzzing,stateful"
# schemathesis reads an answer to its end, and the stream of a job that nobody runs lasts for minutes.
SHORT_STREAMS = """
from laneway.api import events

events.STREAM_SECONDS = 0.2

from laneway.cli import main

main()
"""
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "304", "400", "401", "403", "404", "409", "412", "413", "422", "503"]

[checks.not_a_server_error]
expected-statuses = ["1xx", "2xx", "3xx", "4xx", "503"]

[checks.negative_data_rejection]
enabled = false

[auth.openapi.key]
bearer = "KEY"

[[operations]]
include-operation-id-regex = "^(cancelJobs|(retry|purge)DeadLetters|previewScheduledJob(Alias)?)$"
checks.unsupported_method.enabled = false
checks.allow_header_conformance.enabled = false
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did and found. `tested` of `total` operations got at least one request."""

    requests: int
    tested: int
    total: int
    failures: list[str]
    text: str


class TcpApi(Calls, Server):
    """`laneway api` on a port of its own; its event streams end soon."""

    def __init__(self, settings: Settings) -> None:
        Server.__init__(self, "api")
        Calls.__init__(self, settings)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.run(
            [sys.executable, "-c", SHORT_STREAMS, "api", "--port", str(self.port)],
            ready=self._answers,
            dying=signal.SIGKILL,
            env=environment(self.settings),
        )

    def __exit__(self, *_: object) -> None:
        Server.__exit__(self)
        self.close()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/livez", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


def run(url: str, key: str, *, seed: int, examples: int, phases: str, operation: str = "") -> Report:
    """Run schemathesis with one key: so many examples an operation and phase, all operations or one."""
    with tempfile.TemporaryDirectory() as folder:
        config, report = Path(folder, "schemathesis.toml"), Path(folder, "report.json")
        config.write_text(CONFIG.replace("KEY", key))
        Path(folder, "from_anywhere.py").write_text(HOOKS)
        command: list[str | Path] = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", config, "--no-color"),
            *("run", f"{url}/openapi.json"),
            *("--continue-on-failure", "--no-shrink"),
            *("--phases", phases, "--seed", str(seed), "--max-examples", str(examples)),
            *("--generation-database", "none", "--suppress-health-check", "all", "--warnings", "off"),
            *("--report", "json", "--report-json-path", report, "--output-truncate", "false"),
            *(("--include-operation-id", operation) if operation else ()),
        ]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder, "SCHEMATHESIS_HOOKS": "from_anywhere"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not report.exists():
            raise RuntimeError(done.stdout)
        return _read(json.loads(report.read_text()), done.stdout)


def _read(found: dict[str, Any], text: str) -> Report:
    operations = found["operations"] or {"tested": 0, "total": 0}
    failures = [f"{each['title']} ({each['count']}): {each['operations']}" for each in found["failures"]]
    failures += [f"{each['title']} ({each['count']})" for each in found["errors"]]
    if not found["complete"]:
        failures.append("the run did not come to its end")
    return Report(found["test_cases"]["generated"], operations["tested"], operations["total"], failures, text)


def server_errors(api: TcpApi) -> list[str]:
    """Lines of the API's own count of its 5xx answers. Where nobody works, health is one."""
    lines = httpx.get(f"{api.url}/metrics", trust_env=False).text.splitlines()
    return [line for line in lines if 'status="5xx"' in line and "QueueHealth" not in line]


@contextmanager
def served(*, sqlite: bool) -> Iterator[TcpApi]:
    """An API without rate limits on stores of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis_url = stack.enter_context(RedisServer()).url
        if sqlite:
            database_url = f"sqlite:///{folder}/laneway.db"
            migrate.upgrade(database_url)
        else:
            database_url = stack.enter_context(PostgresServer()).fresh()
        settings = Settings(
            database_url=database_url,
            redis_url=redis_url,
            data_dir=folder / "data",
            rate_limits="off",
            trusted_proxies="127.0.0.0/8",
        )
        yield stack.enter_context(TcpApi(settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=120, help="of each operation in each phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phases", default=PHASES)
    parser.add_argument("--role", choices=ROLES, action="append", help="default: all of them")
    parser.add_argument("--operation", default="", help="only the one with this operationId")
    parser.add_argument("--sqlite", action="store_true", help="instead of PostgreSQL")
    asked = parser.parse_args()
    sent, failed = 0, False
    with served(sqlite=asked.sqlite) as api:
        for role in map(Role, asked.role or ROLES):
            report = run(
                api.url,
                api.key(role, subject=f"a-{role}"),
                seed=asked.seed,
                examples=asked.examples,
                phases=asked.phases,
                operation=asked.operation,
            )
            sent += report.requests
            failed |= bool(report.failures)
            print(f"{role}: {report.requests} requests, {report.tested} of {report.total} operations")
            print("\n".join(report.failures) or "no failures", flush=True)
            if report.failures:
                print(report.text, flush=True)
        errors = server_errors(api)
        print(f"{sent} requests; server errors: {errors or 'none'}")
    return 1 if failed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
