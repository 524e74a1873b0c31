import base64

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from laneway.webhooks.asymmetric import new_private_key, public_key, sign

# RFC 8032, section 7.1, test 1: the key pair of an empty message.
PRIVATE = (
    "whsk_"
    + base64.b64encode(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    ).decode()
)
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")


def test_the_public_key_is_the_published_one_of_its_private_key() -> None:
    assert public_key(PRIVATE) == "whpk_" + base64.b64encode(PUBLIC).decode()


@pytest.mark.parametrize("body", [b"{}", b"", "\u00fc".encode(), bytes(range(256))])
def test_id_second_and_body_are_signed(body: bytes) -> None:
    version, _, signature = sign(PRIVATE, "msg_1", 1700000000, body).partition(",")
    assert version == "v1a"
    key = Ed25519PublicKey.from_public_bytes(PUBLIC)
    key.verify(base64.b64decode(signature, validate=True), b"msg_1.1700000000." + body)
    for other in (
        b"msg_2.1700000000." + body,
        b"msg_1.1700000001." + body,
        b"msg_1.1700000000." + body + b"x",
    ):
        with pytest.raises(InvalidSignature):
            key.verify(base64.b64decode(signature), other)


def test_a_new_key_is_32_bytes_and_never_the_same() -> None:
    keys = {new_private_key() for _ in range(3)}
    assert len(keys) == 3
    assert {len(base64.b64decode(key.removeprefix("whsk_"), validate=True)) for key in keys} == {32}


@pytest.mark.parametrize("wrong", ["", "whsk_", "whsk_AAAA", "whsk_canary!", PRIVATE + "AAAA", "whsk_\u00fc"])
def test_what_is_no_key_is_an_error_that_does_not_repeat_it(wrong: str) -> None:
    for use in (public_key, lambda text: sign(text, "msg_1", 1, b"")):
        with pytest.raises(ValueError, match="32 bytes") as refused:
            use(wrong)
        assert "canary" not in str(refused.value)


def test_an_id_with_a_dot_is_not_signed() -> None:
    with pytest.raises(ValueError, match="dot"):
        sign(PRIVATE, "msg.1", 1, b"{}")
