"""The setting of JWT issuers, and the keys behind a URL: fetched, kept, and fetched again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from jwt_forge import AUDIENCE, SECRET, Forge
from laneway.clock import FrozenClock
from laneway.engine.access.jwt import JwtVerifier
from laneway.engine.access.jwt_issuers import MAX_ISSUERS, parse_issuers
from laneway.engine.access.key_sets import (
    FETCH_SECONDS,
    FRESH_SECONDS,
    KEPT_SECONDS,
    MAX_KEYS_OF_A_SET,
    MAX_SET_BYTES,
    RETRY_SECONDS,
    FetchedKeys,
    read_set,
)
from laneway.errors import Unauthenticated, Unavailable

URL = "https://login.example.org/jwks.json"
RSA_1, RSA_2 = RSAKey.generate_key(2048, {"kid": "1"}), RSAKey.generate_key(2048, {"kid": "2"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})


def jwks(*keys: Any) -> bytes:
    return json.dumps(
        {"keys": [k if isinstance(k, dict | int) else k.as_dict(private=False) for k in keys]}
    ).encode()


class Idp:
    """Answers what it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: Callable[[], httpx.Response] = lambda: httpx.Response(200, content=jwks(RSA_1))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert str(request.url) == URL
        self.asked += 1
        return self.answer()


@pytest.fixture
def idp() -> Idp:
    return Idp()


@pytest.fixture
def keys(idp: Idp, clock: FrozenClock) -> FetchedKeys:
    return FetchedKeys(URL, clock, transport=httpx.MockTransport(idp))


def down() -> httpx.Response:
    raise httpx.ConnectError("refused")


# Fetching


def test_a_set_is_fetched_once_and_kept_for_its_time(keys: FetchedKeys, idp: Idp, clock: FrozenClock) -> None:
    for _ in range(3):
        found = keys.find("1", "RS256")
        assert found is not None
        assert found.kid == "1"
    clock.advance(seconds=FRESH_SECONDS)
    keys.find("1", "RS256")
    assert idp.asked == 1
    clock.advance(seconds=0.001)
    keys.find("1", "RS256")
    assert idp.asked == 2


def test_an_unknown_key_id_fetches_at_most_every_half_minute(
    keys: FetchedKeys, idp: Idp, clock: FrozenClock
) -> None:
    assert keys.find("2", "RS256") is None
    idp.answer = lambda: httpx.Response(200, content=jwks(RSA_1, RSA_2))
    for _ in range(50):
        assert keys.find("2", "RS256") is None
    assert idp.asked == 1
    clock.advance(seconds=RETRY_SECONDS)
    assert keys.find("2", "RS256") is not None
    assert idp.asked == 2


def test_while_the_issuer_is_down_the_set_is_kept_for_a_day(
    keys: FetchedKeys, idp: Idp, clock: FrozenClock
) -> None:
    keys.find("1", "RS256")
    idp.answer = down
    for _ in range(4):
        clock.advance(seconds=KEPT_SECONDS / 4)
        assert keys.find("1", "RS256") is not None
    clock.advance(seconds=1)
    with pytest.raises(Unavailable):
        keys.find("1", "RS256")
    idp.answer = lambda: httpx.Response(200, content=jwks(RSA_1))
    clock.advance(seconds=RETRY_SECONDS)
    assert keys.find("1", "RS256") is not None


def test_without_any_keys_nobody_is_refused_or_let_in(
    keys: FetchedKeys, idp: Idp, clock: FrozenClock
) -> None:
    idp.answer = down
    for _ in range(5):
        with pytest.raises(Unavailable):
            keys.find("1", "RS256")
    assert idp.asked == 1, "and the issuer is not asked by each of them"
    clock.advance(seconds=RETRY_SECONDS)
    with pytest.raises(Unavailable):
        keys.find("1", "RS256")
    assert idp.asked == 2


def test_one_fetches_and_nobody_waits_for_it(keys: FetchedKeys, idp: Idp, clock: FrozenClock) -> None:
    begun, finish = threading.Event(), threading.Event()

    def slow() -> httpx.Response:
        begun.set()
        assert finish.wait(30)
        return httpx.Response(200, content=jwks(RSA_1))

    idp.answer = slow
    found: list[object] = []
    fetcher = threading.Thread(target=lambda: found.append(keys.find("1", "RS256")))
    fetcher.start()
    assert begun.wait(30)
    with pytest.raises(Unavailable):  # there is nothing to go on with
        keys.find("1", "RS256")
    finish.set()
    fetcher.join(30)
    assert found[0] is not None

    clock.advance(seconds=FRESH_SECONDS + 1)
    begun.clear()
    finish.clear()
    fetcher = threading.Thread(target=lambda: found.append(keys.find("1", "RS256")))
    fetcher.start()
    assert begun.wait(30)
    assert keys.find("1", "RS256") is not None, "the old set is good enough meanwhile"
    with pytest.raises(Unavailable):  # the set that is on its way may hold it
        keys.find("2", "RS256")
    finish.set()
    fetcher.join(30)
    assert idp.asked == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda: httpx.Response(404),
        lambda: httpx.Response(302, headers={"Location": "https://evil.example.org/"}),
        lambda: httpx.Response(200, content=b"<html>"),
        lambda: httpx.Response(200, content=b"[]"),
        lambda: httpx.Response(200, content=jwks()),
        lambda: httpx.Response(200, content=jwks(*[RSA_1] * (MAX_KEYS_OF_A_SET + 1))),
        lambda: httpx.Response(200, content=b" " * (MAX_SET_BYTES + 1)),
        lambda: httpx.Response(200, content=b"[" * 50_000),
        down,
    ],
)
def test_a_bad_answer_changes_nothing(
    keys: FetchedKeys, idp: Idp, clock: FrozenClock, answer: Callable[[], httpx.Response]
) -> None:
    keys.find("1", "RS256")
    idp.answer = answer
    clock.advance(seconds=FRESH_SECONDS + 1)
    keys.refresh()
    assert idp.asked == 2
    assert keys.find("1", "RS256") is not None


def test_a_set_may_be_as_long_as_the_limit(keys: FetchedKeys, idp: Idp) -> None:
    full = jwks(*[RSA_1] * MAX_KEYS_OF_A_SET)
    idp.answer = lambda: httpx.Response(200, content=full + b" " * (MAX_SET_BYTES - len(full)))
    assert len(read_set(full)) == MAX_KEYS_OF_A_SET
    assert keys.find("1", "RS256") is None, "a hundred keys of one id are none"
    assert FETCH_SECONDS == 5


@pytest.mark.filterwarnings("ignore:Key size should be:joserfc.errors.SecurityWarning")
def test_only_public_signature_keys_of_a_set_verify() -> None:
    secret = OctKey.import_key(SECRET, {"kid": "oct"}).as_dict(private=True)
    encrypting = RSA_2.as_dict(private=False) | {"use": "enc"}
    wrapping = RSA_2.as_dict(private=False) | {"key_ops": ["wrapKey"]}
    short = {"kty": "RSA", "n": "AQAB" * 40, "e": "AQAB", "kid": "short"}
    unknown = {"kty": "PQC", "kid": "x"}
    bent = [RSA_2.as_dict(private=False) | odd for odd in ({"key_ops": 5}, {"kty": ["RSA"]}, {"use": None})]
    bare = {"kty": "EC", "crv": "P-256", "x": "AA"}
    found = read_set(jwks(secret, encrypting, wrapping, short, unknown, bare, *bent, 7, EC))
    assert [key.kid for key in found] == ["ec"]
    private = read_set(jwks(RSA_1.as_dict(private=True)))
    assert not private[0].is_private


def test_a_key_verifies_only_its_own_kind_and_algorithm(clock: FrozenClock) -> None:
    rs512_only = RSA_2.as_dict(private=False) | {"alg": "RS512"}
    edwards = OKPKey.generate_key("Ed25519", {"kid": "ed"})
    exchange = OKPKey.generate_key("X25519", {"kid": "x"})
    body = jwks(RSA_1, rs512_only, EC, edwards, exchange)
    keys = FetchedKeys(URL, clock, transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body)))
    assert {
        (kid, algorithm)
        for kid in ("1", "2", "ec", "ed", "x")
        for algorithm in ("RS256", "RS512", "PS256", "ES256", "ES384", "EdDSA", "Ed25519", "HS256")
        if keys.find(kid, algorithm) is not None
    } == {
        *(("1", "RS256"), ("1", "RS512"), ("1", "PS256"), ("2", "RS512")),
        *(("ec", "ES256"), ("ed", "EdDSA"), ("ed", "Ed25519")),
    }
    assert keys.find(None, "ES256") is not None, "without an id the only one is meant"
    assert keys.find(None, "RS512") is None, "of two none is"


def test_a_token_is_verified_with_a_fetched_key(clock: FrozenClock, idp: Idp) -> None:
    forge = Forge(clock.now().timestamp())
    issuers = parse_issuers(
        json.dumps([{"issuer": "https://login.example.org/", "audience": AUDIENCE, "jwks_url": URL}]),
        clock,
        fetch=lambda url, clock: FetchedKeys(url, clock, transport=httpx.MockTransport(idp)),
    )
    verifier = JwtVerifier(issuers, clock)
    verifier.refresh()
    assert idp.asked == 1
    verifier.verify(forge.token({"kid": "1"}, key=RSA_1))
    with pytest.raises(Unauthenticated):
        verifier.verify(forge.token({"kid": "1"}, key=RSA_2))
    with pytest.raises(Unauthenticated):
        verifier.verify(forge.token({"kid": "2"}, key=RSA_2))
    assert idp.asked == 1


@pytest.mark.parametrize(
    "url", ["http://login.example.org/jwks", "http://127.0.0.1/", "file:///etc/passwd", ""]
)
def test_keys_come_over_https_only(url: str, clock: FrozenClock) -> None:
    with pytest.raises(ValueError, match="https"):
        FetchedKeys(url, clock)


# The setting


def one(**fields: Any) -> str:
    issuer = {"issuer": "https://a/", "audience": "x", "jwks_url": URL} | fields
    return json.dumps([{name: value for name, value in issuer.items() if value is not None}])


PEM = RSA_1.as_pem(private=False).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "1 to 50"),
        ("{", "neither JSON"),
        ("[1]", "issuer 1"),
        (one(issuer=None), "issuer"),
        (one(audience=None), "audience"),
        (one(audience=""), "audience"),
        (one(jwks_url=None), "exactly one"),
        (one(key=PEM), "exactly one"),
        (one(jwks_url="http://a/jwks"), "jwks_url"),
        (one(algorithms=[]), "algorithms"),
        (one(algorithms=["none"]), "unknown algorithms"),
        (one(algorithms=["HS512"]), "unknown algorithms"),
        (one(algorithms=["HS256"]), "stands alone"),
        (one(algorithms=["RS256", "HS256"], key=PEM, jwks_url=None), "stands alone"),
        (one(algorithms=["HS256"], key=PEM, jwks_url=None), "no shared secret"),
        (one(algorithms=["HS256"], key="x" * 64, jwks_url=None), "random"),
        (one(algorithms=["HS256"], key="0123456789abcdef0123456789abcde", jwks_url=None), "32 random bytes"),
        (one(algorithms=["ES256"], key=PEM, jwks_url=None), "fits none"),
        (one(key="secret", jwks_url=None), "public key"),
        (one(tenant="x"), "tenant"),
        (json.dumps(json.loads(one()) * 2), "twice"),
        (json.dumps(json.loads(one()) * (MAX_ISSUERS + 1)), "1 to 50"),
        ("/nowhere/issuers.toml", "No such file"),
    ],
)
def test_a_bad_setting_is_refused_and_says_why(text: str, why: str, clock: FrozenClock) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_issuers(text, clock)
    assert "hunter" not in str(caught.value)


def test_a_key_is_in_no_message(clock: FrozenClock) -> None:
    with pytest.raises(ValueError, match="random") as caught:
        parse_issuers(one(algorithms=["HS256"], key="hunter2", jwks_url=None), clock)
    assert "hunter2" not in str(caught.value)


def test_the_shortest_shared_secret_has_32_bytes(clock: FrozenClock) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    [issuer] = parse_issuers(one(algorithms=["HS256"], key=secret, jwks_url=None), clock)
    assert issuer.algorithms == {"HS256"}


def test_issuers_may_stand_in_a_file(tmp_path: Path, clock: FrozenClock) -> None:
    file = tmp_path / "issuers.toml"
    file.write_text('[[issuers]]\nissuer = "https://a/"\naudience = "x"\njwks_url = "https://a/jwks"\n')
    [issuer] = parse_issuers(str(file), clock)
    assert issuer.issuer == "https://a/"
    assert issuer.algorithms == {"RS256", "ES256", "EdDSA", "Ed25519"}
    file.write_text("issuers = ")
    with pytest.raises(ValueError, match="neither JSON"):
        parse_issuers(str(file), clock)


def test_a_file_with_a_secret_is_the_owners_alone(tmp_path: Path, clock: FrozenClock) -> None:
    file = tmp_path / "issuers.toml"
    file.write_text(
        f'[[issuers]]\nissuer = "https://a/"\naudience = "x"\nkey = "{SECRET}"\nalgorithms = ["HS256"]\n'
    )
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        parse_issuers(str(file), clock)
    file.chmod(0o600)
    assert len(parse_issuers(str(file), clock)) == 1
