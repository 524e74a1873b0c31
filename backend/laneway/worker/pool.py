"""The worker: takes ids, claims their rows, hands the jobs to children, settles what came of them.

One thread runs the loop below and does all the talking to the lanes and, with the exception of the
heartbeat, to the database. A turn of the loop is: hear the children, take ids for the idle ones, then one
transaction that settles every ending heard and claims every id taken, then dispatch, then the mirror.
While that transaction is under way the children work, so endings collect and the next one carries more.

What may go wrong, and what happens then:
  a child dies           its current job is charged with a crash; the rest of its round goes to others
  the database is away   endings are kept and settled later; nothing is taken meanwhile
  Redis is away          ids come straight from the database, every `poll_seconds`
  beats do not get out   the lease is lost: kill the children, drop everything, start under a new id
  SIGTERM                take no more, let jobs end for `drain_seconds`, release the rest; again: now
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from random import Random
from typing import Any

import redis
import sqlalchemy as sa
from rq import worker_registration
from rq.suspension import is_suspended
from rq.utils import now as rq_now
from rq.worker import BaseWorker

from laneway.clock import Clock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import lanes_of
from laneway.domain.states import JobStatus
from laneway.engine import endings, leases, progress
from laneway.engine.context import Progress
from laneway.engine.endings import Cancelled, Crashed, Ending, Raised, TimedOut, Unfinished
from laneway.engine.exchange import Holder, Settled, exchange
from laneway.engine.leases import Wish
from laneway.engine.outcomes import Claimed
from laneway.errors import StorageUnavailable
from laneway.lanes.backend import EndedRun, LanesUnavailable
from laneway.lanes.live import WISHES_CHANNEL, RedisNews, listen
from laneway.lanes.rq_lanes import RqLanes, connect
from laneway.log import get_logger
from laneway.settings import Settings
from laneway.webhooks.messages import WAKE_CHANNEL
from laneway.worker.beats import Beats
from laneway.worker.children import ChildProcess, Nursery, NurseryFailed

ROUND_JOBS = 64
ROUND_SECONDS = 0.02  # what one round of short jobs may take
LONG_SECONDS = 0.05  # types slower than this are run one at a time
HAND_BACK_SECONDS = 0.05  # claimed jobs that no child is free for go back to their lane
SAVE_PROGRESS_SECONDS = 1.0
MIRROR_SECONDS = 1.0
FACE_SECONDS = 5.0  # between heartbeats of the RQ worker key
OWN_LOOK_SECONDS = 5.0  # an idle worker asks the database itself this often
DATABASE_PAUSE_SECONDS = 0.5

log = get_logger("worker")

_ENDINGS: dict[str, Callable[..., Ending]] = {
    name: getattr(endings, name)
    for name in ("Returned", "Raised", "TimedOut", "Crashed", "Cancelled", "Unfinished")
}


class PoolWorker(BaseWorker):  # type: ignore[misc]
    """An RQ worker to look at (`rq info`, `rq:workers`, suspend, shutdown), ours in all it does."""

    def __init__(
        self,
        settings: Settings,
        *,
        queues: Sequence[str],
        concurrency: int | None = None,
        burst: bool = False,
        clock: Clock | None = None,
        rng: Random | None = None,
    ) -> None:
        self.settings = settings
        self.lane_names = lanes_of(tuple(queues))
        self._queue_names = tuple(queues)
        self._wanted_children = concurrency or settings.children
        self._burst = burst
        self._clock = clock or SystemClock()
        self._rng = rng or Random()  # noqa: S311 - jitter

        host = socket.gethostname()
        super().__init__(
            list(self.lane_names),
            name=f"{host}-{os.getpid()}-{secrets.token_hex(3)}",
            connection=connect(settings.redis_url),
            prepare_for_work=False,  # Redis may be away
        )
        self.hostname, self.pid = host, os.getpid()

        self._nursery = Nursery(settings.tasks)  # before any thread and any connection
        self.job_types = self._nursery.wait_until_ready()
        self.database = Database(settings.database, pool_size=2)
        self.lanes = RqLanes(settings.redis_url, clock=self._clock, window=settings.lane_window)
        self.news = RedisNews(settings.redis_url, courier_channel=WAKE_CHANNEL)

        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._selector.register(self._nursery.control, selectors.EVENT_READ)

        self._children: dict[int, ChildProcess] = {}
        self._expected_children = 0
        self._held: dict[str, Claimed] = {}  # lease token → job: claimed and not yet settled
        self._claiming: set[str] = set()  # lease tokens of a claim that is under way
        self._ready: deque[Claimed] = deque()  # claimed, waiting for a child
        self._ready_since = 0.0
        self._ended: list[tuple[Claimed, Ending]] = []
        self._news: dict[str, tuple[Claimed, Progress]] = {}
        self._announced: set[str] = set()
        self._wishes: deque[Wish] = deque()
        self._pace: dict[str, float] = {}  # job type → smoothed seconds a run
        self._recent = LONG_SECONDS  # smoothed seconds a run, over all types

        self._stopping = threading.Event()
        self._signals = 0
        self._stop_at = 0.0
        self._lost = False
        self._rung = threading.Event()  # the bell rang since the last take
        self._listening = threading.Event()  # there is room: the bell thread may wait
        self._suspended = False
        self._look_at = 0.0  # monotonic: when to look into the lanes uncalled
        self._own_look_at = 0.0
        self._mirror_at = 0.0
        self._save_at = 0.0
        self._face_at = 0.0
        self._pause_until = 0.0
        self._drained_at: float | None = None

    # The process

    def run(self) -> int:
        """Work until told to stop (or, in burst mode, until there is nothing left). The exit status."""
        self._register_face()
        self._start_lease()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for target in (self._wait_for_bell, self._wait_for_wishes):
            threading.Thread(target=target, daemon=True).start()
        log.info(
            "worker_started", worker_id=self.worker_id, lanes=self.lane_names, job_types=len(self.job_types)
        )
        try:
            while not self._done():
                for key, _ in self._selector.select(self._pause()):
                    self._hear(key.fileobj)
                self._turn()
            return 0
        except NurseryFailed as error:
            log.error("nursery_failed", error=str(error))
            return 1
        finally:
            self._close()

    def _done(self) -> bool:
        if self._lost:
            return False
        if self._stopping.is_set():
            return not self._held
        return self._burst and self._drained_at is not None

    def _on_signal(self, *_: Any) -> None:
        self._signals += 1
        self._stopping.set()
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"\0")
        except BlockingIOError:
            pass  # it will wake already

    def _pause(self) -> float:
        """How long the loop may sleep when nothing is heard."""
        now = self._clock.monotonic()
        if self._ended:
            return max(0.0, self._pause_until - now)
        if self._rung.is_set() and self._room():
            return 0.0
        moments = [self._look_at, self._face_at]
        if self._ready:
            moments.append(self._ready_since + HAND_BACK_SECONDS)
        if self._news:
            moments.append(self._save_at)
        if self._held:
            moments.append(self._mirror_at)
        if self._stop_at:
            moments.append(self._stop_at)
        return min(max(0.0, min(moments) - now), self.settings.poll_seconds)

    def _close(self) -> None:
        self._stopping.set()
        self._beats.stop()
        self._nursery.stop()
        try:
            leases.leave(self.database, worker_id=self.worker_id)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("leave_failed", error=type(error).__name__)
        try:
            self.register_death()
        except redis.RedisError:
            pass  # its keys expire
        self.lanes.close()
        self.news.close()
        self.database.dispose()
        log.info("worker_stopped", worker_id=self.worker_id)

    # One turn

    def _hear(self, source: Any) -> None:
        if source is self._wake_in:
            try:
                self._wake_in.recv(4096)
            except BlockingIOError:
                pass
        elif source is self._nursery.control:
            self._hear_nursery()
        else:
            child = next((c for c in self._children.values() if c.stream is source), None)
            if child is not None:
                self._hear_child(child)

    def _turn(self) -> None:
        now = self._clock.monotonic()
        if self._lost:
            self._start_anew()
            return
        if self._stopping.is_set():
            self._drain(now)
        self._keep_children()
        self._enforce(now)
        self._grant_wishes(now)
        if now < self._pause_until:
            return
        taken = self._take(now)
        if self._ended or taken:
            self._commit(taken)
        self._dispatch(self._clock.monotonic())
        self._save_progress(now)
        self._mirror(now)
        self._show_face(now)

    # Children

    def _keep_children(self) -> None:
        if self._stopping.is_set():
            return
        while self._expected_children < self._wanted_children:
            self._nursery.ask_for_child()
            self._expected_children += 1

    def _hear_nursery(self) -> None:
        while (message := self._nursery.read()) is not None:
            if "child" in message:
                child: ChildProcess = message["child"]
                self._children[child.pid] = child
                self._selector.register(child.stream, selectors.EVENT_READ)
                self._look_at = 0.0
            elif message["exit"] in self._children:
                self._bury(self._children[message["exit"]], message["status"])

    def _hear_child(self, child: ChildProcess) -> None:
        for message in child.frames.read():
            match message:
                case ["end", job_id, kind, *values, run_ms]:
                    job = child.jobs.pop(job_id)
                    self._learn(job.job_type, run_ms / 1000)
                    self._ended.append((job, _ENDINGS[kind](*values)))
                    child.since, child.cancel_at = self._clock.monotonic(), None
                case ["progress", job_id, percent, text, details]:
                    if job_id in child.jobs:
                        self._news[job_id] = (child.jobs[job_id], Progress(percent, text, details))
                case ["back", job_ids]:
                    back = [child.jobs.pop(job_id) for job_id in job_ids]
                    if back:
                        self._learn(back[0].job_type, LONG_SECONDS)
                        self._put_back(back)
        if child.frames.ended:
            self._selector.unregister(child.stream)
        elif child.idle and child.served >= self.settings.recycle_jobs:
            self._selector.unregister(child.stream)
            child.let_go()

    def _bury(self, child: ChildProcess, status: int) -> None:
        """A child has exited: what it had said counts, then its current job bears the blame."""
        while not child.frames.ended and child.doomed != "recycled":
            self._hear_child(child)
        child.stream.close()
        del self._children[child.pid]
        self._expected_children -= 1
        current, *rest = child.jobs.values() or (None,)
        if current is not None:
            self._ended.append((current, self._blame(child, current, status)))
        self._put_back(rest)
        if not child.doomed:
            log.warning("child_died", pid=child.pid, how=_how(status), job_id=current and current.job_id)

    def _blame(self, child: ChildProcess, job: Claimed, status: int) -> Ending:
        match child.doomed:
            case "timeout":
                return TimedOut(job.timeout_seconds)
            case "cancel":
                return Cancelled()
            case "drain" | "lost":
                return Unfinished()
        return Crashed(_how(status))

    def _put_back(self, jobs: Sequence[Claimed]) -> None:
        if jobs and not self._ready:
            self._ready_since = self._clock.monotonic()
        self._ready.extendleft(reversed(jobs))

    def _learn(self, job_type: str, seconds: float) -> None:
        known = self._pace.get(job_type, seconds)
        self._pace[job_type] = 0.8 * known + 0.2 * seconds
        self._recent = 0.9 * self._recent + 0.1 * seconds if seconds < LONG_SECONDS else LONG_SECONDS

    def _enforce(self, now: float) -> None:
        """Kill children whose job outstayed its timeout or its cancel by more than the grace."""
        for child in self._children.values():
            job = child.current
            if job is None or child.doomed:
                continue
            if child.cancel_at is not None and now >= child.cancel_at:
                child.kill("cancel")
            elif now >= child.since + job.timeout_seconds + self.settings.timeout_grace_seconds:
                child.kill("timeout")

    def _grant_wishes(self, now: float) -> None:
        while self._wishes:
            wish = self._wishes.popleft()
            job = self._held.get(wish.lease_token)
            if job is None:
                continue
            if job in self._ready:
                self._ready.remove(job)
                self._ended.append((job, Cancelled()))
            for child in self._children.values():
                if child.current is job and child.cancel_at is None:
                    grace = (
                        self.settings.cancel_grace_seconds
                        if wish.grace_seconds is None
                        else wish.grace_seconds
                    )
                    child.cancel_at = now + (0.0 if wish.terminate else grace)
                    child.ask_to_stop(job.job_id)

    # Taking, claiming, settling

    def _room(self) -> int:
        """How many more jobs the idle children could be given now."""
        if self._stopping.is_set() or self._suspended or self._ready:
            return 0
        idle = sum(child.idle for child in self._children.values())
        each = max(1, min(ROUND_JOBS, int(ROUND_SECONDS / max(self._recent, 1e-6))))
        return idle * each

    def _take(self, now: float) -> list[str]:
        room = self._room()
        if not room:
            return []
        called = self._rung.is_set()
        if not called and now < self._look_at:
            return []
        self._rung.clear()
        self._look_at = now + self.settings.poll_seconds
        try:
            ids = self.lanes.take(self.lane_names, room, worker_name=self.name)
        except LanesUnavailable:
            return self._find(room)
        if ids:
            self._look_at = now  # there may be more
        elif now >= self._own_look_at:
            self._own_look_at = now + OWN_LOOK_SECONDS
            ids = self._find(room, unheard_for=OWN_LOOK_SECONDS)
        if not ids:
            self._listening.set()
            if self._burst and not self._held and not self._ended:
                self._drained_at = now
        return ids

    def _find(self, count: int, *, unheard_for: float = 0.0) -> list[str]:
        """The slow path: the ids that the lanes would have given, from the database."""
        before = self._clock.now() - timedelta(seconds=unheard_for)
        try:
            with self.database.read() as connection:
                return leases.find_queued(
                    connection, self.lane_names, self.job_types, limit=count, before=before
                )
        except (sa.exc.DBAPIError, sa.exc.TimeoutError):
            return []

    def _commit(self, ids: Sequence[str]) -> None:
        """Settle the endings and claim the ids, in one transaction; then tell the lanes."""
        ended, self._ended = self._ended, []
        wanted = [(job_id, new_id()) for job_id in dict.fromkeys(ids)]
        self._claiming = {token for _, token in wanted}  # a beat during the claim must name them
        try:
            done = exchange(
                self.database,
                self._holder,
                ended=ended,
                wanted=wanted,
                news=self._news,
                now=self._clock.now(),
            )
        except StorageUnavailable:
            self._ended = ended + self._ended
            self._claiming = set()
            self._pause_until = self._clock.monotonic() + DATABASE_PAUSE_SECONDS
            return
        for job, _ in ended:
            self._held.pop(job.lease_token, None)
            self._news.pop(job.job_id, None)
        for job in done.claimed:
            self._held[job.lease_token] = job
        self._claiming = set()
        if done.claimed:
            if not self._ready:
                self._ready_since = self._clock.monotonic()
            self._ready.extend(done.claimed)
            self._dispatch(self._ready_since)
        for job, error in done.refused:  # the store would not keep this ending: the job fails with the reason
            log.error("ending_refused", job_id=job.job_id, error=type(error).__name__)
            self._held[job.lease_token] = job
            self._ended.append((job, Raised("ResultRefused", str(error)[:500], permanent=True)))
        for job in done.stale:
            log.warning("stale_attempt", job_id=job.job_id, attempt=job.attempt)
        self._tell(done.settled)

    def _tell(self, settled: Sequence[Settled]) -> None:
        """Best effort, after the commit: nothing here may change the outcome any more."""
        if not settled:
            return
        runs = [EndedRun(s.job.lane, s.job.job_id, s.status, due_at=s.next_retry_at) for s in settled]
        try:
            self.lanes.mirror_ended(runs, worker_name=self.name)
            for run in runs:
                if run.status is JobStatus.QUEUED:  # released: back to its place at the head
                    self.lanes.refill(run.lane, [run.job_id], [], complete=False, refusals_seen=-1)
        except LanesUnavailable:
            pass  # the reconciler repairs the lanes, expiry the mirror
        self.news.changed([run.job_id for run in runs])
        if any(s.webhook for s in settled):
            self.news.ring_courier()

    def _dispatch(self, now: float) -> None:
        """Deal the claimed jobs out to idle children; give back what none is free for."""
        while self._ready:
            idle = [child for child in self._children.values() if child.idle]
            if not idle:
                break
            rounds: list[list[Claimed]] = [[] for _ in idle]
            spent = [0.0] * len(idle)
            turn = 0
            while self._ready:
                pace = self._pace.get(self._ready[0].job_type, LONG_SECONDS)
                place = turn % len(idle)
                if rounds[place] and (
                    spent[place] + pace > ROUND_SECONDS or len(rounds[place]) >= ROUND_JOBS
                ):
                    break
                rounds[place].append(self._ready.popleft())
                spent[place] += pace
                turn += 1
            for child, jobs in zip(idle, rounds, strict=True):
                if jobs:
                    child.send(jobs, now=now)
        if self._ready and now - self._ready_since >= HAND_BACK_SECONDS:
            self._ended += [(job, Unfinished()) for job in self._ready]
            self._ready.clear()

    # News and appearances

    def _save_progress(self, now: float) -> None:
        if not self._news or now < self._save_at:
            return
        self._save_at = now + SAVE_PROGRESS_SECONDS
        news, self._news = list(self._news.values()), {}
        try:
            with self.database.write() as connection:
                progress.save(connection, news, now=self._clock.now())
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("progress_not_saved", error=type(error).__name__)
            return
        self.news.changed([job.job_id for job, _ in news])

    def _mirror(self, now: float) -> None:
        """Show jobs that run for a while as running; short ones never appear and cost nothing."""
        if now < self._mirror_at:
            return
        self._mirror_at = now + MIRROR_SECONDS
        current = [
            child.current for child in self._children.values() if now - child.since > MIRROR_SECONDS / 2
        ]
        items = [(job.lane, job.job_id) for job in current if job is not None]
        if items:
            try:
                self.lanes.mirror_running(items, worker_name=self.name, lease_seconds=3 * FACE_SECONDS)
            except LanesUnavailable:
                pass

    def _register_face(self) -> None:
        try:
            self.register_birth()
            self.subscribe()
        except redis.RedisError:
            log.warning("redis_away", redis="the worker works straight from the database")

    def _show_face(self, now: float) -> None:
        """Keep the RQ worker key alive, also after Redis forgot it; hear `rq suspend`."""
        if now < self._face_at:
            return
        self._face_at = now + FACE_SECONDS
        try:
            self.last_heartbeat = rq_now()
            if self.birth_date is None:
                self._register_face()
            with self.connection.pipeline(transaction=False) as pipeline:
                state = "busy" if self._held else "idle"
                pipeline.hset(self.key, mapping=self.serialize() | {"state": state})
                pipeline.expire(self.key, self.worker_ttl + 60)
                worker_registration.register(self, pipeline)
                pipeline.execute()
            self._suspended = bool(is_suspended(self.connection, self))
        except redis.RedisError:
            self._suspended = False

    def subscribe(self) -> None:
        """Listen to RQ's commands: of those only `shutdown` is obeyed."""
        super().subscribe()

    def request_stop_execution(self, execution_id: str) -> None:
        log.info("rq_stop_ignored", execution_id=execution_id, instead="POST /jobs/{id}/cancel")

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        log.info("rq_kill_ignored")

    # Waiting

    def _wait_for_bell(self) -> None:
        while not self._stopping.is_set():
            self._listening.wait()
            self._listening.clear()
            try:
                rung = self.lanes.wait(self._queue_names, 5.0)
            except LanesUnavailable:
                self._stopping.wait(self.settings.poll_seconds)
                continue
            if rung:
                self._rung.set()
                self._wake()
            else:
                self._listening.set()

    def _wait_for_wishes(self) -> None:
        listen(self.settings.redis_url, WISHES_CHANNEL, lambda _: self._beats.now(), stopping=self._stopping)

    # The lease

    def _start_lease(self) -> None:
        self.worker_id = new_id()
        self._lost = False
        self._holder = Holder(self.worker_id, self.job_types, self.settings.crash_limit, self._rng)
        leases.register(self.database, worker_id=self.worker_id, name=self.name, lanes=self.lane_names)
        self._beats = Beats(
            self.settings,
            worker_id=self.worker_id,
            held=lambda: [*self._held, *self._claiming],
            clock=self._clock,
            wished=self._hear_wishes,
            lost=self._lose_lease,
        )
        self._beats.start()

    def _hear_wishes(self, wishes: list[Wish]) -> None:
        self._wishes.extend(wishes)
        self._wake()

    def _lose_lease(self) -> None:
        self._lost = True
        self._wake()

    def _start_anew(self) -> None:
        """The lease is lost: others may run these jobs now. Stop all of it, come back as somebody else."""
        for child in self._children.values():
            if child.jobs:
                child.kill("lost")
            child.jobs.clear()
        for pending in (self._held, self._ready, self._ended, self._news):
            pending.clear()
        self._beats.stop()
        log.warning("lease_lost", worker_id=self.worker_id)
        try:
            self._start_lease()
        except (sa.exc.DBAPIError, sa.exc.TimeoutError):
            self._lost = True
            self._stopping.wait(DATABASE_PAUSE_SECONDS)

    def _drain(self, now: float) -> None:
        """After SIGTERM: give back what has not started, wait for the rest, then release that too."""
        if not self._stop_at:
            self._stop_at = now + self.settings.drain_seconds
            log.info("worker_draining", held=len(self._held), seconds=self.settings.drain_seconds)
        if self._ready:
            self._ended += [(job, Unfinished()) for job in self._ready]
            self._ready.clear()
        if now >= self._stop_at or self._signals > 1:
            for child in self._children.values():
                if child.jobs and not child.doomed:
                    child.kill("drain")


def _how(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"killed by signal {number} ({signal.Signals(number).name})"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"
