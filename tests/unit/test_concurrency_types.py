"""Concurrency keys of job types, and what a request may say of its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.domain.spec import MAX_CONCURRENCY, JobSpec
from laneway.engine.concurrency import Candidate, Slots, whose_turn
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import _with_defaults

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def sync(shop: int, full: bool = False) -> None: ...


def asked(job_type: JobType, **fields: Any) -> tuple[str | None, int | None]:
    spec = _with_defaults(JobSpec(job_type="t.sync", parameters={"shop": 17}, **fields), job_type)
    return spec.concurrency_key, spec.concurrency_limit


def test_a_types_key_is_made_of_parameters() -> None:
    job_type = JobType("t.sync", sync, concurrency_key="shop-{shop}-{full}", concurrency_limit=3)
    assert asked(job_type) == ("shop-17-False", 3)
    assert asked(job_type, concurrency_key="own") == ("own", 3)
    assert asked(job_type, concurrency_key="own", concurrency_limit=2) == ("own", 2)
    assert asked(job_type, concurrency_key=None) == (None, 3)  # without a key the limit says nothing
    assert asked(JobType("t.sync", sync)) == (None, None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"concurrency_key": "{shpo}"}, "no parameter is 'shpo'"),
        ({"concurrency_limit": 2}, "needs a concurrency_key"),
        ({"concurrency_key": "k", "concurrency_limit": 0}, "1 to 1,000"),
        ({"concurrency_key": "k", "concurrency_limit": MAX_CONCURRENCY + 1}, "1 to 1,000"),
    ],
)
def test_a_type_that_cannot_be_meant_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Registry().add(JobType("t.sync", sync, **options))


@pytest.mark.parametrize("limit", [1, MAX_CONCURRENCY])
def test_a_type_may_have_any_limit_between(limit: int) -> None:
    Registry().add(JobType("t.sync", sync, concurrency_key="k", concurrency_limit=limit))


KEY, OWN = Slots("t", "k"), Slots("t")

candidates = st.lists(
    st.builds(
        lambda n, key, limit, rank, waits: Candidate(
            str(n), "t", "k" if key else None, limit, rank, T0 + timedelta(seconds=n), waits
        ),
        st.integers(0, 99),
        st.booleans(),
        st.integers(1, 4),
        st.integers(0, 3),
        st.sampled_from((None, None, KEY, OWN)),
    ).filter(lambda each: each.waits_for is not KEY or each.key is not None),
    max_size=12,
    unique_by=lambda each: each.job_id,
)


def started(all_of_them: Sequence[Candidate], ids: Sequence[str]) -> list[Candidate]:
    return [each for each in all_of_them if each.job_id in ids]


@given(
    candidates,
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 5),
    st.dictionaries(st.sampled_from((KEY, OWN)), st.integers(0, 5)),
)
def test_no_deal_passes_a_limit_or_forgets_a_job_that_was_wanted(
    wanted: list[Candidate], of_key: int, of_tenant: int, limit: int, room: dict[Slots, int]
) -> None:
    turns = whose_turn(wanted, running={KEY: of_key, OWN: of_tenant}, limits={"t": limit}, room=room)
    new = {each.job_id for each in wanted if each.waits_for is None}
    assert {*turns.start, *(job_id for job_id, _ in turns.block)} == new
    assert not set(turns.start) & {job_id for job_id, _ in turns.block}
    going = [*started(wanted, turns.start), *turns.wake]
    assert not going or of_tenant + len(going) <= limit
    keyed = [each for each in going if each.key]
    assert not keyed or of_key + len(keyed) <= max(each.limit or 1 for each in keyed)
    for slots in (KEY, OWN):
        assert sum(each.waits_for == slots for each in turns.wake) <= room.get(slots, 0)
