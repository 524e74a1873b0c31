"""A short, seeded run of schemathesis over all operations; `python -m schemathesis_run` is the long one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from laneway.engine.access.callers import Role
from schemathesis_run import ROLES, TcpApi, run, served, server_errors

OPERATIONS = 60  # at least so many are there, and each is sent to


@pytest.fixture(scope="module")
def api() -> Iterator[TcpApi]:
    with served(sqlite=True) as api:
        yield api


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("schemathesis")
@pytest.mark.parametrize("role", ROLES)
def test_no_request_gets_what_the_document_does_not_promise(api: TcpApi, role: Role) -> None:
    key = api.key(role, subject=f"a-{role}")
    report = run(api.url, key, seed=20261122, examples=2, phases="examples,fuzzing")
    assert report.failures == [], report.text
    assert report.tested == report.total >= OPERATIONS
    assert server_errors(api) == []
