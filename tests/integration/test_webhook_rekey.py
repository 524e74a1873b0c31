"""The key that seals is replaced: everything is sealed again, and the old key may be forgotten."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from standardwebhooks.webhooks import Webhook

from factories import add_job, job_row, rows_of
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import rotate_webhook_secret
from laneway.models import tenants, webhook_endpoints
from laneway.webhooks import rekey as rekey_module
from laneway.webhooks.papers import endpoint_context, signing_key_context
from laneway.webhooks.rekey import Rekeyed, rekey
from laneway.webhooks.secrets import SecretBox, target_headers_context, tenant_context
from laneway_process import laneway
from webhook_desk import Desk, wait_for_waiter
from webhook_office import Office
from webhook_receiver import Receiver

OLD, NEW = bytes(32), bytes(range(32))
BOTH = {"k2": NEW, "k1": OLD}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rekey_module, "BATCH", 2)


@pytest.fixture
def desk(database: Database) -> Desk:
    """One of three tenants; it has five endpoints, and everything that is ever sealed."""
    desks = [Desk(Office(database)) for _ in range(3)]
    desk = desks[0]
    for number in range(5):
        endpoint_id, _ = desk.register(
            "http://127.0.0.1:9000/", sign_with="both", headers={"X-Key": f"canary {number}"}
        )
        desk.rotate(endpoint_id, grace_seconds=60)
        sealed = desk.office.box.seal(f"PEM {number}", endpoint_context(endpoint_id))
        _write(database, webhook_endpoints, endpoint_id, client_certificate=sealed)
    office = desk.office
    rotate_webhook_secret(
        database, office.box, office.tenant_id, grace_seconds=60, secret=None, now=office.clock.now()
    )
    return desk


def _write(database: Database, table: sa.Table, row_id: str, **values: Any) -> None:
    with database.write() as connection:
        connection.execute(sa.update(table).where(table.c.id == row_id).values(values))


def opened(database: Database, box: SecretBox) -> dict[str, list[str]]:
    """By row, all its sealed texts in clear."""
    found = {}
    for row in rows_of(database, tenants):
        context = tenant_context(row["id"])
        texts = [row["webhook_secret"], *(each["sealed"] for each in row["old_webhook_secrets"])]
        found[row["id"]] = [box.open(text, context) for text in texts]
        if row["webhook_signing_key"] is not None:
            found[row["id"]].append(box.open(row["webhook_signing_key"], signing_key_context(row["id"])))
    for row in rows_of(database, webhook_endpoints):
        context = endpoint_context(row["id"])
        texts = [row["secret"], *(each["sealed"] for each in row["old_secrets"])]
        texts += [text for text in (row["headers"], row["client_certificate"]) if text is not None]
        found[row["id"]] = [box.open(text, context) for text in texts]
    return found


def test_the_headers_of_http_jobs_are_sealed_again_whatever_became_of_the_job(desk: Desk) -> None:
    database, tenant_id = desk.office.database, desk.office.tenant_id
    context = target_headers_context(tenant_id)

    def make(status: JobStatus, key: dict[str, bytes], **private: str) -> str:
        private["headers"] = SecretBox(key).seal('{"a":"b"}', context)
        return add_job(
            database,
            status,
            tenant_id=tenant_id,
            job_type="http.request",
            parameters={"url": "https://x.org/", "private": private},
        )

    old = [make(status, {"k1": OLD}, traceparent="t") for status in (JobStatus.QUEUED, JobStatus.FAILED)]
    lost = make(JobStatus.QUEUED, {"k1": bytes(reversed(NEW))})
    add_job(database, tenant_id=tenant_id, job_type="http.request", parameters={"private": {}})
    done = run(desk)
    assert (done.jobs, [each.split(":")[0] for each in done.unreadable]) == (2, [f"jobs {lost}"])
    for job_id in old:
        parameters = job_row(database, job_id)["parameters"]
        assert SecretBox({"k2": NEW}).open(parameters["private"].pop("headers"), context) == '{"a":"b"}'
        assert parameters == {"url": "https://x.org/", "private": {"traceparent": "t"}}
    assert run(desk).jobs == 0


def run(desk: Desk, keys: dict[str, bytes] = BOTH) -> Rekeyed:
    return rekey(desk.office.database, SecretBox(keys), now=desk.office.clock.now())


def test_afterwards_the_new_key_alone_opens_everything(desk: Desk) -> None:
    database = desk.office.database
    before = opened(database, SecretBox({"k1": OLD}))
    assert sorted(map(len, before.values())) == [1, 1, 3, 4, 4, 4, 4, 4]
    assert run(desk) == Rekeyed(tenants=3, endpoints=5, unreadable=())
    assert opened(database, SecretBox({"k2": NEW})) == before
    rows = rows_of(database, tenants), rows_of(database, webhook_endpoints)
    assert run(desk) == Rekeyed(tenants=0, endpoints=0, unreadable=())
    assert (rows_of(database, tenants), rows_of(database, webhook_endpoints)) == rows


def test_what_expires_and_who_owns_it_stays_as_it_was(desk: Desk) -> None:
    def without_seals(row: sa.RowMapping) -> dict[str, Any]:
        changing = ("secret", "headers", "client_certificate", "version", "updated_at")
        old = [each["expires_at"] for each in row["old_secrets"]]
        return {str(name): row[name] for name in row if name not in changing} | {"old_secrets": old}

    before = [without_seals(row) for row in rows_of(desk.office.database, webhook_endpoints)]
    run(desk)
    assert [without_seals(row) for row in rows_of(desk.office.database, webhook_endpoints)] == before


def test_a_run_that_was_cut_short_is_continued_by_the_next(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    reseal, calls = rekey_module._resealed, []

    def dying(box: SecretBox, table: sa.Table, row: Any) -> dict[str, Any]:
        if table is webhook_endpoints:
            calls.append(row["id"])
            if len(calls) == 4:  # in the middle of the second batch
                raise KeyboardInterrupt
        return reseal(box, table, row)

    with monkeypatch.context() as patched:
        patched.setattr(rekey_module, "_resealed", dying)
        with pytest.raises(KeyboardInterrupt):
            run(desk)
    sealed_by = [row["secret"].partition(".")[0] for row in rows_of(desk.office.database, webhook_endpoints)]
    assert sealed_by == ["k2", "k2", "k1", "k1", "k1"]
    assert run(desk) == Rekeyed(tenants=0, endpoints=3, unreadable=())
    opened(desk.office.database, SecretBox({"k2": NEW}))


def test_what_does_not_open_is_named_and_left_and_the_rest_is_done(desk: Desk) -> None:
    database = desk.office.database
    first = rows_of(database, webhook_endpoints)[0]
    lost = SecretBox({"k0": bytes([7] * 32)}).seal("{}", endpoint_context(first["id"]))
    _write(database, webhook_endpoints, first["id"], headers=lost)
    done = run(desk)
    assert (done.tenants, done.endpoints) == (3, 4)
    [said] = done.unreadable
    assert first["id"] in said
    assert "'k0'" in said
    left = rows_of(database, webhook_endpoints)[0]
    assert (left["secret"], left["headers"]) == (first["secret"], lost)


def test_a_rotation_meanwhile_is_not_undone(desk: Desk) -> None:
    database, box = desk.office.database, SecretBox(BOTH)
    endpoint_id = rows_of(database, webhook_endpoints)[0]["id"]
    context = endpoint_context(endpoint_id)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            e = webhook_endpoints
            rotated = sa.update(e).where(e.c.id == endpoint_id).values(secret=box.seal("fresh", context))
            connection.execute(rotated)
            asked = pool.submit(run, desk)
            wait_for_waiter(connection, asked)
        assert asked.result(60) == Rekeyed(tenants=3, endpoints=5, unreadable=())
    secret = rows_of(database, webhook_endpoints)[0]["secret"]
    assert SecretBox({"k2": NEW}).open(secret, context) == "fresh"


def test_a_courier_with_the_new_key_alone_signs_as_before(desk: Desk) -> None:
    office = desk.office
    with Receiver() as receiver:
        endpoint_id, secret = desk.register(receiver.url(), headers={"X-Key": "canary"})
        run(desk)
        with office.open(office.courier(box=SecretBox({"k2": NEW}))):
            desk.complete(webhook_url=receiver.url())
            requests = receiver.wait_for(2)
            desk.wait(endpoint_id, "delivered")
    [of_endpoint] = [each for each in requests if each.headers.get("x-key") == "canary"]
    assert Webhook(secret).verify(of_endpoint.body, of_endpoint.headers) == json.loads(of_endpoint.body)


def test_the_command_says_what_it_did_and_fails_while_something_is_left(desk: Desk) -> None:
    def encoded(key: bytes) -> str:
        return base64.b64encode(key).decode()

    database = desk.office.database
    url = {"LANEWAY_DATABASE_URL": database_url_of(database)}
    keys = f"k2:{encoded(NEW)},k1:{encoded(OLD)}"
    done = laneway("webhooks", "rekey", LANEWAY_ENCRYPTION_KEYS=keys, **url)
    expected = (0, "sealed again: 3 tenants, 5 endpoints, 0 jobs\n")
    assert (done.returncode, done.stdout) == expected, done.stderr
    stranger = new_id()
    values = {"id": stranger, "name": "x", "created_by": "t", "webhook_secret": "k0.AAAA.AAAA"}
    with database.write() as connection:
        connection.execute(sa.insert(tenants).values(values))
    left = laneway("webhooks", "rekey", LANEWAY_ENCRYPTION_KEYS=keys, **url)
    assert (left.returncode, left.stdout) == (1, "sealed again: 0 tenants, 0 endpoints, 0 jobs\n")
    assert stranger in left.stderr
    for key in (OLD, NEW):
        assert encoded(key) not in left.stderr


def database_url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)
