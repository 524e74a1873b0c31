"""The worker as RQ's tools see it, and what they may ask of it.

`rq info`, `SMEMBERS rq:workers` and rq-dashboard show the worker with its lanes, state and jobs; `rq
suspend` and RQ's `shutdown` command are obeyed. All of it is a mirror, written after the fact, best effort:
nothing here changes what becomes of a job.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Sequence

import redis
from rq import worker_registration
from rq.suspension import is_suspended
from rq.utils import now as rq_now
from rq.worker import BaseWorker

from laneway.domain.states import JobStatus
from laneway.engine.exchange import Settled
from laneway.engine.outcomes import Claimed
from laneway.lanes.backend import Due, EndedRun, Lack, LaneBackend, LanesUnavailable, by_tenant
from laneway.lanes.rq_lanes import connect
from laneway.log import get_logger

SHOW_SECONDS = 1.0
SHOWN_FOR_SECONDS = 15.0  # a running job, after the last sign of life

log = get_logger("worker")


class RqFace(BaseWorker):
    """An RQ worker to look at, and nothing that works: its loop and its horses are never started."""

    def __init__(self, redis_url: str, *, lane_names: Sequence[str], lanes: LaneBackend) -> None:
        host = socket.gethostname()
        super().__init__(
            list(lane_names),
            name=f"{host}-{os.getpid()}-{secrets.token_hex(3)}",
            connection=connect(redis_url),
            prepare_for_work=False,  # Redis may be away
        )
        self.hostname, self.pid = host, os.getpid()
        self.birth_date = rq_now()
        self.suspended = False
        self._lanes = lanes

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        return connection  # RQ would have it wait 415 s for a reply

    def show(self, *, busy: bool) -> None:
        """Keep the worker's keys alive, also after Redis forgot them; learn of `rq suspend`."""
        self.last_heartbeat = rq_now()
        try:
            self.suspended = bool(is_suspended(self.connection))
            state = "suspended" if self.suspended else "busy" if busy else "idle"
            with self.connection.pipeline(transaction=False) as pipeline:
                pipeline.hset(self.key, mapping=self.serialize() | {"state": state})
                pipeline.expire(self.key, self.worker_ttl + 60)
                worker_registration.register(self, pipeline)
                pipeline.execute()
        except redis.RedisError:
            self.suspended = False

    def vanish(self) -> None:
        """Take the worker's keys away."""
        try:
            self.register_death()  # type: ignore[no-untyped-call]
        except redis.RedisError:
            pass  # they expire
        self.connection.close()

    def wants_shutdown(self, message: str) -> bool:
        """Whether this message on `pubsub_channel_name` is RQ's command to shut down.

        The commands that stop a job are ignored: that is asked of Laneway, which keeps the record.
        """
        try:
            command = json.loads(message)["command"]
        except (ValueError, KeyError, TypeError):
            return False
        if command != "shutdown":
            log.info("rq_command_ignored", command=str(command)[:50], instead="POST /jobs/{id}/cancel")
        return bool(command == "shutdown")

    # Jobs

    def mirror_running(self, jobs: Sequence[Claimed]) -> None:
        """Show these jobs as running."""
        try:
            self._lanes.mirror_running(
                [(job.lane, job.job_id) for job in jobs],
                worker_name=self.name,
                lease_seconds=SHOWN_FOR_SECONDS,
            )
        except LanesUnavailable:
            pass  # it is a mirror

    def mirror_ended(self, settled: Sequence[Settled]) -> None:
        """Show that these runs are over, and put jobs that were given back at the head of their lanes."""
        runs = [EndedRun(s.job.lane, s.job.job_id, s.status, due_at=s.next_retry_at) for s in settled]
        try:
            self._lanes.mirror_ended(runs, worker_name=self.name)
            self._give_back(
                [
                    Due(s.job.lane, s.job.job_id, s.job.tenant_id)
                    for s in settled
                    if s.status is JobStatus.QUEUED
                ]
            )
        except LanesUnavailable:
            pass  # the reconciler repairs the lanes, expiry the mirror

    def _give_back(self, released: Sequence[Due]) -> None:
        lacks: dict[str, dict[str, list[str]]] = {}
        for (lane, tenant_id), job_ids in by_tenant(sorted(released)).items():  # ids sort by age
            lacks.setdefault(lane, {})[tenant_id] = job_ids
        for lane, of_tenants in lacks.items():
            backlog = self._lanes.backlog(lane)
            self._lanes.refill(
                lane,
                [Lack(t, ids, (), complete=t not in backlog.tenants) for t, ids in of_tenants.items()],
                refusals_seen=backlog.refusals,
            )
