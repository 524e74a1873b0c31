"""The pool's children as one: as many as wanted, heard, dealt to, stopped in time, and buried.

A job of a forked type runs in a child more, forked for it and let go after it. As long as it lives, and from
when it was asked for, one of the others gets no work: never more jobs run at once than children are wanted.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from laneway.clock import Clock
from laneway.engine import endings
from laneway.engine.context import Progress
from laneway.engine.endings import Cancelled, Crashed, Death, Ending, HandedOver, TimedOut, Unfinished
from laneway.engine.leases import Wish
from laneway.engine.outcomes import Claimed
from laneway.log import get_logger
from laneway.settings import Settings
from laneway.worker.children import ChildProcess, Doom, Nursery
from laneway.worker.dealing import Dealer
from laneway.worker.ledger import Ledger
from laneway.worker.memory import private_mib

log = get_logger("worker")

_ENDINGS: dict[str, Callable[..., Ending | HandedOver]] = {
    name: getattr(endings, name) for name in ("Returned", "Raised", "TimedOut", "Cancelled", "HandedOver")
}


class Crew:
    """Registers its sockets with `selector`, each with what to call when there is something to hear.

    Endings go to the ledger, jobs that were not started to the dealer. Raises NurseryFailed from whatever
    is called when no child can be started any more.
    """

    def __init__(
        self,
        nursery: Nursery,
        selector: selectors.BaseSelector,
        *,
        wanted: int,
        forked: Collection[str],
        ledger: Ledger,
        dealer: Dealer,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._nursery = nursery
        self._selector = selector
        self._wanted = wanted
        self._forked = frozenset(forked)
        self._ledger = ledger
        self._dealer = dealer
        self._settings = settings
        self._clock = clock
        self._children: dict[int, ChildProcess] = {}
        self._unforked: deque[Claimed] = deque()  # each waits for a child of its own
        self._asked = 0  # children that the nursery was asked for, and is yet to tell of
        selector.register(nursery.control, selectors.EVENT_READ, self._hear_nursery)

    def idle(self) -> int:
        """How many children could start a round now."""
        return len(self._free())

    def _free(self) -> list[ChildProcess]:
        children = self._children.values()
        taken = len(self._unforked) + sum(bool(c.jobs) or c.for_one_job for c in children)
        idle = [child for child in children if child.idle and not child.for_one_job]
        return idle[: max(0, self._wanted - taken)]

    def releasing(self) -> bool:
        """Whether children that `release_all` killed are still to be buried."""
        return any(child.doom is Doom.DRAIN for child in self._children.values())

    def running(self, *, longer_than: float, now: float) -> list[Claimed]:
        """The jobs that have run for so many seconds."""
        running = (c.current for c in self._children.values() if now - c.since > longer_than)
        return [job for job in running if job is not None]

    def begun(self) -> list[str]:
        """The lease tokens of the jobs that have started."""
        return [child.current.lease_token for child in self._children.values() if child.current]

    def keep_up(self) -> None:
        """Ask for the children that are missing."""
        while self._asked < self._missing() + len(self._unforked) and self._nursery.ask_for_child():
            self._asked += 1

    def _missing(self) -> int:
        return self._wanted - sum(not child.for_one_job for child in self._children.values())

    def deal(self, now: float) -> None:
        """Give the jobs that wait to the children that are free."""
        while self._dealer.hand_back_at is not None:
            free = self._free()
            if not free:
                break
            for child, jobs in zip(free, self._dealer.deal(len(free)), strict=True):
                if jobs and jobs[0].job_type in self._forked:
                    self._unforked.extend(jobs)
                elif jobs:
                    child.send(jobs, now=now)
        if self._unforked:
            self.keep_up()

    def put_back_unforked(self, now: float) -> None:
        """Let the jobs wait whose children are not there yet."""
        self._dealer.put_back(self._unforked, now=now)
        self._unforked.clear()

    # Hearing

    def _hear_nursery(self) -> None:
        while (message := self._nursery.read()) is not None:
            if "child" in message:
                self._welcome(message["child"])
            elif message["exit"] in self._children:
                child = self._children[message["exit"]]
                self._bury(child, message)

    def _welcome(self, child: ChildProcess) -> None:
        now = self._clock.monotonic()
        self._asked -= 1
        child.for_one_job = bool(self._unforked) or self._missing() <= 0
        self._children[child.pid] = child
        if child.for_one_job and not self._unforked:
            child.let_go(now=now)  # its job is not here any more
            return
        if self._settings.child_memory_mib:
            child.born_with_mib = private_mib(child.pid)
        self._selector.register(child.stream, selectors.EVENT_READ, lambda: self._hear(child))
        if child.for_one_job:
            child.send([self._unforked.popleft()], now=now)

    def _hear(self, child: ChildProcess) -> None:
        if self._children.get(child.pid) is not child:
            return  # buried since the selector looked
        self._listen_to(child)
        if child.frames.ended:
            self._selector.unregister(child.stream)
        elif child.idle and (child.for_one_job or self._worn_out(child)):
            self._selector.unregister(child.stream)
            child.let_go(now=self._clock.monotonic())

    def _worn_out(self, child: ChildProcess) -> bool:
        """Whether the next job should find a new child: one short of memory would fail the innocent."""
        return (
            child.served >= self._settings.recycle_jobs
            or child.kept_mib() * 2 > self._settings.child_memory_mib > 0
        )

    def _listen_to(self, child: ChildProcess) -> None:
        for message in child.frames.read():  # the socket does not block
            self._take_in(child, message)
        if child.frames.broken:
            child.kill(Doom.BABBLE)

    def _take_in(self, child: ChildProcess, message: list[Any]) -> None:
        """Of a job that is not the child's any more (the lease was lost) nothing is heard."""
        now = self._clock.monotonic()
        match message:
            case ["end", job_id, kind, *values, run_ms]:
                child.since, child.cancel_at, child.progress = now, None, None
                child.ended += 1
                if (job := child.jobs.pop(job_id, None)) is not None:
                    self._dealer.learn(job.job_type, run_ms / 1000)
                    self._ledger.end(job, _ENDINGS[kind](*values))
            case ["progress", job_id, percent, text, details]:
                if (job := child.jobs.get(job_id)) is not None:
                    child.progress = Progress(percent, text, details)
                    self._ledger.note(job, child.progress)
            case ["back", job_ids]:
                back = [child.jobs.pop(job_id) for job_id in job_ids if job_id in child.jobs]
                if child.current is not None:
                    self._dealer.learn(child.current.job_type, now - child.since)
                self._dealer.put_back(back, now=now)

    def _bury(self, child: ChildProcess, report: dict[str, Any]) -> None:
        """A child has exited: what it had said counts, then its current job bears the blame.

        One that was killed between two jobs, by whomever, leaves nobody to blame.
        """
        status = report["status"]
        if child.doom is not Doom.LET_GO:
            self._hear_out(child)
        del self._children[child.pid]
        left = list(child.jobs.values())
        between = child.doom is None and os.WIFSIGNALED(status) and report["begun"] == child.ended
        current = left.pop(0) if left and not between else None
        if current is not None:
            blame = _blame(child, current, status, peak_memory_mib=report["peak_memory_mib"])
            self._ledger.end(current, blame)
        self._dealer.put_back(left, now=self._clock.monotonic())
        if child.doom is None:
            log.warning("child_died", pid=child.pid, how=_how(status), job_id=current and current.job_id)

    def _hear_out(self, child: ChildProcess) -> None:
        """Take in what a dead child had said. Where a fork of it keeps the socket open, it just dries up."""
        if not child.frames.ended:
            self._selector.unregister(child.stream)
            while not child.frames.ended:
                self._listen_to(child)
                if child.frames.dry:
                    break
        child.stream.close()

    # Stopping

    def enforce(self, now: float) -> float:
        """Kill children whose job outstayed its timeout or its cancel by more than the grace.

        Those that were let go and stay are killed too. Returns when to look next, infinity when at nothing.
        """
        soonest = math.inf
        for child in self._children.values():
            if child.leave_at is not None:
                if now >= child.leave_at:
                    child.kill(Doom.LET_GO)
                else:
                    soonest = min(soonest, child.leave_at)
            job = child.current
            if job is None or child.doom is not None:
                continue
            timeout_at = child.since + job.timeout_seconds + self._settings.timeout_grace_seconds
            cancel_at = math.inf if child.cancel_at is None else child.cancel_at
            if now >= cancel_at:
                child.kill(Doom.CANCEL)
            elif now >= timeout_at:
                child.kill(Doom.TIMEOUT)
            else:
                soonest = min(soonest, timeout_at, cancel_at)
        return soonest

    def grant(self, wish: Wish, now: float) -> None:
        """Ask a running job to stop; its child is killed when the grace is over.

        A job further back in a round is left to the next beat, which brings the wish again.
        """
        job = self._ledger.held(wish.lease_token)
        if job is None:
            return
        if self._dealer.withdraw(job) or self._withdraw_unforked(job):
            self._ledger.end(job, Cancelled())
            return
        child = next((child for child in self._children.values() if child.current is job), None)
        if child is None:
            return
        default = self._settings.cancel_grace_seconds
        grace = default if wish.grace_seconds is None else wish.grace_seconds
        kill_at = now + (0.0 if wish.terminate else grace)
        if child.cancel_at is None:
            child.ask_to_stop(job.job_id)
        child.cancel_at = min(kill_at, child.cancel_at or kill_at)

    def _withdraw_unforked(self, job: Claimed) -> bool:
        if job not in self._unforked:
            return False
        self._unforked.remove(job)
        return True

    def release_all(self) -> None:
        """Kill what runs; the jobs are not charged."""
        for child in self._children.values():
            if child.jobs and child.doom is None:
                child.kill(Doom.DRAIN)

    def abandon_all(self) -> None:
        """Kill what runs and hear no more of it: the jobs are somebody else's."""
        self._unforked.clear()
        for child in self._children.values():
            if child.jobs:
                child.kill(Doom.LOST)
                child.jobs.clear()


def _blame(child: ChildProcess, job: Claimed, status: int, *, peak_memory_mib: int) -> Ending:
    if child.doom in (None, Doom.BABBLE):
        last = child.progress
        death = Death(
            signal=_signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None,
            exit_status=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            peak_memory_mib=peak_memory_mib,
            progress_percent=last.percent if last else None,
            progress_message=last.message if last else None,
        )
        babble = "wrote what is no message into its connection to the worker"
        return Crashed(_how(status) if child.doom is None else babble, death)
    if child.doomed_job == job.job_id:
        match child.doom:
            case Doom.TIMEOUT:
                return TimedOut(job.timeout_seconds)
            case Doom.CANCEL:
                return Cancelled()
    return Unfinished()  # not its fault: it may have started between the decision to kill and the kill


def _how(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
        return f"killed by signal {number} ({_signal_name(number)}){hint}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"  # of the real-time signals only the ends have names
