"""Following a job by server-sent events, over a real uvicorn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import sqlalchemy as sa

from api_client import RATE_HEADERS, LocalApi, ServedApi, WorkerProcess, claim, complete, move, report
from factories import add_job, change
from laneway import models
from laneway.clock import new_id
from laneway.domain.states import JobStatus
from laneway.engine.outcomes import error_record
from laneway.engine.transitions import Fail, Retry
from servers import wait_until


@dataclass
class Event:
    id: str
    name: str
    data: dict[str, Any]


def events_in(lines: Iterator[str]) -> Iterator[Event]:
    """The events of a stream, as a browser reads them."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith((":", "retry:")):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


def read(response: httpx.Response) -> list[Event]:
    return list(events_in(iter(response.text.split("\n"))))


def test_an_ended_job_is_told_from_the_start_and_then_no_more(each_api: LocalApi) -> None:
    job_id = each_api.make()["id"]
    complete(each_api, claim(each_api, job_id), '{"rows":3}')
    response = each_api.get(f"/jobs/{job_id}/events")
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    events = read(response)
    assert [event.name for event in events] == ["job.queued", "job.running", "job.completed"]
    assert [event.id for event in events] == ["1", "2", "3"]
    assert events[-1].data["result"] == {"rows": 3}
    assert (events[-1].data["status"], events[-1].data["progress"]) == ("completed", 100)
    assert "result" not in events[0].data
    assert (events[0].data["status"], events[0].data["attempt"]) == ("queued", 0)
    resumed = each_api.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "2"})
    assert [event.id for event in read(resumed)] == ["3"]
    for last in ("3", "3.50", "999999999", "999999999999"):
        done = each_api.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": last})
        assert (done.status_code, done.content) == (204, b""), last
    for none in ("x", "-1", "", "²"):
        whole = each_api.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": none.encode("latin-1")})
        assert len(read(whole)) == 3, none


def test_a_job_that_was_run_again_is_followed_past_its_first_end(each_api: LocalApi) -> None:
    job_id = each_api.make(max_retries=0)["id"]
    held = claim(each_api, job_id)
    error = error_record("ValueError", "no", category="error")
    move(each_api, Fail(job_id, held.attempt, held.lease_token, error=error))
    move(each_api, Retry(job_id))
    complete(each_api, claim(each_api, job_id), '"well"')
    events = read(each_api.get(f"/jobs/{job_id}/events"))
    names = [event.name.removeprefix("job.") for event in events]
    assert names == ["queued", "running", "failed", "queued", "running", "completed"]
    assert (events[2].data["result"], events[2].data["error"]["message"]) == (None, "no")
    assert (events[-1].data["result"], events[-1].data["error"]) == ("well", None)
    assert events[2].data["finished_at"] is None  # who reads the stream must not stop here
    assert events[-1].data["finished_at"]


def test_an_end_that_comes_between_two_looks_is_told(local: Any, postgres_url: str) -> None:
    """The end is committed after the events were read and before the job is."""
    api: LocalApi = local(database_url=postgres_url)
    job_id = api.make()["id"]
    held = [claim(api, job_id)]

    def end_it(_c: Any, _u: Any, statement: str, *_: Any) -> None:
        if "FROM job_events" in statement and held:
            complete(api, held.pop(), "7")

    sa.event.listen(api.app.state.runtime.database.engine, "after_cursor_execute", end_it)
    events = read(api.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "2"}))
    assert [(event.name, event.data["result"]) for event in events] == [("job.completed", 7)]


def test_a_running_job_is_followed_to_its_end(served: Any) -> None:
    api: ServedApi = served()
    job_id = api.make()["id"]
    with api.stream(f"/jobs/{job_id}/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert all(name in response.headers for name in RATE_HEADERS)
        events = events_in(response.iter_lines())
        assert next(events).name == "job.queued"
        held = claim(api, job_id)
        assert next(events).name == "job.running"
        for percent in (10, 60):
            report(api, held, percent, f"at {percent}")
            event = next(events)
            assert (event.name, event.id) == ("job.progress", f"2.{percent}")
            assert (event.data["progress"], event.data["progress_message"]) == (percent, f"at {percent}")
        complete(api, held, "[1]")
        final = next(events)
        assert (final.id, final.name, final.data["result"]) == ("3", "job.completed", [1])
        assert list(events) == [], "the final event closes the stream"
    assert api.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": final.id}).status_code == 204


def test_a_worker_is_heard_through_redis(each_api: LocalApi, worker: WorkerProcess) -> None:
    job = each_api.make("demo.sleep", parameters={"seconds": 0.3, "steps": 3})
    events = read(each_api.get(f"/jobs/{job['id']}/events"))
    assert (events[0].name, events[-1].name) == ("job.queued", "job.completed")
    assert events[-1].data["result"] == {"slept_seconds": 0.3, "steps": 3}


def test_a_follower_who_comes_back_misses_nothing(served: Any) -> None:
    api: ServedApi = served()
    job_id = api.make()["id"]
    with api.stream(f"/jobs/{job_id}/events") as response:
        last = next(events_in(response.iter_lines())).id
    held = claim(api, job_id)
    report(api, held, 40, "so far")
    complete(api, held)
    response = api.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": last})
    assert [event.name for event in read(response)] == ["job.running", "job.completed"]


def test_a_caller_holds_at_most_ten_streams_and_a_closed_one_is_free_again(served: Any) -> None:
    api: ServedApi = served()
    path = f"/jobs/{api.make()['id']}/events"
    with ExitStack() as streams:
        for _ in range(9):
            assert streams.enter_context(api.stream(path)).status_code == 200
        with api.stream(path) as tenth:
            assert tenth.status_code == 200
            refused = api.get(path)
            assert (refused.status_code, refused.json()["code"]) == (429, "concurrent_requests")
            assert refused.json()["facts"] == {"violated_policies": ["concurrent-streams"]}
            assert all(name in refused.headers for name in RATE_HEADERS)
            assert api.get(path, key=api.key(subject="bob")).status_code == 404
        wait_until(lambda: _can_open(api, path), what="the place of the closed stream is free")
    wait_until(lambda: _can_open(api, path), what="all places are free")


def _can_open(api: ServedApi, path: str) -> bool:
    with api.stream(path) as stream:
        return bool(stream.status_code == 200)


def test_an_ended_stream_holds_no_place(local: Any) -> None:
    api: LocalApi = local(streams_per_caller=1)
    ended = add_job(api.database, JobStatus.COMPLETED, tenant_id=api.tenant_id)
    for _ in range(3):
        assert api.get(f"/jobs/{ended}/events").status_code == 200
        assert api.get(f"/jobs/{ended}/events", headers={"Last-Event-ID": "1"}).status_code == 204
        assert api.get(f"/jobs/{new_id()}/events").status_code == 404


def test_a_slow_follower_holds_up_nobody_and_hears_the_end(served: Any) -> None:
    api: ServedApi = served()
    job_id = api.make()["id"]
    with api.stream(f"/jobs/{job_id}/events") as slow:
        held = claim(api, job_id)
        with api.stream(f"/jobs/{job_id}/events") as quick:
            heard = events_in(quick.iter_lines())
            assert [next(heard).name, next(heard).name] == ["job.queued", "job.running"]
            for percent in range(1, 40):  # the slow one reads nothing of all this
                report(api, held, percent, "x" * 400)
                change(api.database, models.jobs, job_id, progress_details={"text": "y" * 100_000})
                assert api.get(f"/jobs/{job_id}/status").json()["progress"] == percent
            complete(api, held)
            assert [event.name for event in heard][-1] == "job.completed"
        assert [event.name for event in events_in(slow.iter_lines())][-1] == "job.completed"


def test_a_job_that_vanishes_ends_the_stream(served: Any) -> None:
    api: ServedApi = served()
    job_id = api.make()["id"]
    with api.stream(f"/jobs/{job_id}/events") as response:
        events = events_in(response.iter_lines())
        assert next(events).name == "job.queued"
        with api.database.write() as connection:
            connection.execute(sa.delete(models.jobs).where(models.jobs.c.id == job_id))
        assert list(events) == []
    assert api.get(f"/jobs/{job_id}/events").status_code == 404
