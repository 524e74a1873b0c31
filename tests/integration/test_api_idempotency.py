"""`Idempotency-Key` over HTTP: its forms, and every route that makes work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from api_client import LocalApi, claim, complete
from factories import add_endpoint, add_job, add_webhook, job_row
from laneway import models
from laneway.api import idempotency
from laneway.clock import SystemClock, new_id
from laneway.domain.states import JobStatus
from laneway.engine.access.callers import Caller, Role
from laneway.engine.idempotency import Key, begin, keep

NOOP = {"job_type": "demo.noop"}


def post(
    api: LocalApi, given: str | bytes, body: object = NOOP, path: str = "/jobs", **how: Any
) -> httpx.Response:
    headers = {"Idempotency-Key": given} | how.pop("headers", {})
    return api.post(path, headers=headers, **({} if body is None else {"json": body}), **how)


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get("idempotency-replayed") == "true"


def test_a_request_sent_again_gets_the_first_answer(each_api: LocalApi) -> None:
    first, again = post(each_api, "k"), post(each_api, "k")
    assert (first.status_code, again.status_code) == (202, 202)
    assert (is_replay(first), is_replay(again)) == (False, True)
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert each_api.count_jobs() == 1


def test_another_body_is_refused_and_the_same_json_in_another_form_is_not(each_api: LocalApi) -> None:
    first = post(each_api, "k", {**NOOP, "title": "a", "tags": []})
    same = each_api.post(
        "/jobs",
        content=b' {"tags":[ ], "title": "\\u0061",\n"job_type":"demo.noop"}',
        headers={"Idempotency-Key": "k", "Content-Type": "application/json"},
    )
    assert (is_replay(same), same.content) == (True, first.content)
    for other in ({**NOOP, "title": "b", "tags": []}, {**NOOP, "title": "a"}):
        refused = post(each_api, "k", other)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
    assert each_api.count_jobs() == 1


FORMS = [
    ("k", "k", True),
    ("k", '"k"', True),
    ("k", "  k\t", True),
    ('a"b\\c', r'"a\"b\\c"', True),
    ("8e03978e-40d5-43dd-bc93-6894a57f9324", '"8e03978e-40d5-43dd-bc93-6894a57f9324"', True),
    ("k", "K", False),
    ("k", "'k'", False),
    ("a b", "ab", False),
]


@pytest.mark.parametrize(("first", "second", "same"), FORMS)
def test_a_key_is_the_same_bare_and_in_quotes(api: LocalApi, first: str, second: str, same: bool) -> None:
    assert not is_replay(post(api, first))
    assert is_replay(post(api, second)) == same


def test_a_key_has_1_to_255_characters(api: LocalApi) -> None:
    for fits in ("x", "x" * 255, f'"{"y" * 255}"', '"' + r"\"" * 255 + '"'):
        assert post(api, fits).status_code == 202, fits
    made = api.count_jobs()
    for wrong in (
        *("", " ", '""', "x" * 256, f'"{"x" * 256}"', '"', '"a', 'a"b"'[1:] + "c", '"a"b', r'"a\b"', '"a\\'),
        *('"a";b=1', "é".encode(), "é".encode("latin-1"), b"\x7f", b"a\x01b", '"a" "b"'),
    ):
        refused = post(api, wrong)
        assert (refused.status_code, refused.json()["code"]) == (400, "bad_request"), wrong
    twice = api.portal.call(
        lambda: api._client.post(
            "/api/v1/jobs",
            json=NOOP,
            headers=[*api.headers().items(), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")],
        )
    )
    assert twice.status_code == 400
    assert api.count_jobs() == made


def test_what_was_refused_may_be_sent_again_with_its_key(api: LocalApi) -> None:
    for body, status in (
        ({"job_type": "no.such"}, 422),
        ({**NOOP, "unknown": 1}, 422),
        ({**NOOP, "parameters": {"x": 2**64}}, 422),
    ):
        for _ in range(2):
            refused = post(api, "k", body)
            assert (refused.status_code, is_replay(refused)) == (status, False)
    assert not is_replay(post(api, "k"))


def test_keys_of_others_are_no_ones_business(each_api: LocalApi) -> None:
    mine = post(each_api, "k")
    for other in (each_api.key(subject="bob"), each_api.key(tenant="elsewhere", subject="alice")):
        theirs = post(each_api, "k", {**NOOP, "title": "another"}, key=other)
        assert (theirs.status_code, is_replay(theirs)) == (202, False)
        assert theirs.json()["id"] != mine.json()["id"]
    second_key = each_api.key(subject="alice")
    assert is_replay(post(each_api, "k", key=second_key)), "the same caller"


def test_whoever_waits_is_answered_with_the_job_as_it_is_now(each_api: LocalApi) -> None:
    first = post(each_api, "k")
    job_id = first.json()["id"]
    waiting = {"Prefer": "wait=30"}
    complete(each_api, claim(each_api, job_id), '"done"')
    again = post(each_api, "k", headers=waiting)
    assert (again.status_code, again.json()["result"], is_replay(again)) == (200, "done", True)
    assert again.headers["preference-applied"] == "wait=30"
    each_api.request("DELETE", f"/jobs/{job_id}", key=each_api.key(Role.OPERATOR))
    gone = post(each_api, "k", headers=waiting)
    assert (gone.status_code, gone.content, is_replay(gone)) == (202, first.content, True)


def test_whoever_meets_a_key_under_way_waits_for_it_and_then_is_told_to_come_back(
    local: Any, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api: LocalApi = local(database_url=postgres_url)
    caller = Caller(api.tenant_id, "alice", Role.USER)
    asked = b'["",{"job_type":"demo.noop"}]'  # as `key_of` puts it
    key = Key.of(caller, "createJob", "k", request=asked)
    answer = api.make("demo.noop")
    with api.database.write() as other:  # another process, in the middle of its transaction
        assert begin(other, key, now=SystemClock().now()) is None
        with monkeypatch.context() as at_once:
            at_once.setattr(idempotency, "IN_PROGRESS_SECONDS", 0.0)
            refused = post(api, "k")
        assert (refused.status_code, refused.json()["code"]) == (409, "idempotency_in_progress")
        assert refused.headers["retry-after"] == "1"
        with api.asking("POST", "/jobs", json=NOOP, headers={"Idempotency-Key": "k"}) as waiting:
            assert post(api, "another").status_code == 202, "nobody else waits"
            keep(other, key, answer)
            other.commit()
            response = waiting()
    assert (response.status_code, response.json(), is_replay(response)) == (202, answer, True)


# Every other route that makes work


def failed(api: LocalApi) -> str:
    return add_job(api.database, JobStatus.FAILED, tenant_id=api.tenant_id, dead_letter_reason="exhausted")


def test_a_retry_with_a_key_happens_once(each_api: LocalApi) -> None:
    for noun in ("jobs", "dead-letters"):
        job_id = failed(each_api)
        path = f"/{noun}/{job_id}/retry"
        first = post(each_api, noun, None, path)
        assert first.status_code == 202, first.text
        claim(each_api, job_id)
        again = post(each_api, noun, None, path)
        assert (again.content, is_replay(again)) == (first.content, True)
        assert job_row(each_api.database, job_id)["status"] == "running"
        assert post(each_api, "other", None, path).status_code in (404, 409)
        reused = post(each_api, noun, {"parameters": {}}, path)
        assert (reused.status_code, reused.json()["code"]) == (422, "idempotency_key_reused")
        elsewhere = post(each_api, noun, None, f"/{noun}/{failed(each_api)}/retry")
        assert (elsewhere.status_code, elsewhere.json()["code"]) == (422, "idempotency_key_reused")


def test_many_dead_letters_are_retried_once(each_api: LocalApi) -> None:
    operator = each_api.key(Role.OPERATOR)
    job_id = failed(each_api)
    dry = post(each_api, "k", {"filter": {}, "dry_run": True}, "/dead-letters/retry", key=operator)
    assert (dry.status_code, dry.json()["count"]) == (200, 1)
    first = post(each_api, "k", {"filter": {}}, "/dead-letters/retry", key=operator)
    assert (first.status_code, first.json()["count"], is_replay(first)) == (202, 1, False)
    failed(each_api)
    again = post(each_api, "k", {"filter": {}}, "/dead-letters/retry", key=operator)
    assert (again.content, is_replay(again)) == (first.content, True)
    assert first.json()["sample_ids"] == [job_id]


def deliveries_of(api: LocalApi) -> list[dict[str, Any]]:
    with api.database.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(models.webhook_deliveries)).mappings()]


def redelivery(api: LocalApi) -> tuple[str, object, Callable[[], object]]:
    delivery = add_webhook(api.database, failed(api))
    with api.database.write() as connection:
        for table in (models.webhook_deliveries, models.webhook_messages):
            connection.execute(sa.update(table).values(tenant_id=api.tenant_id))
    return f"/webhooks/deliveries/{delivery}/redeliver", None, lambda: deliveries_of(api)[0]["version"]


def test_event(api: LocalApi) -> tuple[str, object, Callable[[], object]]:
    endpoint = add_endpoint(api.database, "job.*", tenant_id=api.tenant_id)
    return f"/webhooks/endpoints/{endpoint}/test", None, lambda: len(deliveries_of(api))


test_event.__test__ = False  # type: ignore[attr-defined]


def recovery(api: LocalApi) -> tuple[str, object, Callable[[], object]]:
    endpoint = add_endpoint(api.database, "job.*", tenant_id=api.tenant_id)

    def count() -> object:
        with api.database.read() as connection:
            rows = sa.select(sa.func.count()).select_from(models.webhook_recoveries)
            return connection.execute(rows).scalar_one()

    body = {"mode": "failed", "since": "2026-01-01T00:00:00Z"}
    return f"/webhooks/endpoints/{endpoint}/recover", body, count


@pytest.mark.parametrize("arrange", [redelivery, test_event, recovery])
def test_webhooks_are_sent_again_once(
    each_api: LocalApi, arrange: Callable[[LocalApi], tuple[str, object, Callable[[], object]]]
) -> None:
    operator = each_api.key(Role.OPERATOR)
    path, body, effect = arrange(each_api)
    first = post(each_api, "k", body, path, key=operator)
    assert (first.status_code, is_replay(first)) == (202, False), first.text
    done = effect()
    again = post(each_api, "k", body, path, key=operator)
    assert (again.status_code, again.content, is_replay(again)) == (202, first.content, True)
    assert again.headers["location"] == first.headers["location"]
    assert effect() == done


def test_the_example_takes_keys_too(local: Any) -> None:
    api: LocalApi = local(tasks=("feedback_summaries",))
    path = "/api/v1/feedback-summaries/evaluation/101/student"  # in no document: the example is mounted

    def ask(student: int) -> httpx.Response:
        return api.send("POST", f"{path}/{student}/queue", headers={**api.headers(), "Idempotency-Key": "k"})

    first, again, other = ask(301), ask(301), ask(302)
    assert (first.status_code, again.content, is_replay(again)) == (202, first.content, True)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_an_unknown_id_is_not_found_with_a_key_either(api: LocalApi) -> None:
    for _ in range(2):
        assert post(api, "k", None, f"/jobs/{new_id()}/retry").status_code == 404
