"""A seed under faults on each store: `make chaos` runs more of them, `make soak` all."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import plan
from chaos.run import run


@pytest.mark.timeout(240)
@pytest.mark.xdist_group("chaos")
@pytest.mark.parametrize("store", ["pg", "sqlite"])
def test_nothing_acknowledged_is_lost_under_faults(tmp_path: Path, store: str) -> None:
    planned = plan.make(1, store=store, seconds=20, jobs_per_second=8, faults=4)
    result = run(planned, tmp_path / "run")
    assert result.violations == [], result.timelines
    assert result.complaints == []
    assert result.faults
