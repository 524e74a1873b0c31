"""What the worker holds, and the transactions that claim it and settle it.

Endings and claims of one turn of the pool travel in one transaction. While it is under way the children
work, so endings collect and the next one carries more.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from laneway.clock import Clock, new_id
from laneway.db import Database
from laneway.engine import leases, progress
from laneway.engine.context import Progress
from laneway.engine.endings import Ending, HandedOver, Raised
from laneway.engine.exchange import Exchanged, Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.errors import StorageUnavailable
from laneway.lanes.turns import FairPicks
from laneway.log import get_logger

SAVE_PROGRESS_SECONDS = 1.0
TELL_PROGRESS_SECONDS = 0.25

log = get_logger("worker")


class Ledger:
    """The jobs of one worker. Used by the pool's own thread; only `tokens` is for that of the beats."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._held: dict[str, Claimed] = {}  # by lease token
        self._claiming: list[str] = []
        self._ended: list[tuple[Claimed, Ending | HandedOver]] = []
        self._progress: dict[str, tuple[Claimed, Progress]] = {}
        self._save_at = 0.0
        self._picks: dict[str, FairPicks] = {}  # of lanes: the tenants' turns on the slow path
        self._untold: dict[str, tuple[Claimed, Progress]] = {}
        self._tell_at = 0.0

    def open(self, holder: Holder) -> None:
        """From now on claims are made in this worker's name."""
        self._holder = holder

    # What is known

    def __len__(self) -> int:
        return len(self._held)

    @property
    def unsettled(self) -> bool:
        """Whether endings wait to be written."""
        return bool(self._ended)

    @property
    def progress_at(self) -> float | None:
        """When progress is to be told or written next."""
        moments = [self._tell_at] if self._untold else []
        return min([*moments, self._save_at] if self._progress else moments, default=None)

    def tokens(self) -> list[str]:
        """The lease tokens of what is held, and of claims under way."""
        return [*self._held, *self._claiming]

    def held(self, lease_token: str) -> Claimed | None:
        return self._held.get(lease_token)

    def end(self, job: Claimed, ending: Ending | HandedOver) -> None:
        """Say how an attempt ended: the next commit writes it."""
        self._ended.append((job, ending))

    def note(self, job: Claimed, news: Progress) -> None:
        """Say how far a job is: it is told four times a second and written once a second, at most."""
        self._progress[job.job_id] = self._untold[job.job_id] = job, news

    def drop_all(self) -> int:
        """Hold nothing any more, without a word to the database; how many jobs that were."""
        count = len(self._held)
        self._held.clear()
        self._ended.clear()
        self._progress.clear()
        return count

    # Transactions

    def find(self, lanes: Sequence[str], count: int, *, queued_for_seconds: float = 0.0) -> list[str] | None:
        """The ids that the lanes would give, from the database; None when it is away."""
        before = self._clock.now() - timedelta(seconds=queued_for_seconds)
        try:
            with self._database.read() as connection:
                return leases.find_queued(
                    connection,
                    lanes,
                    self._holder.job_types,
                    limit=count,
                    before=before,
                    picks=self._picks,
                )
        except (sa.exc.DBAPIError, sa.exc.TimeoutError):
            return None

    def commit(self, ids: Sequence[str]) -> Exchanged:
        """Settle all endings and claim the ids.

        Raises StorageUnavailable when the database is away; the endings are kept for the next time.
        """
        ended, self._ended = self._ended, []
        wanted = [(job_id, new_id()) for job_id in dict.fromkeys(ids)]
        self._claiming = [token for _, token in wanted]  # a beat during the claim must name them
        try:
            done = exchange(
                self._database,
                self._holder,
                ended=ended,
                wanted=wanted,
                news=self._progress,
                now=self._clock.now(),
            )
        except StorageUnavailable:
            self._ended = ended + self._ended
            raise
        else:
            self._held |= {job.lease_token: job for job in done.claimed}
        finally:
            self._claiming = []  # a claim made all the same is taken back by the reaper
        for job, _ in ended:
            del self._held[job.lease_token]
            self._progress.pop(job.job_id, None)
            self._untold.pop(job.job_id, None)
        for job in done.stale:
            log.warning("stale_attempt", job_id=job.job_id, attempt=job.attempt)
        for job, error in done.refused:  # the store would not keep this ending: the job fails with the reason
            log.error("ending_refused", job_id=job.job_id, error=type(error).__name__)
            self._held[job.lease_token] = job
            self._ended.append((job, Raised("ResultRefused", str(error)[:500], permanent=True)))
        return done

    def untold_progress(self, now: float) -> list[tuple[Claimed, Progress]]:
        """The newest progress of the jobs that have some nobody was told of, four times a second at most."""
        if not self._untold or now < self._tell_at:
            return []
        self._tell_at = now + TELL_PROGRESS_SECONDS
        news, self._untold = list(self._untold.values()), {}
        return news

    def save_progress(self, now: float) -> bool:
        """Write the newest progress, once a second at most; whether a courier has something to do."""
        if not self._progress or now < self._save_at:
            return False
        self._save_at = now + SAVE_PROGRESS_SECONDS
        news, self._progress = list(self._progress.values()), {}
        try:
            with self._database.write() as connection:
                return progress.save_and_tell(connection, news, now=self._clock.now())
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("progress_not_saved", error=type(error).__name__)
            return False
