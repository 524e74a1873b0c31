from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook

from laneway.errors import WebhookNotVerified
from laneway.webhooks.secrets import new_webhook_secret
from laneway.webhooks.signing import sign, signature_headers, verify_webhook

# The test vector that the Standard Webhooks libraries publish.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
STAMP = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
NOW = datetime.fromtimestamp(STAMP, UTC)
HEADERS = signature_headers([sign(SECRET, ID, STAMP, BODY)], message_id=ID, timestamp=STAMP)


def reason(
    headers: dict[str, str], *, body: bytes = BODY, secret: str = SECRET, now: datetime = NOW
) -> object:
    with pytest.raises(WebhookNotVerified) as refused:
        verify_webhook(body, headers, secret, now=now)
    assert secret.removeprefix("whsec_") not in str(refused.value)
    return refused.value.facts["reason"]


def test_the_published_vector_is_reproduced() -> None:
    assert sign(SECRET, ID, STAMP, BODY) == SIGNATURE
    assert sign(SECRET.removeprefix("whsec_"), ID, STAMP, BODY) == SIGNATURE


@given(st.text(max_size=200), st.text(alphabet="abc123_", min_size=1))
def test_the_reference_library_accepts_what_we_sign(text: str, message_id: str) -> None:
    secret, now = new_webhook_secret(), datetime.now(UTC)
    body = b'{"text":"%b"}' % text.encode("utf-8").hex().encode()
    stamp = int(now.timestamp())
    headers = signature_headers(
        [sign(secret, message_id, stamp, body)], message_id=message_id, timestamp=stamp
    )
    assert Webhook(secret).verify(body, headers) == verify_webhook(body, headers, secret, now=now)


def test_we_accept_what_the_reference_library_signs() -> None:
    signature = Webhook(SECRET).sign(ID, NOW, BODY.decode())
    assert verify_webhook(BODY, HEADERS | {"webhook-signature": signature}, SECRET, now=NOW) == {
        "test": 2432232314
    }


def test_an_id_with_a_dot_is_not_signed() -> None:
    with pytest.raises(ValueError, match="dot"):
        sign(SECRET, "a.1", STAMP, BODY)


def test_a_secret_that_is_not_base64_is_not_repeated_in_the_error() -> None:
    with pytest.raises(ValueError, match="whsec_") as bad:
        sign("whsec_not base64!", ID, STAMP, BODY)
    assert "not base64!" not in str(bad.value)


def test_header_names_match_in_any_case() -> None:
    headers = {name.title(): value for name, value in HEADERS.items()}
    assert verify_webhook(BODY, headers, SECRET, now=NOW) == {"test": 2432232314}


def test_one_fitting_signature_of_several_is_enough() -> None:
    other = sign(new_webhook_secret(), ID, STAMP, BODY)
    headers = HEADERS | {"webhook-signature": f"v1a,x {other} {SIGNATURE}"}
    verify_webhook(BODY, headers, SECRET, now=NOW)


def test_a_signature_holds_for_five_minutes_either_way_and_not_a_second_more() -> None:
    for seconds in (-300, 300):
        verify_webhook(BODY, HEADERS, SECRET, now=NOW + timedelta(seconds=seconds))
    assert reason(HEADERS, now=NOW + timedelta(seconds=301)) == "too_old"
    assert reason(HEADERS, now=NOW - timedelta(seconds=301)) == "too_new"


@pytest.mark.parametrize("name", list(HEADERS))
def test_a_missing_header_is_named(name: str) -> None:
    assert reason({key: value for key, value in HEADERS.items() if key != name}) == "missing_header"


@pytest.mark.parametrize("stamp", ["", "soon", "-1", "1e9", "9" * 5000, "\u0661"])
def test_a_timestamp_that_is_no_number_is_refused(stamp: str) -> None:
    assert reason(HEADERS | {"webhook-timestamp": stamp}) == "bad_timestamp"


def test_whatever_is_changed_the_signature_no_longer_fits() -> None:
    assert reason(HEADERS, body=BODY + b" ") == "no_match"
    assert reason(HEADERS, secret=new_webhook_secret()) == "no_match"
    assert reason(HEADERS | {"webhook-id": ID + "x"}) == "no_match"
    assert reason(HEADERS | {"webhook-timestamp": str(STAMP + 1)}) == "no_match"
    for signature in ("", "v1", "v1,", "v2" + SIGNATURE[2:], SIGNATURE[:-1], "\u00e9\udc80", SIGNATURE[3:]):
        assert reason(HEADERS | {"webhook-signature": signature}) == "no_match"
