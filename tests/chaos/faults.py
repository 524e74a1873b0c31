"""What goes wrong, and how it is made good again: one generator a fault, `yield` between the two.

All run in the harness's main thread, one after the other or overlapping; none blocks for long. A fault
yields a few words on what it hit, for the history.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import redis

from chaos.failpoints import PLACES, Strike
from chaos.ground import Ground, Member
from chaos.plan import STRUCK, PlannedFault
from laneway.clock import new_id
from laneway.domain.spec import lanes_of
from laneway.lanes.rq_lanes import queue_key
from servers import wait_until
from webhook_receiver import Receiver

Fault = Callable[["Scene", PlannedFault], Iterator[str]]
MENU: dict[str, Fault] = {}
CLOCK_STEP_SECONDS = 10
LURES = {
    # What is done besides, so that somebody comes by a place that is seldom passed.
    "reap.between": (("worker", signal.SIGKILL),),
    "reap.before_push": (("worker", signal.SIGKILL),),
    "drain.before_leave": (("worker", signal.SIGTERM),),
}


class Scene:
    """What faults reach: the ground, and the receiver that can be told to misbehave."""

    def __init__(self, ground: Ground, receiver: Receiver, misbehaviours: list[Any]) -> None:
        self.ground = ground
        self.receiver = receiver
        self.misbehaviours = misbehaviours

    def member(self, role: str, fault: PlannedFault) -> Member:
        members = self.ground.of_role(role)
        return members[fault.pick % len(members)]


def _fault(function: Fault) -> Fault:
    MENU[function.__name__] = function
    return function


# Processes


def _kill(*pids: int | None, how: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, how)


def _killed(role: str) -> Fault:
    def kill(scene: Scene, fault: PlannedFault) -> Iterator[str]:
        member = scene.member(role, fault)
        _kill(member.pid)
        yield member.name

    kill.__name__ = f"{role}_killed"
    return _fault(kill)


def _frozen(role: str, name: str) -> Fault:
    def freeze(scene: Scene, fault: PlannedFault) -> Iterator[str]:
        member = scene.member(role, fault)
        pids = [member.pid]
        if role == "worker":
            pids += [*scene.ground.children(member), scene.ground.nursery(member) or 0]
        _kill(*pids, how=signal.SIGSTOP)
        yield f"{member.name}, {len(pids)} processes"
        _kill(*pids, how=signal.SIGCONT)

    freeze.__name__ = name
    return _fault(freeze)


for _role in ("worker", "api", "scheduler", "courier"):
    _killed(_role)
_frozen("worker", "worker_frozen_briefly")
_frozen("worker", "worker_frozen")
_frozen("scheduler", "scheduler_frozen")
_frozen("courier", "courier_frozen")


@_fault
def nursery_killed(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """The process that forks the children; its worker has to leave."""
    member = scene.member("worker", fault)
    _kill(scene.ground.nursery(member))
    yield member.name


@_fault
def child_killed(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """As the out-of-memory killer does: one that is running a handler.

    Killed with a job that it has not looked at yet, it would have that job blamed, which nobody could tell
    from a job that kills at once; the ledger could, and the checker would call it a false blame.
    """
    victim = wait_until(lambda: _running_child(scene.ground), what="a handler runs", seconds=2)
    _kill(victim)
    yield f"child {victim}"


def _running_child(ground: Ground) -> int | None:
    children = [pid for member in ground.of_role("worker") for pid in ground.children(member)]
    return next((pid for pid in children if _runs_handler(ground.history_folder, pid)), None)


def _runs_handler(history: Path, pid: int) -> bool:
    lines = [path.read_bytes().splitlines()[-1:] for path in history.glob(f"ledger-{pid}-*.jsonl")]
    return any(b'"ph":"invoke"' in line for last in lines for line in last)


@_fault
def worker_parent_frozen(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """Past its lease, while its children work on: their endings come from a dead worker."""
    member = scene.member("worker", fault)
    _kill(member.pid, how=signal.SIGSTOP)
    yield member.name
    _kill(member.pid, how=signal.SIGCONT)


@_fault
def child_frozen(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """Its worker beats on: nothing may be taken away."""
    member = scene.member("worker", fault)
    children = scene.ground.children(member)
    _kill(*children[:1], how=signal.SIGSTOP)
    yield f"{member.name}, child {children[:1]}"
    _kill(*children[:1], how=signal.SIGCONT)


def _strike(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """A process dies, stops or dawdles at a failpoint, if one gets there in time."""
    order, board = new_id(), scene.ground.board
    seconds = fault.seconds if Strike(fault.strike) is Strike.PAUSE else 0.0
    board.arm(fault.place, Strike(fault.strike), order=order, pass_number=fault.pick, seconds=seconds)
    for role, how in LURES.get(fault.place, ()):
        scene.member(role, fault).send(how)
    yield f"{fault.strike} at {fault.place}, pass {fault.pick}"
    board.disarm(fault.place)
    struck = board.struck(order)
    scene.ground.history.note("struck", place=fault.place, strike=fault.strike, pid=struck)
    _kill(struck if fault.strike == Strike.STOP else None, how=signal.SIGCONT)


MENU[STRUCK] = _strike


@_fault
def rolling_deploy(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """SIGTERM for one process after the other; each is back before the next goes."""
    members = list(scene.ground.members)

    def roll() -> None:
        for member in members:
            starts = member.starts
            member.send(signal.SIGTERM)
            for _ in range(200):
                if member.starts > starts:
                    break
                threading.Event().wait(0.1)

    deploy = threading.Thread(target=roll, name="deploy", daemon=True)
    deploy.start()
    yield f"{len(members)} processes"
    deploy.join(60)


# Redis


@_fault
def redis_killed(scene: Scene, _: PlannedFault) -> Iterator[str]:
    scene.ground.redis.kill()
    yield "SIGKILL"
    scene.ground.servers_up()


@_fault
def redis_frozen(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """Connections open, no answer."""
    pid = scene.ground.redis.pid
    _kill(pid, how=signal.SIGSTOP)
    yield "SIGSTOP"
    _kill(pid, how=signal.SIGCONT)


@_fault
def redis_flushed(scene: Scene, _: PlannedFault) -> Iterator[str]:
    with scene.ground.redis_client() as client:
        size = client.dbsize()
        client.flushall()
    yield f"FLUSHALL of {size} keys"


@_fault
def redis_rolled_back(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """Its append-only file loses its end: stale ids come back, new ones are gone."""
    server = scene.ground.redis
    server.kill()
    files = sorted((server.folder).glob("appendonly*/*.incr.aof")) or sorted(server.folder.glob("*.aof"))
    cut = 0
    if files:
        size = files[-1].stat().st_size
        cut = min(size, 2000 + fault.pick % 60_000)
        os.truncate(files[-1], size - cut)
    yield f"{cut} bytes of its file"
    scene.ground.servers_up()


@_fault
def redis_out_of_memory(scene: Scene, _: PlannedFault) -> Iterator[str]:
    with scene.ground.redis_client() as client:
        client.config_set("maxmemory", 1)
    yield "maxmemory 1, noeviction"
    with suppress(redis.RedisError), scene.ground.redis_client() as client:
        client.config_set("maxmemory", 0)


@_fault
def redis_disk_full(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """It cannot append to its file."""
    scene.ground.redis.limit_files(4096)
    yield "RLIMIT_FSIZE 4096"
    if scene.ground.redis.alive():
        scene.ground.redis.limit_files(-1)
    scene.ground.servers_up()


@_fault
def ids_doubled(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """Every lane holds its ids once more, with ids of jobs that ended, and with nonsense."""
    ground = scene.ground
    with ground.database.read() as connection:
        ended = "SELECT id FROM jobs WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 50"
        stale = [str(row[0]) for row in connection.exec_driver_sql(ended)]
    with ground.redis_client() as client:
        for lane in lanes_of(("default", "mail")):
            ids = client.lrange(queue_key(lane), 0, -1)
            client.lpush(queue_key(lane), *ids, *stale, "nonsense", new_id())
    yield f"{len(stale)} stale ids in each lane"


# PostgreSQL


def _admin(scene: Scene) -> psycopg.Connection[Any]:
    assert scene.ground.postgres is not None
    return scene.ground.postgres.connect(scene.ground.url)


@_fault
def postgres_killed(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """`pg_ctl stop -m immediate`: it recovers from its log at the next start."""
    server = scene.ground.postgres
    assert server is not None
    server.kill()
    outage = scene.ground.history.invoke("outage", what="database")
    yield "immediate stop"
    outage.ok(what="database")
    scene.ground.servers_up()


@_fault
def backends_terminated(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """All of Laneway's, or every other one."""
    every = 1 + fault.pick % 2
    with _admin(scene) as connection:
        killed = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'laneway' AND pid %% %s = 0",
            (every,),
        ).rowcount
    yield f"{killed} backends"


@_fault
def postgres_read_only(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """As after a failover to a standby that was not promoted."""
    with _admin(scene) as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
    yield "default_transaction_read_only"
    _end_read_only(scene)


def _end_read_only(scene: Scene) -> None:
    with _admin(scene) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")


@_fault
def connections_exhausted(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """Somebody else has all the connections, and Laneway's were cut."""
    held: list[psycopg.Connection[Any]] = []
    with suppress(psycopg.OperationalError):
        while len(held) < 300:
            held.append(_admin(scene))
    if held:
        held[0].execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'laneway'"
        )
        with suppress(psycopg.OperationalError):
            while len(held) < 300:
                held.append(_admin(scene))
    yield f"{len(held)} connections held"
    for connection in held:
        connection.close()


@_fault
def table_locked(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """A migration that should not have been one."""
    connection = _admin(scene)
    connection.autocommit = False
    with suppress(psycopg.Error):
        connection.execute("SET lock_timeout = '2s'")
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
    yield "ACCESS EXCLUSIVE on jobs"
    connection.close()


@_fault
def postgres_disk_full(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """No file of the server may grow, or be written past its first megabyte."""
    server = scene.ground.postgres
    assert server is not None
    server.limit_files(1 << 20)
    yield "RLIMIT_FSIZE 1 MiB"
    if server.alive():
        server.limit_files(-1)
    scene.ground.servers_up()


@_fault
def postgres_clock_wrong(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """An hour ahead, or behind. Without libfaketime nothing happens, which the history says."""
    server = scene.ground.postgres
    assert server is not None
    seconds = 3600 if fault.pick % 2 else -3600
    if server.has_clock:
        server.set_clock(seconds)
    yield f"{seconds:+d} s" if server.has_clock else "left out: libfaketime is not installed"
    if server.has_clock:
        server.set_clock(0)


# Networks


def _network(name: str, order: Callable[[Any, PlannedFault], None], *proxies: str) -> Fault:
    def disturb(scene: Scene, fault: PlannedFault) -> Iterator[str]:
        names = proxies or tuple(scene.ground.proxies)
        proxy = names[fault.pick % len(names)]
        order(scene.ground.proxies[proxy], fault)
        yield proxy
        scene.ground.proxies[proxy].heal()

    disturb.__name__ = name
    return _fault(disturb)


_network("network_slow", lambda proxy, fault: proxy.delay(0.02 + fault.pick % 200 / 1000))
_network("network_thin", lambda proxy, fault: proxy.slow(20_000 + fault.pick % 100_000))
_network("network_silent", lambda proxy, _: proxy.blackhole())
_network("network_reset", lambda proxy, _: proxy.reset())
_network("network_refused", lambda proxy, _: proxy.refuse())
_network("workers_cut_off", lambda proxy, _: proxy.refuse(), "worker-pg")
_network("replies_cut", lambda proxy, fault: proxy.cut(after_bytes=fault.pick % 4000))


@_fault
def reply_lost(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """Committed, and nobody hears of it: once, or for as long as it lasts.

    Some transactions end with COMMIT, others are a single prepared statement.
    """
    name = ("worker-pg", "api-pg", "upkeep-pg")[fault.pick % 3]
    request = b"_pg3_" if name == "api-pg" or fault.pick // 6 % 2 else b"COMMIT"
    proxy = scene.ground.proxies[name]
    before = proxy.lost
    times = fault.pick % 2
    proxy.lose_reply(to=request, times=times)
    yield f"{name}, {'once' if times else 'each time'}"
    scene.ground.history.note("lost", replies=proxy.lost - before)
    proxy.heal()


@_fault
def claims_unheard(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """Workers claim and never learn what: connections are new, so that each claim is sent as text."""
    proxy = scene.ground.proxies["worker-pg"]
    before = proxy.lost
    proxy.reset()
    proxy.lose_reply(to=b"SET status = 'running'")
    yield "worker-pg"
    scene.ground.history.note("lost", replies=proxy.lost - before)
    proxy.heal()


# Clocks, receivers, SQLite


@_fault
def clock_wrong(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    """One process is ahead of the others, or behind: what it says falls due does so early or late."""
    members = scene.ground.members
    member = members[fault.pick % len(members)]
    seconds = CLOCK_STEP_SECONDS if fault.pick % 2 else -CLOCK_STEP_SECONDS
    member.clock.write_text(str(seconds))
    yield f"{member.name} {seconds:+d} s"
    member.clock.unlink(missing_ok=True)


@_fault
def receiver_misbehaves(scene: Scene, fault: PlannedFault) -> Iterator[str]:
    well_behaved = scene.receiver.mode
    mode = scene.misbehaviours[fault.pick % len(scene.misbehaviours)]
    scene.receiver.mode = mode
    yield mode.__name__
    scene.receiver.mode = well_behaved
    hanging, scene.receiver.let_go = scene.receiver.let_go, threading.Event()
    hanging.set()


@_fault
def reader_holds_snapshot(scene: Scene, _: PlannedFault) -> Iterator[str]:
    """A reader that does not end: the write-ahead log cannot be folded back meanwhile."""
    reading = scene.ground.database.engine.connect()
    reading.exec_driver_sql("SELECT count(*) FROM jobs").scalar()
    yield "one SELECT left open"
    reading.close()


def heal_everything(scene: Scene) -> None:
    """Undo whatever a fault could not undo by itself. Raises what keeps a server from coming back."""
    ground = scene.ground
    for proxy in ground.proxies.values():
        proxy.heal()
    for member in ground.members:
        member.clock.unlink(missing_ok=True)
    for place in PLACES:
        ground.board.disarm(place)
    _kill(*ground.pids(), ground.redis.pid, how=signal.SIGCONT)
    ground.servers_up()
    with ground.redis_client() as client:
        client.config_set("maxmemory", 0)
    if ground.postgres is not None:
        ground.postgres.set_clock(0)
        _end_read_only(scene)
