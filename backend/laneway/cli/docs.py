"""`laneway docs`: the reference pages, written from the code that they describe.

Each page is a pure function of the code: the same on every machine, whatever the environment says. A
test compares the pages in `docs/reference` with what is made here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laneway.cli.docs_http import fields, http, openapi_text
from laneway.cli.markdown import code, codes, docstring, table

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FOLDER = Path("docs") / "reference"
SIGNATURE_WIDTH = 100
MADE = "<!-- Written by `make docs`: change the code, not this page. -->"


def docs(
    folder: Annotated[Path, typer.Option(help="Where the pages are.")] = FOLDER,
) -> None:
    """Write the reference pages from the code."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every generated page: file name → text."""
    makers: dict[str, Callable[[], Iterable[str]]] = {
        "settings.md": _settings,
        "states.md": _states,
        "events.md": _events,
        "errors.md": _errors,
        "limits.md": _limits,
        "job_types.md": _job_types,
        "http.md": http,
        "cli.md": _cli,
        "python.md": _python,
    }
    return {name: _page(make()) for name, make in makers.items()} | {"openapi.json": openapi_text()}


def _page(paragraphs: Iterable[str]) -> str:
    title, *rest = (paragraph.strip() for paragraph in paragraphs)
    return "\n\n".join([title, MADE, *filter(None, rest)]) + "\n"


# Settings


def _settings() -> Iterable[str]:
    from laneway.settings import PREFIX, Settings

    yield "# Settings"
    yield (
        "Read from the environment when a process starts. A value that does not fit stops the process with "
        "a line that names the variable; a `LANEWAY_` variable that sets nothing is warned of, with the "
        "nearest name. Lists are separated by commas, booleans are `1` or `0`."
    )
    for group, names in _setting_groups():
        yield f"## {group}"
        yield table(
            ("variable", "default", "range", "what it does"),
            (
                (
                    code(PREFIX + name.upper()),
                    _default(Settings.model_fields[name]),
                    _range(Settings.model_fields[name]),
                    Settings.model_fields[name].description or "",
                )
                for name in names
            ),
        )


def _setting_groups() -> Iterable[tuple[str, list[str]]]:
    """The fields under the comment lines that stand over them in `Settings`."""
    from laneway.settings import Settings

    groups: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(Settings).splitlines():
        if found := re.fullmatch(r" {4}# (.+)", line):
            groups.append((found[1], []))
        elif (found := re.match(r" {4}(\w+):", line)) and found[1] in Settings.model_fields:
            groups[-1][1].append(found[1])
    return [group for group in groups if group[1]]


def _default(field: FieldInfo) -> str:
    value = field.default
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    if isinstance(value, tuple):
        value = ",".join(value)
    if isinstance(value, bool):
        value = int(value)
    return code(value) if str(value) else "empty"


def _range(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{signs[name]} {getattr(rule, name):g}"
        for rule in field.metadata
        for name in signs
        if hasattr(rule, name)
    ]
    choices = getattr(field.annotation, "__args__", ()) if not bounds else ()
    return ", ".join(bounds) or codes(choice for choice in choices if isinstance(choice, str))


# States and events


def _states() -> Iterable[str]:
    from laneway.domain.states import ACTIVE, FINAL, RULES, JobStatus

    yield "# States"
    yield (
        "A job is in one status at a time. One table, `RULES` in `backend/laneway/domain/states.py`, says "
        "which action leads from where to where; each change is one guarded UPDATE and one row of "
        "`job_events`, in the same transaction."
    )
    meaning = _member_comments(JobStatus)
    yield "## Statuses"
    yield table(
        ("status", "", "meaning"),
        (
            (code(status), "active" if status in ACTIVE else "final", meaning.get(status.name, ""))
            for status in JobStatus
        ),
    )
    yield (
        "In `GET /api/v1/jobs`, `pending`, `processing` and `success` may stand for `queued`, `running` and "
        "`completed`."
    )
    yield "## Actions"
    yield (
        "Only the worker that holds the job may do what is marked held: its write names the attempt and the "
        "lease token. The table says what is legal; what a caller may ask for is in the [HTTP API](http.md)."
    )
    yield table(
        ("action", "from", "to", "held"),
        (
            (
                code(action),
                codes(status for status in JobStatus if status in rule.sources),
                code(rule.target),
                "held" if rule.held else "",
            )
            for action, rule in RULES.items()
        ),
    )
    yield "`create` is the first event of every job; it leads to `scheduled` or `queued`."
    arrows = [
        f"    {source} --> {rule.target}: {action}"
        for action, rule in RULES.items()
        for source in JobStatus
        if source in rule.sources and action != "force_complete"
    ]
    ends = [f"    {status} --> [*]" for status in JobStatus if status in FINAL]
    starts = [f"    [*] --> {status}: create" for status in (JobStatus.SCHEDULED, JobStatus.QUEUED)]
    yield "## Diagram"
    yield "Without `force_complete`, which leads from every other status to `completed`."
    yield "\n".join(["```mermaid", "stateDiagram-v2", *starts, *arrows, *ends, "```"])


def _member_comments(kind: type) -> dict[str, str]:
    """What stands behind each member of an enumeration in its source."""
    return dict(re.findall(r"^ {4}(\w+) = [^#\n]+# (.+)$", inspect.getsource(kind), re.M))


def _events() -> Iterable[str]:
    from laneway.api.event_payloads import PAYLOADS, example
    from laneway.domain.events import CATALOGUE, DEFAULT_WEBHOOK_EVENTS, EventType
    from laneway.domain.states import JobStatus
    from laneway.webhooks.messages import MAX_PAYLOAD_BYTES, PROGRESS_TTL

    yield "# Events"
    yield "## Webhooks"
    yield (
        "A job's `webhook_url` may hear the events of jobs: `webhook_events` picks some of them. A "
        "registered endpoint may hear all of these, by name or by glob: `job.*`, `*`. Either hears every end "
        f"of a job unless it says otherwise: {codes(DEFAULT_WEBHOOK_EVENTS)}."
    )
    payloads = {
        event: f"[{model.__name__}](http.md#{model.__name__.lower()})" for event, model in PAYLOADS.items()
    }
    yield table(
        ("event", "sent when", "`data`"),
        ((code(event), text, payloads[event]) for event, text in CATALOGUE.items() if event in payloads),
    )
    yield (
        "Progress is told once a second a job at most, and no more once it was overtaken: by newer progress, "
        f"by the job's end, or by {PROGRESS_TTL.seconds} seconds."
    )
    yield (
        "The body is JSON: `type` (the event), `timestamp` (RFC 3339, UTC) and `data`. "
        f"Past {MAX_PAYLOAD_BYTES} bytes `data.result` is null and `data.result_truncated` is true. "
        "`laneway`'s OpenAPI document has each event, with an example, under `webhooks`."
    )
    body = json.dumps(example(EventType.JOB_COMPLETED), indent=2, ensure_ascii=False)
    yield f"```json\n{body}\n```"
    yield (
        "The request is signed as [Standard Webhooks](https://www.standardwebhooks.com) say, in the headers "
        "`webhook-id`, `webhook-timestamp` and `webhook-signature`; see "
        "[Verify a webhook](../how-to/verify_a_webhook.md)."
    )
    yield "## The stream of a job"
    yield (
        "`GET /api/v1/jobs/{job_id}/events` sends server-sent events: one for each status the job comes to, "
        "and `job.progress` while it runs. `id` is the event's number in the job's life and can be handed "
        "back as `Last-Event-ID`."
    )
    yield table(
        ("event", "sent when the job"),
        [(code(f"job.{status}"), f"became `{status}`") for status in JobStatus]
        + [("`job.progress`", "runs and reported progress")],
    )


# Errors and limits


def _errors() -> Iterable[str]:
    from http import HTTPStatus

    from laneway import errors
    from laneway.api import problems

    yield "# Errors"
    yield (
        "Every error of the HTTP API is `application/problem+json` (RFC 9457) with `type`, `title`, "
        "`status`, `detail`, `instance`, `code` and `request_id`; some have `facts`, and 422 has `errors` "
        "with a JSON Pointer each. Programs look at `code`: it does not change. 429 and 503 have "
        "`Retry-After`."
    )
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ours = [(kind.status, kind.code, kind.title) for kind in kinds if issubclass(kind, errors.LanewayError)]
    of_http = [(status, name, HTTPStatus(status).phrase) for status, name in problems._CODES.items()]
    known = {name for _, name, _ in ours}
    rows = ours + [row for row in of_http if row[1] not in known]
    shown = [(code(name), str(status), title) for status, name, title in sorted(rows)]
    shown.append((code(problems._HTTP_ERROR), "another", "As the status says"))
    yield table(("code", "status", "title"), shown)


_LIMITS: tuple[tuple[str, str, str], ...] = (
    ("domain.payload", "MAX_BYTES", "bytes of a job's `parameters` as JSON, and of its result"),
    ("domain.payload", "MAX_DEPTH", "levels of nesting in any JSON"),
    ("domain.payload", "MAX_INTEGER", "largest integer in any JSON"),
    ("engine.access.tenants", "MAX_QUEUED", "largest `max_queued` of a tenant"),
    ("engine.turns", "MAX_WEIGHT", "largest weight of a tenant"),
    ("domain.spec", "MAX_TAGS", "tags of a job, of 1 to 100 characters each"),
    ("domain.spec", "MAX_SECONDS", "longest delay or timeout, in seconds"),
    ("domain.spec", "MAX_CONCURRENCY", "largest `concurrency_limit`"),
    ("domain.spec", "MAX_DEBOUNCE_SECONDS", "longest `debounce_seconds`"),
    ("engine.positions", "MAX_POSITION", "largest `position` that a waiting job is told"),
    ("engine.access.tenants", "MAX_RUNNING", "largest `max_running` of a tenant"),
    ("domain.http_target", "MAX_URL", "characters of a target's URL"),
    ("domain.http_target", "MAX_SUCCESS", "entries of a target's `success`"),
    ("domain.http_target", "MAX_CALL_SECONDS", "longest `timeout_seconds` of a target's call"),
    ("webhooks.call", "MAX_BODY_BYTES", "bytes kept of a target's answer"),
    ("engine.access.job_tokens", "MAX_JOB_TOKEN_CHARACTERS", "characters of a job's token that is sent"),
    ("domain.retry", "CRASH_DELAY_SECONDS", "seconds until a job whose process died runs again; doubles"),
    ("domain.retry", "CRASH_MAX_DELAY_SECONDS", "longest of those waits, in seconds"),
    ("engine.service", "MAX_METADATA_BYTES", "bytes of a job's `metadata` as JSON"),
    ("engine.registry", "MAX_KEY", "characters of a key that a job type makes of parameters"),
    ("engine.context", "MAX_MESSAGE", "characters kept of a progress message"),
    ("engine.context", "MAX_DETAILS_BYTES", "bytes of progress details as JSON"),
    ("engine.endings", "MAX_ERROR_MESSAGE", "characters kept of an error's message"),
    ("engine.endings", "MAX_TRACEBACK", "characters kept of a traceback, from its end"),
    ("engine.dead_letters", "MAX_BULK", "dead letters retried or deleted by one call"),
    ("engine.dead_letters", "MAX_SAMPLE", "ids of them in its answer"),
    ("api.dead_letters", "MAX_RATE", "largest `rate` of such a call, in jobs a second"),
    ("engine.schedules", "MAX_SCHEDULES", "schedules of a tenant"),
    ("engine.schedules", "MAX_JITTER_SECONDS", "largest `jitter_seconds` of a schedule"),
    ("engine.schedules", "MAX_PREVIEWED", "times shown by one preview"),
    ("domain.cadence", "MAX_EXPRESSION", "characters of a cron expression"),
    ("engine.slot_plan", "MISFIRE_GRACE_SECONDS", "seconds by which a slot may be late before it was missed"),
    ("engine.slot_plan", "MAX_CATCH_UP", "missed slots that `misfire: fire_all` still runs, the newest"),
    ("engine.slot_plan", "MAX_ACTIVE_RUNS", "runs of one schedule that may be active at once"),
    ("engine.slot_plan", "MAX_SLOTS_AT_ONCE", "slots of one schedule decided in one transaction"),
    ("engine.schedule_ends", "FAILING_AFTER", "failures in a row that make a schedule a failing one"),
    ("domain.spec", "MAX_DEPENDENCIES", "jobs that one job may depend on"),
    ("domain.flow", "MAX_STEPS", "steps of a chain"),
    ("engine.chains", "MAX_RESULTS_BYTES", "bytes of the steps' results in one answer about a chain"),
    ("engine.chain_runs", "MAX_ERROR_MESSAGE", "characters kept of a chain's `error_message`"),
    ("engine.batches", "MAX_JOBS", "jobs of a batch"),
    ("engine.batches", "MAX_TOLD", "errors told of a batch that is refused"),
    ("api.batch_body", "MAX_JOB_CHARACTERS", "characters of JSON of one job of a batch"),
    ("engine.dependencies", "MAX_RELEASED", "dependencies counted in the transaction of an end"),
    ("engine.flow", "MAX_ROUNDS", "levels of dependants followed in that transaction"),
    ("engine.cancels", "MAX_CANCELLED", "jobs cancelled by one `POST /api/v1/jobs/cancel`"),
    ("api.cancels", "MAX_IDS", "ids in the filter of such a call"),
    ("engine.workers", "MAX_HELD_SHOWN", "ids of held jobs shown of each worker"),
    ("engine.queries", "MAX_COUNTED", "rows a count goes up to in `GET /api/v1/queues/stats`"),
    (
        "engine.access.credentials",
        "CACHE_SECONDS",
        "seconds an API process remembers a key; changes are told",
    ),
    ("engine.access.keys", "MAX_KEYS", "API keys of a tenant that are not revoked"),
    ("engine.access.keys", "MAX_CIDRS", "networks in a key's `allowed_cidrs`"),
    ("engine.access.keys", "MAX_OVERLAP_SECONDS", "longest `overlap_seconds` of a key's rotation"),
    ("engine.access.tokens", "MAX_TOKEN_SECONDS", "longest `expires_in_seconds` of a browser token"),
    ("engine.access.tokens", "MAX_TOKEN_CHARACTERS", "characters of a browser token that is sent"),
    ("engine.access.jwt", "MAX_JWT_CHARACTERS", "characters of a JWT"),
    ("engine.access.jwt", "MAX_JWT_HOURS", "hours between a JWT's `iat` and `exp`"),
    (
        "engine.access.jwt",
        "MAX_NAME_CHARACTERS",
        "characters of a JWT's tenant, and of a subject made of one",
    ),
    ("engine.access.jwt_issuers", "MAX_ISSUERS", "issuers of JWTs"),
    ("engine.access.key_sets", "MAX_SET_BYTES", "bytes of an issuer's JWKS"),
    ("engine.access.key_sets", "MAX_KEYS_OF_A_SET", "keys in it"),
    ("engine.access.audit", "MAX_TARGET_CHARACTERS", "characters kept of an audit entry's `target`"),
    ("engine.access.audit", "MAX_FACTS_BYTES", "bytes of an audit entry's `facts` as JSON"),
    ("api.body_gate", "MAX_BODY_DEPTH", "levels of nesting in a request's body"),
    ("api.edge", "MAX_HEAD_BYTES", "bytes of a request's path, query and headers"),
    ("api.connections", "HEAD_SECONDS", "seconds for them to come"),
    ("api.edge", "BODY_SECONDS", "seconds for its body to come, and one more for each of the next bytes"),
    ("api.edge", "BODY_BYTES_PER_SECOND", "bytes of a body that buy it another second"),
    ("api.runtime", "MAX_WAITING", "requests that wait for a thread of one API process"),
    ("api.jobs", "LONGEST_WAIT_SECONDS", "longest `Prefer: wait`, in seconds"),
    ("api.jobs", "MAX_PAGE", "jobs of one page"),
    ("api.jobs", "MAX_SEARCH", "characters of `q` in `GET /api/v1/jobs`"),
    ("engine.queries", "MAX_SEARCHED", "newest jobs that a page with `q` looks at"),
    ("engine.idempotency", "MAX_KEY_CHARACTERS", "characters of an `Idempotency-Key`"),
    ("api.idempotency", "IN_PROGRESS_SECONDS", "seconds that a request waits for another with its key"),
    ("engine.happenings", "MAX_REPLAYED", "events of the last hour told to a stream that comes back"),
    ("api.hub", "MAX_STEPS", "jobs whose progress waits to be told in a stream of all jobs"),
    ("api.events", "STREAM_SECONDS", "seconds until an event stream is closed; clients reconnect"),
    ("engine.queues", "MAX_PAUSED_QUEUES", "queues that may be paused at once"),
    ("engine.queues", "MAX_QUEUES_SHOWN", "queues of one answer, by name"),
    ("engine.queues", "MAX_RECENT", "newest ended jobs of a status that a queue's waits are told from"),
    ("engine.statistics", "MAX_SAMPLED", "newest ended jobs of a status that statistics are told from"),
    ("api.admin", "MAX_WINDOW_DAYS", "days of the longest window of statistics"),
    ("engine.administration", "MAX_CLEANED_UP", "jobs deleted by one `POST /api/v1/admin/cleanup`"),
    ("api.compat", "MAX_PAGE_NUMBER", "largest `page` of a list that is asked for by page number"),
    ("limits.rules", "MAX_QUOTA", "largest quota of a rate limit"),
    ("limits.rules", "MAX_WINDOW_SECONDS", "longest window of a rate limit, in seconds"),
    ("limits.rules", "MAX_WINDOWS", "windows of one policy"),
    ("engine.access.overrides", "MAX_OVERRIDES", "rate limits that were set for one tenant and its callers"),
    ("engine.access.overrides", "MAX_SUBJECT", "characters of the caller such a limit is set for"),
    ("webhooks.guard", "MAX_URL_CHARACTERS", "characters of a webhook URL"),
    ("webhooks.guard", "MAX_HOST_CHARACTERS", "characters of its host"),
    ("webhooks.messages", "MAX_PAYLOAD_BYTES", "bytes of a webhook's body; past it the result is left out"),
    ("webhooks.endpoints", "MAX_ENDPOINTS", "webhook endpoints of a tenant"),
    ("webhooks.endpoints", "MAX_EVENT_TYPES", "events and globs of one of them"),
    ("webhooks.endpoints", "MAX_FILTER_VALUES", "names in each of its filters"),
    ("domain.headers", "MAX_HEADERS", "headers of its own, or of a job's `target`"),
    ("domain.headers", "MAX_HEADER_VALUE", "characters of such a header"),
    ("webhooks.endpoints", "MAX_RETRIES", "retries in its schedule"),
    ("webhooks.endpoints", "MAX_PAUSE_SECONDS", "longest wait in its schedule, in seconds"),
    ("webhooks.endpoints", "MAX_IN_FLIGHT", "largest `max_in_flight`"),
    ("engine.recoveries", "MAX_PER_SECOND", "largest `per_second` of a bulk replay"),
    ("engine.recoveries", "MAX_COUNTED", "messages that its dry run counts up to"),
    ("engine.webhook_ledger", "MAX_ATTEMPTS_SHOWN", "attempts shown of a delivery, the newest"),
    ("webhooks.secrets", "MAX_SECRETS", "secrets that sign at the same time"),
    ("webhooks.secrets", "MAX_GRACE_SECONDS", "longest grace of an old secret, in seconds"),
    ("webhooks.retries", "MAX_UNCHARGED", "attempts of a delivery that a Retry-After makes free"),
    ("webhooks.retries", "MAX_RETRY_AFTER_SECONDS", "longest `Retry-After` honoured, in seconds"),
    ("webhooks.retries", "MAX_TIMEOUT_SECONDS", "longest `timeout_seconds` of an endpoint"),
    ("webhooks.sender", "MAX_HEADER_CHARACTERS", "characters kept of a header of a receiver's answer"),
    ("webhooks.sender", "MAX_RESPONSE_BYTES", "bytes read of a receiver's answer"),
    ("webhooks.pace", "MAX_IN_FLIGHT", "attempts one courier has in flight"),
    ("webhooks.pace", "MAX_PER_TARGET", "of them to one receiver, unless its endpoint says otherwise"),
    ("webhooks.pace", "MAX_PER_TENANT", "of them for one tenant"),
    ("webhooks.pace", "MAX_PER_ORIGIN", "of them to one scheme, host and port"),
    ("webhooks.signing", "TOLERANCE_SECONDS", "seconds a signature's age may differ from now"),
)


def _limits() -> Iterable[str]:
    from laneway.limits.anonymous import ANONYMOUS, FAILED_LOGINS
    from laneway.limits.rules import parse_rules
    from laneway.settings import Settings

    yield "# Limits"
    yield (
        "What is refused or cut, and where the number stands. The fields of a request have their own limits "
        "beside them: [JobSpec](http.md#jobspec). What an operator may change is a [setting](settings.md)."
    )
    yield table(
        ("limit", "what", "constant"),
        (
            (
                _number(getattr(import_module(f"laneway.{module}"), name)),
                what,
                code(f"laneway.{module}.{name}"),
            )
            for module, name, what in _LIMITS
        ),
    )
    yield "## Requests"
    yield (
        "Each operation is charged to one rate class ([HTTP API](http.md)). A class holds in any window of "
        "its length, counted per caller; `LANEWAY_RATE_LIMITS` changes it. These are the defaults:"
    )
    rules = parse_rules(Settings.model_fields["rate_limits"].default)
    rows = [
        (code(rule.name), str(rule.quota), f"{rule.window_seconds} s", str(rule.partition))
        for each in rules.values()
        for rule in each
    ]
    rows += [(code(name), "those of `default`", "", "") for name in ("poll", "stream")]
    rows.append((code("free"), "no limit", "", ""))
    yield table(("class", "requests", "window", "counted per"), rows)
    yield (
        f"Requests without a valid key: {ANONYMOUS.quota} in any {ANONYMOUS.window_seconds} s from one "
        f"address (of IPv6, one /64), counted in each API process; {FAILED_LOGINS.quota} of them with a key "
        "that is none."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < 1e12 else str(value)


# Job types


def _job_types() -> Iterable[str]:
    from laneway.engine.registry import SHIPPED, JobType, load

    yield "# Job types"
    yield (
        "What ships. `GET /api/v1/job-types` lists what a running service knows, with the modules of "
        "`LANEWAY_TASKS`. Their jobs run on the queue `default` with priority `normal` unless a line says "
        "otherwise."
    )
    for known in load(()):
        if known.function.__module__ not in SHIPPED:
            continue
        yield f"## {known.name}"
        yield docstring(known.function)
        others = [f"`{name}` {getattr(known, name)}" for name in JobType.DEFAULTED if known.differs(name)]
        yield f"Defaults of its own: {', '.join(others)}." if others else ""
        yield fields(known.schema)


# The command line


def _cli() -> Iterable[str]:
    from laneway.cli import build
    from laneway.cli.exits import ExitCode

    yield "# Command line"
    yield (
        "`laneway --help` lists the commands, `laneway <command> --help` says what each takes. Results go to "
        "standard output, the rest to standard error; off a terminal, and with `--json`, a result is one "
        "JSON value a line."
    )
    meaning = _member_comments(ExitCode)
    yield table(
        ("exit code", "meaning"),
        ((str(each.value), f"`{each.name}` {meaning.get(each.name, '')}".strip()) for each in ExitCode),
    )
    group = typer.main.get_command(build())
    yield from _commands(group, "laneway")


def _commands(group: Any, path: str) -> Iterable[str]:
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
            continue
        context = command.make_context(f"{path} {name}", [], resilient_parsing=True)
        yield f"## {path} {name}"
        yield inspect.cleandoc(command.help)
        yield f"```text\n{' '.join(command.get_usage(context).split()).removeprefix('Usage: ')}\n```"
        records = [each.get_help_record(context) for each in command.params]
        if records := [record for record in records if record]:
            yield table(("option", "meaning"), ((code(option), what) for option, what in records))


# The Python package


def _python() -> Iterable[str]:
    import laneway
    from laneway.webhooks.signing import verify_webhook

    yield "# Python"
    yield "What `from laneway import …` gives. Each name is loaded on first use."
    for name in laneway.__all__:
        yield f"## {name}"
        yield from _python_name(name, getattr(laneway, name))
    yield "## laneway.webhooks.signing.verify_webhook"
    yield "For receivers of webhooks."
    yield from _python_name("verify_webhook", verify_webhook)


def _python_name(name: str, value: Any) -> Iterable[str]:
    from enum import Enum

    if isinstance(value, type) and issubclass(value, Enum):
        yield docstring(value)
        yield "One of " + codes(f"{name}.{member.name}" for member in value) + "."
        return
    if inspect.isfunction(value):
        yield _signature(name, value)
        yield docstring(value)
        return
    if issubclass(value, BaseException) and "__init__" in vars(value):
        yield _signature(name, value.__init__)
    yield docstring(value)
    for attribute, member in vars(value).items():
        function = _documented(name, member)
        if attribute.startswith("_") or function is None or not function.__doc__:
            continue
        yield f"### {name}.{attribute}"
        if not isinstance(member, property | cached_property):
            yield _signature(f"{name}.{attribute}", function)
        yield docstring(function)


def _documented(name: str, member: Any) -> Callable[..., Any] | None:
    """The function behind a member of a class; None for what is none, and for what another class shows."""
    match member:
        case property():
            return member.fget
        case cached_property():
            return member.func
    if name.startswith("Async"):
        return member if inspect.iscoroutinefunction(member) else None
    found = getattr(member, "_build", member)  # a call of the client: what it is built by
    return found if inspect.isfunction(found) else None


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    shown: list[str] = []
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        if each.name != "self":
            shown.append(_parameter(each))
    answer = re.sub(r"^Call\[(.*)\]$", r"\1", str(signature.return_annotation))
    answer = re.sub(r"^Listing\[(.*)\]$", r"Iterator[\1]", answer)
    arrow = f" -> {answer}" if function.__name__ != "__init__" else ""
    text = f"{name}({', '.join(shown)}){arrow}"
    if len(text) > SIGNATURE_WIDTH:
        text = f"{name}(\n    " + ",\n    ".join(shown) + f",\n){arrow}"
    return f"```python\n{text}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    text = f"{stars}{parameter.name}: {parameter.annotation}"
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"


if __name__ == "__main__":
    typer.run(docs)
