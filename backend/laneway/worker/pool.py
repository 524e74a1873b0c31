"""The worker: takes ids, claims their rows, hands the jobs to children, settles what came of them.

One thread runs the loop below and does all the talking to the lanes and, with the exception of the
heartbeat, to the database. A turn of the loop is: hear the children, take ids for the idle ones, then one
transaction that settles every ending heard and claims every id taken, then deal, then the mirror.

What may go wrong, and what happens then:
  a child dies           its current job is charged with a crash; the rest of its round goes to others
  the nursery dies       its children die with it; exit 1, and whoever watches starts the worker again
  the database is away   endings are kept and settled later; nothing is taken meanwhile
  Redis is away          ids come straight from the database, every `poll_seconds`
  beats do not get out   the lease is lost: kill the children, drop everything, start under a new id
  SIGTERM                take no more, let jobs end for `drain_seconds`, release the rest; again: now
"""

from __future__ import annotations

import selectors
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import sqlalchemy as sa

from laneway.clock import Clock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import lanes_of
from laneway.engine import leases
from laneway.engine.endings import Unfinished
from laneway.engine.exchange import Exchanged, Holder
from laneway.engine.leases import Wish
from laneway.engine.outcomes import Claimed
from laneway.engine.pauses import open_lanes
from laneway.errors import StorageUnavailable
from laneway.lanes.backend import LanesUnavailable
from laneway.lanes.live import WISHES_CHANNEL, RedisNews, listen
from laneway.lanes.rq_lanes import RqLanes
from laneway.log import get_logger
from laneway.settings import Settings
from laneway.webhooks.messages import WAKE_CHANNEL
from laneway.worker.beats import Beats
from laneway.worker.children import Nursery, NurseryFailed
from laneway.worker.crew import Crew
from laneway.worker.dealing import Dealer
from laneway.worker.face import SHOW_SECONDS, RqFace
from laneway.worker.ledger import Ledger

OWN_LOOK_SECONDS = 5.0  # an idle worker asks the database itself this often
DATABASE_PAUSE_SECONDS = 0.5
BELL_SECONDS = 5.0

log = get_logger("worker")


class PoolWorker:
    """One worker process of `concurrency` children (default: the setting) on the lanes of `queues`.

    Raises NurseryFailed when the job types cannot be loaded.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        queues: Sequence[str],
        concurrency: int | None = None,
        burst: bool = False,
    ) -> None:
        # Before any thread and any connection
        self._nursery = Nursery(settings.tasks, child_memory_mib=settings.child_memory_mib)
        self._job_types, forked = self._nursery.wait_until_ready()
        self._settings = settings
        self._queues = tuple(queues)
        self._lane_names = lanes_of(self._queues)
        self._burst = burst
        self._clock: Clock = SystemClock()
        self._rng = Random()  # noqa: S311 - jitter
        self._database = Database(
            settings.database, pool_size=2, statement_seconds=settings.worker_statement_seconds
        )
        self._lanes = RqLanes(settings.redis_url, clock=self._clock, window=settings.lane_window)
        self._news = RedisNews(settings.redis_url, courier_channel=WAKE_CHANNEL)
        self._face = RqFace(settings.redis_url, lane_names=self._lane_names, lanes=self._lanes)
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, lambda: self._wake_in.recv(4096))
        self._ledger = Ledger(self._database, clock=self._clock)
        self._dealer = Dealer(alone=forked)
        self._crew = Crew(
            self._nursery,
            self._selector,
            wanted=concurrency or settings.children,
            forked=forked,
            ledger=self._ledger,
            dealer=self._dealer,
            settings=settings,
            clock=self._clock,
        )
        # From the thread of the beats, and for it
        self._wishes: deque[Wish] = deque()
        self._named: deque[str] = deque()
        self._paused: frozenset[str] = frozenset()  # queues whose lanes are left alone
        self._begun: list[str] = []
        self._suspects: dict[str, Claimed] = {}  # by lease token: started once a beat has named them
        self._signals = 0
        self._stopping = threading.Event()
        self._lost = False
        self._drained = False
        self._rung = threading.Event()  # the bell rang since the last take
        self._listening = threading.Event()  # there is room: the bell thread may wait
        self._idle = 0
        self._cut_off = False  # the last claim did not reach the database
        # Monotonic moments
        self._look_at = 0.0  # into the lanes, uncalled
        self._own_look_at = 0.0  # into the database, when the lanes are empty
        self._kill_at = 0.0
        self._stop_at = 0.0
        self._show_at = 0.0
        self._pause_until = 0.0

    # The process

    def run(self) -> int:
        """Work until told to stop (or, in burst mode, until there is nothing left). The exit status."""
        self._start_lease()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for target in (self._wait_for_bell, self._wait_for_wishes, self._wait_for_commands):
            threading.Thread(target=target, daemon=True).start()
        log.info(
            "worker_started",
            worker_id=self._worker_id,
            lanes=self._lane_names,
            job_types=len(self._job_types),
        )
        try:
            while not self._done():
                for key, _ in self._selector.select(self._pause()):
                    key.data()
                self._turn()
            return 0
        except NurseryFailed as error:
            log.error("nursery_failed", error=str(error))
            return 1
        finally:
            self._close()

    def _on_signal(self, *_: Any) -> None:
        self._signals += 1  # no Event.set(): the main thread may be inside of that Event
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"\0")
        except BlockingIOError:
            pass  # it will wake already

    def _done(self) -> bool:
        if self._lost:
            return False
        if self._stopping.is_set():
            return not (self._ledger or self._ledger.unsettled)
        return self._drained

    def _pause(self) -> float:
        """How long the loop may sleep when nothing is heard."""
        now = self._clock.monotonic()
        if self._lost:
            return max(0.0, self._pause_until - now)
        moments = [now + self._settings.poll_seconds, self._show_at, self._kill_at]
        if self._ledger.unsettled and not self._crew.releasing():
            moments.append(self._pause_until)
        if self._room():
            moments.append(max(self._pause_until, now if self._rung.is_set() else self._look_at))
        if self._stop_at > now:
            moments.append(self._stop_at)
        for at in (self._dealer.hand_back_at, self._ledger.progress_at):
            if at is not None:
                moments.append(at)
        return max(0.0, min(moments) - now)

    def _close(self) -> None:
        self._stopping.set()
        self._beats.stop()
        self._nursery.stop()
        self._leave("gone")
        self._face.vanish()
        self._lanes.close()
        self._news.close()
        self._database.dispose()
        log.info("worker_stopped", worker_id=self._worker_id)

    # One turn

    def _turn(self) -> None:
        now = self._clock.monotonic()
        if self._lost:
            self._start_anew(now)
            return
        if self._signals:
            self._drain(now)
        else:
            self._crew.keep_up()
        while self._wishes:
            self._crew.grant(self._wishes.popleft(), now)
        while self._named:
            if (suspect := self._suspects.pop(self._named.popleft(), None)) is not None:
                self._dealer.add([suspect], now=now)
        self._kill_at = self._crew.enforce(now)
        self._crew.deal(now)
        if (
            now >= self._pause_until and not self._crew.releasing()
        ):  # what is released together keeps its order
            self._commit(now)
        hand_back_at = self._dealer.hand_back_at
        if hand_back_at is not None and now >= hand_back_at:
            self._hand_back()
        self._show(now)
        self._begun = [*self._crew.begun(), *self._suspects]

    def _room(self) -> int:
        if self._signals or self._face.suspended or self._beats.overdue or self._suspects:
            return 0
        return self._dealer.room(self._crew.idle())

    def _commit(self, now: float) -> None:
        ids, searched = self._take(now)
        if not ids and not self._ledger.unsettled:
            return
        try:
            done = self._ledger.commit(ids)
        except StorageUnavailable:
            self._pause_until = now + DATABASE_PAUSE_SECONDS
            self._cut_off = True
            return
        if done.claimed or (ids and not searched):
            self._look_at = now  # there may be more
        if done.claimed and searched:
            self._own_look_at = now
        now = self._clock.monotonic()
        suspects = {job.lease_token: job for job in done.claimed if job.suspect}
        self._dealer.add([job for job in done.claimed if not job.suspect], now=now)
        self._crew.deal(now)
        if suspects:  # should this worker die of one of them, the database must know which had begun
            self._suspects = suspects
            self._begun = [*self._crew.begun(), *suspects]
            self._beats.now()
        if done.settled or done.next:
            self._tell(done)

    def _take(self, now: float) -> tuple[list[str], bool]:
        """Ids to claim, and whether they come from the database instead of the lanes."""
        idle, self._idle = self._idle, self._crew.idle()
        if self._idle > idle:
            self._look_at = now
        room = self._room()
        if not room or not (self._rung.is_set() or now >= self._look_at):
            return [], False
        self._rung.clear()
        self._look_at = now + self._settings.poll_seconds
        lanes = open_lanes(self._lane_names, self._paused)
        if self._cut_off:  # ids taken off the lanes now would be lost to workers that can claim them
            found = self._ledger.find(lanes, room)
            self._cut_off = found is None
            return found or [], True
        searched = False
        try:
            ids = self._lanes.take(lanes, room, worker_name=self._face.name)
        except LanesUnavailable:
            ids, searched = self._ledger.find(lanes, room) or [], True
        else:
            if not ids and now >= self._own_look_at:
                self._own_look_at = now + OWN_LOOK_SECONDS
                ids = self._ledger.find(lanes, room, queued_for_seconds=OWN_LOOK_SECONDS) or []
                searched = True
        if not ids:
            self._listening.set()
            self._drained = self._burst and not self._ledger and not self._ledger.unsettled
        return ids, searched

    def _tell(self, done: Exchanged) -> None:
        """Best effort: after the commit nothing may change the outcome any more."""
        self._face.mirror_ended(done.settled)
        self._news.changed([s.job.job_id for s in done.settled])
        if any(s.webhook for s in done.settled):
            self._news.ring_courier()
        with suppress(LanesUnavailable):  # the reconciler rings again
            self._lanes.push([due for s in done.settled for due in s.due])
            self._lanes.push_first(done.next)

    def _hand_back(self) -> None:
        """Give back what waits for a child."""
        for job in self._dealer.take_all():
            self._ledger.end(job, Unfinished())

    def _hear_named(self, tokens: Sequence[str]) -> None:
        if self._suspects:
            self._named.extend(tokens)
            self._wake()

    def _show(self, now: float) -> None:
        if self._ledger.save_progress(now):
            self._news.ring_courier()
        self._news.progressed(
            [
                (job.job_id, job.attempt, p.percent, p.message, p.details)
                for job, p in self._ledger.untold_progress(now)
            ]
        )
        if now < self._show_at:
            return
        self._show_at = now + SHOW_SECONDS
        # Short jobs never appear and cost nothing.
        if jobs := self._crew.running(longer_than=SHOW_SECONDS / 2, now=now):
            self._face.mirror_running(jobs)
        self._face.show(busy=bool(self._ledger))

    # What other threads hear

    def _wait_for_bell(self) -> None:
        while not self._stopping.is_set():
            self._listening.wait()
            self._listening.clear()
            queues = [queue for queue in self._queues if queue not in self._paused]
            if not queues:
                self._stopping.wait(self._settings.poll_seconds)
                self._listening.set()
                continue
            try:
                rung = self._lanes.wait(queues, BELL_SECONDS)
            except LanesUnavailable:
                self._stopping.wait(self._settings.poll_seconds)
                continue
            if rung:
                self._rung.set()
                self._wake()
            else:
                self._listening.set()

    def _wait_for_wishes(self) -> None:
        self._listen(WISHES_CHANNEL, lambda _: self._beats.now())

    def _wait_for_commands(self) -> None:
        def heard(message: str) -> None:
            if self._face.wants_shutdown(message):
                self._on_signal()

        self._listen(self._face.pubsub_channel_name, heard)

    def _listen(self, channel: str, heard: Callable[[str], None]) -> None:
        listen(self._settings.redis_url, channel, heard, stopping=self._stopping)

    def _hear_wishes(self, wishes: list[Wish]) -> None:
        self._wishes.extend(wishes)
        self._wake()

    def _hear_paused(self, queues: frozenset[str]) -> None:
        if queues != self._paused:
            log.info("paused_queues_changed", queues=sorted(queues))
            self._paused = queues
            self._rung.set()  # look at once: one may have been resumed
            self._wake()

    def _lose_lease(self) -> None:
        self._lost = True
        self._wake()

    # The lease

    def _start_lease(self, *, replaces: str | None = None) -> None:
        worker_id = new_id()
        leases.register(
            self._database,
            worker_id=worker_id,
            name=self._face.name,
            lanes=self._lane_names,
            job_types=self._job_types,
            replaces=replaces,
        )
        self._worker_id = worker_id
        self._lost = False
        self._ledger.open(Holder(worker_id, self._job_types, self._settings.crash_limit, self._rng))
        self._beats = Beats(
            self._settings,
            worker_id=worker_id,
            held=self._ledger.tokens,
            begun=lambda: self._begun,
            clock=self._clock,
            wished=self._hear_wishes,
            lost=self._lose_lease,
            named=self._hear_named,
            paused=self._hear_paused,
        )
        self._beats.start()

    def _start_anew(self, now: float) -> None:
        """The lease is lost: others may run these jobs now. Stop all of it, come back as somebody else."""
        self._crew.abandon_all()
        self._dealer.take_all()
        held = self._ledger.drop_all()
        self._wishes.clear()
        self._suspects.clear()
        if self._signals:
            self._stopping.set()
            self._lost = False
        elif now >= self._pause_until:
            log.warning("lease_lost", worker_id=self._worker_id, held=held)
            self._beats.stop()
            try:
                self._start_lease(replaces=self._worker_id)
            except (sa.exc.DBAPIError, sa.exc.TimeoutError):
                self._pause_until = now + DATABASE_PAUSE_SECONDS

    def _leave(self, state: str) -> None:
        try:
            leases.leave(self._database, worker_id=self._worker_id, state=state)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("leave_failed", error=type(error).__name__)

    def _drain(self, now: float) -> None:
        """After SIGTERM: give back what has not started, wait for the rest, then release that too."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._stop_at = now + self._settings.drain_seconds
            seconds = self._settings.drain_seconds
            log.info("worker_draining", held=len(self._ledger), seconds=seconds)
            self._leave("draining")
        self._dealer.add(self._suspects.values(), now=now)
        self._suspects.clear()
        self._crew.put_back_unforked(now)
        self._hand_back()
        if now >= self._stop_at or self._signals > 1:
            self._crew.release_all()
