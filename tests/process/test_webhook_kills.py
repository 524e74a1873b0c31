"""SIGKILL of couriers and workers. The whole run is `python -m process.webhook_kills`."""

from process.stack import Stack
from process.webhook_kills import kill


def test_no_end_is_lost_and_none_is_told_under_two_ids_whoever_is_killed(stack: Stack) -> None:
    report = kill(stack, count=150, kills=16, seed=1)
    assert min(report.kills["courier"], report.kills["worker"]) > 0
    assert report.ended >= 150
    assert (report.lost, report.strange) == ([], []), report
