"""A job in the transaction of an application: written through its session, rung after its commit.

The row is what counts, and it stands or falls with the transaction. The ring is a courtesy: it happens in a
thread, so that no commit waits for Redis, and what is lost is rung again by the reconciler within seconds.
SQLAlchemy says of a session when it has committed, and of a plain connection only when it is about to: there
the thread waits for the transaction to be over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from laneway.sdk.backend import Backend, Joined, Request

LONGEST_COMMIT_SECONDS = 10.0
LOOK_SECONDS = 0.002

_WAITING = "laneway_jobs"


def join(backend: Backend, session: Session | sa.Connection, request: Request) -> str:
    """The id of a job in the transaction of `session`. Raises what `enqueue` raises."""
    connection = session.connection() if isinstance(session, Session) else session
    job = backend.enqueue_in(connection, request)
    _ring_after_commit(session, job)
    return job.job_id


async def join_async(backend: Backend, session: Any, request: Request) -> str:
    """The same, also for an AsyncSession and an AsyncConnection."""
    if (inner := getattr(session, "sync_session", None)) is not None:
        return str(await session.run_sync(lambda _: join(backend, inner, request)))
    if getattr(session, "sync_connection", None) is not None:
        return str(await session.run_sync(lambda plain: join(backend, plain, request)))
    if not isinstance(session, Session | sa.Connection):
        raise TypeError(f"a job can join a SQLAlchemy session or connection, not {type(session).__name__}")
    return join(backend, session, request)


def _ring_after_commit(session: Session | sa.Connection, job: Joined) -> None:
    if isinstance(session, Session):
        waiting = session.info.get(_WAITING)
        if waiting is None:
            waiting = session.info[_WAITING] = []
            sa.event.listen(session, "after_commit", _session_committed)
            sa.event.listen(session, "after_rollback", _session_rolled_back)
        waiting.append(job)
        return
    transaction = session.get_transaction()

    def commits(connection: sa.Connection) -> None:
        if connection.get_transaction() is transaction:  # else ours was rolled back, and this is a later one
            _soon([job], after=transaction)

    sa.event.listen(session, "commit", commits, once=True)


def _session_committed(session: Session) -> None:
    if session.in_nested_transaction():  # a savepoint's: the transaction is still open
        return
    jobs = session.info[_WAITING]
    session.info[_WAITING] = []
    if jobs:
        _soon(jobs)


def _session_rolled_back(session: Session) -> None:
    if not session.in_nested_transaction():
        session.info[_WAITING] = []


def _soon(jobs: Sequence[Joined], *, after: sa.RootTransaction | None = None) -> None:
    threading.Thread(target=_ring, args=(jobs, after), name="laneway-ring").start()


def _ring(jobs: Sequence[Joined], after: sa.RootTransaction | None) -> None:
    deadline, looking = time.monotonic() + LONGEST_COMMIT_SECONDS, threading.Event()
    while after is not None and after.is_active and time.monotonic() < deadline:
        looking.wait(LOOK_SECONDS)
    for job in jobs:
        job.ring()
