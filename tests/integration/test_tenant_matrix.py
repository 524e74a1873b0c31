"""Every operation, with the ids of another tenant, as every role: the same answer as for ids of nobody.

The operations come from the OpenAPI document, so a new one joins by itself. One whose ids or body nobody
knows fails the test until it is told what they are: `KIND_OF`, `ITS_OWN`, `BODIES`, `QUERIES` in
tests/tenant_worlds.py, `BODY_IDS` here. Every text that one tenant owns carries its canary; no answer to the
other may hold it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from api_client import LocalApi, ServedApi, reference
from laneway.engine.access import row_security
from laneway.engine.access.callers import Role
from laneway.engine.queries import Clauses, Scope
from tenant_worlds import CANARY, CONSTANTS, ITS_OWN, KIND_OF, STEP, Operation, World, nobodys, operations

STREAMS = {"streamEvents"}
"""Operations without an id whose answer does not end: test_a_stream_tells_of_its_own_tenant_alone."""

BODY_IDS: dict[str, tuple[Any, ...]] = {
    "createJob": (lambda ids: {**STEP, "depends_on": [ids["job"]]},),
    "cancelJobs": (lambda ids: {"filter": {"ids": [ids["job"]]}},),
    "createToken": (lambda ids: {"job_id": ids["job"]},),
    "createBatch": (
        lambda ids: {"jobs": [{**STEP, "depends_on": [ids["job"]]}]},
        lambda ids: {"jobs": [STEP], "on_success": {**STEP, "depends_on": [ids["job"]]}},
        lambda ids: {"jobs": [STEP], "on_complete": {**STEP, "depends_on": [ids["job"]]}},
        lambda ids: {"jobs": [STEP], "on_failure": {**STEP, "depends_on": [ids["job"]]}},
    ),
    "createChain": tuple(
        lambda ids, wrap=wrap: {
            "name": "n",
            "chain_definition": [wrap({**STEP, "depends_on": [ids["job"]]})],
            "execute": True,
        }
        for wrap in (lambda s: s, lambda s: [s], lambda s: {"parallel": [s]})
    ),
    "changeChain": (lambda ids: {"chain_definition": [{**STEP, "depends_on": [ids["job"]]}]},),
}
"""By operation, bodies that hold ids."""


ALL = list(operations())
WITH_ID = [o for o in ALL if o.path_parameters and o.id not in ITS_OWN]
LISTS = [o for o in ALL if not o.path_parameters and o.method == "GET" and o.id not in STREAMS]


class Attacker:
    """Calls as one role of a tenant, and keeps what was answered."""

    def __init__(self, world: World, role: Role) -> None:
        self.world = world
        self.role = role
        self.key = world.keys[role]

    def call(self, operation: Operation, url: str, **how: Any) -> httpx.Response:
        """The answer. No canary is in it, unless the operation is an admin's, who sees all tenants."""
        response = self.world.api.request(operation.method, url, key=self.key, **how)
        if not self.rules(operation):
            told = response.text + repr(response.headers.multi_items())
            said = response.request.url.raw_path.decode()
            assert CANARY not in told.replace(said, ""), f"{self.role} {operation.id}: {told}"
        return response

    def rules(self, operation: Operation) -> bool:
        """Whether it is for admins of the installation, and this is one."""
        return self.role is Role.ADMIN and (operation.path.startswith(("/admin", "/jobs/admin", "/queue")))


def answer(response: httpx.Response, ids: dict[str, str]) -> tuple[int, str, dict[str, str]]:
    """What of an answer may not differ: without the ids that were asked for, and what counts requests."""
    text = response.text.replace(response.headers["x-request-id"], "REQUEST")
    for value in ids.values():
        text = text.replace(quote(value), "ID").replace(value, "ID")
    headers = {
        name: value
        for name, value in response.headers.items()
        if not re.search("request-id|ratelimit|retry-after|content-length", name)
    }
    return response.status_code, text, headers


@pytest.fixture(params=["sqlite", "postgresql", "postgresql with row security"])
def walled_api(request: pytest.FixtureRequest, local: Any) -> LocalApi:
    """The API on each store, and on PostgreSQL behind its own wall."""
    if request.param == "sqlite":
        return local(database_url=request.getfixturevalue("sqlite_url"))  # type: ignore[no-any-return]
    url = request.getfixturevalue("postgres_url")
    secured = request.param.endswith("row security")
    api: LocalApi = local(database_url=url, row_security=secured)
    if secured:
        row_security.prepare(api.database)
    return api


def test_every_id_of_the_document_is_known() -> None:
    assert len(ALL) > 100
    assert len(WITH_ID) > 50
    strange = {(o.id, n) for o in WITH_ID for n in o.path_parameters if n not in {*KIND_OF, *CONSTANTS}}
    assert not strange, f"say what kind of id this is, in KIND_OF: {strange}"
    asked = {(o.id, n) for o in ALL for n in o.query_parameters if n.endswith("_id") and n not in KIND_OF}
    assert not asked, f"say what kind of id this is, in KIND_OF: {asked}"
    document = reference().document
    for path, methods in document["paths"].items():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            found = sorted(set(ids_in(content.get("schema", {}), document["components"]["schemas"])))
            name = operation["operationId"].removesuffix("Alias")
            assert not found or name in BODY_IDS, f"{path}: give BODY_IDS a body with {found}"


def ids_in(schema: Any, known: dict[str, Any], at: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Where a body of this schema holds ids."""
    if (name := schema.get("$ref", "").rpartition("/")[2]) and name not in above:
        yield from ids_in(known[name], known, at, (*above, name))
    for part in (each for way in ("anyOf", "oneOf", "allOf") for each in schema.get(way, [])):
        yield from ids_in(part, known, at, above)
    if "items" in schema:
        yield from ids_in(schema["items"], known, at + "/*", above)
    for name, part in schema.get("properties", {}).items():
        yield from ids_in(part, known, f"{at}/{name}", above)
    if schema.get("format") == "uuid" or at.endswith(("_id", "_ids", "/ids")):
        yield at


@pytest.mark.timeout(900)  # some 2,000 requests
def test_another_tenant_s_id_is_an_id_of_nobody(
    walled_api: LocalApi, capfd: pytest.CaptureFixture[str]
) -> None:
    victim = World(walled_api, "victim", CANARY).build()
    own = World(walled_api, "attacker", "mine").build()
    before = victim.snapshot()
    for role in Role:
        attacker = Attacker(own, role)
        check_paths(attacker, victim)
        check_queries(attacker, victim)
        check_bodies(attacker, victim)
        check_lists(attacker)
    check_cursors(victim, own)
    assert victim.snapshot() == before
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err, "no text of a tenant is logged"


def check_paths(attacker: Attacker, victim: World) -> None:
    for operation in WITH_ID:
        if attacker.rules(operation):
            continue
        names = list(operation.kinds)
        for foreign in product((True, False), repeat=len(names)):  # of several ids some may be one's own
            if not any(foreign):
                continue

            def ids(theirs: dict[str, str]) -> dict[str, str]:
                return {
                    name: (theirs if there else attacker.world.ids)[operation.kinds[name]]  # noqa: B023
                    for name, there in zip(names, foreign, strict=True)  # noqa: B023
                }

            answers = []
            for asked in (ids(nobodys()), ids(victim.ids)):
                response = attacker.call(operation, operation.url(asked), **operation.body())
                answers.append(answer(response, asked))
            said = f"{attacker.role} {operation.method} {operation.path}: {answers}"
            assert answers[0] == answers[1], said
            assert answers[0][0] in (403, 404), f"BODIES may need a better one: {said}"


def check_queries(attacker: Attacker, victim: World) -> None:
    """A filter by another's id, or words, finds what one by nobody's does: nothing."""
    words = {"queue": victim.ids["queue"], "tag": CANARY, "q": CANARY, "created_by": CANARY, "target": CANARY}
    for operation in LISTS:
        if attacker.rules(operation):
            continue
        for name in operation.query_parameters:
            kind = KIND_OF.get(name)
            if kind is None and name not in words:
                continue
            answers = []
            for value in (nobodys()[kind], victim.ids[kind]) if kind else ("nobody", words[name]):
                response = attacker.call(operation, f"{operation.path}?{name}={quote(value)}")
                answers.append(answer(response, {name: value}))
            assert answers[0] == answers[1], f"{attacker.role} {operation.id} {name}: {answers}"


def check_bodies(attacker: Attacker, victim: World) -> None:
    for operation in ALL:
        for body in BODY_IDS.get(operation.name, ()):
            answers = []
            for theirs in (nobodys(), victim.ids):
                own = {name: attacker.world.ids[kind] for name, kind in operation.kinds.items()}
                response = attacker.call(operation, operation.url(own), json=body(theirs))
                answers.append(answer(response, {"job": theirs["job"]}))
            said = f"{attacker.role} {operation.id}: {answers}"
            assert answers[0] == answers[1], said
            assert answers[0][0] >= 400 or '"matched":0' in answers[0][1], said


def check_lists(attacker: Attacker) -> None:
    for operation in LISTS:
        attacker.call(operation, operation.path)


def check_cursors(victim: World, own: World) -> None:
    """A place in another's list is no place in one's own."""
    for operation in LISTS:
        if "cursor" not in operation.query_parameters or operation.name in ("listWorkers",):
            continue
        url = f"{operation.path}?limit=1"
        page = victim.api.request(operation.method, url, key=victim.keys[Role.ADMIN]).json()
        assert page["next_cursor"], f"{operation.id}: a world needs two of them"
        for role in Role:
            used = own.api.request(
                operation.method, f"{url}&cursor={page['next_cursor']}", key=own.keys[role]
            )
            assert (used.status_code, used.json()["code"]) in ((400, "invalid_cursor"), (403, "forbidden")), (
                f"{role} {operation.id}: {used.text}"
            )


def test_row_security_alone_keeps_tenants_apart(
    postgres_url: str, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the queries' own wall torn down: the mutant of the first is caught by the second."""
    api: LocalApi = local(database_url=postgres_url, row_security=True)
    row_security.prepare(api.database)
    victim = World(api, "victim", CANARY).build()
    own = World(api, "attacker", "mine").build()

    def everything(_: Scope) -> Clauses:
        return []

    monkeypatch.setattr(Scope, "clauses", everything)
    for role in (Role.USER, Role.OPERATOR):
        attacker = Attacker(own, role)
        for path in ("/jobs", f"/jobs?tag={CANARY}", "/dead-letters", "/queues", "/queues/stats"):
            response = api.get(path, key=attacker.key)
            assert response.status_code == 200
            assert CANARY not in response.text.replace(f"tag={CANARY}", ""), path
        for tail in ("", "/status", "/attempts", "/timeline", "/webhooks"):
            assert api.get(f"/jobs/{victim.ids['job']}{tail}", key=attacker.key).status_code == 404, tail
        assert api.post(f"/jobs/{victim.ids['job']}/cancel", key=attacker.key).status_code == 404
    assert api.get(f"/jobs/{victim.ids['job']}", key=victim.keys[Role.USER]).json()["status"] == "queued"


def test_without_either_wall_the_matrix_would_see_it(api: LocalApi, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = World(api, "victim", CANARY).build()
    attacker = Attacker(World(api, "attacker", "mine").build(), Role.OPERATOR)
    monkeypatch.setattr(Scope, "clauses", lambda _: [])
    with pytest.raises(AssertionError, match="getJob"):
        check_paths(attacker, victim)
    with pytest.raises(AssertionError, match=CANARY):
        check_lists(attacker)


def test_a_stream_tells_of_its_own_tenant_alone(served: Any) -> None:
    """The tenant's stream, open while both tenants make jobs, until one's own has been told of."""
    api: ServedApi = served()
    victim, own = (api.key(Role.OPERATOR, tenant=name, subject=name) for name in (CANARY, "mine"))
    with api.stream("/events", headers=api.headers(own)) as stream:
        lines = stream.iter_lines()
        next(lines)
        body = {"job_type": "demo.echo", "parameters": {"value": CANARY}, "title": CANARY, "tags": [CANARY]}
        theirs = api.post("/jobs", key=victim, json=body).json()["id"]
        api.post(f"/jobs/{theirs}/cancel", key=victim)
        mine = api.post("/jobs", key=own, json={"job_type": "demo.echo"}).json()["id"]
        api.post(f"/jobs/{mine}/cancel", key=own)
        heard = []
        for line in lines:
            heard.append(line)
            if mine in line and "cancelled" in "".join(heard[-3:]):
                break
    text = "\n".join(heard)
    assert CANARY not in text
    assert theirs not in text
