"""No window ever holds more than its quota: a short storm here, a million events with `-m limits_storm`."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from laneway.limits import redis_windows
from laneway.limits.decision import Charge
from laneway.limits.local import LocalWindows
from limits_storm import Script, Twin, storm

EVENTS = 20_000


@pytest.mark.parametrize("seed", [1, 2])
def test_in_a_storm_script_and_twin_let_the_same_pass_and_no_window_overflows(
    redis_url: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_windows, "TIMEOUT_SECONDS", 60.0)
    told = storm(Twin(LocalWindows()), events=EVENTS, seed=seed)
    with asyncio.Runner() as runner:
        script = Script(redis_url, runner)
        assert storm(script, events=EVENTS, seed=seed) == told
        script.close()
    assert all(told[what] >= 50 for what in ("admitted", "refused", "full", "given back")), told


class RoundsDown(LocalWindows):
    """Stamps at the beginning of their grain: units leave up to a grain early."""

    def _spend(self, charge: Charge, log: array[int], first: int, *, used: int, now_us: int) -> None:
        grain = charge.rule.grain_us
        super()._spend(charge, log, first, used=used, now_us=now_us // grain * grain)


class ForgetsTooSoon(LocalWindows):
    """A unit is free a microsecond before its window ends."""

    def hit(self, charges: object, *, now_us: int, spend: bool = True) -> list[int]:
        return super().hit(charges, now_us=now_us + (now_us % 2), spend=spend)  # type: ignore[arg-type]


class ReturnsOthers(LocalWindows):
    """What is given back comes out of the newest record, whosever it is."""

    def give_back(self, charge: Charge, *, spent_us: int, now_us: int) -> bool:
        log = self._logs.get(charge.key)
        if log is None or log[-1] < charge.cost:
            return False
        log[0] -= charge.cost
        log[-1] -= charge.cost
        return True


@pytest.mark.parametrize("broken", [RoundsDown, ForgetsTooSoon, ReturnsOthers])
def test_the_storm_finds_a_window_that_holds_too_much(broken: type[LocalWindows]) -> None:
    with pytest.raises(AssertionError, match=r"of Rule\("):
        storm(Twin(broken()), events=EVENTS, seed=1)
