"""What the Python API answers: small values, the same on every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from laneway.domain.states import FINAL, JobStatus


@dataclass(frozen=True, slots=True)
class JobResult:
    """Where a job is. `error` is `{type, message, category, traceback}`, `progress` from 0 to 100."""

    id: str
    job_type: str
    status: JobStatus
    result: Any
    error: dict[str, Any] | None
    progress: int
    progress_message: str | None
    progress_details: Any
    attempt: int
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Self:
        """From a job as the HTTP API answers it."""
        return cls(
            id=job["id"],
            job_type=job["job_type"],
            status=JobStatus(job["status"]),
            result=job["result"],
            error=job["error"],
            progress=job["progress"],
            progress_message=job["progress_message"],
            progress_details=job["progress_details"],
            attempt=job["attempt"],
            created_at=_moment(job["created_at"]),
            started_at=_moment(job["started_at"]),
            finished_at=_moment(job["finished_at"]),
        )

    @property
    def ended(self) -> bool:
        """Whether its status is final."""
        return self.status in FINAL


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch: how many jobs were asked for, and how many were made."""

    batch_id: str
    total: int
    enqueued: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule: `schedule` is its cron expression, or its interval in words."""

    id: str
    name: str
    job_type: str
    schedule: str
    timezone: str
    is_active: bool
    next_run: datetime | None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """From a schedule as the HTTP API answers it."""
        cron = answer["cron_expression"]
        return cls(
            id=answer["id"],
            name=answer["name"],
            job_type=answer["job_type"],
            schedule=cron if cron is not None else f"every {answer['interval_seconds']:g} s",
            timezone=answer["timezone"],
            is_active=answer["is_active"],
            next_run=_moment(answer["next_run_at"]),
        )


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
