"""Browser tokens: no more than their maker has, for a while, and made here."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from typing import Any

import pytest

from factories import NOW, TENANT
from laneway.clock import new_id
from laneway.engine.access.callers import ROLE_SCOPES, AccessScope, Caller, Role
from laneway.engine.access.tokens import MAX_TOKEN_CHARACTERS, MAX_TOKEN_SECONDS, TokenSigner, token_end
from laneway.errors import Forbidden, Unauthenticated, Unprocessable
from laneway.webhooks.secrets import KEY_BYTES, SecretBox

OLD, NEW = b"\1" * KEY_BYTES, b"\2" * KEY_BYTES
OLGA = Caller(TENANT, "olga", Role.OPERATOR, "abcdefghijkl")
JOB = new_id()


@pytest.fixture
def signer() -> TokenSigner:
    return TokenSigner(SecretBox({"k1": OLD}))


def make(signer: TokenSigner, caller: Caller = OLGA, **how: Any) -> str:
    wanted = {"scopes": None, "job_id": None, "expires_at": token_end(NOW, 60)} | how
    return signer.make(caller, **wanted)[0]


def test_a_token_speaks_for_its_maker(signer: TokenSigner) -> None:
    token = signer.read(make(signer), now=NOW)
    assert token.key_id == OLGA.key_id
    assert (token.caller.tenant_id, token.caller.subject, token.caller.role) == (
        TENANT,
        "olga",
        Role.OPERATOR,
    )
    assert token.caller.is_token
    assert token.caller.expires_at == NOW + timedelta(seconds=60)
    assert token.caller.scopes == ROLE_SCOPES[Role.OPERATOR] - {AccessScope.KEYS_MANAGE}


def test_a_token_of_a_job_looks_at_it_and_may_be_let_cancel_it(signer: TokenSigner) -> None:
    looks = signer.read(make(signer, job_id=JOB), now=NOW).caller
    assert (looks.job_id, looks.scopes) == (JOB, {AccessScope.JOBS_READ})
    cancels = make(signer, job_id=JOB, scopes=[AccessScope.JOBS_READ, AccessScope.JOBS_WRITE])
    assert signer.read(cancels, now=NOW).caller.scopes == {AccessScope.JOBS_READ, AccessScope.JOBS_WRITE}


@pytest.mark.parametrize(
    ("caller", "how", "error"),
    [
        (OLGA, {"scopes": [AccessScope.ADMIN]}, Forbidden),
        (OLGA, {"scopes": [AccessScope.KEYS_MANAGE]}, Unprocessable),
        (OLGA, {"job_id": JOB, "scopes": [AccessScope.CHAINS_READ]}, Unprocessable),
        (Caller(TENANT, "s", Role.USER, allowed=frozenset()), {"job_id": JOB}, Forbidden),
        (
            Caller(TENANT, "s", Role.USER, allowed=frozenset({AccessScope.JOBS_READ})),
            {"scopes": [AccessScope.JOBS_WRITE]},
            Forbidden,
        ),
        (Caller(TENANT, "s", Role.ADMIN, is_token=True), {}, Forbidden),
    ],
)
def test_nobody_gets_a_token_that_may_more(
    signer: TokenSigner, caller: Caller, how: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(signer, caller, **how)


def test_a_token_ends_after_a_quarter_of_an_hour_and_not_after_its_makers_credential(
    signer: TokenSigner,
) -> None:
    assert token_end(NOW, 10**6) == NOW + timedelta(seconds=MAX_TOKEN_SECONDS)
    assert MAX_TOKEN_SECONDS == 900
    short = Caller(TENANT, "s", Role.USER, expires_at=NOW + timedelta(seconds=9.9))
    assert signer.read(make(signer, short), now=NOW).caller.expires_at == NOW + timedelta(seconds=9)
    text = make(signer)
    signer.read(text, now=NOW + timedelta(seconds=59.999))
    with pytest.raises(Unauthenticated, match="expired"):
        signer.read(text, now=NOW + timedelta(seconds=60))


def test_a_changed_character_anywhere_is_refused(signer: TokenSigner) -> None:
    text = make(signer)
    for place in range(4, len(text)):
        changed = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(Unauthenticated):
            signer.read(changed, now=NOW)


@pytest.mark.parametrize(
    "bend",
    [
        lambda t: "lwt_",
        lambda t: "lwt_..",
        lambda t: t[:-1],
        lambda t: t + "A",
        lambda t: t + "=",
        lambda t: t + ".",
        lambda t: t.rpartition(".")[0],
        lambda t: t.rpartition(".")[0] + ".",
        lambda t: t.replace("lwt_k1", "lwt_k2"),
        lambda t: t.replace("lwt_k1", "lwt_"),
        lambda t: t + "é",
        lambda t: "lwt_k1." + "A" * MAX_TOKEN_CHARACTERS + ".A",
        lambda t: (
            "lwt_k1." + base64.urlsafe_b64encode(json.dumps({"r": "admin"}).encode()).decode() + ".AAAA"
        ),
    ],
)
def test_what_was_not_made_here_is_refused(signer: TokenSigner, bend: Any) -> None:
    with pytest.raises(Unauthenticated):
        signer.read(bend(make(signer)), now=NOW)


def test_the_first_encryption_key_signs_and_all_verify() -> None:
    old = make(TokenSigner(SecretBox({"k1": OLD})))
    rotated = TokenSigner(SecretBox({"k2": NEW, "k1": OLD}))
    rotated.read(old, now=NOW)
    new = make(rotated)
    assert new.startswith("lwt_k2.")
    with pytest.raises(Unauthenticated):
        TokenSigner(SecretBox({"k2": NEW})).read(old, now=NOW)
    with pytest.raises(Unauthenticated):  # another key under the same id
        TokenSigner(SecretBox({"k1": NEW})).read(old, now=NOW)


def test_the_signing_key_is_not_the_encryption_key_and_is_for_tokens_only() -> None:
    box = SecretBox({"k1": OLD})
    derived = box.derived("browser-tokens")
    assert list(derived) == ["k1"]
    assert len(derived["k1"]) == KEY_BYTES
    assert derived["k1"] not in (OLD, box.derived("something-else")["k1"])
    assert derived == SecretBox({"k1": OLD}).derived("browser-tokens")
