"""Every move does what the table of transitions says, on both stores, also when many want the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    OTHER_TENANT,
    TENANT,
    WORKER,
    add_job,
    at_once,
    change,
    events_of,
    hold_of,
    job_row,
    new_job,
    rows_of,
    status_of,
)
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import ACTIVE, FINAL, RULES, Action, JobStatus
from laneway.engine import transitions
from laneway.engine.group_commit import commit_each
from laneway.engine.transitions import (
    MOVES,
    Applied,
    BackOff,
    Block,
    Cancel,
    Claim,
    Complete,
    Enqueue,
    Expire,
    Fail,
    ForceComplete,
    HeldMove,
    Move,
    NewJob,
    Outcome,
    Refused,
    Release,
    Retry,
    RetryLater,
    Stop,
    TimeOut,
    apply,
    create,
)
from laneway.errors import StorageUnavailable
from servers import wait_until

LATER = NOW + timedelta(seconds=1, microseconds=7)
ERROR = '{"type":"E","message":"m"}'
LET_GO = {"lease_token": None, "worker_id": None}
HELD = [action for action in Action if RULES[action].held]


def make(database: Database, moves: Sequence[Move], job_types: Sequence[str] | None = None) -> list[Outcome]:
    with database.write() as connection:
        return apply(connection, moves, now=LATER, actor="tester", job_types=job_types)


def claim(job_id: str) -> Claim:
    return Claim(job_id, new_id(), WORKER, LATER)


def move_of(action: Action, job_id: str, attempt: int = 3, token: str = "") -> Move:
    """A move that fills in all it can carry."""
    hold = (job_id, attempt, token or new_id())
    moves: dict[Action, Callable[[], Move]] = {
        Action.ENQUEUE: lambda: Enqueue(job_id),
        Action.CLAIM: lambda: Claim(job_id, new_id(), new_id(), LATER + timedelta(microseconds=3)),
        Action.BLOCK: lambda: Block(job_id, reason="tenant_limit"),
        Action.COMPLETE: lambda: Complete(*hold, result='{"n": [1, 2.50]}'),
        Action.BACK_OFF: lambda: BackOff(*hold, LATER + timedelta(minutes=2), charge=1, crash=1, error=ERROR),
        Action.FAIL: lambda: Fail(*hold, error=ERROR, reason="poison", crash=1),
        Action.TIME_OUT: lambda: TimeOut(*hold, error=ERROR),
        Action.RELEASE: lambda: Release(*hold, crash=1, error=ERROR),
        Action.STOP: lambda: Stop(*hold),
        Action.CANCEL: lambda: Cancel(job_id, by="bob", reason="changed my mind"),
        Action.EXPIRE: lambda: Expire(job_id),
        Action.RETRY: lambda: Retry(job_id, parameters='{"y":[2.50]}', reason="with other parameters"),
        Action.RETRY_LATER: lambda: RetryLater(job_id, LATER + timedelta(minutes=3)),
        Action.FORCE_COMPLETE: lambda: ForceComplete(job_id, result="7", reason="by hand"),
    }
    return moves[action]()


def changes_of(action: Action, before: dict[str, Any], move: Any) -> dict[str, Any]:
    """The columns that the action changes, besides those that all change."""
    error = json.loads(ERROR)
    again = {
        "progress": 0,
        "progress_message": None,
        "progress_details": None,
    }
    anew = again | {
        "finished_at": None,
        "status_reason": None,
        "result": None,
        "error": None,
        "dead_letter_reason": None,
        "retry_count": 0,
        "crash_count": 0,
        "cancel_requested_at": None,
        "cancel_terminate": False,
        "cancel_grace_seconds": None,
        "cancelled_by": None,
        "cancel_reason": None,
        "expires_at": None,
        "webhook_delivered": False,
    }
    changes: dict[Action, Callable[[], dict[str, Any]]] = {
        Action.ENQUEUE: lambda: {"queued_at": LATER, "next_retry_at": None, "status_reason": None},
        Action.CLAIM: lambda: {
            **again,
            "attempt": before["attempt"] + 1,
            "lease_token": move.lease_token,
            "worker_id": move.worker_id,
            "started_at": move.at,
        },
        Action.BLOCK: lambda: {"status_reason": "tenant_limit"},
        Action.COMPLETE: lambda: {
            **LET_GO,
            "progress": 100,
            "result": {"n": [1, 2.5]},
            "error": None,
            "finished_at": LATER,
        },
        Action.BACK_OFF: lambda: {
            **LET_GO,
            "next_retry_at": move.next_retry_at,
            "retry_count": before["retry_count"] + 1,
            "crash_count": before["crash_count"] + 1,
            "error": error,
        },
        Action.FAIL: lambda: {
            **LET_GO,
            "error": error,
            "dead_letter_reason": "poison",
            "crash_count": before["crash_count"] + 1,
            "finished_at": LATER,
        },
        Action.TIME_OUT: lambda: {
            **LET_GO,
            "error": error,
            "dead_letter_reason": "timeout",
            "finished_at": LATER,
        },
        Action.RELEASE: lambda: {**LET_GO, "progress": 0, "crash_count": before["crash_count"] + 1},
        Action.STOP: lambda: {**LET_GO, "finished_at": LATER},
        Action.CANCEL: lambda: {
            "cancel_requested_at": LATER,
            "cancelled_by": "bob",
            "cancel_reason": "changed my mind",
            "next_retry_at": None,
            "finished_at": LATER,
        },
        Action.EXPIRE: lambda: {"finished_at": LATER},
        Action.RETRY: lambda: anew | {"queued_at": LATER, "parameters": {"y": [2.5]}},
        Action.RETRY_LATER: lambda: anew | {"next_retry_at": move.next_retry_at},
        Action.FORCE_COMPLETE: lambda: {
            **LET_GO,
            "progress": 100,
            "result": 7,
            "error": None,
            "dead_letter_reason": None,
            "next_retry_at": None,
            "finished_at": LATER,
        },
    }
    return changes[action]()


def seasoned_job(database: Database, status: JobStatus, action: Action) -> str:
    """A job with a past, so that what is reset and what is kept can be told apart."""
    columns: dict[str, Any] = {
        "event_seq": 9,
        "attempt": 3,
        "retry_count": 2,
        "crash_count": 1,
        "error": {"type": "Before"},
        "status_reason": "a reason",
        "progress_message": "half way",
        "progress_details": {"done": 4},
    }
    if status is not JobStatus.COMPLETED:
        columns["progress"] = 40
    if status in FINAL:
        columns |= {"result": {"old": True}, "dead_letter_reason": "exhausted", "webhook_delivered": True}
        columns |= {"cancel_requested_at": NOW, "cancel_terminate": True, "cancel_grace_seconds": 3.5}
        columns |= {"cancelled_by": "carol", "cancel_reason": "no more", "expires_at": NOW}
    if action is Action.EXPIRE:
        columns["expires_at"] = LATER
    return add_job(database, status, **columns)


def check_action(database: Database, action: Action) -> None:
    """Ask the action of one job in every status, all in one batch."""
    ids = {status: seasoned_job(database, status, action) for status in JobStatus}
    before = {status: job_row(database, job_id) for status, job_id in ids.items()}
    moves = [move_of(action, ids[s], token=before[s]["lease_token"] or "") for s in JobStatus]
    outcomes = make(database, moves)
    rule = RULES[action]
    for status, move, outcome in zip(JobStatus, moves, outcomes, strict=True):
        after, events = job_row(database, ids[status]), events_of(database, ids[status])
        assert outcome.move is move
        if status not in rule.sources:
            assert outcome == Refused(move, status, 3)
            assert after == before[status]
            assert len(events) == 1
            continue
        assert isinstance(outcome, Applied), f"{action} of a {status} job: {outcome}"
        assert outcome.status is rule.target
        assert after == before[status] | changes_of(action, before[status], move) | {
            "status": rule.target.value,
            "event_seq": 10,
            "version": 2,
            "updated_at": LATER,
            "followed_seq": 10 if rule.target in FINAL else before[status]["followed_seq"],
        }
        for name in transitions.RETURNED:
            assert outcome.row[name] == after[name]
        assert events[1:] == [
            {
                "job_id": ids[status],
                "seq": 10,
                "tenant_id": TENANT,
                "action": action.value,
                "status": rule.target.value,
                "attempt": after["attempt"],
                "at": LATER,
                "actor": "bob" if action is Action.CANCEL else "tester",
                "reason": getattr(move, "reason", None),
                "error": json.loads(ERROR) if getattr(move, "error", None) else None,
            }
        ]


@pytest.mark.parametrize("action", Action)
def test_an_action_changes_jobs_in_the_statuses_of_its_rule_and_no_others(
    database: Database, action: Action
) -> None:
    check_action(database, action)


@pytest.mark.parametrize("action", HELD)
def test_a_stale_attempt_a_wrong_token_and_an_unknown_job_are_refused(
    database: Database, action: Action
) -> None:
    check_fence(database, action)


def check_fence(database: Database, action: Action) -> None:
    job_id = add_job(database, JobStatus.RUNNING, attempt=3)
    _, _, token = hold_of(database, job_id)
    before = job_row(database, job_id)
    wrong = [
        move_of(action, job_id, 2, token),
        move_of(action, job_id, 4, token),
        move_of(action, job_id, 3, new_id()),
        move_of(action, new_id(), 3, token),
    ]
    for move in wrong:
        unknown = move.job_id != job_id
        [outcome] = make(database, [move])
        assert outcome == Refused(move, None if unknown else JobStatus.RUNNING, None if unknown else 3)
    assert job_row(database, job_id) == before
    assert len(events_of(database, job_id)) == 1
    assert isinstance(make(database, [move_of(action, job_id, 3, token)])[0], Applied)


def without(monkeypatch: pytest.MonkeyPatch, part: str, instead: str = "true") -> None:
    """Take one condition out of every statement that moves are made with."""
    honest = transitions._update

    def mutant(kind: type[Move], dialect: str, known_types: bool) -> Any:
        statement, rows = honest(kind, dialect, known_types)  # type: ignore[arg-type]
        rule = RULES[kind.action]
        sources = ", ".join(f"'{s.value}'" for s in sorted(rule.sources))
        text = statement.text.replace(part.format(sources=sources), instead)
        return sa.text(text).bindparams(sa.bindparam("now", type_=models.jobs.c.updated_at.type)), rows

    monkeypatch.setattr(transitions, "_update", mutant)


@pytest.mark.parametrize("fence", ["jobs.attempt = u.attempt", "jobs.lease_token = u.lease_token"])
def test_the_fence_check_fails_without_the_fence(
    database: Database, monkeypatch: pytest.MonkeyPatch, fence: str
) -> None:
    without(monkeypatch, fence)
    with pytest.raises((AssertionError, KeyError)):
        check_fence(database, Action.COMPLETE)


def test_of_two_attempts_reported_at_once_the_one_that_holds_the_job_counts(database: Database) -> None:
    """A worker that was taken for dead may claim its own job again and then report both."""
    ghost = hold_of(database, add_job(database, JobStatus.RUNNING))
    make(database, [Release(*ghost)])
    make(database, [claim(ghost[0])])
    holder = hold_of(database, ghost[0])
    refused, applied = make(database, [Complete(*ghost, result="1"), Complete(*holder, result="2")])
    assert isinstance(refused, Refused)
    assert isinstance(applied, Applied)
    assert job_row(database, ghost[0])["result"] == 2


@pytest.mark.parametrize("action", [Action.CANCEL, Action.RETRY, Action.FORCE_COMPLETE])
def test_the_status_check_fails_without_the_status_guard(
    database: Database, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    without(monkeypatch, "COALESCE(jobs.status, '') IN ({sources})")
    with pytest.raises((AssertionError, sa.exc.IntegrityError)):
        check_action(database, action)


@pytest.mark.parametrize("written", ["upper", "braces", "nonsense", "", "'; DROP TABLE jobs; --", "\0"])
def test_an_id_in_another_spelling_is_an_unknown_job_and_harms_no_neighbour(
    database: Database, written: str
) -> None:
    job_id = add_job(database)
    odd = {"upper": job_id.upper(), "braces": "{" + job_id + "}"}.get(written, written)
    moves = [Claim(odd, new_id(), WORKER, LATER), claim(add_job(database))]
    refused, applied = make(database, moves)
    assert refused == Refused(moves[0], None, None)
    assert isinstance(applied, Applied)
    assert status_of(database, job_id) == "queued"


def test_a_batch_mixes_kinds_and_answers_in_the_order_of_its_moves(database: Database) -> None:
    done, failed, slow = (add_job(database, JobStatus.RUNNING) for _ in range(3))
    waits, late, over = add_job(database), add_job(database, JobStatus.SCHEDULED), new_id()
    moves = [
        claim(waits),
        Complete(*hold_of(database, done), result="1"),
        Enqueue(over),
        Fail(*hold_of(database, failed), error=ERROR),
        Complete(*hold_of(database, slow)[:2], new_id()),
        Enqueue(late),
        Cancel(waits, by="bob"),
    ]
    outcomes = make(database, moves)
    assert [outcome.move for outcome in outcomes] == moves
    assert [isinstance(outcome, Applied) for outcome in outcomes] == [
        True,
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    assert [status_of(database, j) for j in (waits, done, failed, slow, late)] == [
        "running",
        "completed",
        "failed",
        "running",
        "queued",
    ]
    assert [len(events_of(database, j)) for j in (waits, done, failed, slow, late)] == [2, 2, 2, 1, 2]
    assert outcomes[6] == Refused(moves[6], JobStatus.RUNNING, 1)


def test_of_two_moves_of_a_kind_for_one_job_the_first_counts(database: Database) -> None:
    job_id, other = add_job(database), add_job(database)
    first, second = claim(job_id), claim(job_id)
    outcomes = make(database, [first, claim(other), second])
    assert [isinstance(outcome, Applied) for outcome in outcomes] == [True, True, False]
    assert outcomes[2] == Refused(second, JobStatus.RUNNING, 1)
    assert job_row(database, job_id)["lease_token"] == first.lease_token
    assert len(events_of(database, job_id)) == 2


def test_no_moves_are_no_outcomes(database: Database) -> None:
    assert make(database, []) == []


def test_a_thousand_jobs_are_claimed_and_settled_in_two_batches(database: Database) -> None:
    with database.write() as connection:
        ids = create(connection, [new_job() for _ in range(1_000)], now=NOW)
    claims = [
        Claim(str(job_id), new_id(), WORKER, NOW + timedelta(microseconds=place))
        for place, job_id in enumerate(reversed(ids))
    ]
    outcomes = make(database, claims)
    assert [o.row["id"] for o in outcomes if isinstance(o, Applied)] == [c.job_id for c in claims]
    rows = {row["id"]: row for row in rows_of(database, models.jobs)}
    started = [rows[c.job_id]["started_at"] for c in claims]
    assert all(before < after for before, after in pairwise(started))
    settled = make(database, [Complete(c.job_id, 1, c.lease_token, result="null") for c in claims])
    assert all(isinstance(outcome, Applied) for outcome in settled)
    with database.read() as connection:
        events = sa.select(models.job_events.c.seq, sa.func.count()).group_by(models.job_events.c.seq)
        assert sorted(map(tuple, connection.execute(events))) == [(1, 1_000), (2, 1_000), (3, 1_000)]


def test_a_claim_returns_what_the_run_needs(database: Database) -> None:
    with database.write() as connection:
        create(
            connection, [job := new_job(parameters='{"b":1,"a":[1e3,"\\u00e9"]}', retry_jitter=True)], now=NOW
        )
    [outcome] = make(database, [claim(job.id)])
    assert isinstance(outcome, Applied)
    assert set(outcome.row) == set(transitions.CLAIMED)
    assert outcome.row["parameters"] == '{"b":1,"a":[1e3,"\\u00e9"]}'  # the very text
    assert (outcome.row["id"], outcome.row["tenant_id"], outcome.row["attempt"]) == (job.id, TENANT, 1)
    assert bool(outcome.row["retry_jitter"]) is True


def test_a_worker_claims_only_the_job_types_it_knows(database: Database) -> None:
    known, unknown = add_job(database, job_type="demo.noop"), add_job(database, job_type="demo.other")
    moves = [claim(unknown), claim(known)]
    assert [isinstance(o, Applied) for o in make(database, moves, job_types=["a.b", "demo.noop"])] == [
        False,
        True,
    ]
    assert status_of(database, unknown) == "queued"
    assert not isinstance(make(database, [claim(unknown)], job_types=[])[0], Applied)
    assert isinstance(make(database, [claim(unknown)])[0], Applied)


def test_a_job_that_is_to_stop_is_not_claimed(database: Database) -> None:
    job_id = add_job(database, cancel_requested_at=NOW)
    [outcome] = make(database, [claim(job_id)])
    assert outcome == Refused(outcome.move, JobStatus.QUEUED, 0)


@pytest.mark.parametrize("action", [Action.BACK_OFF, Action.RELEASE])
def test_a_running_job_that_is_to_stop_does_not_go_back_to_waiting(
    database: Database, action: Action
) -> None:
    job_id = add_job(database, JobStatus.RUNNING, cancel_requested_at=NOW)
    hold = hold_of(database, job_id)
    assert not isinstance(make(database, [move_of(action, *hold)])[0], Applied)
    assert isinstance(make(database, [Stop(*hold)])[0], Applied)


def test_a_job_is_claimed_until_the_moment_it_expires_and_expired_from_then_on(database: Database) -> None:
    early = add_job(database, expires_at=LATER + timedelta(microseconds=1))
    late = add_job(database, expires_at=LATER)
    never = add_job(database)
    assert [isinstance(o, Applied) for o in make(database, [claim(early), claim(late)])] == [True, False]
    early2 = add_job(database, expires_at=LATER + timedelta(microseconds=1))
    moves = [Expire(early2), Expire(late), Expire(never)]
    assert [isinstance(o, Applied) for o in make(database, moves)] == [False, True, False]


def test_attempts_grow_over_releases_retries_and_callers_retries(database: Database) -> None:
    job_id = add_job(database)
    for attempt in (1, 2, 3):
        make(database, [claim(job_id)])
        assert hold_of(database, job_id)[1] == attempt
        if attempt == 1:
            make(database, [Release(*hold_of(database, job_id))])
        if attempt == 2:
            make(database, [Fail(*hold_of(database, job_id), error=ERROR)])
            make(database, [Retry(job_id)])
    events = events_of(database, job_id)
    assert [event["seq"] for event in events] == list(range(1, 8))
    assert [event["attempt"] for event in events] == [0, 1, 1, 2, 2, 2, 3]


def test_a_released_job_keeps_its_place_in_the_lane(database: Database) -> None:
    job_id = add_job(database, JobStatus.RUNNING, queued_at=NOW - timedelta(hours=1))
    make(database, [Release(*hold_of(database, job_id))])
    assert job_row(database, job_id)["queued_at"] == NOW - timedelta(hours=1)


def test_what_is_not_committed_changed_nothing(database: Database) -> None:
    job_id = add_job(database)

    def fail() -> None:
        with database.write() as connection:
            assert isinstance(apply(connection, [claim(job_id)], now=NOW, actor="t")[0], Applied)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert status_of(database, job_id) == "queued"
    assert len(events_of(database, job_id)) == 1


def test_every_move_has_a_case_here() -> None:
    assert {type(move_of(action, new_id())) for action in Action} == set(MOVES)
    assert {kind for kind in MOVES if issubclass(kind, HeldMove)} == {
        type(move_of(action, new_id())) for action in HELD
    }


# Races


def racers(database: Database, moves: Sequence[Move]) -> list[Outcome]:
    """Each move in a transaction and a thread of its own, all at once."""

    def attempt(move: Move) -> Callable[[], Outcome]:
        return lambda: make(database, [move])[0]

    outcomes = at_once([attempt(move) for move in moves])
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes  # type: ignore[return-value]


def winners(outcomes: Sequence[Outcome]) -> list[Move]:
    return [outcome.move for outcome in outcomes if isinstance(outcome, Applied)]


def test_of_eight_claims_at_once_one_wins(database: Database) -> None:
    for _ in range(5):
        job_id = add_job(database)
        [winner] = winners(racers(database, [claim(job_id) for _ in range(8)]))
        row = job_row(database, job_id)
        assert (row["attempt"], row["lease_token"]) == (1, winner.lease_token)  # type: ignore[attr-defined]
        assert [event["seq"] for event in events_of(database, job_id)] == [1, 2]


def test_cancel_and_claim_at_once_have_one_winner(database: Database) -> None:
    for _ in range(5):
        job_id = add_job(database)
        moves: list[Move] = [claim(job_id) for _ in range(4)] + [Cancel(job_id, by=f"u{n}") for n in range(4)]
        [winner] = winners(racers(database, moves))
        assert status_of(database, job_id) == RULES[winner.action].target
        assert len(events_of(database, job_id)) == 2


def test_a_completing_worker_and_reapers_at_once_have_one_winner(database: Database) -> None:
    for _ in range(5):
        job_id = add_job(database, JobStatus.RUNNING)
        hold = hold_of(database, job_id)
        moves: list[Move] = [Complete(*hold, result="1"), *(Release(*hold, crash=1) for _ in range(7))]
        [winner] = winners(racers(database, moves))
        row = job_row(database, job_id)
        assert row["status"] == RULES[winner.action].target
        assert row["crash_count"] == getattr(winner, "crash", 0)
        assert len(events_of(database, job_id)) == 2


def test_of_endings_settled_at_once_one_counts(database: Database) -> None:
    job_id = add_job(database, JobStatus.RUNNING)
    hold = hold_of(database, job_id)
    [winner] = winners(racers(database, [Complete(*hold, result=str(n)) for n in range(8)]))
    assert job_row(database, job_id)["result"] == int(winner.result)  # type: ignore[attr-defined]
    assert len(events_of(database, job_id)) == 2


def test_batches_that_overlap_share_the_jobs_out(database: Database) -> None:
    ids = [add_job(database) for _ in range(40)]

    def batch(order: Sequence[str]) -> Callable[[], list[Outcome]]:
        return lambda: make(database, [claim(job_id) for job_id in order])

    results = at_once([batch(ids if n % 2 else ids[::-1]) for n in range(8)])
    won = [move.job_id for outcomes in results if isinstance(outcomes, list) for move in winners(outcomes)]
    assert [r for r in results if isinstance(r, Exception)] == []
    assert sorted(won) == sorted(ids)


# PostgreSQL's locks


@pytest.fixture
def postgres(postgres_url: str) -> Any:
    store = Database(postgres_url)
    yield store
    store.dispose()


def waiting_for_locks(database: Database) -> int:
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with database.read() as connection:
        return int(connection.execute(query).scalar_one())


def cross(
    database: Database, gate: Callable[[sa.Connection], Any], calls: Sequence[Callable[[], Any]]
) -> list[Any]:
    """Start `calls` while a transaction holds what `gate` locks; let go once all of them wait."""
    with database.engine.connect() as holder:
        transaction = holder.begin()
        gate(holder)

        def let_go() -> None:
            wait_until(lambda: waiting_for_locks(database) >= len(calls), what="all wait for a lock")
            transaction.rollback()

        return at_once([*calls, let_go])[:-1]


def claims_in_opposite_orders(database: Database) -> list[Any]:
    with database.write() as connection:  # the plan of a large table: each row looked up by its key
        ids = sorted(map(str, create(connection, [new_job() for _ in range(2_000)], now=NOW)))[500:503]
        connection.execute(sa.text("ANALYZE jobs"))
        for other in ("hashjoin", "mergejoin", "seqscan"):
            connection.execute(sa.text(f"ALTER DATABASE {database.url.database} SET enable_{other} = off"))
    database.dispose()
    del database.engine  # so that the next session has the settings

    def lock_middle(connection: sa.Connection) -> None:
        connection.execute(sa.select(models.jobs.c.id).where(models.jobs.c.id == ids[1]).with_for_update())

    return cross(
        database,
        lock_middle,
        [
            lambda: make(database, [claim(job_id) for job_id in ids]),
            lambda: make(database, [claim(job_id) for job_id in ids[::-1]]),
        ],
    )


def test_claims_of_the_same_jobs_in_opposite_orders_do_not_lock_each_other_out(postgres: Database) -> None:
    results = claims_in_opposite_orders(postgres)
    assert [isinstance(r, list) for r in results] == [True, True], results
    assert len([move for outcomes in results for move in winners(outcomes)]) == 3


def test_without_the_order_and_the_keys_such_claims_deadlock(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "sorted", lambda rows, key=None: list(rows), raising=False)
    monkeypatch.setattr(transitions.Rows, "match", lambda *_: "jobs.id = u.job_id")
    monkeypatch.setattr(
        transitions, "_update", transitions._update.__wrapped__
    )  # built anew, not from the cache
    [error] = [r for r in claims_in_opposite_orders(postgres) if isinstance(r, Exception)]
    assert "deadlock" in str(error)


def keys_in_opposite_orders(database: Database) -> list[Any]:
    def insert(keys: str) -> Callable[[], list[str | None]]:
        def call() -> list[str | None]:
            with database.write() as connection:
                return create(connection, [new_job(unique_key=key) for key in keys], now=NOW)

        return call

    return cross(
        database,
        lambda connection: create(connection, [new_job(unique_key="m")], now=NOW),
        [insert("amz"), insert("zma")],
    )


def test_unique_keys_in_opposite_orders_do_not_lock_each_other_out(postgres: Database) -> None:
    first, second = keys_in_opposite_orders(postgres)
    assert isinstance(first, list), first
    assert isinstance(second, list), second
    assert sorted(sum(made is not None for made in answer) for answer in (first, second)) == [0, 3]


def test_without_the_order_such_inserts_deadlock(postgres: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "sorted", lambda rows, key=None: list(rows), raising=False)
    [error] = [r for r in keys_in_opposite_orders(postgres) if isinstance(r, Exception)]
    assert "deadlock" in str(error)


def test_a_deadlock_refuses_the_group_as_a_whole_and_trying_again_succeeds(postgres: Database) -> None:
    a, b = add_job(postgres), add_job(postgres)

    def settle(order: Sequence[str]) -> Callable[[], list[Any]]:
        """Two statements, so that no order within one can help."""

        def commit(moves: Sequence[Move]) -> list[Outcome]:
            with postgres.write() as connection:
                done = apply(connection, moves[:1], now=NOW, actor="t")
                if wait:
                    wait.pop()
                    wait_until(lambda: not wait, what="both hold one")
                return done + apply(connection, moves[1:], now=NOW, actor="t")

        return lambda: commit_each(commit, [claim(job_id) for job_id in order])

    wait = [1, 1]
    calls = [settle([a, b]), settle([b, a])]
    results = at_once(calls)
    [refused] = [n for n, outcomes in enumerate(results) if isinstance(outcomes[0], Exception)]  # type: ignore[index]
    assert [type(outcome) for outcome in results[refused]] == [StorageUnavailable] * 2  # type: ignore[union-attr]
    again = calls[refused]()
    assert [outcome.status for outcome in again] == [JobStatus.RUNNING] * 2  # the other has them


# Making jobs


def made(database: Database, jobs: Sequence[NewJob]) -> list[bool]:
    with database.write() as connection:
        ids = create(connection, jobs, now=NOW)
    assert [job_id for job_id in ids if job_id] == [
        job.id for job, job_id in zip(jobs, ids, strict=True) if job_id
    ]
    return [job_id is not None for job_id in ids]


def test_a_new_job_is_what_was_asked_for_and_has_one_event(database: Database) -> None:
    job = new_job(
        tags='["a","b"]',
        metadata='{"k":null}',
        title="T",
        description="D",
        status="scheduled",
        queued_at=None,
        scheduled_for=LATER,
        expires_at=LATER + timedelta(days=1),
        retry_jitter=True,
        retry_backoff=1.5,
        webhook_url="https://example.org/",
        webhook_events='["job.failed"]',
        unique_key="k",
    )
    assert made(database, [job]) == [True]
    row = job_row(database, job.id)
    asked = {name: getattr(job, name) for name in NewJob.__slots__}
    for name in ("parameters", "tags", "metadata", "webhook_events"):
        asked[name] = json.loads(asked[name])
    assert {name: row[name] for name in asked} == asked
    assert (row["event_seq"], row["attempt"], row["progress"], row["version"]) == (1, 0, 0, 1)
    assert row["created_at"] == row["updated_at"] == NOW
    [event] = events_of(database, job.id)
    assert event == {
        "job_id": job.id,
        "seq": 1,
        "tenant_id": TENANT,
        "action": "create",
        "status": "scheduled",
        "attempt": 0,
        "at": NOW,
        "actor": "alice",
        "reason": None,
        "error": None,
    }


def test_two_hundred_and_fifty_six_jobs_are_one_batch_with_their_events(database: Database) -> None:
    assert made(database, [new_job() for _ in range(256)]) == [True] * 256
    with database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(models.job_events)).scalar() == 256


def test_of_a_batch_the_first_has_the_unique_key(database: Database) -> None:
    jobs = [new_job(unique_key=key) for key in ("z", "a", None, "z", "a", None)]
    assert made(database, jobs) == [True, True, True, False, False, True]
    assert events_of(database, jobs[3].id) == []


@pytest.mark.parametrize("status", sorted(ACTIVE))
def test_an_active_job_keeps_its_unique_key(database: Database, status: JobStatus) -> None:
    add_job(database, status, unique_key="k")
    others = [
        new_job(unique_key="k"),
        new_job(unique_key="k", tenant_id=OTHER_TENANT),
        new_job(unique_key="K"),
    ]
    assert made(database, others) == [False, True, True]


def test_a_job_that_ends_frees_its_unique_key_and_cannot_be_retried_while_another_has_it(
    database: Database,
) -> None:
    ended = add_job(database, JobStatus.RUNNING, unique_key="k")
    make(database, [Fail(*hold_of(database, ended), error=ERROR)])
    holder = new_job(unique_key="k")
    assert made(database, [holder]) == [True]
    with pytest.raises(sa.exc.IntegrityError):
        make(database, [Retry(ended)])
    make(database, [Cancel(holder.id, by="bob")])
    assert isinstance(make(database, [Retry(ended)])[0], Applied)


def test_one_of_eight_inserts_at_once_has_the_unique_key(database: Database) -> None:
    def insert() -> list[bool]:
        return made(database, [new_job(unique_key="k"), new_job()])

    answers = at_once([insert] * 8)
    assert sorted(map(str, answers)) == ["[False, True]"] * 7 + ["[True, True]"]


def test_a_row_changed_past_the_engine_is_still_guarded(database: Database) -> None:
    job_id = add_job(database, JobStatus.RUNNING)
    hold = hold_of(database, job_id)
    change(database, models.jobs, job_id, attempt=2)
    [outcome] = make(database, [Complete(*hold)])
    assert outcome == Refused(outcome.move, JobStatus.RUNNING, 2)
