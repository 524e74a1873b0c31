"""How many jobs to take, and who gets which: prefetch that holds nobody up.

Short jobs travel many at a time, so that their cost is not that of the messages around them; but a job
that was dealt to a child waits for those before it, whatever else turns up. So a round is as many jobs as
take ROUND_SECONDS by what their types took lately, types that take long (or are new) go one at a time,
and what no child is free for goes back to its lane. A job that gets a process of its own goes alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from laneway.engine.outcomes import Claimed

ROUND_JOBS = 64
ROUND_SECONDS = 0.02
LONG_SECONDS = 0.05
HAND_BACK_SECONDS = 0.05


class Dealer:
    """The claimed jobs that wait for a child, and what is known of how long jobs take.

    Those of the types `alone` share no round.
    """

    def __init__(self, *, alone: Collection[str] = ()) -> None:
        self._alone = frozenset(alone)
        self._ready: deque[Claimed] = deque()
        self._since = 0.0  # monotonic: since when the first of them waits
        self._pace: dict[str, float] = {}  # job type → smoothed seconds a run
        self._recent = LONG_SECONDS  # smoothed seconds a run, over all types

    @property
    def hand_back_at(self) -> float | None:
        """When the jobs that wait should go back to their lanes; None when none waits."""
        return self._since + HAND_BACK_SECONDS if self._ready else None

    def learn(self, job_type: str, seconds: float) -> None:
        """A job of that type took so long."""
        if job_type in self._alone:  # it stays new, and no more are taken than processes can be started for
            self._recent = LONG_SECONDS
            return
        known = self._pace.get(job_type, seconds)
        self._pace[job_type] = 0.8 * known + 0.2 * seconds
        self._recent = 0.9 * self._recent + 0.1 * seconds if seconds < LONG_SECONDS else LONG_SECONDS

    def room(self, idle: int) -> int:
        """How many more jobs `idle` children could be given now."""
        if self._ready:
            return 0
        return idle * max(1, min(ROUND_JOBS, int(ROUND_SECONDS / max(self._recent, 1e-6))))

    def add(self, jobs: Iterable[Claimed], *, now: float) -> None:
        """Jobs that were claimed just now."""
        if not self._ready:
            self._since = now
        self._ready.extend(jobs)

    def put_back(self, jobs: Sequence[Claimed], *, now: float) -> None:
        """Jobs that a child had and did not start: they come before the others."""
        if not self._ready:
            self._since = now
        self._ready.extendleft(reversed(jobs))

    def withdraw(self, job: Claimed) -> bool:
        """Whether the job waited here; it does no longer."""
        if job not in self._ready:
            return False
        self._ready.remove(job)
        return True

    def deal(self, idle: int) -> list[list[Claimed]]:
        """A round for each of `idle` children, in turn; some may be empty."""
        rounds: list[list[Claimed]] = [[] for _ in range(idle)]
        spent = [0.0] * idle
        turn = 0
        while idle and self._ready:
            pace = self._pace.get(self._ready[0].job_type, LONG_SECONDS)
            place = turn % idle
            if rounds[place] and (spent[place] + pace > ROUND_SECONDS or len(rounds[place]) >= ROUND_JOBS):
                break
            rounds[place].append(self._ready.popleft())
            spent[place] += pace
            turn += 1
        return rounds

    def take_all(self) -> list[Claimed]:
        """The jobs that wait; none does any more."""
        jobs = list(self._ready)
        self._ready.clear()
        return jobs
