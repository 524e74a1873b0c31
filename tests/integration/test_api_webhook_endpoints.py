"""Webhook endpoints over HTTP: what may be set, what is shown, and who may."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import structlog

from api_client import LocalApi
from factories import at_once, rows_of
from laneway import models
from laneway.clock import new_id
from laneway.engine.access.callers import Role
from laneway.webhooks.endpoints import MAX_ENDPOINTS
from laneway.webhooks.retries import QUICK_SECONDS, STANDARD_SECONDS
from webhook_desk import wait_for_waiter

URL = "https://hooks.example.org/in"
PATH = "/webhooks/endpoints"


class Operator:
    """An operator of the default tenant."""

    def __init__(self, api: LocalApi) -> None:
        self.api = api
        self.key = api.key(Role.OPERATOR, subject="olga")

    def make(self, **fields: Any) -> dict[str, Any]:
        response = self.create(**fields)
        assert response.status_code == 201, response.text
        return dict(response.json())

    def create(self, **fields: Any) -> httpx.Response:
        return self.api.post(PATH, key=self.key, json={"url": URL} | fields)

    def get(self, endpoint_id: str) -> dict[str, Any]:
        return dict(self.api.get(f"{PATH}/{endpoint_id}", key=self.key).json())

    def list(self) -> list[dict[str, Any]]:
        return list(self.api.get(PATH, key=self.key).json()["data"])

    def patch(self, endpoint_id: str, **fields: Any) -> httpx.Response:
        return self.api.request("PATCH", f"{PATH}/{endpoint_id}", key=self.key, json=fields)

    def rotate(self, endpoint_id: str, **fields: Any) -> httpx.Response:
        return self.api.post(f"{PATH}/{endpoint_id}/rotate-secret", key=self.key, json=fields)

    def test(self, endpoint_id: str) -> httpx.Response:
        return self.api.post(f"{PATH}/{endpoint_id}/test", key=self.key)

    def delete(self, endpoint_id: str) -> httpx.Response:
        return self.api.request("DELETE", f"{PATH}/{endpoint_id}", key=self.key)


@pytest.fixture
def olga(each_api: LocalApi) -> Operator:
    return Operator(each_api)


@pytest.fixture
def on_sqlite(api: LocalApi) -> Operator:
    return Operator(api)


def secret_of(size: int) -> str:
    return "whsec_" + base64.b64encode(bytes(size)).decode()


def refused(response: httpx.Response) -> list[str]:
    """Where the body was refused."""
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request"), response.text
    return [error["pointer"] for error in response.json()["errors"]]


def test_an_endpoint_is_made_with_the_documented_defaults(olga: Operator) -> None:
    response = olga.create()
    made = response.json()
    assert response.headers["location"] == f"/api/v1{PATH}/{made['id']}"
    assert len(base64.b64decode(made.pop("secret").removeprefix("whsec_"), validate=True)) == 32
    expected = {
        "url": URL,
        "description": None,
        "event_types": ["job.completed", "job.failed", "job.timeout", "job.cancelled", "job.expired"],
        "filters": {"queues": [], "job_types": [], "tags": []},
        "format": "standard",
        "status": "enabled",
        "disabled_reason": None,
        "disabled_at": None,
        "sign_with": "v1",
        "timeout_seconds": 10.0,
        "retry_schedule": list(STANDARD_SECONDS),
        "max_in_flight": 8,
        "max_per_second": None,
        "in_order": False,
        "header_names": [],
        "has_client_certificate": False,
        "has_ca_certificate": False,
        "secrets_in_grace": 0,
        "created_by": "olga",
        "health": {
            "consecutive_failures": 0,
            "failing_since": None,
            "last_failure_at": None,
            "last_success_at": None,
            "blocked_until": None,
            "blocked_reason": None,
        },
    }
    assert made.items() >= expected.items()
    assert olga.get(made["id"]) == made
    assert olga.list() == [made]


def test_everything_given_is_kept(olga: Operator) -> None:
    given = {
        "description": "billing",
        "event_types": ["job.*", "endpoint.disabled"],
        "filters": {"queues": ["emails"], "job_types": ["demo.echo"], "tags": ["a", "b"]},
        "format": "cloudevents",
        "status": "paused",
        "sign_with": "both",
        "timeout_seconds": 3.5,
        "retry_schedule": [1, 2.5],
        "max_in_flight": 3,
        "max_per_second": 2.5,
        "in_order": True,
    }
    made = olga.make(**given, headers={"X-B": "1", "Authorization": "Bearer t"}, secret=secret_of(24))
    assert made.items() >= given.items()
    assert made["header_names"] == ["Authorization", "X-B"]
    assert made.pop("secret") == secret_of(24)
    assert olga.get(made["id"]) == made


def test_a_preset_of_retries_is_shown_as_its_seconds(olga: Operator) -> None:
    made = olga.make(retry_schedule="quick")
    assert made["retry_schedule"] == list(QUICK_SECONDS)
    assert olga.patch(made["id"], retry_schedule="standard").json()["retry_schedule"] == list(
        STANDARD_SECONDS
    )
    assert olga.patch(made["id"], retry_schedule=[]).json()["retry_schedule"] == []


def test_a_patch_changes_what_it_names_and_nothing_else(olga: Operator) -> None:
    made = olga.make(description="old", max_per_second=5, headers={"X-A": "1"}, filters={"tags": ["t"]})
    del made["secret"]
    changed = olga.patch(made["id"], event_types=["*"], timeout_seconds=30).json()
    different = {name for name in made if made[name] != changed[name]}
    assert different == {"event_types", "timeout_seconds", "updated_at"}
    assert olga.patch(made["id"]).json()["event_types"] == ["*"]
    assert olga.patch(made["id"], filters={"queues": ["q"]}).json()["filters"] == {
        "queues": ["q"],
        "job_types": [],
        "tags": [],
    }


def test_null_takes_away_what_may_be_absent(olga: Operator) -> None:
    made = olga.make(description="old", max_per_second=5, headers={"X-A": "1"})
    names = ("description", "max_per_second", "headers", "client_certificate", "ca_certificate")
    changed = olga.patch(made["id"], **dict.fromkeys(names)).json()
    assert (changed["description"], changed["max_per_second"], changed["header_names"]) == (None, None, [])
    assert rows_of(olga.api.database, models.webhook_endpoints)[0]["headers"] is None


@pytest.mark.parametrize(
    "name",
    [
        "url",
        "event_types",
        "filters",
        "format",
        "status",
        "sign_with",
        "timeout_seconds",
        "retry_schedule",
        "max_in_flight",
        "in_order",
    ],
)
def test_null_is_refused_where_it_means_nothing(on_sqlite: Operator, name: str) -> None:
    made = on_sqlite.make()
    assert refused(on_sqlite.patch(made["id"], **{name: None})) == [f"/{name}"]
    assert refused(on_sqlite.create(**{name: None})) == [f"/{name}"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("event_types", [["job.completed"] * 50, ["*"], ["job.*"], ["endpoint.test", "chain.*"]]),
        ("filters", [{"tags": ["t" * 100] * 50}]),
        ("headers", [{f"X-{i}": "v" for i in range(20)}, {"X-A": "v" * 1000}, {"X" * 100: "~ !"}, {}]),
        ("retry_schedule", [[1] * 20, [86_400], []]),
        ("timeout_seconds", [1, 30]),
        ("max_in_flight", [1, 64]),
        ("max_per_second", [0.01, 1000]),
        ("description", ["d" * 500, ""]),
        ("url", ["https://hooks.example.org/" + "a" * (2048 - 26)]),
    ],
)
def test_a_value_at_its_limit_is_taken(on_sqlite: Operator, name: str, values: list[Any]) -> None:
    made = on_sqlite.make()
    for value in values:
        assert on_sqlite.patch(made["id"], **{name: value}).status_code == 200, value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("event_types", [["job.completed"] * 51, [], ["job.done"], ["jobs.*"], ["job*"], ["*.completed"]]),
        ("filters", [{"tags": ["t"] * 51}, {"tags": ["t" * 101]}, {"queues": [""]}, {"owner": ["x"]}]),
        ("headers", [{f"X-{i}": "v" for i in range(21)}, {"X" * 101: "v"}]),
        ("retry_schedule", [[1] * 21, [86_400.5], [0.9], ["1e400"], "slow"]),
        ("timeout_seconds", [0.9, 30.1, "NaN"]),
        ("max_in_flight", [0, 65]),
        ("max_per_second", [0.009, 1000.1, "Infinity"]),
        ("description", ["d" * 501]),
        ("url", ["", "https://hooks.example.org/" + "a" * (2049 - 26)]),
        ("status", ["deleted"]),
        ("format", ["xml"]),
        ("sign_with", ["v2"]),
        ("secret", ["whsec_AAAA"]),  # only `rotate-secret` replaces it
        ("tenant_id", ["x"]),
    ],
)
def test_a_value_past_its_limit_is_refused(on_sqlite: Operator, name: str, values: list[Any]) -> None:
    made = on_sqlite.make()
    for value in values:
        places = refused(on_sqlite.patch(made["id"], **{name: value}))
        assert all(place.startswith(f"/{name}") for place in places), (value, places)
    del made["secret"]
    assert on_sqlite.get(made["id"]) == made


@pytest.mark.parametrize(
    "headers",
    [
        *({name: "x"} for name in ("Host", "content-length", "Transfer-Encoding", "Connection", "Cookie")),
        *({name: "x"} for name in ("webhook-id", "Webhook-Signature", "webhook-anything", "User-Agent")),
        *({name: "x"} for name in ("Content-Type", "Expect", "TE", "Upgrade", "Proxy-Authorization")),
        {"X-A\r\nB": "x"},
        {"X A": "x"},
        {"X-A:": "x"},
        {"X-\u00c4": "x"},
        {"": "x"},
        {"X-A": ""},
        {"X-A": "one\ntwo"},
        {"X-A": "one\r\nX-B: two"},
        {"X-A": "\u00e9"},
        {"X-A": "\t"},
        {"X-A": " padded"},
        {"X-A": "v" * 1001},
        {"X-A": "1", "x-a": "2"},
    ],
)
def test_a_header_that_could_not_be_sent_as_it_is_is_refused(
    on_sqlite: Operator, headers: dict[str, str]
) -> None:
    assert refused(on_sqlite.create(headers=headers)) == ["/headers"]
    assert on_sqlite.list() == []


def test_a_secret_of_ones_own_has_24_to_64_bytes_and_is_not_repeated_when_refused(
    on_sqlite: Operator,
) -> None:
    for size in (24, 64):
        made = on_sqlite.make(secret=secret_of(size))
        assert made["secret"] == secret_of(size)
        assert on_sqlite.rotate(made["id"], secret=secret_of(size)).json()["secret"] == secret_of(size)
    for wrong in (secret_of(23), secret_of(65), secret_of(32)[6:], secret_of(32) + "!", "whsec_"):
        for response in (on_sqlite.create(secret=wrong), on_sqlite.rotate(made["id"], secret=wrong)):
            assert refused(response) == ["/secret"]
            assert wrong not in response.text.replace("`whsec_`", "")


def test_the_grace_is_0_to_7_days(on_sqlite: Operator) -> None:
    endpoint_id = on_sqlite.make()["id"]
    for grace, in_grace in ((604_800, 1), (86_400, 2), (0, 0)):
        answer = on_sqlite.rotate(endpoint_id, grace_seconds=grace).json()
        assert answer["secrets_in_grace"] == in_grace
    for grace in (-1, 604_801, 0.5):
        assert refused(on_sqlite.rotate(endpoint_id, grace_seconds=grace)) == ["/grace_seconds"]
    key = on_sqlite.key
    for grace in (-1, 604_801):
        wrong = on_sqlite.api.post("/webhooks/secret/rotate", key=key, json={"grace_seconds": grace})
        assert refused(wrong) == ["/grace_seconds"]


def test_no_more_than_five_secrets_sign(on_sqlite: Operator) -> None:
    endpoint_id = on_sqlite.make()["id"]
    counts = [on_sqlite.rotate(endpoint_id).json()["secrets_in_grace"] for _ in range(6)]
    assert counts == [1, 2, 3, 4, 4, 4]


def test_a_tenant_has_100_endpoints_also_when_many_ask_at_once(each_api: LocalApi) -> None:
    olga = Operator(each_api)
    row = dict(rows_of(each_api.database, models.webhook_endpoints)[0]) if olga.make() else {}
    with each_api.database.write() as connection:
        copies = [row | {"id": new_id()} for _ in range(MAX_ENDPOINTS - 2)]
        connection.execute(sa.insert(models.webhook_endpoints), copies)
    answers = at_once([olga.create] * 4)
    codes = sorted(answer.status_code for answer in answers if isinstance(answer, httpx.Response))
    assert codes == [201, 409, 409, 409]
    assert len(olga.list()) == MAX_ENDPOINTS
    full = olga.create()
    assert (full.status_code, "delete one first" in full.json()["detail"]) == (409, True)
    another = each_api.key(Role.OPERATOR, tenant="acme")
    assert each_api.post(PATH, key=another, json={"url": URL}).status_code == 201
    assert olga.delete(olga.list()[0]["id"]).status_code == 204
    assert olga.create().status_code == 201


def test_who_asks_while_the_hundredth_is_being_made_is_refused(each_api: LocalApi) -> None:
    olga = Operator(each_api)
    olga.make()
    database = each_api.database
    row = dict(rows_of(database, models.webhook_endpoints)[0])
    copies = [row | {"id": new_id()} for _ in range(MAX_ENDPOINTS - 1)]
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            tenants = models.tenants
            connection.execute(sa.select(tenants).where(tenants.c.id == each_api.tenant_id).with_for_update())
            asked = pool.submit(olga.create)
            wait_for_waiter(connection, asked)
            connection.execute(sa.insert(models.webhook_endpoints), copies)
        assert asked.result(60).status_code == 409
    assert len(olga.list()) == MAX_ENDPOINTS


@pytest.mark.parametrize(
    ("url", "setting"),
    [
        ("http://hooks.example.org/", "LANEWAY_WEBHOOK_ALLOW_HTTP"),
        ("https://127.0.0.1/", "LANEWAY_WEBHOOK_ALLOWED_CIDRS"),
        ("https://localhost/", "LANEWAY_WEBHOOK_ALLOWED_HOSTS"),
        ("https://hooks.example.org:444/", "LANEWAY_WEBHOOK_ALLOWED_PORTS"),
    ],
)
def test_a_url_that_may_not_be_called_is_refused_with_the_setting_that_allows_it(
    on_sqlite: Operator, url: str, setting: str
) -> None:
    made = on_sqlite.make()
    for response in (on_sqlite.create(url=url), on_sqlite.patch(made["id"], url=url)):
        problem = response.json()
        assert (response.status_code, problem["code"]) == (422, "webhook_url_refused")
        assert setting in problem["detail"]
        assert [error["pointer"] for error in problem["errors"]] == ["/url"]
    assert [each["url"] for each in on_sqlite.list()] == [URL]


def test_an_id_of_another_tenant_is_not_found_like_one_that_is_nobodys(each_api: LocalApi) -> None:
    olga = Operator(each_api)
    mine = olga.make()["id"]
    olga.key = each_api.key(Role.ADMIN, tenant="acme")
    calls: list[Callable[[str], httpx.Response]] = [
        lambda each: each_api.get(f"{PATH}/{each}", key=olga.key),
        lambda each: olga.patch(each, status="paused"),
        olga.rotate,
        olga.test,
        olga.delete,
    ]
    for call in calls:
        answers = [call(each) for each in (mine, new_id())]
        assert [a.status_code for a in answers] == [404, 404]
        problems = [
            {
                name: a.json()[name]
                for name in a.json()
                if name not in ("detail", "instance", "request_id", "facts")
            }
            for a in answers
        ]
        assert problems[0] == problems[1]
        assert problems[0]["code"] == "endpoint_not_found"
    assert olga.list() == []
    assert [row["id"] for row in rows_of(each_api.database, models.webhook_endpoints)] == [mine]


def test_a_user_may_not(on_sqlite: Operator) -> None:
    endpoint_id = on_sqlite.make()["id"]
    on_sqlite.key = on_sqlite.api.alice
    answers = [
        on_sqlite.create(),
        on_sqlite.api.get(PATH),
        on_sqlite.api.get(f"{PATH}/{endpoint_id}"),
        on_sqlite.patch(endpoint_id, status="paused"),
        on_sqlite.rotate(endpoint_id),
        on_sqlite.test(endpoint_id),
        on_sqlite.delete(endpoint_id),
        on_sqlite.api.get("/webhooks/secret"),
        on_sqlite.api.post("/webhooks/secret/rotate", json={}),
    ]
    assert [(a.status_code, a.json()["code"]) for a in answers] == [(403, "forbidden")] * len(answers)
    assert on_sqlite.api.get("/webhooks/public-key").status_code == 200


def test_disabling_by_hand_has_its_reason_and_enabling_starts_afresh(olga: Operator) -> None:
    endpoint_id = olga.make()["id"]
    for again, enabled in ((endpoint_id, "enabled"), (endpoint_id, "paused")):
        off = olga.patch(again, status="disabled").json()
        assert (off["status"], off["disabled_reason"]) == ("disabled", "manual")
        assert off["disabled_at"] is not None
        assert olga.patch(again, status="disabled").json()["disabled_at"] == off["disabled_at"]
        assert olga.patch(again, description="x").json()["status"] == "disabled"
        assert olga.test(again).json()["facts"]["current_status"] == "disabled"
        on = olga.patch(again, status=enabled).json()
        assert (on["status"], on["disabled_reason"], on["disabled_at"]) == (enabled, None, None)
        assert on["enabled_at"] > off["enabled_at"]


def test_a_test_event_waits_for_the_courier_whatever_the_endpoint_hears(olga: Operator) -> None:
    endpoint_id = olga.make(event_types=["job.failed"])["id"]
    answer = olga.test(endpoint_id)
    [delivery] = rows_of(olga.api.database, models.webhook_deliveries)
    [message] = rows_of(olga.api.database, models.webhook_messages)
    assert (answer.status_code, answer.json()) == (202, {"delivery_id": delivery["id"]})
    assert answer.headers["location"] == f"/api/v1/webhooks/deliveries/{delivery['id']}"
    assert (delivery["endpoint_id"], delivery["trigger"], delivery["max_attempts"]) == (
        endpoint_id,
        "test",
        1,
    )
    body = json.loads(message["payload"])
    assert (body["type"], body["data"]) == (
        "endpoint.test",
        {"endpoint_id": endpoint_id, "url": URL, "asked_by": "olga"},
    )


def test_the_public_key_stays_the_same_and_is_the_tenants(each_api: LocalApi) -> None:
    first = each_api.get("/webhooks/public-key").json()["public_key"]
    assert len(base64.b64decode(first.removeprefix("whpk_"), validate=True)) == 32
    Operator(each_api).make(sign_with="v1a")
    assert each_api.get("/webhooks/public-key").json()["public_key"] == first
    other = each_api.get("/webhooks/public-key", key=each_api.key(tenant="acme")).json()["public_key"]
    assert other != first


def test_the_tenants_secret_is_rotated(olga: Operator) -> None:
    api, key = olga.api, olga.key
    before = api.get("/webhooks/secret", key=key).json()["secret"]
    given = api.post("/webhooks/secret/rotate", key=key, json={"secret": secret_of(32)})
    assert given.json() == {"secret": secret_of(32)} == api.get("/webhooks/secret", key=key).json()
    made = api.post("/webhooks/secret/rotate", key=key, json={}).json()["secret"]
    assert len({before, secret_of(32), made}) == 3


def test_secrets_and_header_values_are_in_no_later_answer_no_log_and_no_plain_column(
    each_api: LocalApi,
) -> None:
    olga = Operator(each_api)
    given, header, tenants = secret_of(33), "Bearer canary-4711", secret_of(34)
    with structlog.testing.capture_logs() as logs:
        made = olga.make(headers={"Authorization": header}, sign_with="both")
        own = olga.make(secret=given, headers={"X-Key": header})
        fresh = olga.rotate(made["id"]).json()["secret"]
        api, key = each_api, olga.key
        api.post("/webhooks/secret/rotate", key=key, json={"secret": tenants})
        answers = [
            olga.rotate(own["id"]).text,
            json.dumps(olga.list()),
            json.dumps(olga.get(made["id"])),
            olga.patch(made["id"], description="x").text,
            olga.patch(made["id"], headers={"X-Key": f"{header}\n"}).text,
            olga.test(made["id"]).text,
            olga.create(secret=given + "!", headers={"X-Key": header}).text,
            olga.delete(own["id"]).text,
        ]
    stored = _dump(each_api)
    for text in (made["secret"], given, fresh, tenants, header):
        bare = text.removeprefix("whsec_")
        assert all(bare not in answer for answer in answers)
        assert bare not in str(logs)
        assert bare not in stored
    assert "hooks.example.org" in stored  # or nothing was looked at


def _dump(api: LocalApi) -> str:
    """All that the store holds, as text; on SQLite the bytes of its files too."""
    with api.database.read() as connection:
        tables = models.metadata.sorted_tables
        found = [str(connection.execute(sa.select(table)).all()) for table in tables]
    url = sa.make_url(api.settings.database)
    if url.get_backend_name() == "sqlite" and url.database:
        with sqlite3.connect(url.database) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with open(url.database, "rb") as file:
            found.append(file.read().decode("latin-1"))
    return "\n".join(found)
