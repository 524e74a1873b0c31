"""Named places in Laneway where a fault can strike. The product knows nothing of them.

`install` wraps the functions named below, in the process it is called in. A place strikes when a file of
its name lies in `<folder>/armed`: the process that takes the file away first is the one that is struck, so
an order strikes once. What happened is left in `<folder>/struck`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "CHAOS_FAILPOINTS"


class Strike(StrEnum):
    """What befalls a process: SIGKILL, SIGSTOP (of the whole process), or a stop of this one thread."""

    KILL = "kill"
    STOP = "stop"
    PAUSE = "pause"


Applies = Callable[[Sequence[Any], Mapping[str, Any], Any], Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Before or after one call of `target` (`module:name` or `module:Class.name`).

    `applies` sees the call's arguments, by place and by name, and its result (None before the call).
    """

    name: str
    target: str
    after: bool = False
    applies: Applies = lambda _args, _named, _result: True
    strikes: tuple[Strike, ...] = tuple(Strike)


def _moves(*kinds: str) -> Applies:
    """Calls of `carry_out(connection, moves)` that carry a move of one of these classes."""
    return lambda args, _named, _result: any(type(move).__name__ in kinds for move in args[1])


IN_MAIN = (
    Place("api.before_commit", "laneway.engine.service:create"),
    Place("api.after_commit", "laneway.engine.service:JobService.create", after=True),
    Place("api.before_push", "laneway.engine.service:JobService.ring_new"),
    Place("api.after_push", "laneway.engine.service:JobService.ring_new", after=True),
    Place("cancel.after_commit", "laneway.engine.service:JobService._forget"),
    Place(
        "take.after_pop", "laneway.lanes.rq_lanes:RqLanes.take", after=True, applies=lambda _, __, ids: ids
    ),
    Place("claim.before_commit", "laneway.engine.exchange:carry_out", after=True, applies=_moves("Claim")),
    Place(
        "claim.after_commit", "laneway.worker.ledger:exchange", after=True, applies=lambda _, __, d: d.claimed
    ),
    Place("claim.after_deal", "laneway.worker.children:ChildProcess.send", after=True),
    Place(
        "settle.before_begin", "laneway.worker.ledger:exchange", applies=lambda _, named, __: named["ended"]
    ),
    Place(
        "settle.before_commit",
        "laneway.engine.exchange:carry_out",
        after=True,
        applies=_moves("Complete", "BackOff", "Fail", "TimeOut"),
    ),
    Place("follow.after", "laneway.engine.outcomes:follow", after=True),
    Place("slots.counted", "laneway.engine.concurrency:_look", after=True),
    Place(
        "settle.after_commit",
        "laneway.worker.ledger:exchange",
        after=True,
        applies=lambda _, __, d: d.settled,
    ),
    Place(
        "progress.before_commit", "laneway.engine.progress:save", after=True, applies=lambda a, _, __: a[1]
    ),
    Place("beat.before_commit", "laneway.engine.leases:beat"),
    Place("drain.before_leave", "laneway.engine.leases:leave"),
    Place("reap.between", "laneway.engine.reaper:Reaper._take_back"),
    Place(
        "reap.before_push", "laneway.engine.reaper:Reaper._take_back", after=True, applies=lambda _, __, r: r
    ),
    Place("promote.before_commit", "laneway.engine.upkeep:carry_out", after=True, applies=_moves("Enqueue")),
    Place(
        "promote.after_commit", "laneway.engine.upkeep:promote", after=True, applies=lambda _, __, ids: ids
    ),
    Place("reconcile.before_refill", "laneway.lanes.rq_lanes:RqLanes.refill"),
    Place("courier.before_send", "laneway.webhooks.sender:Sender.send"),
    Place("courier.before_record", "laneway.webhooks.deliveries:Deliveries._settle"),
    Place("courier.before_commit", "laneway.webhooks.deliveries:Deliveries._settle", after=True),
    Place("courier.after_commit", "laneway.webhooks.deliveries:Deliveries.turn", after=True),
)
IN_CHILDREN = (
    # Not killed here: the job would rightly be blamed, and the ledger would not know that it had begun.
    Place("child.before_run", "laneway.worker.child:Child._run", strikes=(Strike.STOP, Strike.PAUSE)),
    Place("child.after_run", "laneway.engine.running:Runner.run", after=True),
    Place("child.after_report", "laneway.worker.child:Child._run", after=True),
)
PLACES = {place.name: place for place in (*IN_MAIN, *IN_CHILDREN)}


def find(target: str) -> tuple[Any, str]:
    """The object that holds `module:name` or `module:Class.name`, and the last name."""
    module, _, path = target.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for each in outer:
        holder = getattr(holder, each)
    return holder, name


def install(places: Sequence[Place], folder: Path) -> None:
    """Wrap the targets of `places`. Raises AttributeError for one that Laneway no longer has."""
    for place in places:
        holder, name = find(place.target)
        setattr(holder, name, _wrapped(getattr(holder, name), place, folder))


def _wrapped(function: Callable[..., Any], place: Place, folder: Path) -> Callable[..., Any]:
    armed = folder / "armed" / place.name
    passed: dict[str, int] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not place.after and armed.exists() and place.applies(args, kwargs, None):
            _pass(armed, folder, passed)
        result = function(*args, **kwargs)
        if place.after and armed.exists() and place.applies(args, kwargs, result):
            _pass(armed, folder, passed)
        return result

    return call


def _pass(armed: Path, folder: Path, passed: dict[str, int]) -> None:
    try:
        order = json.loads(armed.read_text())
        passed[order["id"]] = passed.get(order["id"], 0) + 1
        if passed[order["id"]] < order["pass_number"]:
            return
        mine = folder / "struck" / f"{order['id']}-{os.getpid()}"
        armed.rename(mine)
    except FileNotFoundError:
        return  # another process was first, or the order was withdrawn
    match Strike(order["strike"]):
        case Strike.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Strike.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Strike.PAUSE:
            threading.Event().wait(order["seconds"])


class Board:
    """The harness's side: arms places, withdraws orders, says which process was struck."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("armed", "struck"):
            (folder / name).mkdir(parents=True)

    def arm(
        self, place: str, strike: Strike, *, order: str, pass_number: int = 1, seconds: float = 0
    ) -> None:
        """Strike the process that passes `place` for the `pass_number`th time from now on.

        `order` is an id of the caller's. `seconds` is how long a PAUSE lasts.
        """
        draft = self.folder / f"draft-{order}"
        said = {"id": order, "strike": strike.value, "pass_number": pass_number, "seconds": seconds}
        draft.write_text(json.dumps(said))
        draft.rename(self.folder / "armed" / PLACES[place].name)

    def disarm(self, place: str) -> None:
        (self.folder / "armed" / place).unlink(missing_ok=True)

    def struck(self, order: str) -> int | None:
        """The process that was struck by `order`, once there is one."""
        for path in (self.folder / "struck").glob(f"{order}-*"):
            return int(path.name.rpartition("-")[2])
        return None
