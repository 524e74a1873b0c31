"""Before, during and after a rotation each delivery verifies with the secrets that are good just then."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import standardwebhooks
import standardwebhooks.webhooks
import svix.webhooks
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from laneway.db import Database
from laneway.engine.access.callers import rotate_webhook_secret
from laneway.errors import WebhookNotVerified
from laneway.webhooks.secrets import MAX_SECRETS, new_webhook_secret
from laneway.webhooks.signing import verify_webhook
from webhook_desk import Desk
from webhook_office import Office
from webhook_receiver import Receiver, Request, in_turn

DAY = 24 * 3600


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(Office(database))


def accepted(request: Request, secret: str) -> bool:
    """Whether the holder of `secret` takes the request; the verifiers must be of one opinion."""
    verifiers: list[tuple[Callable[[], Any], type[Exception]]] = [
        (
            lambda: standardwebhooks.Webhook(secret).verify(request.body, request.headers),
            standardwebhooks.webhooks.WebhookVerificationError,
        ),
        (
            lambda: svix.webhooks.Webhook(secret).verify(request.body, request.headers),
            svix.webhooks.WebhookVerificationError,
        ),
        (lambda: verify_webhook(request.body, request.headers, secret), WebhookNotVerified),
    ]
    opinions = set()
    for verify, refusal in verifiers:
        try:
            assert verify() in (json.loads(request.body), None)  # svix returns nothing
            opinions.add(True)
        except refusal:
            opinions.add(False)
    assert len(opinions) == 1, opinions
    return opinions.pop()


def signed_for(request: Request, public_key: str) -> bool:
    """Whether one of the signatures is the holder's of the key pair."""
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key.removeprefix("whpk_")))
    said = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
    for version, _, signature in (
        each.partition(",") for each in request.headers["webhook-signature"].split()
    ):
        if version == "v1a":
            try:
                key.verify(base64.b64decode(signature), said)
            except InvalidSignature:
                return False
            return True
    return False


def signatures(request: Request) -> list[str]:
    return [each.partition(",")[0] for each in request.headers["webhook-signature"].split(" ")]


def test_the_old_secret_alone_is_enough_until_the_grace_is_over_and_not_after(desk: Desk) -> None:
    clock = desk.office.clock
    with Receiver() as receiver, desk.office.open():
        endpoint_id, old = desk.register(receiver.url())

        def next_request() -> Request:
            desk.complete()
            return receiver.wait_for(len(receiver.requests) + 1)[-1]

        before = next_request()
        assert (accepted(before, old), signatures(before)) == (True, ["v1"])

        new = desk.rotate(endpoint_id, grace_seconds=60)
        during = next_request()
        assert (accepted(during, old), accepted(during, new)) == (True, True)
        assert signatures(during) == ["v1", "v1"]

        clock.advance(seconds=59)
        assert accepted(next_request(), old)
        clock.advance(seconds=1)
        after = next_request()
        assert (accepted(after, old), accepted(after, new), signatures(after)) == (False, True, ["v1"])
        view = desk.endpoints.get(desk.office.tenant_id, endpoint_id, now=clock.now())
        assert view["secrets_in_grace"] == 0


def test_what_waits_is_signed_with_the_secrets_of_the_moment_it_is_sent(desk: Desk) -> None:
    with Receiver(in_turn(500, 200)) as receiver, desk.office.open():
        endpoint_id, old = desk.register(receiver.url())
        desk.complete()
        desk.wait(endpoint_id, "retrying")
        new = desk.rotate(endpoint_id, grace_seconds=0)
        desk.office.clock.advance(seconds=7)
        desk.wait(endpoint_id, "delivered")
    first, second = receiver.requests
    assert first.body == second.body
    assert (accepted(first, old), accepted(first, new)) == (True, False)
    assert (accepted(second, old), accepted(second, new)) == (False, True)


def test_without_a_grace_all_old_secrets_are_revoked_at_once(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        endpoint_id, first = desk.register(receiver.url())
        second = desk.rotate(endpoint_id, grace_seconds=DAY)
        leaked = desk.rotate(endpoint_id, grace_seconds=DAY)
        fresh = desk.rotate(endpoint_id, grace_seconds=0)
        desk.complete()
        [request] = receiver.wait_for(1)
    assert [accepted(request, each) for each in (first, second, leaked, fresh)] == [False, False, False, True]


def test_the_newest_five_sign_and_the_newest_comes_first(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        endpoint_id, first = desk.register(receiver.url())
        secrets = [first] + [desk.rotate(endpoint_id, grace_seconds=DAY) for _ in range(MAX_SECRETS)]
        desk.complete()
        [request] = receiver.wait_for(1)
    assert [accepted(request, each) for each in secrets] == [False] + [True] * MAX_SECRETS
    newest, *_ = request.headers["webhook-signature"].split(" ")
    request.headers["webhook-signature"] = newest
    assert accepted(request, secrets[-1])


def test_each_rotation_keeps_its_own_grace(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        endpoint_id, first = desk.register(receiver.url())
        second = desk.rotate(endpoint_id, grace_seconds=3 * DAY)
        third = desk.rotate(endpoint_id, grace_seconds=DAY)
        desk.office.clock.advance(seconds=2 * DAY)
        desk.complete()
        [request] = receiver.wait_for(1)
    # Verifiers refuse what was signed two days ahead of their clock: only the signatures are compared.
    assert signatures(request) == ["v1", "v1"]
    at = desk.office.clock.now()
    for secret, fits in ((first, True), (second, False), (third, True)):
        try:
            verify_webhook(request.body, request.headers, secret, now=at)
            assert fits
        except WebhookNotVerified:
            assert not fits


@pytest.mark.parametrize(("sign_with", "kinds"), [("v1", ["v1"]), ("v1a", ["v1a"]), ("both", ["v1", "v1a"])])
@pytest.mark.parametrize("form", ["standard", "cloudevents", "thin"])
def test_each_form_is_signed_as_it_travels(desk: Desk, sign_with: str, kinds: list[str], form: str) -> None:
    with Receiver() as receiver, desk.office.open():
        _, secret = desk.register(receiver.url(), sign_with=sign_with, format=form)
        desk.complete(result='{"text": "\u00fc"}')
        [request] = receiver.wait_for(1)
    public_key = desk.endpoints.public_key(desk.office.tenant_id)
    assert signatures(request) == kinds
    assert accepted(request, secret) == ("v1" in kinds)
    assert signed_for(request, public_key) == ("v1a" in kinds)
    another = Desk(Office(desk.office.database))
    assert not signed_for(request, another.endpoints.public_key(another.office.tenant_id))


def test_v1a_goes_on_through_a_rotation_of_the_secret(desk: Desk) -> None:
    with Receiver() as receiver, desk.office.open():
        endpoint_id, old = desk.register(receiver.url(), sign_with="both")
        public_key = desk.endpoints.public_key(desk.office.tenant_id)
        new = desk.rotate(endpoint_id, grace_seconds=DAY)
        desk.complete()
        [request] = receiver.wait_for(1)
    assert signatures(request) == ["v1", "v1", "v1a"]
    assert (accepted(request, old), accepted(request, new), signed_for(request, public_key)) == (True,) * 3


def test_the_tenants_secret_is_rotated_likewise_and_no_endpoint_uses_it(desk: Desk) -> None:
    office = desk.office

    def rotate(grace_seconds: int, secret: str | None = None) -> str:
        return rotate_webhook_secret(
            office.database,
            office.box,
            office.tenant_id,
            grace_seconds=grace_seconds,
            secret=secret,
            now=office.clock.now(),
        )

    with Receiver() as receiver, Receiver() as other, office.open():
        _, of_endpoint = desk.register(other.url())

        def next_request() -> Request:
            desk.complete(webhook_url=receiver.url())
            return receiver.wait_for(len(receiver.requests) + 1)[-1]

        assert accepted(next_request(), office.secret)
        given = new_webhook_secret()
        assert rotate(60, given) == given
        during = next_request()
        assert [accepted(during, each) for each in (office.secret, given)] == [True, True]
        office.clock.advance(seconds=60)
        after = next_request()
        assert [accepted(after, each) for each in (office.secret, given)] == [False, True]
        leaked, fresh = rotate(DAY), rotate(0)
        revoked = next_request()
        assert [accepted(revoked, each) for each in (given, leaked, fresh)] == [False, False, True]
        for request in other.wait_for(4):
            assert accepted(request, of_endpoint)
            assert not accepted(request, office.secret)


def test_a_grace_is_over_at_its_last_microsecond(desk: Desk) -> None:
    endpoint_id, _ = desk.register("http://127.0.0.1:9000/")
    desk.rotate(endpoint_id, grace_seconds=7 * DAY)
    tenant_id, now = desk.office.tenant_id, desk.office.clock.now()
    for moment, count in ((timedelta(days=7, microseconds=-1), 1), (timedelta(days=7), 0)):
        view = desk.endpoints.get(tenant_id, endpoint_id, now=now + moment)
        assert view["secrets_in_grace"] == count
