"""What production refuses to start with."""

from __future__ import annotations

import base64
import os
from typing import Any

import pytest

from laneway.api.app import create_app
from laneway.engine.access.production import NotForProduction, need_fit_for_production, troubles
from laneway.settings import Settings


def key(secret: bytes, name: str = "k1") -> str:
    return f"{name}:{base64.b64encode(secret).decode()}"


RANDOM = key(bytes.fromhex("d2c9a1f04be83375610c7e95b8da42ff19860a5ec37712e4ab903df268c1570b"))
OPEN = "0.0.0.0"


def settings(**fields: Any) -> Settings:
    return Settings(**({"environment": "production", "encryption_keys": RANDOM} | fields))


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"encryption_keys": ""}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"encryption_keys": "secret"}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"encryption_keys": key(os.urandom(31))}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"encryption_keys": key(bytes(32))}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"encryption_keys": key(b"changeme" * 4)}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"encryption_keys": key(b"my-very-long-secret-passphrase-1")}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"encryption_keys": f"{RANDOM},{key(bytes(32), 'k2')}"}, "LANEWAY_ENCRYPTION_KEYS"),
        ({"host": OPEN}, "LANEWAY_ALLOWED_HOSTS"),
        ({"host": "::"}, "LANEWAY_ALLOWED_HOSTS"),
        ({"host": "192.0.2.1"}, "LANEWAY_ALLOWED_HOSTS"),
        ({"host": "jobs.internal"}, "LANEWAY_ALLOWED_HOSTS"),
        ({"trusted_proxies": "*"}, "LANEWAY_TRUSTED_PROXIES"),
        ({"trusted_proxies": "0.0.0.0/0"}, "LANEWAY_TRUSTED_PROXIES"),
        ({"trusted_proxies": "10.0.0.0/8,::/0"}, "LANEWAY_TRUSTED_PROXIES"),
        ({"jwt_issuers": "[]"}, "LANEWAY_JWT_ISSUERS"),
    ],
)
def test_a_dangerous_setting_is_named_and_refused(fields: dict[str, Any], setting: str) -> None:
    wrong = settings(**fields)
    assert [each.setting for each in troubles(wrong)] == [setting]
    with pytest.raises(NotForProduction, match=setting) as caught:
        create_app(wrong)
    assert all(each.remedy for each in troubles(wrong))
    for secret in ("changeme", "passphrase", base64.b64encode(bytes(32)).decode()):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"encryption_keys": "", "accept_key_file": True},
        {"encryption_keys": f"{RANDOM},{RANDOM.replace('k1', 'k2')}"},
        {"host": OPEN, "allowed_hosts": "jobs.example.org"},
        {"host": OPEN, "public_url": "https://jobs.example.org"},
        {"host": "::1"},
        {"trusted_proxies": "10.0.0.0/8"},
    ],
)
def test_what_is_set_right_starts(fields: dict[str, Any]) -> None:
    need_fit_for_production(settings(**fields), api=True)


def test_random_keys_are_taken_for_random() -> None:
    for _ in range(200):
        assert list(troubles(settings(encryption_keys=key(os.urandom(32))))) == []


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(NotForProduction) as caught:
        need_fit_for_production(settings(encryption_keys="", host=OPEN, trusted_proxies="*"), api=True)
    for name in ("LANEWAY_ENCRYPTION_KEYS", "LANEWAY_ALLOWED_HOSTS", "LANEWAY_TRUSTED_PROXIES"):
        assert name in str(caught.value)


def test_a_worker_needs_the_keys_and_no_doors() -> None:
    need_fit_for_production(settings(host=OPEN, trusted_proxies="*"), api=False)
    with pytest.raises(NotForProduction):
        need_fit_for_production(settings(encryption_keys=""), api=False)


def test_on_a_developers_machine_nothing_is_refused() -> None:
    need_fit_for_production(
        Settings(host=OPEN, trusted_proxies="*", encryption_keys=key(bytes(32))), api=True
    )
