"""Jobs that their maker runs itself: the row is made and held in one transaction."""

from __future__ import annotations

from datetime import datetime

from laneway.domain.states import JobStatus
from laneway.engine.outcomes import Claimed, carry_out
from laneway.engine.service import JobService, Prepared
from laneway.engine.transitions import Applied, Claim, create
from laneway.errors import Conflict, UniqueKeyTaken


def create_held(
    service: JobService, prepared: Prepared, *, lease_token: str, worker_id: str, now: datetime
) -> Claimed:
    """Make a job and claim it, so that no worker ever sees it wait. It needs no room among those that do.

    Raises UniqueKeyTaken while an active job holds its unique key, Conflict while its queue is paused or no
    slot of its concurrency key, or of its tenant, is free.
    """
    with service.database.write() as connection:
        [made] = create(connection, [prepared.row], now=now)
        if made is None:
            raise UniqueKeyTaken(f"an active job holds the unique key {prepared.row.unique_key!r}")
        claim = Claim(prepared.row.id, lease_token, worker_id, now)
        [outcome] = carry_out(connection, [claim], now=now, actor=f"worker:{worker_id}")
        if not isinstance(outcome, Applied):
            if outcome.status is JobStatus.BLOCKED:
                raise Conflict("as many jobs of its concurrency key, or of its tenant, run as may")
            raise Conflict(f"the queue {prepared.row.queue!r} is paused: nothing of it starts now")
        return Claimed.of(outcome.row, lease_token)
