"""The table of legal transitions says what the documents say."""

from __future__ import annotations

import pytest

from laneway.domain.events import EVENT_OF
from laneway.domain.states import ACTIVE, FINAL, RULES, WAITING, Action, JobStatus
from laneway.engine.transitions import MOVES, HeldMove

S, A = JobStatus, Action

LEAVES_BY: dict[JobStatus, set[Action]] = {
    S.SCHEDULED: {A.ENQUEUE, A.CANCEL, A.EXPIRE},
    S.BLOCKED: {A.ENQUEUE, A.CANCEL, A.EXPIRE},
    S.QUEUED: {A.CLAIM, A.BLOCK, A.CANCEL, A.EXPIRE},
    S.RUNNING: {A.COMPLETE, A.BACK_OFF, A.FAIL, A.TIME_OUT, A.RELEASE, A.STOP},
    S.RETRYING: {A.ENQUEUE, A.CANCEL},
    S.COMPLETED: set(),
    S.FAILED: {A.RETRY, A.RETRY_LATER},
    S.TIMEOUT: {A.RETRY, A.RETRY_LATER},
    S.CANCELLED: {A.RETRY, A.RETRY_LATER},
    S.EXPIRED: {A.RETRY, A.RETRY_LATER},
}


@pytest.mark.parametrize("status", S)
def test_a_status_is_left_by_the_actions_that_the_architecture_names(status: JobStatus) -> None:
    forced = set() if status is S.COMPLETED else {A.FORCE_COMPLETE}
    assert {action for action, rule in RULES.items() if status in rule.sources} == LEAVES_BY[status] | forced


def test_every_action_has_one_rule_and_one_move() -> None:
    assert set(RULES) == set(Action)
    assert sorted(move.action for move in MOVES) == sorted(Action)


def test_every_status_is_waiting_or_running_or_final() -> None:
    assert {*WAITING, S.RUNNING} == ACTIVE
    assert set(S) == ACTIVE | FINAL
    assert not ACTIVE & FINAL


def test_every_status_can_be_reached_and_every_active_one_can_end() -> None:
    assert {rule.target for rule in RULES.values()} | {S.SCHEDULED, S.BLOCKED} == set(S)
    ends: set[JobStatus] = set(FINAL)
    while more := {s for r in RULES.values() if r.target in ends for s in r.sources} - ends:
        ends |= more
    assert ends == set(S)


def test_what_leaves_running_is_the_holders_alone_but_for_an_admins_force() -> None:
    for action, rule in RULES.items():
        if S.RUNNING in rule.sources and action is not A.FORCE_COMPLETE:
            assert rule.held
            assert rule.sources == {S.RUNNING}
        else:
            assert not rule.held


def test_a_move_names_the_lease_exactly_when_its_rule_is_the_holders() -> None:
    for move in MOVES:
        assert issubclass(move, HeldMove) == RULES[move.action].held


def test_every_end_is_an_event_that_a_webhook_can_hear() -> None:
    assert set(EVENT_OF) == FINAL | {JobStatus.RETRYING}
