"""Idempotency keys while the API is killed: every request is sent until it is answered, by whichever process.

`IDEMPOTENCY_KEYS=200` makes the whole run of it.
"""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from api_client import BASE, ServedApi
from laneway import models
from laneway.settings import Settings
from servers import wait_until

KEYS = int(os.environ.get("IDEMPOTENCY_KEYS", "16"))
POSTS = 8  # with each key, at the same time
KILLS = max(3, KEYS // 10)
AGAIN = {409, 503}

pytestmark = pytest.mark.timeout(180 + 10 * KEYS)


class Service:
    """Two API processes on one store; one of them may be down."""

    def __init__(self, apis: list[ServedApi], rng: random.Random) -> None:
        self._apis = apis
        self._rng = rng
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._answered = 0
        self._kill_at = set(rng.sample(range(KEYS * POSTS * 3 // 4), KILLS))
        self.kills = 0

    def post(self, n: int) -> httpx.Response:
        """The answer to the n-th key's request, however often it must be sent."""
        body = {"job_type": "demo.echo", "parameters": {"n": n}, "tags": [f"n:{n}"]}
        headers = {**self._apis[0].headers(), "Idempotency-Key": f"key-{n}"}

        def send() -> httpx.Response | None:
            with self._lock:
                api = self._rng.choice(self._apis)
            try:
                response = api.send("POST", f"{BASE}/jobs", json=body, headers=headers)
            except httpx.TransportError:
                return None
            return None if response.status_code in AGAIN else response

        response: httpx.Response = wait_until(send, what=f"key {n} is answered", seconds=240)
        with self._lock:
            self._answered += 1
            due = self._answered in self._kill_at
        if due:
            self._kill()
        return response

    def _kill(self) -> None:
        with self._turn:  # the other one serves meanwhile
            with self._lock:
                api = self._rng.choice(self._apis)
            api.kill()
            self.kills += 1
            api.start()


def test_each_key_makes_one_job_and_every_answer_to_it_is_the_same(
    database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = Settings(
        database_url=database_url, redis_url=redis_url, data_dir=tmp_path / "data", rate_limits="off"
    )
    rng = random.Random(5)
    with ExitStack() as stack:
        apis = [stack.enter_context(ServedApi(settings)) for _ in range(2)]
        service = Service(apis, rng)
        posts = [n for n in range(KEYS) for _ in range(POSTS)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(service.post, posts))
        assert service.kills == KILLS
        with apis[0].database.read() as connection:
            made = connection.execute(sa.select(models.jobs.c.id, models.jobs.c.parameters)).all()
            tagged = set(connection.execute(sa.select(models.job_tags.c.job_id, models.job_tags.c.tag)).all())
    assert sorted(row.parameters["n"] for row in made) == list(range(KEYS))
    ids = {row.parameters["n"]: row.id for row in made}
    assert {(job_id, f"n:{n}") for n, job_id in ids.items()} == {tuple(row) for row in tagged}
    for n in range(KEYS):
        same = answers[n * POSTS : (n + 1) * POSTS]
        assert {response.status_code for response in same} == {202}
        assert len({response.content for response in same}) == 1, n
        assert {response.headers["location"] for response in same} == {f"{BASE}/jobs/{ids[n]}"}
        first = [response for response in same if "idempotency-replayed" not in response.headers]
        assert len(first) <= 1, "none when the first answer was lost with its process"
