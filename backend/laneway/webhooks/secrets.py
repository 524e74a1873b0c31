"""Secrets at rest: what signs a webhook is kept encrypted, under a key the database never sees.

AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce. Each text is sealed for one place
(`context`, authenticated but not stored), so that a row's secret copied into another row does not open.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

if TYPE_CHECKING:
    from laneway.settings import Settings

KEY_BYTES = 32
NONCE_BYTES = 12
KEY_FILE = "encryption.key"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
MAX_SECRETS = 5  # that sign at the same time
GRACE_SECONDS = 24 * 3600
MAX_GRACE_SECONDS = 7 * 24 * 3600
SECRET_PREFIX = "whsec_"  # noqa: S105 - the name of the form, from Standard Webhooks
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


class SecretBox:
    """Seals and opens short texts. The first of its keys seals, all of them open."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        if not keys:
            raise ValueError("a secret box needs at least one key")
        self._keys = dict(keys)
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._sealing_id = next(iter(keys))

    @classmethod
    def from_settings(cls, settings: Settings) -> SecretBox:
        """The box of `LANEWAY_ENCRYPTION_KEYS`, else of the data folder's key file, made when it is missing.

        Raises ValueError for keys of the wrong form and PermissionError for a key file that others can read.
        """
        text = settings.encryption_keys.get_secret_value()
        if text:
            return cls(parse_keys(text, source="LANEWAY_ENCRYPTION_KEYS"))
        path = settings.data_dir / KEY_FILE
        return cls(parse_keys(_key_file(path), source=str(path)))

    def seal(self, text: str, context: str) -> str:
        """`text` encrypted, as `key id.nonce.ciphertext`; opens only under the same `context`."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self._sealing_id].encrypt(nonce, text.encode(), context.encode())
        return f"{self._sealing_id}.{_base64(nonce)}.{_base64(sealed)}"

    def open(self, sealed: str, context: str) -> str:
        """The text that was sealed. Raises ValueError: unknown key, another context, or changed since."""
        parts = sealed.split(".")
        if len(parts) != 3:
            raise ValueError("not a sealed text")
        key_id, nonce, ciphertext = parts
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise ValueError(f"sealed with the key {key_id!r}, which is not among the configured ones")
        try:
            return cipher.decrypt(_bytes(nonce), _bytes(ciphertext), context.encode()).decode()
        except InvalidTag:
            raise ValueError(
                "sealed for another place, with another key of that id, or changed since"
            ) from None
        except binascii.Error:
            raise ValueError("not a sealed text") from None

    def derived(self, purpose: str) -> dict[str, bytes]:
        """A key of 32 bytes for each of the box's, in their order, that is for `purpose` only (RFC 5869)."""
        return {
            key_id: HKDF(SHA256(), KEY_BYTES, salt=None, info=f"laneway/{purpose}".encode()).derive(key)
            for key_id, key in self._keys.items()
        }

    def reseal(self, sealed: str, context: str) -> str:
        """The same text under the first key; as it was when that one sealed it. Raises ValueError."""
        if sealed.partition(".")[0] == self._sealing_id:
            return sealed
        return self.seal(self.open(sealed, context), context)


def tenant_context(tenant_id: str) -> str:
    """The context under which `tenants.webhook_secret` is sealed."""
    return f"tenants/{tenant_id}/webhook_secret"


def target_headers_context(tenant_id: str) -> str:
    """The context under which the headers of a tenant's HTTP jobs are sealed, in `jobs.parameters`."""
    return f"tenants/{tenant_id}/http_jobs"


def new_webhook_secret() -> str:
    """A fresh signing secret: `whsec_` and 32 random bytes in base64 (Standard Webhooks 1.0.0)."""
    return SECRET_PREFIX + _base64(secrets.token_bytes(32))


def live_secrets(newest: str, old: Iterable[Mapping[str, str]], *, now: datetime) -> list[str]:
    """The sealed secrets that sign now: the newest, and the old ones whose grace is not over."""
    return [newest] + [each["sealed"] for each in old if datetime.fromisoformat(each["expires_at"]) > now]


def keep_old(
    newest: str, old: Sequence[Mapping[str, str]], *, grace_seconds: int, now: datetime
) -> list[dict[str, str]]:
    """The old secrets after a rotation: the newest until now, and those whose grace still runs.

    Five sign at once, at most. Without a grace none of the old ones signs any more: one had leaked.
    """
    if grace_seconds == 0:
        return []
    until = (now + timedelta(seconds=grace_seconds)).isoformat()
    living = [dict(each) for each in old if datetime.fromisoformat(each["expires_at"]) > now]
    return [{"sealed": newest, "expires_at": until}, *living][: MAX_SECRETS - 1]


def parse_webhook_secret(text: str) -> str:
    """`text`, when it is `whsec_` and base64 of 24 to 64 bytes. Raises ValueError that does not repeat it."""
    wrong = (
        f"a webhook secret is `{SECRET_PREFIX}` and base64 of {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes"
    )
    try:
        size = len(_bytes(text.removeprefix(SECRET_PREFIX)))
    except ValueError:
        raise ValueError(wrong) from None
    if not text.startswith(SECRET_PREFIX) or not MIN_SECRET_BYTES <= size <= MAX_SECRET_BYTES:
        raise ValueError(wrong)
    return text


def parse_keys(text: str, *, source: str) -> dict[str, bytes]:
    """`id:base64,…` as keys in that order. Raises ValueError that names `source` and never the key."""
    keys: dict[str, bytes] = {}
    for part in text.split(","):
        key_id, _, encoded = part.strip().partition(":")
        if not _KEY_ID.fullmatch(key_id) or not encoded:
            raise ValueError(f"{source}: each key is `id:base64`, the id of letters, digits, - and _")
        try:
            key = _bytes(encoded)
        except ValueError:  # also binascii.Error
            raise ValueError(f"{source}: the key {key_id!r} is not base64") from None
        if len(key) != KEY_BYTES:
            raise ValueError(f"{source}: the key {key_id!r} has {len(key)} bytes, and needs {KEY_BYTES}")
        if key_id in keys:
            raise ValueError(f"{source}: the key id {key_id!r} is there twice")
        keys[key_id] = key
    return keys


def _key_file(path: Path) -> str:
    """The key file's text; made first when it is missing, by whichever process is first.

    The file appears whole under its name or not at all: written beside it and linked, and `link` fails
    when another process was faster, whose key is then the one everybody reads.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(_new_key())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    with path.open() as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise PermissionError(f"{path} can be read by others (mode {mode:04o}); run: chmod 600 {path}")
        return file.read().strip()


def _new_key() -> str:
    # The id is the key's fingerprint: keys made on two machines never share one.
    key = secrets.token_bytes(KEY_BYTES)
    return f"k{hashlib.sha256(key).hexdigest()[:12]}:{_base64(key)}\n"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
