"""Every knob, once: unit in the name, range in the field, sentence for the reference."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "LANEWAY_"


def _split(value: object) -> object:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


class Settings(BaseSettings):
    """Read from the environment: a field's variable is its name in capitals after `LANEWAY_`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    # Where things are
    data_dir: Path = Field(
        Path(".laneway"), description="Folder for the embedded stores, the admin key and the encryption key."
    )
    database_url: str = Field(
        "",
        description="SQLAlchemy URL of the record: `postgresql://…` or `sqlite:///…`. "
        "Empty: `laneway.db` in the data folder.",
    )
    statement_seconds: float = Field(
        10.0,
        gt=0,
        description="Longest statement on PostgreSQL; a server silent for a fifth longer is given up.",
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", description="Redis of the lanes: `redis://`, `rediss://`, `unix://`."
    )
    tasks: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Modules with job types, separated by commas. The types that ship are always there."
    )
    backend: Literal["rq", "memory", "http"] = Field(
        "rq",
        description="Where the Python API puts jobs: `rq` into the database and Redis, `memory` into this "
        "process, which runs them itself, `http` into the server at LANEWAY_URL, with LANEWAY_API_KEY.",
    )

    # The API
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port the API listens on.")
    unready_seconds: float = Field(
        3.0,
        ge=0,
        description="After SIGTERM an API fails `/readyz` for so long, and still answers, before it closes: "
        "the balancer looks elsewhere meanwhile. Take two of its probes.",
    )
    public_url: str = Field(
        "", description="How clients reach the API; used in links. Empty: relative links."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names (`Host`, `Origin`) the API answers to, separated by commas: names, addresses, "
        "networks; besides the one of `public_url`. Empty: when it listens on loopback those of this "
        "machine, else all.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Networks of proxies whose `X-Forwarded-For` is believed, separated by commas. "
        "`*`, all, lets every client name its own address.",
    )
    rate_limits: str = Field(
        "queue=10/60@user,batch=5/60@user,default=100/60@user",
        description="Rules `policy=quota/seconds@user`, separated by commas "
        "(docs/how-to/set_rate_limits.md); `off` switches the limiter off.",
    )
    ratelimit_redis_url: str = Field(
        "", description="Redis of the limiter: `redis://`, `rediss://`, `unix://`. Empty: the lanes' Redis."
    )
    ratelimit_replicas: int = Field(
        1,
        ge=1,
        description="API processes that share a quota while Redis is away: each then allows its part of it.",
    )
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Larger request bodies are answered 413.")
    max_batch_body_bytes: int = Field(
        16 * 1024 * 1024, ge=1024, description="Likewise, for the body of `POST /api/v1/batches`."
    )
    streams_per_caller: int = Field(
        10, ge=1, description="Event streams and long waits one caller may hold open."
    )
    metrics_networks: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.0/8", "::1/128"),
        description="Networks that may read `/metrics`, separated by commas. A proxy in one of them must be "
        "in `LANEWAY_TRUSTED_PROXIES`, or it lets everybody in.",
    )
    max_connections: int = Field(
        900,
        ge=1,
        description="Connections one API process holds open; more are answered 503. The default leaves room "
        "below the usual 1,024 open files.",
    )

    # Jobs
    job_timeout_seconds: int = Field(3600, ge=1, description="A job's `timeout_seconds` when it names none.")
    lane_window: int = Field(
        10_000, ge=1, description="Ids one lane holds in Redis; the rest waits in the database."
    )
    crash_limit: int = Field(
        3, ge=1, description="A job that killed its process so often becomes a dead letter."
    )

    waiting_per_tenant: int = Field(
        100_000,
        ge=1,
        description="Jobs of one tenant that may wait (queued, blocked, scheduled, retrying); "
        "more are answered 429 `quota_queued`.",
    )
    waiting_total: int = Field(
        1_000_000,
        ge=1,
        description="Jobs of all tenants that may wait. Above it low priority is answered 503 `overloaded`, "
        "above twice as many normal; high and critical are accepted.",
    )

    # Workers
    concurrency: int = Field(
        0, ge=0, le=1024, description="Child processes of one worker; 0 means one a CPU."
    )
    lease_seconds: float = Field(30.0, gt=0, description="A worker silent for so long loses its jobs.")
    beat_seconds: float = Field(
        5.0, gt=0, description="How often a worker says that it lives; at most lease / 6."
    )
    drain_seconds: float = Field(
        25.0, ge=0, description="What SIGTERM leaves to running jobs before they are released."
    )
    cancel_grace_seconds: float = Field(
        10.0, ge=0, description="What a cancelled handler gets before it is killed."
    )
    timeout_grace_seconds: float = Field(
        5.0, ge=0, description="What a timed-out handler gets before it is killed."
    )
    recycle_jobs: int = Field(10_000, ge=1, description="A child is replaced after so many jobs.")
    child_memory_mib: int = Field(
        0,
        ge=0,
        description="MiB that one child may take beyond what it starts with (Linux); a handler that asks for "
        "more gets MemoryError. A child that keeps more than half of it is replaced. 0: no limit.",
    )
    poll_seconds: float = Field(
        1.0, gt=0, description="How often an idle worker looks without having been called."
    )
    tick_seconds: float = Field(
        1.0, gt=0, description="How often the scheduler runs its sweeps; at most lease / 6."
    )

    # What is kept
    keep_completed_days: int = Field(
        30, ge=0, le=36_500, description="Completed jobs are deleted after so many days; 0 keeps them."
    )
    keep_cancelled_days: int = Field(
        30, ge=0, le=36_500, description="Cancelled and expired jobs likewise; 0 keeps them."
    )
    keep_failed_days: int = Field(
        0,
        ge=0,
        le=36_500,
        description="Failed and timed-out jobs likewise; 0 keeps them until they are deleted.",
    )
    keep_webhooks_days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="Webhooks of kept jobs, delivered or given up, likewise; 0 keeps them with the job.",
    )

    # Webhooks
    webhook_allow_http: bool = Field(False, description="Also deliver to `http://` targets.")
    webhook_allowed_cidrs: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Private networks webhooks may reach, separated by commas. Metadata addresses stay shut.",
    )
    webhook_allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Host names webhooks may reach although they look internal."
    )
    webhook_allowed_ports: Annotated[tuple[str, ...], NoDecode] = Field(
        ("443", "8443"),
        description="Ports webhooks may reach besides the scheme's own; `*`: all but known services.",
    )
    webhook_timeout_seconds: float = Field(
        10.0, gt=0, le=60, description="Longest wait for a receiver, in all."
    )

    # Notifications
    notifications: Path | None = Field(
        None,
        description="TOML file that says who is notified of what (docs/how-to/get_notified.md). "
        "Every process reads it when it starts. Empty: nobody.",
    )

    # The command line
    url: str = Field(
        "", description="Where the command line finds the API. Empty: this machine, at the API's port."
    )
    api_key: SecretStr = Field(
        SecretStr(""),
        description="The key the command line calls with. Empty: the one in `<data dir>/admin.key`.",
    )

    # Who may call
    environment: Literal["development", "production"] = Field(
        "development",
        description="`production` refuses to start with what only a developer's machine may do "
        "(docs/how-to/production_checklist.md).",
    )
    jwt_issuers: SecretStr = Field(
        SecretStr(""),
        description="Whose JWTs are accepted: a JSON list, or the path of a TOML file "
        "(docs/how-to/accept_jwts.md). Empty: nobody's.",
    )

    row_security: bool = Field(
        False,
        description="PostgreSQL itself keeps each request to its tenant's rows, as a second wall behind the "
        "queries; `laneway db upgrade` prepares it (docs/how-to/separate_tenants.md).",
    )

    # Secrets
    encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="`id:base64` of 32 bytes each, separated by commas; the first encrypts, all decrypt. "
        "Empty: made once in `<data dir>/encryption.key`.",
    )
    accept_key_file: bool = Field(
        False,
        description="In production: encrypt with the key file in the data folder, which every machine shares "
        "and you back up.",
    )

    # Logs
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: JSON unless on a terminal."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least level written."
    )

    @field_validator(
        "tasks",
        "allowed_hosts",
        "trusted_proxies",
        "metrics_networks",
        "webhook_allowed_cidrs",
        "webhook_allowed_hosts",
        "webhook_allowed_ports",
        mode="before",
    )
    @classmethod
    def _comma_separated(cls, value: object) -> object:
        return _split(value)

    @field_validator("notifications", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("webhook_allowed_cidrs", "metrics_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for cidr in value:
            ip_network(cidr)
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", host):  # no name: then an address or a network
                ip_network(host.strip("[]"))
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for cidr in value:
            if cidr != "*":
                ip_network(cidr)
        return value

    @model_validator(mode="after")
    def _beats_and_ticks_within_the_lease(self) -> Self:
        if self.beat_seconds * 6 > self.lease_seconds * 1.000001:  # floats: 0.4 is a sixth of 2.4
            raise ValueError(
                f"beat_seconds ({self.beat_seconds:g}) may be at most a sixth of lease_seconds "
                f"({self.lease_seconds:g}): a worker that misses a few beats would lose its jobs"
            )
        if self.tick_seconds * 6 > self.lease_seconds * 1.000001:
            raise ValueError(
                f"tick_seconds ({self.tick_seconds:g}) may be at most a sixth of lease_seconds "
                f"({self.lease_seconds:g}): a scheduler that looks less often calls nobody dead"
            )
        return self

    @model_validator(mode="after")
    def _row_security_is_postgresql_s(self) -> Self:
        if self.row_security and self.database.startswith("sqlite"):
            raise ValueError("row_security needs PostgreSQL; SQLite has none")
        return self

    @property
    def database(self) -> str:
        """The SQLAlchemy URL, with the driver named and the default filled in."""
        url = self.database_url or f"sqlite:///{(self.data_dir / 'laneway.db').absolute()}"
        for short in ("postgresql://", "postgres://"):
            if url.startswith(short):
                return "postgresql+psycopg://" + url.removeprefix(short)
        return url

    @property
    def lease_patience_seconds(self) -> float:
        """How long a worker without a successful beat may still run jobs."""
        return self.lease_seconds - 2 * self.beat_seconds

    @property
    def worker_statement_seconds(self) -> float:
        """`statement_seconds`, cut so that a worker whose database is silent hears so within its patience."""
        return min(self.statement_seconds, self.lease_patience_seconds / 3)

    @property
    def allowed_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(ip_network(cidr) for cidr in self.webhook_allowed_cidrs)

    @property
    def proxy_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """`trusted_proxies` as networks."""
        every = ("0.0.0.0/0", "::/0")
        given = every if "*" in self.trusted_proxies else self.trusted_proxies
        return tuple(ip_network(cidr) for cidr in given)

    @property
    def children(self) -> int:
        """How many child processes a worker runs."""
        return self.concurrency or os.cpu_count() or 1


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unknown_variables(environ: Mapping[str, str]) -> Iterable[tuple[str, str | None]]:
    """`LANEWAY_…` variables that set nothing, each with the nearest name that would."""
    known = [name.upper() for name in Settings.model_fields]
    for variable in sorted(environ):
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            yield variable, PREFIX + near[0] if near else None


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
