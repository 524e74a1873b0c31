"""How long the machine runs, from which seed, and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.stateful import run_state_machine_as_test

from laneway.db import Database
from model.machine import Conformance
from model.pure import World

EXAMPLE_STEPS = 80


@dataclass(slots=True)
class Count:
    """Steps, and the events that came of them by action. `stepped` is called after each step."""

    steps: int = 0
    events: Counter[str] = field(default_factory=Counter)
    stepped: Callable[[], None] = lambda: None


def run_machine(
    database: Database, *, number: int, examples: int, shrink: bool = True, count: Count | None = None
) -> None:
    """`examples` lives of up to EXAMPLE_STEPS steps from seed `number`. Raises the first divergence.

    The store is emptied first and again for each life.
    """
    counted = count or Count()

    class Counted(Conformance):
        def _stepped(self) -> None:
            counted.steps += 1
            counted.stepped()

        def _lived(self, world: World) -> None:
            counted.events.update(e["action"] for told in world.events.values() for e in told)

    Counted.database = database
    with pytest.MonkeyPatch.context() as patch:
        # Else it draws constants from whatever modules are loaded, and a seed means something else each time.
        patch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_a, **_k: None)
        run_state_machine_as_test(
            seed(number)(Counted),
            settings=settings(
                max_examples=examples,
                stateful_step_count=EXAMPLE_STEPS,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            ),
        )
