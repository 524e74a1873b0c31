"""How long it takes to refuse a key, by what is wrong with it: `python -m bench.key_timing`.

Run with tests/ on the path. A stranger shall not learn by the time which ids exist: keys with a guessed
secret take the same to refuse, but for the few microseconds in which a row is read. The last line says how
few. Who has the right secret of a revoked or expired key may notice. A test counts the steps instead
(tests/contract/test_keys.py); this looks at the clock.
"""

from __future__ import annotations

import hmac
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.cli import migrate
from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.engine.access import credentials
from laneway.engine.access.callers import Role, _check, create_key, key_id_of, make_key
from laneway.engine.access.credentials import Callers
from laneway.errors import Unauthenticated

ROUNDS = 2000
NEAR = "192.0.2.0/24"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


class Steps(list[Any]):
    """What a refusal does, one after the other: statements by their text, comparisons by their length."""

    def __init__(self, database: Database, monkeypatch: Any) -> None:
        super().__init__()
        sa.event.listen(database.engine, "before_cursor_execute", lambda *a: self.append(("sql", a[2])))
        compare = hmac.compare_digest

        def compared(one: bytes, other: bytes) -> bool:
            self.append(("compare", len(one)))
            return compare(one, other)

        monkeypatch.setattr(credentials.hmac, "compare_digest", compared)


@dataclass(frozen=True)
class BadKey:
    """A well-formed key that opens nothing; `good` is the one that it was guessed from, if any."""

    text: str
    good: str | None = None


def bad_keys(database: Database) -> dict[str, BadKey]:
    """By what is wrong with them."""
    tenant_id = new_id()

    def made(**columns: Any) -> str:
        text = create_key(database, tenant_id=tenant_id, role=Role.USER)
        if columns:
            k = models.api_keys
            with database.write() as connection:
                connection.execute(sa.update(k).where(k.c.id == key_id_of(text)).values(columns))
        return text

    def guessed(good: str) -> BadKey:
        body = good[:21] + make_key()[21:-6]
        return BadKey(body + _check(body), good)

    return {
        "wrong secret": guessed(made()),
        "wrong, bounded": guessed(made(scopes=["jobs:read"], allowed_cidrs=[NEAR])),
        "unknown": BadKey(make_key()),
        "revoked": BadKey(made(revoked_at=LONG_AGO)),
        "expired": BadKey(made(expires_at=LONG_AGO)),
        "from elsewhere": BadKey(made(allowed_cidrs=["203.0.113.0/24"])),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'laneway.db'}"
        migrate.upgrade(url)
        database = Database(url)
        door = Callers(database, SystemClock())
        keys = {name: bad.text for name, bad in bad_keys(database).items()}
        keys["unknown, again"] = make_key()  # what the same kind differs by is the noise
        taken: dict[str, list[float]] = {name: [] for name in keys}
        for _ in range(ROUNDS):
            for name, text in keys.items():
                taken[name].append(_seconds(lambda text=text: door.authenticate(text)))  # type: ignore[misc]
        medians = {name: statistics.median(values) * 1e6 for name, values in taken.items()}
        for name, median in medians.items():
            print(f"{name:<16}{median:8.1f} µs")
        guessed = [medians[name] for name in medians if name.startswith(("wrong", "unknown"))]
        noise = abs(medians["unknown"] - medians["unknown, again"])
        print(f"guessed keys differ by {max(guessed) - min(guessed):.1f} µs, of one kind by {noise:.1f} µs")
        database.dispose()


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    with suppress(Unauthenticated):
        call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
