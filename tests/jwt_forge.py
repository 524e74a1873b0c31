"""Good tokens of three issuers, and all that somebody may try instead."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

RSA_ISSUER = "https://login.example.org/"
EC_ISSUER = "https://ec.example.org/realms/a"
HMAC_ISSUER = "https://shared.example.org/"
AUDIENCE = "laneway"
SECRET = "correct-horse-battery-staple-0123456789"
PADDING = "=" * 10_000


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def part(value: object) -> str:
    return b64(value if isinstance(value, bytes) else json.dumps(value).encode())


class Forge:
    """The issuers' keys, and an enemy's; `now` is in seconds since 1970."""

    def __init__(self, now: float) -> None:
        self.now = int(now)
        made = _keys()
        self.rsa: RSAKey = made[0]
        self.enemy: RSAKey = made[1]
        self.ec: ECKey = made[2]
        self.ed: OKPKey = made[3]
        self.hmac: OctKey = OctKey.import_key(SECRET)

    def issuers(self) -> str:
        """The setting that trusts all three."""
        return json.dumps(
            [
                {
                    "issuer": RSA_ISSUER,
                    "audience": AUDIENCE,
                    "key": self.rsa.as_pem(private=False).decode(),
                    "algorithms": ["RS256"],
                },
                {
                    "issuer": EC_ISSUER,
                    "audience": AUDIENCE,
                    "key": self.ec.as_pem(private=False).decode(),
                    "algorithms": ["ES256"],
                    "tenant_claim": "org",
                    "roles_claim": "groups",
                },
                {"issuer": HMAC_ISSUER, "audience": AUDIENCE, "key": SECRET, "algorithms": ["HS256"]},
            ]
        )

    def claims(self, **changes: Any) -> dict[str, Any]:
        """What a good token of RSA_ISSUER says, but for `changes`; None takes a claim away."""
        said = {
            "iss": RSA_ISSUER,
            "aud": AUDIENCE,
            "sub": "alice",
            "tenant": "default",
            "roles": ["user"],
            "iat": self.now,
            "exp": self.now + 300,
        } | changes
        return {name: value for name, value in said.items() if value is not None}

    def token(
        self, header: Mapping[str, Any] | None = None, *, key: Any = None, signed_as: str = "", **claims: Any
    ) -> str:
        """A token of RSA_ISSUER's key (or `key`), with changes to its header and claims."""
        return self.sign(
            {"alg": "RS256", "typ": "JWT"} | dict(header or {}), self.claims(**claims), key=key, as_=signed_as
        )

    def sign(self, header: object, payload: object, *, key: Any = None, as_: str = "") -> str:
        """Signed with `key` by its algorithm; by HMAC-SHA256 with a key that is bytes."""
        text = f"{part(header)}.{part(payload)}"
        if isinstance(key, bytes):
            return f"{text}.{b64(hmac.digest(key, text.encode(), 'sha256'))}"
        algorithm = as_ or (header.get("alg") if isinstance(header, dict) else "") or "RS256"
        model = JWSRegistry.algorithms[algorithm if algorithm in JWSRegistry.algorithms else "RS256"]
        return f"{text}.{b64(model.sign(text.encode(), key or self.rsa))}"

    def ec_token(self, **claims: Any) -> str:
        said = {"iss": EC_ISSUER, "org": "default", "tenant": None, "roles": None} | claims
        return self.token({"alg": "ES256"}, key=self.ec, **said)

    def hmac_token(self, **claims: Any) -> str:
        return self.token({"alg": "HS256"}, key=self.hmac, **({"iss": HMAC_ISSUER} | claims))


@cache
def _keys() -> tuple[RSAKey, RSAKey, ECKey, OKPKey]:
    return (
        RSAKey.generate_key(2048),
        RSAKey.generate_key(2048),
        ECKey.generate_key("P-256"),
        OKPKey.generate_key("Ed25519"),
    )


def _public_pem(f: Forge) -> bytes:
    return f.rsa.as_pem(private=False)


def _unsigned(f: Forge, algorithm: str) -> str:
    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(f.claims())}."


def _twice(f: Forge, claim: str, second: object) -> str:
    text = json.dumps(f.claims())[:-1] + f', "{claim}": {json.dumps(second)}}}'
    return f.sign({"alg": "RS256", "typ": "JWT"}, text.encode())


def _bent(token: str, segment: int) -> str:
    parts = token.split(".")
    changed = parts[segment]
    parts[segment] = changed[:10] + ("A" if changed[10] != "A" else "B") + changed[11:]
    return ".".join(parts)


FORGED: dict[str, Callable[[Forge], str]] = {
    # The signature
    "unsigned": lambda f: _unsigned(f, "none"),
    "unsigned, in capitals": lambda f: _unsigned(f, "NONE"),
    "unsigned, in mixed letters": lambda f: _unsigned(f, "nOnE"),
    "unsigned, with a signature": lambda f: _unsigned(f, "none") + "AAAA",
    "none, over the issuer's own signature": lambda f: f.token({"alg": "none"}, signed_as="RS256"),
    "without its signature": lambda f: f.token().rpartition(".")[0] + ".",
    "signed by somebody else": lambda f: f.token(key=f.enemy),
    "HMAC with the public key": lambda f: f.token({"alg": "HS256"}, key=_public_pem(f)),
    "HMAC with the public key, called RS256": lambda f: f.token(key=_public_pem(f)),
    "HMAC with an empty secret": lambda f: f.token({"alg": "HS256"}, key=b"", iss=HMAC_ISSUER),
    "HMAC with another secret": lambda f: f.token(
        {"alg": "HS256"}, key=SECRET[:-1].encode(), iss=HMAC_ISSUER
    ),
    "a longer HMAC than the issuer's": lambda f: f.token({"alg": "HS512"}, key=f.hmac, iss=HMAC_ISSUER),
    "the issuer's key, another algorithm": lambda f: f.token({"alg": "RS512"}),
    "the issuer's key, another padding": lambda f: f.token({"alg": "PS256"}),
    "the issuer's key, another padding called RS256": lambda f: f.token(signed_as="PS256"),
    "EdDSA where RSA is wanted": lambda f: f.token({"alg": "EdDSA"}, key=f.ed),
    "no algorithm": lambda f: f.sign({"typ": "JWT"}, f.claims()),
    "a list of algorithms": lambda f: f.sign({"alg": ["RS256"], "typ": "JWT"}, f.claims(), as_="RS256"),
    "a changed payload": lambda f: _bent(f.token(), 1),
    "a changed header": lambda f: _bent(f.token(), 0),
    "a changed signature": lambda f: _bent(f.token(), 2),
    "another token's signature": lambda f: (
        f.token().rpartition(".")[0] + "." + f.token(sub="bob").rpartition(".")[2]
    ),
    "a signature of zeros": lambda f: f.token().rpartition(".")[0] + "." + b64(bytes(256)),
    "ES256 of zeros": lambda f: f.ec_token().rpartition(".")[0] + "." + b64(bytes(64)),
    "ES256 in DER": lambda f: (
        f.ec_token().rpartition(".")[0] + "." + b64(b"\x30\x06\x02\x01\x01\x02\x01\x01")
    ),
    # The issuer
    "an unknown issuer": lambda f: f.token(iss="https://evil.example.org/"),
    "no issuer": lambda f: f.token(iss=None),
    "a list of issuers": lambda f: f.token(iss=[RSA_ISSUER]),
    "a part of the issuer": lambda f: f.token(iss=RSA_ISSUER[:-1]),
    "more than the issuer": lambda f: f.token(iss=RSA_ISSUER + "x"),
    "the issuer in capitals": lambda f: f.token(iss=RSA_ISSUER.upper()),
    "one issuer's key for another": lambda f: f.token(iss=EC_ISSUER, org="default"),
    "one issuer's key and algorithm for another": lambda f: f.token(
        {"alg": "ES256"}, key=f.ec, tenant="default"
    ),
    # Whom it is for, and when
    "another audience": lambda f: f.token(aud="somebody-else"),
    "no audience": lambda f: f.token(aud=None),
    "a part of the audience": lambda f: f.token(aud="lane"),
    "an audience in a longer word": lambda f: f.token(aud="not-laneway-at-all"),
    "audiences as an object": lambda f: f.token(aud={AUDIENCE: True}),
    "expired": lambda f: f.token(iat=f.now - 600, exp=f.now),
    "no end": lambda f: f.token(exp=None),
    "an end that is a text": lambda f: f.token(exp=str(f.now + 300)),
    "an end that is true": lambda f: f.token(exp=True),
    "an end beyond all time": lambda f: f.token(exp=10**30),
    "an infinite end": lambda f: f.sign(
        {"alg": "RS256", "typ": "JWT"}, json.dumps(f.claims()).replace(str(f.now + 300), "1e999").encode()
    ),
    "an end that is no number": lambda f: f.sign(
        {"alg": "RS256", "typ": "JWT"}, json.dumps(f.claims(exp=float("nan"))).encode()
    ),
    "made in the future": lambda f: f.token(iat=f.now + 3600, exp=f.now + 7200),
    "good only later": lambda f: f.token(nbf=f.now + 3600, exp=f.now + 7200),
    "no beginning": lambda f: f.token(iat=None),
    "longer than a day": lambda f: f.token(exp=f.now + 86401),
    "longer than a day, of which most is over": lambda f: f.token(iat=f.now - 86400, exp=f.now + 300),
    "over before it began": lambda f: f.token(iat=f.now + 20, exp=f.now + 10),
    # Whom it speaks for
    "no tenant": lambda f: f.token(tenant=None),
    "an empty tenant": lambda f: f.token(tenant=""),
    "a tenant that is not here": lambda f: f.token(tenant="nobody"),
    "a list of tenants": lambda f: f.token(tenant=["default"]),
    "a tenant with a NUL": lambda f: f.token(tenant="default\0"),
    "the other issuer's tenant claim": lambda f: f.token(tenant=None, org="default"),
    "no subject": lambda f: f.token(sub=None),
    "a subject with a NUL": lambda f: f.token(sub="a\0b"),
    "a subject that is a number": lambda f: f.token(sub=7),
    "roles that are an object": lambda f: f.token(roles={"admin": True}),
    "a role that is a number": lambda f: f.token(roles=[1]),
    # The header
    "keys of its own (jwk)": lambda f: f.token({"jwk": f.enemy.as_dict(private=False)}, key=f.enemy),
    "keys elsewhere (jku)": lambda f: f.token({"jku": "https://evil.example.org/jwks"}),
    "certificates elsewhere (x5u)": lambda f: f.token({"x5u": "https://evil.example.org/c.pem"}),
    "certificates of its own (x5c)": lambda f: f.token({"x5c": ["AAAA"]}),
    "an extension that must be known (crit)": lambda f: f.token({"crit": ["exp"], "exp": 1}),
    "an unencoded payload (b64)": lambda f: f.token({"b64": False, "crit": ["b64"]}),
    "a token in a token (cty)": lambda f: f.token({"cty": "JWT"}),
    "another type": lambda f: f.token({"typ": "dpop+jwt"}),
    "no type": lambda f: f.sign({"alg": "RS256"}, f.claims()),
    "a type that is a list": lambda f: f.token({"typ": ["JWT"]}),
    "a key id that is a path": lambda f: f.token({"kid": "../../../dev/null"}, key=f.enemy),
    "a key id that is no text": lambda f: f.token({"kid": {"a": 1}}),
    "a key id too long": lambda f: f.token({"kid": "k" * 201}),
    # The form
    "two parts": lambda f: f.token().rpartition(".")[0],
    "four parts": lambda f: f.token() + ".AAAA",
    "five parts, as if encrypted": lambda f: ".".join(
        [part({"alg": "dir", "enc": "A256GCM"}), *["AAAA"] * 4]
    ),
    "only dots": lambda f: "..",
    "a payload that is a list": lambda f: f.sign({"alg": "RS256", "typ": "JWT"}, [f.claims()]),
    "a payload that is no JSON": lambda f: f.sign({"alg": "RS256", "typ": "JWT"}, b"{"),
    "a payload that is no UTF-8": lambda f: f.sign({"alg": "RS256", "typ": "JWT"}, b'{"iss":"\xff"}'),
    "a header that is a text": lambda f: f"{part('RS256')}.{part(f.claims())}.AAAA",
    "a claim twice": lambda f: _twice(f, "tenant", "default"),
    "an issuer twice": lambda f: _twice(f, "iss", RSA_ISSUER),
    "padded base64": lambda f: f.token().replace(".", "=."),
    "base64 of the other alphabet": lambda f: f.token().replace("_", "/").replace("-", "+") + "+",
    "a line break": lambda f: f.token().replace(".", ".\n", 1),
    "very deep JSON": lambda f: f.sign({"alg": "RS256", "typ": "JWT"}, b"[" * 2000 + b"]" * 2000),
    "too long": lambda f: f.token(padding=PADDING),
    "a token of a token": lambda f: f"lwt_{f.token()}",
}
