"""Every SQL statement of a request names its tenant, or is on the list of those that need not.

The wall between tenants is a clause in each query. This test walks the statements themselves: all that the
API issues while it works for a caller, in every operation, on rows that are there.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from typing import Any

import pytest
import sqlalchemy as sa

from api_client import LocalApi
from laneway.db import acting_for
from laneway.engine import queries
from laneway.engine.access import row_security
from laneway.engine.access.callers import Role
from laneway.engine.queries import Clauses, Scope
from tenant_worlds import ITS_OWN, World, operations

OWNED = frozenset(row_security.tenants_columns()) - {"tenants"}
"""`tenants` is looked up by its id, which is the caller's."""

_BY_ID = "by ids that the same transaction has found for the caller"
_FOLLOWS = "what follows, in the same transaction, from a job or run that was found for the caller"
NEED_NOT: dict[str, str] = {
    "engine.queries.lanes_with_work": "names of lanes; those where the caller has no job are dropped",
    "engine.queues._waiting": "the head of a lane, of which the caller's rows are counted outside",
    "engine.statistics.sample": "the newest ended jobs, of which the caller's rows are picked outside",
    "engine.workers._views": "how many jobs a worker holds, of all tenants: a number",
    **dict.fromkeys(
        (
            "engine.chains._run_views",
            "engine.chains._views",
            "engine.history.attempts",
            "engine.history.timeline",
            "engine.queries.events_after",
            "engine.batch_ends.counts_of",
            "engine.recoveries._end",
            "engine.recoveries.cancel",
            "engine.recoveries.start",
            "engine.retention._delete_messages",
            "engine.retention._idle",
            "engine.retention.delete_jobs",
            "engine.schedule_ends.uncounted",
            "engine.schedules.change",
            "engine.schedules.delete",
            "engine.schedules.runs",
            "engine.webhook_ledger.get",
            "engine.webhook_ledger.redeliver",
            "webhooks.endpoint_health.cancel_waiting",
            "webhooks.endpoints._update",
            "webhooks.endpoints.delete",
            "webhooks.endpoints.test_within",
        ),
        _BY_ID,
    ),
    **dict.fromkeys(
        (
            "engine.batch_ends._count_active",
            "engine.batch_ends._end",
            "engine.batch_ends.look",
            "engine.chain_runs._error_messages",
            "engine.chain_runs._read",
            "engine.chain_runs._write",
            "engine.chain_runs.advance",
            "engine.dependencies.release",
            "engine.flow._follow",
            "engine.flow_upkeep.stop_jobs",
            "engine.slots.count_start",
            "engine.slots.drop_waiting",
            "engine.telling.tell",
            "engine.transitions._where_they_are",
            "engine.transitions.apply",
            "webhooks.messages.supersede_progress",
        ),
        _FOLLOWS,
    ),
}
"""By the function that asks, why its statement needs no tenant."""
ASKS_FOR_OTHERS = "engine.queries.newest_first"
"""It runs the statement that its caller made: the caller is who asks."""


def tables_of(statement: str) -> frozenset[str]:
    """The tables with tenants' rows that a statement reads or writes."""
    named = re.findall(r"\b(?:FROM|JOIN|UPDATE|INTO)\s+\"?(\w+)", statement, re.I)
    return OWNED.intersection(named)


def names_tenant(statement: str) -> bool:
    """Whether a tenant is asked for, or written into a new row."""
    if re.match(r"(WITH \w+ AS \()?INSERT\b", statement.lstrip(), re.I):
        return "tenant_id" in statement
    return re.search(r"tenant_id\"?\s*(=|IN\b)", statement, re.I) is not None


def asker() -> str:
    """The innermost function of ours that is under way: `engine.queries.page_of_jobs`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        name = f"{module.removeprefix('laneway.')}.{frame.f_code.co_name}"
        if module.startswith("laneway.") and module != "laneway.db" and name != ASKS_FOR_OTHERS:
            return name
        frame = frame.f_back
    return "nobody"


def heard_of(api: LocalApi) -> dict[str, set[str]]:
    """By asker, the statements on tenants' tables that name none; filled while the API works."""
    found: dict[str, set[str]] = {}

    def look(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if acting_for.get() is not None and tables_of(statement) and not names_tenant(statement):
            found.setdefault(asker(), set()).add(re.sub(r"\s+", " ", statement))

    sa.event.listen(api.app.state.runtime.database.engine, "before_cursor_execute", look)
    return found


def call_everything(api: LocalApi) -> int:
    """How many operations answered well, called on a world of their own: those that delete come last."""
    world = World(api, "own", "mine").build()
    well = 0
    for role in (Role.USER, Role.OPERATOR):
        for operation in sorted(operations(), key=lambda o: o.method == "DELETE"):
            if operation.path.endswith("/events") or operation.id in ITS_OWN:
                continue
            own = {name: world.ids[kind] for name, kind in operation.kinds.items()}
            url = operation.url(own)
            response = api.request(operation.method, url, key=world.keys[role], **operation.body())
            well += response.status_code < 300
    return well


def test_every_statement_of_a_request_names_its_tenant(each_api: LocalApi) -> None:
    found = heard_of(each_api)
    assert call_everything(each_api) > 60
    strange = {name: statements for name, statements in found.items() if name not in NEED_NOT}
    assert not strange, "\n".join(f"{name}: {text}" for name, texts in strange.items() for text in texts)


def test_who_need_not_name_a_tenant_exists() -> None:
    for name in NEED_NOT:
        module, _, function = name.rpartition(".")
        assert f"def {function}(" in inspect.getsource(import_module(f"laneway.{module}")), name


def test_a_statement_without_its_tenant_is_seen(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(_: Scope) -> Clauses:
        return []

    monkeypatch.setattr(Scope, "clauses", everything)
    found = heard_of(api)
    api.get("/jobs")
    assert f"engine.queries.{queries.page_of_jobs.__name__}" in found
