"""What looks for secrets in logs and stores finds each kind of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from canaries import main, secrets_in
from laneway.engine.access.callers import make_key
from laneway.webhooks.secrets import new_webhook_secret

KINDS = {
    "an API key": make_key(),
    "a webhook secret": new_webhook_secret(),
    "a browser token": "lwt_" + "a" * 60,
    "a private key": "-----BEGIN PRIVATE KEY-----",
}


@pytest.mark.parametrize("secret", KINDS.values(), ids=KINDS)
def test_a_secret_in_a_log_is_found(tmp_path: Path, secret: str) -> None:
    log, store = tmp_path / "0-api.log", tmp_path / "laneway.db"
    store.write_bytes(b"rows")
    log.write_text('{"event": "job_made"}\n')
    assert main(tmp_path) == 0
    log.write_text(f'{{"event": "job_made", "key": "{secret}"}}\n')
    assert len(secrets_in([log])) == 1
    assert main(tmp_path) == 1


def test_a_folder_without_logs_proves_nothing(tmp_path: Path) -> None:
    assert main(tmp_path) == 1
