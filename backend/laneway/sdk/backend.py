"""Where the Python API puts jobs: one small protocol, three backends, and the one this process uses.

`rq` is the database and Redis (sdk/local.py), `memory` the same engine on a store of this process
(sdk/memory.py), `http` a Laneway server (sdk/remote.py). Requests and answers have the fields of the HTTP
API on all three, so that what stands above them cannot tell one from another.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pydantic_core import PydanticSerializationError, to_jsonable_python

from laneway.errors import InvalidPayload
from laneway.settings import Settings, get_settings

if TYPE_CHECKING:
    import sqlalchemy as sa

    from laneway.engine.context import JobContext
    from laneway.engine.endings import Ending
    from laneway.engine.registry import JobType

Request = Mapping[str, Any]
Answer = dict[str, Any]


class Held(Protocol):
    """A job that this process runs itself: its row is running, and stays so until `end`."""

    context: JobContext

    def end(self, ending: Ending) -> None: ...


class Backend(Protocol):
    """Safe to use from many threads. Everything blocks, and raises LanewayError for what is refused."""

    def enqueue(self, requests: Sequence[Request]) -> list[Answer]:
        """The jobs. Raises the first refusal; others may have been made by then."""
        ...

    def enqueue_batch(self, request: Request) -> Answer:
        """`id`, `total`, `enqueued` of a batch: all of its jobs are made, or none."""
        ...

    def enqueue_in(self, connection: sa.Connection, request: Request) -> Joined:
        """A job whose row is written through the connection; ring it once that has committed."""
        ...

    def hold(self, job_type: JobType, parameters: Mapping[str, Any]) -> Held | None:
        """A running job for a direct call; None where the call is the server's to run."""
        ...

    def get(self, job_id: str) -> Answer:
        """The job. Raises JobNotFound."""
        ...

    def wait(self, job_id: str, *, timeout_seconds: float) -> Answer:
        """The job, as soon as it has ended or the time is over. Raises JobNotFound."""
        ...

    def cancel(self, job_id: str, *, terminate: bool) -> Answer:
        """The job, cancelled or asked to stop. Raises JobNotFound, IllegalTransition once it has ended."""
        ...

    def queue_length(self, queue: str) -> int:
        """How many jobs wait in the lanes of the queue."""
        ...

    def purge_queue(self, queue: str) -> int:
        """Cancel what waits in the queue; how many."""
        ...

    def start_chain(self, request: Request) -> Answer: ...

    def create_schedule(self, request: Request) -> Answer: ...

    def list_schedules(self) -> list[Answer]: ...

    def delete_schedule(self, schedule_id: str) -> None: ...

    def close(self) -> None: ...


class Joined(Protocol):
    """A job in a transaction that is not ours."""

    job_id: str

    def ring(self) -> None:
        """Tell the workers. Never raises: what is lost is rung again by the reconciler."""
        ...


def jsonable(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as JSON values: dates, UUIDs, enumerations, models and the like in their usual JSON form.

    Raises InvalidPayload for what has none.
    """
    try:
        return dict(to_jsonable_python(dict(parameters), inf_nan_mode="constants"))
    except (PydanticSerializationError, ValueError) as error:
        raise InvalidPayload(f"the parameters are not JSON: {error}") from None


def connect(settings: Settings) -> Backend:
    """The backend that the settings name. Raises what the import of a module of LANEWAY_TASKS raises."""
    match settings.backend:
        case "memory":
            from laneway.sdk.memory import MemoryBackend

            return MemoryBackend.running(settings)
        case "http":
            from laneway.sdk.remote import RemoteBackend

            return RemoteBackend.from_settings(settings)
        case "rq":
            from laneway.sdk.local import LocalBackend

            return LocalBackend.connect(settings)


_lock = threading.Lock()
_current: Backend | None = None


def current_backend() -> Backend:
    """The process's backend, made at first use from its settings."""
    global _current  # noqa: PLW0603 - one a process
    if (backend := _current) is not None:
        return backend
    with _lock:
        if _current is None:
            _current = connect(get_settings())
        return _current


def use(backend: Backend | None) -> Backend | None:
    """Make `backend` the process's own; None: a new one at the next use. Returns the one before, open."""
    global _current
    before, _current = _current, backend
    return before


def _start_over() -> None:
    """A forked child must not share its parent's connections."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    use(None)


os.register_at_fork(after_in_child=_start_over)
