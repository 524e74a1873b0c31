"""What must hold of a run, whatever was done to it: one function per invariant of the design.

The numbers are those of the reliability plan; it has one more for schedules (process/schedule_kills.py). Each
function sees the whole `Run`, through indexes that are made once, and says in sentences what does not
hold. `test_checker.py` shows each of them a run that breaks it and nothing else.

A check trusts the order of a job's events (`seq`, under the row's lock) and the order of CLOCK_MONOTONIC
between processes; wall times only as far as `Facts.clock_error_seconds` says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from statistics import fmean

from chaos.history import Phase, Record, Row, Run, Series, digest
from chaos.plan import callback_tag
from laneway.domain.events import DEFAULT_WEBHOOK_EVENTS, EVENT_OF
from laneway.domain.retry import RetryPolicy, crash_delay
from laneway.domain.states import FINAL, RULES, Action, JobStatus

CLAIM, BACK_OFF, ENQUEUE = Action.CLAIM, Action.BACK_OFF, Action.ENQUEUE
RETRIES = (Action.RETRY, Action.RETRY_LATER)  # a caller's; the allowance starts anew
SCHEDULER = "scheduler"
COMMIT_DELAY = timedelta(milliseconds=1)  # PostgreSQL and SQLite keep microseconds; floats lose some


class Invariant(StrEnum):
    """The sentences, by their numbers in the plan."""

    DURABLE = "I1"  # what was acknowledged exists and has ended
    AT_LEAST_ONCE = "I2"  # what is recorded as completed was run to its end, with this result
    FENCED = "I3"  # only the attempt that holds a job changes it or runs it
    FINAL = "I4"  # no event leaves an end, but a caller's retry or an admin's force_complete
    COMPLETED_ONCE = "I4-completed"  # no job is completed twice by the record
    ATTEMPTS = "I5"  # each claim adds one to the attempt, nothing else changes it
    PROGRESS = "I6"  # progress never falls within an attempt
    NOT_EARLY = "I7"  # nothing starts before its time
    RETRIES = "I8"  # a retry waits as long as its policy says; there are as many as it says
    MESSAGES = "I9"  # one message per subscribed end, delivered or dead, each verified
    CONCURRENCY = "I11"  # of a key there run no more jobs at once than its limit
    UNIQUE = "I13"  # one active job per tenant and unique key
    TENANT = "I14"  # nobody is told of another tenant's jobs
    ACCOUNTING = "I15"  # rows and counters are the replay of the events
    POISON = "I16"  # a job is blamed for the crashes it started, up to the limit
    CHAIN = "I17"  # a step starts once those before it have completed, or ended where failures do not stop
    CANCEL = "I18"  # no attempt begins after an answered cancel, and the job ends
    BATCH = "I19"  # a batch has all its jobs, ends with the last, and is followed by its callbacks once
    BACKPRESSURE = "I20"  # nothing is accepted without the database; who must wait is told how long
    BOUNDED = "I21"  # memory, descriptors and connections stay flat and below their bounds
    NO_STALL = "I22"  # while jobs wait and workers live, jobs are claimed


@dataclass(frozen=True, slots=True)
class Violation:
    """One sentence about what does not hold. `job_id` is None when it is not about one job."""

    invariant: Invariant
    job_id: str | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Operation:
    """All records of one operation: `end` is None while nobody knows how it ended."""

    begin: Record
    end: Record | None


@dataclass(slots=True)
class _Indexed:
    """The run, with its history by what the checks ask for."""

    run: Run
    operations: dict[str, list[Operation]] = field(default_factory=lambda: defaultdict(list))
    seen: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))  # `ok` lines, by `f`
    starts: dict[tuple[str, int], list[Record]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[tuple[str, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    runs: dict[str, list[Operation]] = field(default_factory=lambda: defaultdict(list))  # by job

    def __post_init__(self) -> None:
        ends: dict[str, Record] = {}
        for record in self.run.history:
            if record.ph in (Phase.OK, Phase.FAIL):
                ends[record.i] = record
            if record.ph is Phase.OK:
                self.seen[record.f].append(record)
        for record in self.run.history:
            if record.ph is Phase.INVOKE:
                self.operations[record.f].append(Operation(record, ends.get(record.i)))
        for operation in self.operations["run"]:
            run = (operation.begin.v["job_id"], operation.begin.v["attempt"])
            self.starts[run].append(operation.begin)
            self.runs[run[0]].append(operation)
            if operation.end is not None and operation.end.ph is Phase.OK:
                self.digests[run].append(operation.end.v["digest"])

    @property
    def slack(self) -> timedelta | None:
        """How far two wall times may be apart without saying anything; None: they say nothing."""
        error = self.run.facts.clock_error_seconds
        return None if error is None else timedelta(seconds=error) + COMMIT_DELAY

    def steps(self) -> Iterator[tuple[str, Row, Row]]:
        """Each job's events, in order, with the one before: `(job id, before, event)`."""
        for job_id, events in self.run.events.items():
            for before, event in pairwise(events):
                yield job_id, before, event

    def retried_between(self, job_id: str, *, since: datetime, attempt: int) -> bool:
        """Whether a caller's retry after `since` made the claim of `attempt` right."""
        retried = False
        for event in self.run.events.get(job_id, ()):
            retried = retried or (event["action"] in RETRIES and event["at"] >= since)
            if event["action"] == CLAIM and event["attempt"] == attempt:
                return retried
        return False


Finding = tuple[str | None, str]


def durable(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    known = {r.v["job_id"]: "acknowledged" for r in seen.seen["submit"]}
    known |= {job_id: "run" for job_id, _ in seen.starts if job_id not in known}
    for job_id, how in known.items():
        if job_id not in run.jobs:
            yield job_id, f"was {how} and is in no row"
    for job_id, row in run.jobs.items():
        if row["status"] not in FINAL:
            last = run.events.get(job_id, [{"action": "nothing", "at": None}])[-1]
            yield (
                job_id,
                f"is still {row['status']} on attempt {row['attempt']}, held by {row['worker_id']}; "
                f"the last that happened was {last['action']} at {last['at']}",
            )


def at_least_once(seen: _Indexed) -> Iterator[Finding]:
    for job_id, events in seen.run.events.items():
        row = seen.run.jobs.get(job_id)
        for event in events:
            if row is None or event["action"] != Action.COMPLETE:
                continue
            digests = seen.digests.get((job_id, event["attempt"]), [])
            if not digests:
                yield job_id, f"is completed by attempt {event['attempt']}, which no handler finished"
            elif digest(row["result"]) not in digests:
                yield job_id, f"has another result than its attempt {event['attempt']} returned"


def fenced(seen: _Indexed) -> Iterator[Finding]:
    claimed: set[tuple[str, int]] = set()
    holder = ""
    for job_id, before, event in seen.steps():
        if event["action"] == CLAIM:
            holder = event["actor"]
            claimed.add((job_id, event["attempt"]))
        elif RULES[Action(event["action"])].held and before["status"] not in FINAL:
            what = f"{event['action']} by {event['actor']} for attempt {event['attempt']}"
            if before["status"] != JobStatus.RUNNING or before["attempt"] != event["attempt"]:
                yield job_id, f"{what} came while it was {before['status']} on attempt {before['attempt']}"
            elif event["actor"] not in (holder, SCHEDULER):
                yield job_id, f"{what} came while {holder} held it"
    for (job_id, attempt), starts in seen.starts.items():
        if job_id not in seen.run.jobs:
            continue
        if (job_id, attempt) not in claimed:
            yield job_id, f"attempt {attempt} was run and never claimed"
        if len(starts) > 1:
            yield job_id, f"attempt {attempt} was run {len(starts)} times"


def final(seen: _Indexed) -> Iterator[Finding]:
    for job_id, before, event in seen.steps():
        if before["status"] not in FINAL or _completed_again(before, event):
            continue
        machine = event["actor"] == SCHEDULER or event["actor"].startswith("worker:")
        allowed = event["action"] in (*RETRIES, Action.FORCE_COMPLETE)
        if not allowed or machine or before["status"] not in RULES[Action(event["action"])].sources:
            yield (
                job_id,
                f"had ended {before['status']}, and then came {event['action']} by {event['actor']}",
            )


def completed_once(seen: _Indexed) -> Iterator[Finding]:
    for job_id, events in seen.run.events.items():
        times = sum(event["status"] == JobStatus.COMPLETED for event in events)
        if times > 1:
            yield job_id, f"is completed {times} times by the record"


def _completed_again(before: Row, event: Row) -> bool:
    return bool(before["status"] == event["status"] == JobStatus.COMPLETED)


def attempts(seen: _Indexed) -> Iterator[Finding]:
    for job_id, before, event in seen.steps():
        expected = before["attempt"] + (event["action"] == CLAIM)
        held = RULES[Action(event["action"])].held  # those are fenced
        if event["attempt"] != expected and not held:
            yield job_id, f"{event['action']} led from attempt {before['attempt']} to {event['attempt']}"


def progress(seen: _Indexed) -> Iterator[Finding]:
    newest: dict[tuple[str, str], tuple[int, int]] = {}
    for record in seen.seen["progress"]:
        job_id, now = record.v["job_id"], (record.v["attempt"], record.v["percent"])
        before = newest.get((record.i, job_id), (0, 0))
        if now < before or not 0 <= now[1] <= 100:
            yield (
                job_id,
                f"{record.p} saw {now[1]} % of attempt {now[0]} after {before[1]} % of attempt {before[0]}",
            )
        newest[record.i, job_id] = max(now, before)


def not_early(seen: _Indexed) -> Iterator[Finding]:
    if seen.slack is None:
        return
    for (job_id, attempt), starts in seen.starts.items():
        due = seen.run.jobs[job_id]["scheduled_for"] if job_id in seen.run.jobs else None
        if due is not None and (early := due - seen.run.at(starts[0])) > seen.slack:
            yield job_id, f"attempt {attempt} began {early.total_seconds():.3f} s before it was due"


def retries(seen: _Indexed) -> Iterator[Finding]:
    for job_id, events in seen.run.events.items():
        row = seen.run.jobs.get(job_id)
        if row is None:
            continue
        policy = RetryPolicy(
            row["max_retries"],
            row["retry_delay_seconds"],
            row["retry_backoff"],
            row["retry_max_delay_seconds"],
            jitter=False,
        )
        count = _Count()
        for before, event in pairwise(events):
            wait = _least_wait(before, count, policy, jitter=row["retry_jitter"])
            if event["action"] == ENQUEUE and wait is not None and seen.slack is not None:
                waited = event["at"] - before["at"]
                if waited + seen.slack < timedelta(seconds=wait):
                    yield (
                        job_id,
                        f"waited {waited.total_seconds():.3f} s after attempt {event['attempt']}; "
                        f"its policy says {wait:.3f} s at least",
                    )
            count.add(event)
            if event["action"] == BACK_OFF and count.charged > row["max_retries"]:
                yield job_id, f"is retried for the {count.charged}. time of {row['max_retries']}"
            if _given_up(event, "exhausted") and count.charged < row["max_retries"]:
                yield job_id, f"was given up after {count.charged} retries of {row['max_retries']}"


@dataclass(slots=True)
class _Count:
    """What a job has used up since it was made, or since a caller's last retry."""

    charged: int = 0
    crashes: int = 0

    def add(self, event: Row) -> None:
        if event["action"] in RETRIES:
            self.charged = self.crashes = 0
        elif _is_crash(event):
            self.crashes += 1
        elif event["action"] == BACK_OFF and (event["error"] or {}).get("category") != "snooze":
            self.charged += 1


def _is_crash(event: Row) -> bool:
    """Whether the event charges a crash: of all ends of an attempt, only those carry such an error."""
    return bool((event["error"] or {}).get("category") == "crash")


def _given_up(event: Row, reason: str) -> bool:
    return bool(event["action"] == Action.FAIL and event["reason"] == reason)


def _least_wait(back_off: Row, count: _Count, policy: RetryPolicy, *, jitter: bool) -> float | None:
    """Seconds that `back_off`, already counted, must have waited; None where its handler chose them."""
    if back_off["action"] != BACK_OFF or (back_off["error"] or {}).get("type") in ("Retry", "Snooze"):
        return None
    if _is_crash(back_off):
        return crash_delay(count.crashes)
    full = min(policy.delay_seconds * policy.backoff ** (count.charged - 1), policy.max_delay_seconds)
    return full / 2 if jitter else full


def messages(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    due = set()
    for job_id, events in run.events.items():
        row = run.jobs.get(job_id)
        if row is None or not row["webhook_url"]:
            continue
        wanted = row["webhook_events"] or DEFAULT_WEBHOOK_EVENTS
        for event in events:
            kind = EVENT_OF.get(JobStatus(event["status"]))
            if kind is not None and kind in wanted:
                due.add((job_id, event["seq"], str(kind)))
    made = Counter((m["job_id"], m["job_seq"], m["event_type"]) for m in run.messages)
    for end in due - made.keys():
        yield end[0], f"event {end[1]} is {end[2]}, and no message tells of it"
    for end, times in made.items():
        if times > 1 or end not in due:
            yield end[0], f"{times} messages say {end[2]} of event {end[1]}"
    yield from _deliveries(seen)


def _deliveries(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    job_of = {message["id"]: message["job_id"] for message in run.messages}
    carried = {delivery["message_id"] for delivery in run.deliveries}
    for message_id, job_id in job_of.items():
        if message_id not in carried:
            yield job_id, f"message {message_id} has no delivery"
    arrived = set()
    for record in seen.seen["receive"]:
        webhook_id = record.v["webhook_id"]
        arrived.add(webhook_id)
        if webhook_id not in job_of:
            yield record.v["job_id"], f"{webhook_id} was received and is in no row"
        if not record.v["verified"]:
            yield record.v["job_id"], f"{webhook_id} was received with a wrong signature"
    for delivery in run.deliveries:
        if delivery["status"] not in ("delivered", "dead"):
            yield delivery["job_id"], f"{delivery['message_id']} is still {delivery['status']}"
        elif delivery["status"] == "delivered" and delivery["message_id"] not in arrived:
            yield delivery["job_id"], f"{delivery['message_id']} is delivered, and nobody received it"


def concurrency(seen: _Indexed) -> Iterator[Finding]:
    """Judged by what handlers ran, on the clock that all processes share.

    An attempt that was taken from its worker may go on for a while without its slot, so it is left out.
    """
    changes: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
    limits: Counter[tuple[str, str]] = Counter()
    for job_id, row in seen.run.jobs.items():
        if row["concurrency_key"] is None:
            continue
        key = row["tenant_id"], row["concurrency_key"]
        limits[key] = max(limits[key], row["concurrency_limit"])
        settled = {
            event["attempt"]
            for before, event in pairwise(seen.run.events.get(job_id, ()))
            if before["action"] == CLAIM and event["actor"] == before["actor"]
        }
        for operation in seen.runs[job_id]:
            if operation.end is not None and operation.begin.v["attempt"] in settled:
                changes[key] += [(operation.begin.t, 1, job_id), (operation.end.t, -1, job_id)]
    for key, of_key in changes.items():
        running = 0
        for _, change, job_id in sorted(of_key):
            running += change
            if running > limits[key]:
                yield job_id, f"ran as one of {running} jobs of {key[1]!r}; {limits[key]} are allowed"


def unique(seen: _Indexed) -> Iterator[Finding]:
    keys = {
        r.i: (r.v["tenant"], r.v["unique_key"])
        for r in (operation.begin for operation in seen.operations["submit"])
        if r.v.get("unique_key")
    }
    for record in seen.seen["submit"]:
        row = seen.run.jobs.get(record.v["job_id"])
        key = keys.get(record.i)
        if row is not None and key is not None and (row["tenant_id"], row["unique_key"]) != key:
            yield row["id"], f"was answered for the unique key {key[1]!r} and holds {row['unique_key']!r}"
    if seen.slack is None:
        return
    holders: dict[tuple[str, str], list[str]] = defaultdict(list)
    for job_id, row in seen.run.jobs.items():
        if row["unique_key"] is not None and seen.run.events.get(job_id):
            holders[row["tenant_id"], row["unique_key"]].append(job_id)
    for (_, name), ids in holders.items():
        ids.sort(key=lambda job_id: seen.run.events[job_id][0]["at"])
        for first, second in pairwise(ids):
            # A `create` may bear the time before it waited for the last holder's end; what follows may not.
            then = [event["at"] for event in seen.run.events[second][1:2]]
            ended = _first_end(seen.run.events[first])
            if then and (ended is None or then[0] + seen.slack < ended):
                yield second, f"held the unique key {name!r} while {first} was active"


def _first_end(events: Sequence[Row]) -> datetime | None:
    return next((event["at"] for event in events if event["status"] in FINAL), None)


def tenant(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    owner = {job_id: row["tenant_id"] for job_id, row in run.jobs.items()}
    for f in ("submit", "cancel", "read", "progress"):
        for record in seen.seen[f]:
            told = [*record.v.get("ids", ()), *([record.v["job_id"]] if "job_id" in record.v else [])]
            for job_id in told:
                if owner.get(job_id, record.v["tenant"]) != record.v["tenant"]:
                    yield job_id, f"of {owner[job_id]} was shown to {record.v['tenant']} by {f}"
            for canary in record.v.get("foreign", ()):
                yield None, f"{canary!r} was shown to {record.v['tenant']} by {f}"
    rows = [event for events in run.events.values() for event in events]
    for row in [*rows, *run.messages, *run.deliveries]:
        if owner.get(row["job_id"], row["tenant_id"]) != row["tenant_id"]:
            yield row["job_id"], f"belongs to {owner[row['job_id']]}, and what is told of it to another"


def accounting(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    for job_id in run.jobs.keys() ^ run.events.keys():
        yield job_id, "has a row and no event, or events and no row"
    for job_id in run.jobs.keys() & run.events.keys():
        yield from ((job_id, sentence) for sentence in _replayed(run.jobs[job_id], run.events[job_id]))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in run.jobs.values():
        counts[row["tenant_id"]][row["status"]] += 1
    for tenant_id, told in run.facts.counters.items():
        if {k: v for k, v in told.items() if v} != dict(counts[tenant_id]):
            yield None, f"tenant {tenant_id} was told {dict(told)} and has {dict(counts[tenant_id])}"


def _replayed(row: Row, events: Sequence[Row]) -> Iterator[str]:
    if [event["seq"] for event in events] != list(range(1, row["event_seq"] + 1)):
        yield f"has {len(events)} events, and its row counts {row['event_seq']}"
        return
    count = _Count()
    for before, event in pairwise(events):
        rule = RULES[Action(event["action"])]
        count.add(event)
        illegal = before["status"] not in rule.sources and not rule.held and before["status"] not in FINAL
        if illegal or event["status"] != rule.target:
            yield f"{event['action']} led from {before['status']} to {event['status']}"
    last = events[-1]
    replayed = (last["status"], last["attempt"], count.charged, count.crashes)
    stored = (row["status"], row["attempt"], row["retry_count"], row["crash_count"])
    if replayed != stored:
        yield (
            f"its row says {stored}, its events say {replayed} (status, attempt, retry_count, crash_count)"
        )


def poison(seen: _Indexed) -> Iterator[Finding]:
    limit = seen.run.facts.crash_limit
    for job_id, events in seen.run.events.items():
        count = _Count()
        for event in events:
            count.add(event)
            # A suspect is named before it starts (docs/decisions/0005): its worker may die in between.
            named = (
                event["attempt"] > count.charged + 1 and (event["error"] or {}).get("type") == "WorkerLost"
            )
            if _is_crash(event) and not named and (job_id, event["attempt"]) not in seen.starts:
                yield job_id, f"is blamed for a crash of attempt {event['attempt']}, which it never began"
            if _is_crash(event) and count.crashes > limit:
                yield job_id, f"took down {count.crashes} processes; {limit} are allowed"
            if _given_up(event, "poison") and count.crashes < limit:
                yield job_id, f"is called poison after {count.crashes} crashes of {limit}"


def cancel(seen: _Indexed) -> Iterator[Finding]:
    started: dict[str, list[Record]] = defaultdict(list)
    for (job_id, _), starts in seen.starts.items():
        started[job_id] += starts
    for operation in seen.operations["cancel"]:
        end = operation.end
        if end is None or end.ph is not Phase.OK:
            continue
        job_id, attempt = end.v["job_id"], end.v["attempt"]
        asked_at = seen.run.at(operation.begin) - (seen.slack or timedelta())
        for start in started[job_id]:
            late = start.t > end.t and start.v["attempt"] > attempt
            if late and not seen.retried_between(job_id, since=asked_at, attempt=start.v["attempt"]):
                yield job_id, f"attempt {start.v['attempt']} began after the cancel was answered"
        yield from _ends(seen, job_id, since=asked_at, answered_at=seen.run.at(end))


def _ends(seen: _Indexed, job_id: str, *, since: datetime, answered_at: datetime) -> Iterator[Finding]:
    deadline = answered_at + timedelta(seconds=seen.run.facts.cancel_seconds)
    if seen.slack is None or not any(a <= answered_at and deadline <= b for a, b in seen.run.facts.calm):
        return
    ends = (e["at"] for e in seen.run.events.get(job_id, ()) if e["status"] in FINAL and e["at"] >= since)
    ended = next(ends, None)
    if ended is not None and ended > deadline:
        late = (ended - answered_at).total_seconds()
        yield job_id, f"ended {late:.1f} s after its cancel; {seen.run.facts.cancel_seconds} are allowed"


def chain(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    begun = {row["chain_id"] for row in run.chain_runs}
    for record in seen.seen["flow"]:
        if record.v["kind"] == "chain" and record.v["flow_id"] not in begun:
            yield None, f"chain {record.v['flow_id']} was acknowledged and has no run"
    steps: dict[str, dict[int, Row]] = defaultdict(dict)
    for job_id, row in run.jobs.items():
        if row["chain_run_id"] is not None:
            if row["chain_step"] in steps[row["chain_run_id"]]:
                yield job_id, f"is another job of step {row['chain_step']} of one run"
            steps[row["chain_run_id"]][row["chain_step"]] = row
    for row in run.chain_runs:
        yield from _run_of_chain(seen, row, steps[row["id"]])


def _run_of_chain(seen: _Indexed, row: Row, steps: dict[int, Row]) -> Iterator[Finding]:
    what = f"run {row['id']} of a chain"
    if row["finished_at"] is None:
        yield None, f"{what} has no end"
    well = all(job["status"] == JobStatus.COMPLETED for job in steps.values())
    whole = len(steps) == len(row["plan"]["steps"])
    if (row["status"] == JobStatus.COMPLETED) != (well and whole):
        yield None, f"{what} is {row['status']}; of {len(steps)} steps all are completed: {well}"
    before: list[int] = []
    for stage in row["plan"]["stages"]:
        for number in stage:
            if number in steps:
                yield from _step(seen, row, steps, number, before)
        before += stage


def _step(
    seen: _Indexed, row: Row, steps: dict[int, Row], number: int, before: Sequence[int]
) -> Iterator[Finding]:
    job_id = steps[number]["id"]
    began = min((operation.begin.t for operation in seen.runs[job_id]), default=None)
    for other in before:
        last = steps.get(other)
        if last is None or last["status"] not in FINAL:
            if str(other) not in row["step_errors"] or row["stop_on_failure"]:
                yield job_id, f"is step {number} of a run whose step {other} has no end"
        elif last["status"] != JobStatus.COMPLETED and row["stop_on_failure"]:
            yield job_id, f"is step {number} of a run that its step {other} stopped"
        elif last["status"] == JobStatus.COMPLETED and began is not None:
            done = max((o.end.t for o in seen.runs[last["id"]] if o.end and o.end.ph is Phase.OK), default=0)
            if began < done:
                yield job_id, f"began as step {number} before step {other} was done"


def batch(seen: _Indexed) -> Iterator[Finding]:
    run = seen.run
    known = {row["id"] for row in run.batches}
    number_of = {}
    for record in seen.seen["flow"]:
        if record.v["kind"] == "batch":
            number_of[record.v["flow_id"]] = record.v["number"]
            if record.v["flow_id"] not in known:
                yield None, f"batch {record.v['flow_id']} was acknowledged and is in no row"
    statuses: dict[str, Counter[str]] = defaultdict(Counter)
    tagged: Counter[str] = Counter()
    for job in run.jobs.values():
        tagged.update(job["tags"])
        if job["batch_id"] is not None:
            statuses[job["batch_id"]][job["status"]] += 1
    for row in run.batches:
        counted, what = statuses[row["id"]], f"batch {row['id']}"
        if counted.total() != row["enqueued"]:
            yield None, f"{what} has {counted.total()} of its {row['enqueued']} jobs"
        if row["finished_at"] is None:
            yield None, f"{what} has no end"
        elif {k: v for k, v in row["counts"].items() if v} != dict(counted):
            yield None, f"{what} was counted as {row['counts']} and has {dict(counted)}"
        well = counted[JobStatus.COMPLETED] == counted.total()
        for name in row["callbacks"]:
            wanted = name == "on_complete" or (name == "on_success") == well
            if row["id"] in number_of and tagged[callback_tag(number_of[row["id"]], name)] != wanted:
                yield None, f"{what} was followed by {name} not just {int(wanted)} times"


def backpressure(seen: _Indexed) -> Iterator[Finding]:
    away = [
        (o.begin.t, o.end.t)
        for o in seen.operations["outage"]
        if o.end is not None and o.begin.v["what"] == "database"
    ]
    for operation in seen.operations["submit"]:
        begin, end = operation.begin, operation.end
        if end is None or end.ph is not Phase.OK:
            continue
        if any(gone < begin.t and end.t < back for gone, back in away):
            yield end.v["job_id"], "was acknowledged while the database was out of reach"
    for record in seen.run.history:
        status = record.v.get("status") if record.ph is Phase.FAIL else None
        if not isinstance(status, int):
            continue
        if status in (429, 503) and not record.v.get("retry_after"):
            yield None, f"{record.p} was answered {status} to {record.f} without Retry-After"
        elif status >= 500 and status != 503:
            yield None, f"{record.p} was answered {status} to {record.f}"


def bounded(seen: _Indexed) -> Iterator[Finding]:
    for series in seen.run.facts.series:
        highest = max((value for _, value in series.points), default=0.0)
        if series.most is not None and highest > series.most:
            yield None, f"{series.name} reached {highest:.0f}; {series.most:.0f} are allowed"
        growth, allowed = growth_percent_per_hour(series), series.growth_percent_per_hour
        if allowed is not None and growth > allowed and _rise(series, growth) > series.slack:
            yield None, f"{series.name} grew by {growth:.1f} % an hour; {allowed} are allowed"


def _rise(series: Series, percent_per_hour: float) -> float:
    hours = (series.points[-1][0] - series.points[0][0]) / 3600
    return fmean(y for _, y in series.points) * percent_per_hour / 100 * hours


def growth_percent_per_hour(series: Series) -> float:
    """The slope of the least-squares line through the points, as a share of their mean."""
    if len(series.points) < 2:
        return 0.0
    middle = fmean(x for x, _ in series.points)
    mean = fmean(y for _, y in series.points)
    spread = sum((x - middle) ** 2 for x, _ in series.points)
    slope = sum((x - middle) * (y - mean) for x, y in series.points) / spread if spread else 0.0
    return 100 * 3600 * slope / mean if mean else 0.0


def no_stall(seen: _Indexed) -> Iterator[Finding]:
    if seen.slack is None:
        return
    patience = timedelta(seconds=seen.run.facts.stall_seconds) + seen.slack
    changes = [
        (event["at"], event["seq"], job_id, event)
        for job_id, events in seen.run.events.items()
        for event in events
    ]
    changes.sort(key=lambda change: change[:3])
    for begin, end in seen.run.facts.calm:
        waiting: dict[str, None] = {}
        since = begin
        for at, _, job_id, event in changes:
            if at > end:
                break
            if waiting and at - since > patience:
                yield _stalled(waiting, at - since)
                since = at
            idle = not waiting
            waiting.pop(job_id, None)
            if event["status"] == JobStatus.QUEUED:
                waiting[job_id] = None
            if idle or event["action"] == CLAIM:
                since = max(at, begin)
        if waiting and end - since > patience:
            yield _stalled(waiting, end - since)


def _stalled(waiting: dict[str, None], gap: timedelta) -> Finding:
    oldest = next(iter(waiting))
    return (
        oldest,
        f"and {len(waiting) - 1} others waited {gap.total_seconds():.1f} s in which nothing was claimed",
    )


CHECKS: dict[Invariant, Callable[[_Indexed], Iterator[Finding]]] = {
    Invariant.DURABLE: durable,
    Invariant.AT_LEAST_ONCE: at_least_once,
    Invariant.FENCED: fenced,
    Invariant.FINAL: final,
    Invariant.COMPLETED_ONCE: completed_once,
    Invariant.ATTEMPTS: attempts,
    Invariant.PROGRESS: progress,
    Invariant.NOT_EARLY: not_early,
    Invariant.RETRIES: retries,
    Invariant.MESSAGES: messages,
    Invariant.CONCURRENCY: concurrency,
    Invariant.UNIQUE: unique,
    Invariant.TENANT: tenant,
    Invariant.ACCOUNTING: accounting,
    Invariant.POISON: poison,
    Invariant.CHAIN: chain,
    Invariant.CANCEL: cancel,
    Invariant.BATCH: batch,
    Invariant.BACKPRESSURE: backpressure,
    Invariant.BOUNDED: bounded,
    Invariant.NO_STALL: no_stall,
}


def check(run: Run) -> list[Violation]:
    """Everything that does not hold, in the order of the invariants. Empty means that all of it does."""
    seen = _Indexed(run)
    return [
        Violation(invariant, job_id, sentence)
        for invariant, find in CHECKS.items()
        for job_id, sentence in find(seen)
    ]
