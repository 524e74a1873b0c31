"""`GET /events`: all jobs in one stream, over a real uvicorn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx
import sqlalchemy as sa

from api_client import RATE_HEADERS, LocalApi, ServedApi, WorkerProcess, claim, complete, report
from laneway import models
from laneway.clock import SystemClock
from laneway.engine.access.callers import Role
from laneway.engine.happenings import REPLAYED_FOR
from laneway.lanes.live import RedisNews
from servers import wait_until

Event = tuple[str | None, str, dict[str, Any]]


def frames(lines: Iterator[str]) -> Iterator[tuple[str | None, str | None, str]]:
    """Id, name and data of each frame, also of those that only move the id."""
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith((":", "retry:")):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and fields:
            yield fields.get("id"), fields.get("event"), fields.get("data", "")
            fields = {}


class Stream:
    """A client: it remembers the last id, as a browser does."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.read()
        self.response = response
        self._frames = frames(response.iter_lines())
        self.last, name, _ = next(self._frames)
        self.began_with = name

    def __next__(self) -> Event:
        while True:
            event_id, name, data = next(self._frames)
            self.last = event_id or self.last
            if name is not None:
                return event_id, name, json.loads(data)

    def __iter__(self) -> Iterator[Event]:
        return self


@contextmanager
def listening(api: ServedApi, query: str = "", *, last: str | None = None, key: str = "") -> Iterator[Stream]:
    headers = {} if last is None else {"Last-Event-ID": last}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    with api.stream(f"/events{query}", headers=headers) as response:
        yield Stream(response)


def test_everything_that_happens_to_a_job_is_told_as_it_happens(served: Any, database_url: str) -> None:
    api: ServedApi = served(database_url=database_url)
    with listening(api) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        assert all(name in stream.response.headers for name in RATE_HEADERS)
        job = api.make(title="T")
        job_id = job["id"]
        event_id, name, data = next(stream)
        assert (name, data["id"], data["seq"], data["title"]) == ("job.queued", job_id, 1, "T")
        assert set(data) == {
            *("id", "job_type", "queue", "title", "status", "attempt", "seq", "action", "actor"),
            *("reason", "at"),
        }
        assert event_id is not None
        api.request("PATCH", f"/jobs/{job_id}", json={"priority": "high"})
        _, name, data = next(stream)
        assert (name, data["action"], data["status"], data["reason"]) == (
            *("job.changed", "change", "queued", "priority"),
        )
        held = claim(api, job_id)
        assert next(stream)[1] == "job.running"
        report(api, held, 40, "so far")
        api.news.progressed([(job_id, 1, 40, "so far", '{"page":4}')])
        moved_id, name, data = next(stream)
        assert (moved_id, name, data["progress"], data["progress_details"]) == (
            *(None, "job.progress", 40, {"page": 4}),
        )
        complete(api, held, '"secret result"')
        _, name, data = next(stream)
        assert (name, data["status"]) == ("job.completed", "completed")
        assert "result" not in data


def test_types_choose_and_what_is_passed_over_is_not_told_later(served: Any) -> None:
    api: ServedApi = served()
    with listening(api, "?types=job.completed&types=job.cancelled") as stream:
        first, second = api.make()["id"], api.make()["id"]
        complete(api, claim(api, first))
        api.post(f"/jobs/{second}/cancel")
        assert [next(stream)[1] for _ in range(2)] == ["job.completed", "job.cancelled"]
        last = stream.last
    third = api.make()["id"]
    with listening(api, "", last=last) as stream:
        _, name, data = next(stream)
        assert (name, data["id"]) == ("job.queued", third)
    for wrong in ("?types=job.no", "?types=", "?type=job.failed", "?types=job.*"):
        assert api.get(f"/events{wrong}").status_code == 422, wrong


def test_users_hear_of_their_own_jobs_operators_of_all_and_strangers_of_none(served: Any) -> None:
    api: ServedApi = served()
    bob, olga = api.key(subject="bob"), api.key(Role.OPERATOR, subject="olga")
    stranger = api.key(Role.ADMIN, tenant="elsewhere")
    with (
        listening(api) as alices,
        listening(api, key=bob) as bobs,
        listening(api, key=olga) as olgas,
        listening(api, key=stranger) as strangers,
    ):
        mine, his, theirs = api.make()["id"], api.make(key=bob)["id"], api.make(key=stranger)["id"]
        held = claim(api, his)
        api.news.progressed([(his, 1, 40, None, None), (theirs, 1, 50, None, None)])
        complete(api, held)
        ended = [
            api.post(f"/jobs/{job_id}/cancel", key=key) for job_id, key in ((mine, ""), (theirs, stranger))
        ]
        assert [response.status_code for response in ended] == [200, 200]

        def heard(stream: Stream, until: tuple[str, str]) -> set[str]:
            ids = set()
            for _, name, data in stream:
                ids.add(data["id"])
                if (name, data["id"]) == until:
                    break
            return ids

        assert heard(alices, ("job.cancelled", mine)) == {mine}
        assert heard(bobs, ("job.completed", his)) == {his}
        assert heard(olgas, ("job.cancelled", mine)) == {mine, his}
        assert heard(strangers, ("job.cancelled", theirs)) == {theirs}


def test_a_follower_that_is_cut_off_again_and_again_hears_each_event_once(
    each_api: LocalApi, worker: WorkerProcess, served: Any
) -> None:
    """While a worker runs jobs; the stream is another process's."""
    api: ServedApi = served(database_url=each_api.settings.database_url)
    with listening(api) as stream:
        last = stream.last
    made = [each_api.make("demo.noop")["id"] for _ in range(12)]
    told: list[tuple[str, int]] = []
    ended: set[str] = set()
    rounds = 0
    while ended < set(made):
        rounds += 1
        with listening(api, last=last) as stream:
            assert stream.began_with is None, "no gap"
            for _ in range(rounds % 3 + 1):
                _, name, data = next(stream)
                if name == "job.progress":
                    continue
                told.append((data["id"], data["seq"]))
                if name == "job.completed":
                    ended.add(data["id"])
                if ended >= set(made):
                    break
            last = stream.last
    e = models.job_events.c
    with each_api.database.read() as connection:
        happened = {tuple(row) for row in connection.execute(sa.select(e.job_id, e.seq))}
    assert len(told) == len(set(told)), "none twice"
    assert set(told) == happened, "none lost"
    assert rounds > 10


def test_a_gap_is_told_and_the_stream_goes_on_from_now(served: Any) -> None:
    api: ServedApi = served()
    with listening(api) as stream:
        first = stream.last
    old = api.make()["id"]
    e = models.job_events
    with api.database.write() as connection:
        long_ago = (
            sa.update(e)
            .where(e.c.job_id == old)
            .values(at=SystemClock().now() - REPLAYED_FOR - timedelta(minutes=1))
        )
        connection.execute(long_ago)
    for last in (first, "no-id-of-ours"):
        with listening(api, last=last) as stream:
            assert stream.began_with == "reset"
            job_id = api.make()["id"]
            _, name, data = next(stream)
            assert (name, data["id"]) == ("job.queued", job_id)
            assert stream.last != first


def test_a_stream_is_one_of_the_callers_places(served: Any) -> None:
    api: ServedApi = served(streams_per_caller=1)
    with listening(api) as stream:  # named: one that nobody holds is closed
        with api.stream("/events") as refused:
            assert refused.status_code == 429
        assert not stream.response.is_closed
    wait_until(lambda: _free(api), what="the place is free again")


def _free(api: ServedApi) -> bool:
    with api.stream("/events") as response:
        return bool(response.status_code == 200)


def test_without_redis_the_stream_is_heard_all_the_same(served: Any, sqlite_url: str) -> None:
    api: ServedApi = served(redis_url="redis://127.0.0.1:1/0")
    api.news = RedisNews("redis://127.0.0.1:1/0", courier_channel="nobody")
    with listening(api) as stream:
        job_id = api.make()["id"]
        assert next(stream)[2]["id"] == job_id
