"""Which job types get a process a job, and how their jobs are dealt."""

from __future__ import annotations

import os
from contextlib import closing

import pytest

from laneway import background_job
from laneway.domain.retry import RetryPolicy
from laneway.engine import registry as registry_module
from laneway.engine.outcomes import Claimed
from laneway.engine.registry import Isolation, Registry, register_job_function
from laneway.sdk.memory import MemoryBackend
from laneway.settings import Settings
from laneway.worker.dealing import ROUND_JOBS, Dealer


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of the test's own in the place of the process's."""
    registry_module.load(())
    fresh = Registry()
    monkeypatch.setattr(registry_module, "registry", fresh)
    return fresh


def pid() -> int:
    return os.getpid()


def job(number: int, job_type: str) -> Claimed:
    return Claimed(str(number), 1, f"token {number}", "t", "normal", job_type, "{}", 60, 0, 0, RetryPolicy())


def test_a_type_says_whether_its_jobs_get_a_process_each(registry: Registry) -> None:
    background_job("t.shared")(pid)
    background_job("t.apart", isolation="fork")(pid)
    register_job_function("t.plain", pid)
    register_job_function("t.plain_apart", pid, isolation="fork")
    assert [known.isolation for known in registry] == [
        Isolation.FORK,
        Isolation.CHILD,
        Isolation.FORK,
        Isolation.CHILD,
    ]
    assert registry.forked == ("t.apart", "t.plain_apart")


def test_an_isolation_that_is_none_is_refused_when_the_module_is_imported(registry: Registry) -> None:
    with pytest.raises(ValueError, match="thread"):
        background_job(isolation="thread")(pid)
    with pytest.raises(ValueError, match="thread"):
        register_job_function("t.plain", pid, isolation="thread")


def test_in_the_memory_backend_it_runs_where_the_others_run(registry: Registry) -> None:
    register_job_function("t.apart", pid, isolation="fork")
    with closing(MemoryBackend(Settings())) as backend:
        [made] = backend.enqueue([{"job_type": "t.apart"}])
        backend.run_all()
        assert backend.get(made["id"])["result"] == os.getpid()


def test_a_job_that_gets_a_process_shares_no_round() -> None:
    dealer = Dealer(alone=["apart"])
    for _ in range(100):
        dealer.learn("short", 0.0001)
        dealer.learn("apart", 0.0001)
    names = ["short", "short", "apart", "apart", "short", "short", "apart"]
    dealer.add([job(number, name) for number, name in enumerate(names)], now=0.0)
    rounds = []
    while dealer.hand_back_at is not None:
        [dealt] = dealer.deal(1)
        rounds.append([each.job_type for each in dealt])
    assert rounds == [["short", "short"], ["apart"], ["apart"], ["short", "short"], ["apart"]]


def test_of_jobs_that_get_a_process_only_as_many_are_taken_as_can_start() -> None:
    dealer = Dealer(alone=["apart"])
    for _ in range(100):
        dealer.learn("short", 0.0001)
    assert dealer.room(2) == 2 * ROUND_JOBS
    dealer.learn("apart", 0.0001)
    assert dealer.room(2) == 2
