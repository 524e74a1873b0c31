"""`make chaos`, `make soak`: break Laneway on purpose and prove that nothing acknowledged was lost.

Runs one seed after the other. The folder of a seed that failed is kept, with every log and the history;
what went wrong is printed, and the exit code is 1. A seed says everything that was decided: the same
options and the same seed are the same plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chaos import mutants, plan, report
from chaos.plan import Plan
from chaos.run import Result, run
from laneway.clock import SystemClock
from laneway.settings import PREFIX

RESULTS = Path("chaos-results")
GROWTH_PERCENT_PER_HOUR = 50.0  # of ten minutes; a leak that matters is far above


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing it started is left
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]  # a developer's own settings must not decide what is tested
    plans = _plans(options)
    if options.plan:
        print(json.dumps([each.as_json() for each in plans], indent=1))
        return 0
    folder = Path(options.folder or tempfile.mkdtemp(prefix="laneway-chaos-"))
    results = []
    with report.progress(sum(each.seconds for each in plans)) as advance:
        for n, each in enumerate(plans):
            judged = not each.faults and each.seconds >= plan.FLAT_SECONDS
            result = run(
                each,
                folder / f"{n}-{each.store}-{each.seed}",
                mutant=options.mutant,
                grown_percent_per_hour=GROWTH_PERCENT_PER_HOUR if judged else None,
            )
            results.append(result)
            report.tell(result)
            advance(each.seconds)
            if result.passed and not options.keep:
                shutil.rmtree(result.folder)
    return _finish(options, results, folder)


def _finish(options: argparse.Namespace, results: Sequence[Result], folder: Path) -> int:
    at = SystemClock().now()
    report.summary(results)
    if options.soak:
        for path in report.keep(results, RESULTS, at=at):
            print(path)
    if all(result.passed for result in results):
        if not options.keep:
            shutil.rmtree(folder)
        return 0
    return 1


def _plans(options: argparse.Namespace) -> list[Plan]:
    if options.soak:
        return plan.soak()
    if options.smoke:
        return plan.smoke()
    return [
        plan.make(
            seed,
            store=options.store,
            seconds=options.seconds,
            jobs_per_second=options.jobs_per_second,
            faults=options.faults,
            only=options.only,
        )
        for seed in options.seed
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="one run each (default: 1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load (default: 60)")
    parser.add_argument("--jobs-per-second", type=float, default=10.0, help="default: 10")
    parser.add_argument(
        "--faults", type=int, default=6, help="of the menu, and as many failpoints besides (default: 6)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=sorted(plan.FAULTS), default=(), metavar="FAULT", help="of the menu"
    )
    parser.add_argument("--store", choices=("pg", "sqlite"), default="pg")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), default="", help="break Laneway so")
    parser.add_argument("--plan", action="store_true", help="only print the plans, as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs that passed")
    parser.add_argument("--folder", help="where the folders go (default: a new one)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--smoke", action="store_true", help="the seeds of CI, within four minutes")
    several.add_argument("--soak", action="store_true", help="the seeds of a release, about an hour")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
