"""Whatever is wrong with a key, a token or a JWT: one 401, the same for all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from api_client import BASE, LocalApi
from factories import change
from jwt_forge import FORGED, Forge
from laneway import models
from laneway.api.edge import Edge
from laneway.engine.access.callers import Role, _check, key_id_of, make_key
from laneway.engine.access.tokens import TokenSigner, token_end
from laneway.webhooks.secrets import KEY_BYTES, SecretBox

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def checked(body: str) -> str:
    """A key with this body and the right checksum."""
    return body + _check(body)


def swapped(text: str) -> str:
    """Two neighbours that differ, exchanged."""
    at = next(i for i in range(25, 60) if text[i] != text[i + 1])
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


MALFORMED: dict[str, Callable[[str], str]] = {
    "empty": lambda k: "",
    "a blank": lambda k: " ",
    "only the prefix": lambda k: "lw_",
    "prefix and kind": lambda k: "lw_live_",
    "only the id": lambda k: k[:20],
    "no secret": lambda k: k[:21],
    "no checksum": lambda k: k[:-6],
    "a character less": lambda k: k[:-1],
    "a character more": lambda k: k + "0",
    "twice": lambda k: k + k,
    "two, with a blank": lambda k: f"{k} {k}",
    "two, with a comma": lambda k: f"{k},{k}",
    "another kind": lambda k: checked(k[:-6].replace("_live_", "_prod_")),
    "the other kind with the old checksum": lambda k: k.replace("_live_", "_test_"),
    "another brand": lambda k: checked("sk" + k[2:-6]),
    "capitals": lambda k: k.upper(),
    "small letters": lambda k: k.lower(),
    "dashes": lambda k: k.replace("_", "-"),
    "backwards": lambda k: k[::-1],
    "a bent checksum": lambda k: k[:-1] + ("A" if k[-1] != "A" else "B"),
    "a bent secret": lambda k: k[:30] + ("A" if k[30] != "A" else "B") + k[31:],
    "a bent secret with the right checksum": lambda k: checked(
        k[:30] + ("A" if k[30] != "A" else "B") + k[31:-6]
    ),
    "two neighbours swapped": swapped,
    "a bent id with the right checksum": lambda k: checked(
        k[:10] + ("a" if k[10] != "a" else "b") + k[11:-6]
    ),
    "an id in capitals": lambda k: checked(k[:8] + k[8:20].upper() + k[20:-6]),
    "an id with a quote": lambda k: checked(k[:8] + "'" + k[9:-6]),
    "an id like a pattern": lambda k: checked(k[:8] + "%" * 12 + k[20:-6]),
    "a secret with a slash": lambda k: checked(k[:25] + "/" + k[26:-6]),
    "a secret of zeros": lambda k: checked(k[:21] + "0" * 43),
    "an unknown key": lambda k: make_key(),
    "a letter of another alphabet": lambda k: k[:-1] + "а",  # noqa: RUF001 - Cyrillic
    "a wide digit": lambda k: k[:8] + "０" + k[9:],  # noqa: RUF001
    "half a character": lambda k: k + "\xff",
    "quoted": lambda k: f'"{k}"',
    "in base64": lambda k: "bHdfbGl2ZV8=",
    "as JSON": lambda k: json.dumps({"key": k}),
    "very long": lambda k: k + "x" * 8000,
    "of dots": lambda k: "." * 100,
}


class Stranger:
    """Asks with a credential, each time from another address, so that no limit comes first."""

    def __init__(self, api: LocalApi) -> None:
        self._api = api
        self._asked = 0

    def ask(self, credential: str, **headers: str) -> httpx.Response:
        self._asked += 1
        address = (f"198.51.{self._asked // 250}.{self._asked % 250 + 1}", 1234)
        given = {"Authorization": f"Bearer {credential}", "X-Request-Id": "r"} | headers
        raw = {name: value.encode("utf-8") for name, value in given.items()}

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(Edge(self._api.app), client=address)
            async with httpx.AsyncClient(transport=transport, base_url="http://laneway.test") as client:
                return await client.get(f"{BASE}/jobs", headers=raw)

        return self._api.portal.call(send)


def seen(response: httpx.Response) -> tuple[int, str, tuple[tuple[str, str], ...]]:
    """All that a stranger learns, but for the state of the limiters: who sends nothing has one less."""
    headers = tuple(
        (name, "…" if "ratelimit" in name else value) for name, value in sorted(response.headers.items())
    )
    return response.status_code, response.text, headers


@pytest.fixture
def forge() -> Forge:
    return Forge(time.time())


@pytest.fixture
def guarded(local: Callable[..., LocalApi], forge: Forge) -> LocalApi:
    """An API that takes JWTs too."""
    return local(jwt_issuers=forge.issuers())


def other_refusals(api: LocalApi) -> dict[str, str]:
    """Credentials that were good once, or are so elsewhere."""
    revoked, expired, elsewhere = api.key(), api.key(), api.key()
    change(api.database, models.api_keys, key_id_of(revoked), revoked_at=LONG_AGO)
    change(api.database, models.api_keys, key_id_of(expired), expires_at=LONG_AGO)
    change(api.database, models.api_keys, key_id_of(elsewhere), allowed_cidrs=["203.0.113.0/24"])
    now = datetime.now(UTC)
    box = SecretBox.from_settings(api.settings)
    caller = api.app.state.runtime.callers.authenticate(api.key())
    of_revoked = api.app.state.runtime.callers.authenticate(key := api.key())
    change(api.database, models.api_keys, key_id_of(key), revoked_at=LONG_AGO)
    api.app.state.runtime.callers.forget([key_id_of(key)])
    how: Any = {"scopes": None, "job_id": None}
    return {
        "a revoked key": revoked,
        "an expired key": expired,
        "a key from the wrong address": elsewhere,
        "an expired token": TokenSigner(box).make(caller, expires_at=LONG_AGO, **how)[0],
        "a token of a revoked key": TokenSigner(box).make(of_revoked, expires_at=token_end(now, 60), **how)[
            0
        ],
        "a token of another installation": TokenSigner(SecretBox({"k": b"\7" * KEY_BYTES})).make(
            caller, expires_at=token_end(now, 60), **how
        )[0],
        "the prefix of a token": "lwt_",
    }


def test_every_bad_credential_gets_the_same_401(guarded: LocalApi, forge: Forge) -> None:
    stranger = Stranger(guarded)
    good = guarded.key()
    bad = {f"key: {name}": bend(good) for name, bend in MALFORMED.items()}
    bad |= {f"JWT: {name}": forged(forge) for name, forged in FORGED.items() if name != "a line break"}
    bad |= other_refusals(guarded)
    assert len(MALFORMED) >= 30
    assert len(FORGED) >= 40
    answers = {name: seen(stranger.ask(credential)) for name, credential in bad.items()}
    answers["nothing"] = seen(stranger.ask("", Authorization="", **{"X-API-Key": ""}))
    answers["Basic"] = seen(stranger.ask("", Authorization="Basic YTpi"))
    answers["a good key without its scheme"] = seen(stranger.ask("", Authorization=good))
    one = answers["nothing"]
    assert {name: answer for name, answer in answers.items() if answer != one} == {}
    assert one[0] == 401
    assert json.loads(one[1])["code"] == "unauthenticated"
    assert ("www-authenticate", "Bearer") in one[2]
    for credential in (good, forge.token(), forge.ec_token(), forge.hmac_token()):
        assert stranger.ask(credential).status_code == 200


def test_two_credentials_are_none(guarded: LocalApi) -> None:
    """Which of them a proxy in between would believe is not known."""
    good = guarded.key()

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Edge(guarded.app))
        async with httpx.AsyncClient(transport=transport, base_url="http://laneway.test") as client:
            twice = [("Authorization", f"Bearer {good}"), ("Authorization", f"Bearer {guarded.key()}")]
            return await client.get(f"{BASE}/jobs", headers=twice)

    assert guarded.portal.call(send).status_code == 401


def test_a_jwt_speaks_for_its_subject_in_its_tenant(guarded: LocalApi, forge: Forge) -> None:
    guarded.tenant("acme")
    for tenant in ("acme", guarded.tenant("acme"), guarded.tenant("acme").upper()):
        me = guarded.get("/me", key=forge.token(tenant=tenant, roles="operator")).json()
        assert (me["tenant_id"], me["subject"], me["role"], me["key_id"]) == (
            guarded.tenant("acme"),
            "alice@login.example.org/",
            "operator",
            None,
        )
        assert me["expires_at"] is not None
    mine = guarded.make(key=forge.token(tenant="acme"))
    assert guarded.get(f"/jobs/{mine['id']}", key=forge.token(tenant="acme")).status_code == 200
    for other in (forge.token(tenant="acme", sub="bob"), forge.ec_token(org="acme"), guarded.alice):
        assert guarded.get(f"/jobs/{mine['id']}", key=other).status_code == 404


def test_no_header_names_a_tenant_or_a_role(guarded: LocalApi, forge: Forge) -> None:
    other = guarded.tenant("other")
    job = guarded.make(key=guarded.key(tenant="other"))
    for headers in (
        {"X-Tenant-Id": other},
        {"X-Tenant": "other"},
        {"X-Forwarded-User": "root"},
        {"X-Role": "admin"},
    ):
        for key in (guarded.alice, forge.token()):
            assert guarded.get(f"/jobs/{job['id']}", key=key, headers=headers).status_code == 404
            assert guarded.get("/me", key=key, headers=headers).json()["role"] == Role.USER
    assert guarded.get(f"/jobs/{job['id']}?tenant_id={other}").status_code in (404, 422)
