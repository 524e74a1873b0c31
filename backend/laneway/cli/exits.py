"""Exit codes: what a script that calls `laneway` can tell apart."""

from __future__ import annotations

from enum import IntEnum

from laneway.errors import LanewayError


class ExitCode(IntEnum):
    """Never renumbered."""

    OK = 0
    FAILED = 1  # the job failed, or what was asked for could not be done
    USAGE = 2
    NOT_FOUND = 3
    TIMEOUT = 4  # the job ran out of time, or expired before it started
    CANCELLED = 5
    UNREACHABLE = 6
    NOT_ALLOWED = 7  # the key may not, or not so often
    INTERRUPTED = 130  # Ctrl-C


_OF_HTTP_STATUS = {
    400: ExitCode.USAGE,
    401: ExitCode.NOT_ALLOWED,
    403: ExitCode.NOT_ALLOWED,
    404: ExitCode.NOT_FOUND,
    413: ExitCode.USAGE,
    422: ExitCode.USAGE,
    429: ExitCode.NOT_ALLOWED,
    503: ExitCode.UNREACHABLE,
}

_OF_JOB_STATUS = {
    "completed": ExitCode.OK,
    "failed": ExitCode.FAILED,
    "timeout": ExitCode.TIMEOUT,
    "expired": ExitCode.TIMEOUT,
    "cancelled": ExitCode.CANCELLED,
}


def exit_code(error: LanewayError) -> ExitCode:
    """The code for an error, raised here or answered by the API."""
    return _OF_HTTP_STATUS.get(error.status, ExitCode.FAILED)


def exit_code_of_end(job_status: str) -> ExitCode:
    """The code for a job that ended so."""
    return _OF_JOB_STATUS[job_status]
