import base64

import pytest
from pydantic import SecretStr

from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox, new_webhook_secret, parse_keys, tenant_context

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def encoded(key: bytes) -> str:
    return base64.b64encode(key).decode()


def test_what_was_sealed_opens_again() -> None:
    box = SecretBox({"k1": OLD})
    sealed = box.seal("whsec_x\u00fc", "here")
    assert box.open(sealed, "here") == "whsec_x\u00fc"
    assert sealed.startswith("k1.")
    assert "whsec" not in sealed
    assert box.seal("whsec_x\u00fc", "here") != sealed  # a nonce is used once


def test_a_sealed_text_opens_in_no_other_place() -> None:
    box = SecretBox({"k1": OLD})
    with pytest.raises(ValueError, match="another place"):
        box.open(box.seal("text", tenant_context("a")), tenant_context("b"))


def test_a_changed_text_does_not_open() -> None:
    box = SecretBox({"k1": OLD})
    key_id, nonce, ciphertext = box.seal("text", "here").split(".")
    flipped = bytearray(base64.b64decode(ciphertext))
    flipped[0] ^= 1
    with pytest.raises(ValueError, match="changed since"):
        box.open(f"{key_id}.{nonce}.{encoded(bytes(flipped))}", "here")


@pytest.mark.parametrize(
    "sealed", ["", "k1", "k1..", "k1.a.b", "k1.AAAA.AAAA", "k1.a.b.c", "k1.\u00e9.\u00e9"]
)
def test_what_is_not_a_sealed_text_does_not_open(sealed: str) -> None:
    with pytest.raises(ValueError):
        SecretBox({"k1": OLD}).open(sealed, "here")


def test_the_first_key_seals_and_every_key_opens() -> None:
    sealed = SecretBox({"k1": OLD}).seal("text", "here")
    rotated = SecretBox({"k2": NEW, "k1": OLD})
    assert rotated.open(sealed, "here") == "text"
    assert rotated.seal("text", "here").startswith("k2.")
    with pytest.raises(ValueError, match="'k1'"):
        SecretBox({"k2": NEW}).open(sealed, "here")


def test_keys_come_from_the_setting_in_its_order() -> None:
    setting = SecretStr(f"k2:{encoded(NEW)}, k1:{encoded(OLD)}")
    box = SecretBox.from_settings(Settings(encryption_keys=setting))
    assert box.seal("text", "here").startswith("k2.")
    assert box.open(SecretBox({"k1": OLD}).seal("text", "here"), "here") == "text"


@pytest.mark.parametrize(
    "text",
    [
        encoded(OLD),
        f":{encoded(OLD)}",
        "k1:",
        "k1:secret key",
        f"k.1:{encoded(OLD)}",
        f"{'k' * 33}:{encoded(OLD)}",
        f"k1:{encoded(OLD[:31])}",
        f"k1:{encoded(OLD + b'x')}",
        f"k1:{encoded(OLD)},k1:{encoded(NEW)}",
        f"k1:{encoded(OLD)},",
        "k1:\u00e9",
    ],
)
def test_a_bad_key_list_is_an_error_that_names_its_source_and_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"^THE_SOURCE: ") as bad:
        parse_keys(text, source="THE_SOURCE")
    for key in (encoded(OLD), encoded(NEW), "secret key"):
        assert key not in str(bad.value)


def test_a_key_id_may_have_32_characters() -> None:
    assert parse_keys(f"{'k' * 32}:{encoded(OLD)}", source="x") == {"k" * 32: OLD}


def test_a_webhook_secret_is_whsec_and_32_random_bytes() -> None:
    secret = new_webhook_secret()
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
    assert new_webhook_secret() != secret


def test_a_box_shows_no_key() -> None:
    assert encoded(OLD) not in repr(vars(SecretBox({"k1": OLD})))
