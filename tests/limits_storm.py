"""A storm of random requests against the limiter, and a count of its own of what it let pass.

    PYTHONPATH=tests python -m limits_storm --events 1000000 --seed 7

No window, however it is placed, may ever hold more than its quota. The count shares nothing with the
limiter: exact moments, no records, no grain. Half of the storm's pauses are chosen to sit on the edges of
windows. Both the script in a real Redis and its twin in the process are put through it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from laneway.limits import redis_windows
from laneway.limits.decision import Charge
from laneway.limits.local import LocalWindows
from laneway.limits.redis_windows import RedisWindows, giving_back, spending
from laneway.limits.rules import Rule
from servers import RedisServer

SECOND = 1_000_000
START = 1_800_000_000 * SECOND
CHUNK = 200
CALLERS = 3
RULES = [  # none below a minute: keys expire by the clock of Redis, which goes on while this stalls
    Rule("a", 1, 60),
    Rule("b", 10, 60),
    Rule("c", 64, 60),
    Rule("d", 65, 60),
    Rule("e", 100, 60),
    Rule("f", 1000, 3600),
    Rule("g", 5000, 86_400),
    Rule("h", 7, 30 * 86_400),
]


@dataclass(frozen=True, slots=True)
class Ask:
    """Spend all of these at a moment, or none."""

    charges: tuple[Charge, ...]
    now_us: int


@dataclass(frozen=True, slots=True)
class Return:
    """Give back what one charge spent at `spent_us`."""

    charge: Charge
    spent_us: int
    now_us: int


Event = Ask | Return


class Limiter(Protocol):
    def answer(self, events: Sequence[Event]) -> list[bool]:
        """Of each event in turn, whether the limiter granted it."""


class Twin:
    """The window in this process."""

    def __init__(self, windows: LocalWindows) -> None:
        self._windows = windows

    def answer(self, events: Sequence[Event]) -> list[bool]:
        return [self._one(event) for event in events]

    def _one(self, event: Event) -> bool:
        if isinstance(event, Ask):
            return bool(self._windows.hit(event.charges, now_us=event.now_us)[0])
        return self._windows.give_back(event.charge, spent_us=event.spent_us, now_us=event.now_us)


class Script:
    """The scripts in a Redis."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self._windows = RedisWindows(url)
        self._runner = runner

    def answer(self, events: Sequence[Event]) -> list[bool]:
        calls = [
            spending(event.charges, now_us=event.now_us)
            if isinstance(event, Ask)
            else giving_back(event.charge, spent_us=event.spent_us, now_us=event.now_us)
            for event in events
        ]
        replies = self._runner.run(self._windows.run(calls))
        return [(reply[0] if isinstance(reply, list) else reply) == 1 for reply in replies]

    def close(self) -> None:
        self._runner.run(self._windows.close())


class Count:
    """What passed, by key: moments and units, as long as they are in the window."""

    def __init__(self) -> None:
        self._passed: dict[bytes, deque[tuple[int, int]]] = {}
        self._held: Counter[bytes] = Counter()

    def add(self, charge: Charge, now_us: int) -> int:
        """How many units the window that ends now holds, with these."""
        passed = self._passed.setdefault(charge.key, deque())
        while passed and passed[0][0] <= now_us - charge.rule.window_us:
            self._held[charge.key] -= passed.popleft()[1]
        passed.append((now_us, charge.cost))
        self._held[charge.key] += charge.cost
        return self._held[charge.key]

    def remove(self, charge: Charge, spent_us: int) -> None:
        passed = self._passed[charge.key]
        if (spent_us, charge.cost) in passed:
            passed.remove((spent_us, charge.cost))
            self._held[charge.key] -= charge.cost


def storm(limiter: Limiter, *, events: int, seed: int) -> Counter[str]:
    """What happened how often. Raises AssertionError for the first window that holds more than its quota."""
    rng = random.Random(seed)
    moments = _moments(rng)
    count, told = Count(), Counter[str]()
    returnable: deque[tuple[Charge, int]] = deque(maxlen=50)
    while told["events"] < events:
        chunk = [_event(rng, next(moments), returnable) for _ in range(min(CHUNK, events - told["events"]))]
        for event, granted in zip(chunk, limiter.answer(chunk), strict=True):
            told["events"] += 1
            if isinstance(event, Return):
                told["given back"] += granted
                if granted:
                    count.remove(event.charge, event.spent_us)
                continue
            told["admitted" if granted else "refused"] += 1
            for charge in event.charges if granted else ():
                held = count.add(charge, event.now_us)
                assert held <= charge.rule.quota, (
                    f"{held} of {charge.rule} at event {told['events']}, seed {seed}"
                )
                told["full"] += held == charge.rule.quota
                returnable.append((charge, event.now_us))
    return told


def _moments(rng: random.Random) -> Iterator[int]:
    """Moments that never go back: bursts, pauses, and what lies on the edges of windows."""
    now = START
    edges: deque[int] = deque(maxlen=20)
    while True:
        draw = rng.random()
        if draw < 0.3:
            pause = 0
        elif draw < 0.5:
            pause = rng.randrange(2 * SECOND)
        elif draw < 0.6:
            pause = rng.randrange(1000)
        else:
            rule = rng.choice(RULES[:-2] if rng.random() < 0.99 else RULES)
            pause = rule.window_us // rule.quota + rng.choice((-1, 0, 1))
            later = [edge + rule.window_us + rng.choice((-1, 0, 1)) for edge in edges]
            if rng.random() < 0.5 and (ahead := [moment for moment in later if moment > now]):
                pause = min(ahead) - now
        now += max(0, pause)
        edges.append(now)
        yield now


def _event(rng: random.Random, now_us: int, returnable: deque[tuple[Charge, int]]) -> Event:
    if returnable and rng.random() < 0.03:
        charge, spent_us = returnable.pop()
        return Return(charge, spent_us, now_us)
    charges = []
    for rule in rng.sample(RULES, rng.choice((1, 1, 2, 3))):
        cost = 1 if rng.random() < 0.7 else rng.randint(1, rule.quota)
        charges.append(Charge(f"{rule.name}:{rng.randrange(CALLERS)}".encode(), rule, cost))
    return Ask(tuple(charges), now_us)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m limits_storm", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    redis_windows.TIMEOUT_SECONDS = 60.0
    told = storm(Twin(LocalWindows()), events=options.events, seed=options.seed)
    print(f"twin: {dict(told)}")
    with RedisServer() as server, asyncio.Runner() as runner:
        script = Script(server.url, runner)
        of_script = storm(script, events=options.events, seed=options.seed)
        script.close()
    print(f"script: {dict(of_script)}")
    assert of_script == told, "the twin decided otherwise"


if __name__ == "__main__":
    main()
