"""JWTs: good ones say who calls, and nothing else passes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from jwt_forge import FORGED, Forge
from laneway.clock import FrozenClock
from laneway.engine.access.callers import Role
from laneway.engine.access.jwt import MAX_JWT_CHARACTERS, JwtVerifier
from laneway.engine.access.jwt_issuers import parse_issuers
from laneway.errors import Unauthenticated


@pytest.fixture
def forge(clock: FrozenClock) -> Forge:
    return Forge(clock.now().timestamp())


@pytest.fixture
def verifier(forge: Forge, clock: FrozenClock) -> JwtVerifier:
    return JwtVerifier(parse_issuers(forge.issuers(), clock), clock)


def test_a_good_token_says_tenant_subject_role_and_end(
    forge: Forge, verifier: JwtVerifier, clock: FrozenClock
) -> None:
    claims = verifier.verify(forge.token(roles=["viewer", "operator", "user"]))
    assert (claims.tenant, claims.subject, claims.role) == (
        "default",
        "alice@login.example.org/",
        Role.OPERATOR,
    )
    assert claims.expires_at == clock.now() + timedelta(seconds=300)


@pytest.mark.parametrize(
    ("changes", "role"),
    [
        ({"roles": "admin"}, Role.ADMIN),
        ({"roles": ["user", "admin"]}, Role.ADMIN),
        ({"roles": []}, Role.USER),
        ({"roles": None}, Role.USER),
        ({"roles": ["Admin", "administrator"]}, Role.USER),
    ],
)
def test_the_strongest_known_role_counts(
    forge: Forge, verifier: JwtVerifier, changes: dict[str, Any], role: Role
) -> None:
    assert verifier.verify(forge.token(**changes)).role is role


def test_each_issuer_has_its_key_algorithm_and_claims(forge: Forge, verifier: JwtVerifier) -> None:
    of_ec = verifier.verify(forge.ec_token(org="acme", groups=["operator"]))
    assert (of_ec.tenant, of_ec.role, of_ec.subject) == (
        "acme",
        Role.OPERATOR,
        "alice@ec.example.org/realms/a",
    )
    assert verifier.verify(forge.hmac_token()).subject == "alice@shared.example.org/"


@pytest.mark.parametrize(
    "good",
    [
        {"aud": ["other", "laneway"]},
        {"exp": "day"},
        {"sub": "x" * 255},
    ],
)
def test_the_edges_of_what_passes(forge: Forge, verifier: JwtVerifier, good: dict[str, Any]) -> None:
    values = {"day": forge.now + 86400}
    verifier.verify(forge.token(**{k: values.get(str(v), v) for k, v in good.items()}))


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_clocks_may_differ_by_half_a_minute_and_not_more(
    forge: Forge, verifier: JwtVerifier, claim: str
) -> None:
    verifier.verify(forge.token(**{claim: forge.now + 30}))
    with pytest.raises(Unauthenticated, match="future"):
        verifier.verify(forge.token(**{claim: forge.now + 31}))


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt"])
def test_the_types_of_access_tokens_pass(forge: Forge, verifier: JwtVerifier, kind: str) -> None:
    verifier.verify(forge.token({"typ": kind, "x5t": "AAAA", "of-our-issuer": 1}))


def test_a_long_subject_becomes_its_hash_and_stays_unique(forge: Forge, verifier: JwtVerifier) -> None:
    one, other = (verifier.verify(forge.token(sub=last * 200)).subject for last in "ab")
    assert one.startswith("jwt:")
    assert one != other
    assert len(one) <= 100


def test_the_length_of_a_token_is_bounded(forge: Forge, verifier: JwtVerifier) -> None:
    def of_length(characters: int) -> str:
        spare = 0
        while len(token := forge.token(spare="x" * spare)) < characters:
            spare += max(1, (characters - len(token)) * 3 // 4 - 2)
        return token

    longest = of_length(MAX_JWT_CHARACTERS - 2)
    assert len(longest) <= MAX_JWT_CHARACTERS
    verifier.verify(longest)
    with pytest.raises(Unauthenticated, match="malformed"):
        verifier.verify(of_length(MAX_JWT_CHARACTERS + 1))


@pytest.mark.parametrize("name", sorted(set(FORGED) - {"a tenant that is not here"}))
def test_a_forged_token_is_refused(forge: Forge, verifier: JwtVerifier, name: str) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(FORGED[name](forge))


def test_there_are_at_least_forty_of_them() -> None:
    assert len(FORGED) >= 40


def test_a_token_ends_at_its_second(forge: Forge, verifier: JwtVerifier, clock: FrozenClock) -> None:
    token = forge.token()
    clock.advance(seconds=299.999)
    verifier.verify(token)
    clock.advance(seconds=0.001)
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify(token)
