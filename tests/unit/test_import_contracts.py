"""Imports point one way (pyproject.toml, [tool.importlinter]); and the checker would notice if not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(project: Path) -> tuple[int, str]:
    """Exit code and report of import-linter on the `backend` and the `pyproject.toml` in `project`."""
    ran = subprocess.run(  # noqa: PLW1510 - its exit code is the answer
        [sys.executable, "-c", LINT],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project / "backend"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's source, in a place where it may be spoiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "backend", tmp_path / "backend", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept() -> None:
    code, report = lint(ROOT)
    assert code == 0, report
    assert "0 broken" in report


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("laneway/domain/retry.py", "import laneway.db", "Work flows one way"),
        ("laneway/webhooks/signing.py", "import laneway.engine.service", "Work flows one way"),
        ("laneway/domain/retry.py", "import sqlalchemy", "The domain is pure"),
        ("laneway/engine/queries.py", "import rq", "RQ is known in two places"),
        ("laneway/engine/queries.py", "import fastapi", "Importing the library loads no server"),
        (
            "laneway/webhooks/signing.py",
            "import laneway.engine.transitions",
            "Only the engine changes a job's status",
        ),
        ("laneway/handlers/demo.py", "import feedback_summaries", "The service does not know the example"),
    ],
)
def test_a_planted_violation_is_caught(copy: Path, module: str, line: str, contract: str) -> None:
    spoiled = copy / "backend" / module
    spoiled.write_text(spoiled.read_text() + f"\n\ndef planted() -> None:\n    {line}\n")
    code, report = lint(copy)
    assert code != 0
    assert [
        row for row in report.splitlines() if row.startswith(contract) and row.rstrip().endswith("BROKEN")
    ], report


def test_a_module_that_has_chosen_no_layer_is_caught(copy: Path) -> None:
    (copy / "backend" / "laneway" / "misc.py").write_text("")
    code, report = lint(copy)
    assert code != 0
    assert "misc" in report
