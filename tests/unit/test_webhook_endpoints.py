import base64

import pytest
from pydantic import ValidationError

from laneway.api.webhooks import Rotation
from laneway.clock import FrozenClock
from laneway.webhooks.endpoints import EndpointChange, NewEndpoint
from laneway.webhooks.papers import Papers
from laneway.webhooks.secrets import (
    GRACE_SECONDS,
    MAX_GRACE_SECONDS,
    SecretBox,
    keep_old,
    live_secrets,
    new_webhook_secret,
    parse_webhook_secret,
)

URL = "https://hooks.example.org/"


def test_a_change_says_only_what_was_given() -> None:
    assert EndpointChange().model_dump(exclude_unset=True) == {}
    assert EndpointChange(headers=None).model_dump(exclude_unset=True) == {"headers": None}


def test_a_new_endpoint_cannot_be_disabled_from_the_start() -> None:
    with pytest.raises(ValidationError):
        NewEndpoint.model_validate({"url": URL, "status": "disabled"})


def test_no_repr_tells_a_secret() -> None:
    secret = new_webhook_secret()
    made = NewEndpoint(url=URL, headers={"X-Key": "canary"}, secret=secret)
    rotation = Rotation(grace_seconds=0, secret=secret)
    papers = Papers([secret], "whsk_canary", {"X-Key": "canary"}, "canary")
    for shown in (repr(made), str(made), repr(rotation), repr(papers)):
        assert secret not in shown
        assert "canary" not in shown


def test_null_is_no_value_in_the_schema_of_what_it_does_not_clear() -> None:
    properties = EndpointChange.model_json_schema()["properties"]
    nullable = {name for name, each in properties.items() if {"type": "null"} in each.get("anyOf", [])}
    assert nullable == {
        "description",
        "headers",
        "max_per_second",
        "client_certificate",
        "ca_certificate",
    }


def test_a_secret_is_24_to_64_bytes() -> None:
    for size in (24, 64):
        text = "whsec_" + base64.b64encode(bytes(size)).decode()
        assert parse_webhook_secret(text) == text
    for size in (0, 23, 65):
        with pytest.raises(ValueError, match="24 to 64 bytes"):
            parse_webhook_secret("whsec_" + base64.b64encode(bytes(size)).decode())
    for wrong in ("", "whsec_canary!", base64.b64encode(bytes(32)).decode(), "whsec_\u00fc"):
        with pytest.raises(ValueError, match="24 to 64 bytes") as refused:
            parse_webhook_secret(wrong)
        assert "canary" not in str(refused.value)


def test_a_day_and_a_week_are_the_usual_and_the_longest_grace() -> None:
    assert (Rotation().grace_seconds, MAX_GRACE_SECONDS) == (GRACE_SECONDS, 604_800)


def test_old_secrets_sign_until_their_grace_is_over_and_are_forgotten_then(clock: FrozenClock) -> None:
    old = keep_old("a", [], grace_seconds=60, now=clock.now())
    clock.advance(seconds=30)
    old = keep_old("b", old, grace_seconds=60, now=clock.now())
    assert live_secrets("c", old, now=clock.now()) == ["c", "b", "a"]
    clock.advance(seconds=30)
    assert live_secrets("c", old, now=clock.now()) == ["c", "b"]
    assert [each["sealed"] for each in keep_old("c", old, grace_seconds=60, now=clock.now())] == ["c", "b"]
    assert keep_old("c", old, grace_seconds=0, now=clock.now()) == []


def test_a_text_is_sealed_again_only_when_another_key_sealed_it() -> None:
    old, new = SecretBox({"k1": bytes(32)}), SecretBox({"k2": bytes(range(32)), "k1": bytes(32)})
    sealed = old.seal("text", "here")
    again = new.reseal(sealed, "here")
    assert again.startswith("k2.")
    assert new.open(again, "here") == "text"
    assert new.reseal(again, "here") == again
    assert old.reseal(sealed, "here") == sealed
    with pytest.raises(ValueError, match="'k1'"):
        SecretBox({"k2": bytes(32)}).reseal(sealed, "here")
    with pytest.raises(ValueError, match="another place"):
        new.reseal(sealed, "there")
