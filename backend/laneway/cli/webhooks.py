"""The commands about webhooks: what was sent where, sending it again, and receiving it here.

What concerns many is only said, unless `--yes` stands there too.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from laneway.cli import show
from laneway.cli.client import Client
from laneway.cli.environment import listen as bind
from laneway.cli.environment import read_settings
from laneway.cli.exits import ExitCode
from laneway.cli.jobs import AsJson
from laneway.cli.store import migrated_store, secret_box
from laneway.errors import LanewayError, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

TEST_SECONDS = 60.0
LOOK_SECONDS = 0.2
_ON_ITS_WAY = ("pending", "sending", "retrying")

webhooks = typer.Typer(help="Webhooks: what was sent, sending it again, receiving it.", no_args_is_help=True)

DeliveryId = Annotated[str, typer.Argument(metavar="ID", help="The delivery's id.")]
EndpointId = Annotated[str, typer.Argument(metavar="ENDPOINT", help="The endpoint's id.")]


@webhooks.command()
def ls(
    status: Annotated[list[str] | None, typer.Option(help="With this status; repeatable.")] = None,
    event: Annotated[str | None, typer.Option(metavar="EVENT", help="Of this event: job.failed.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="ID", help="To this endpoint.")] = None,
    job: Annotated[str | None, typer.Option(metavar="ID", help="About this job.")] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="TIME", help="Made after it: 2026-01-01T12:00:00Z.")
    ] = None,
    before: Annotated[str | None, typer.Option("--before", metavar="TIME", help="Made before it.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, newest first."""
    said = {
        "status": status,
        "event_type": event,
        "endpoint_id": endpoint,
        "job_id": job,
        "created_after": after,
        "created_before": before,
    }
    with Client.from_environment() as client:
        found = client.pages(
            "/webhooks/deliveries", limit=limit, **{name: value for name, value in said.items() if value}
        )
    columns = {
        "id": "id",
        "event_type": "event",
        "status": "status",
        "attempt_count": "attempts",
        "last_status_code": "answered",
        "created_at": "made",
        "url": "url",
    }
    show.rows(found, columns, as_json=as_json)


@webhooks.command("show")
def show_one(delivery_id: DeliveryId, as_json: AsJson = False) -> None:
    """Print a delivery as JSON: what is sent, and how each try went."""
    with Client.from_environment() as client:
        show.result(client.get(_delivery(delivery_id)), as_json=as_json)


@webhooks.command()
def redeliver(delivery_id: DeliveryId, as_json: AsJson = False) -> None:
    """Send a delivery again: the same bytes under the same webhook-id."""
    with Client.from_environment() as client:
        sent = client.post(f"{_delivery(delivery_id)}/redeliver", None)
    if show.for_eyes(as_json=as_json):
        print(sent["status"])
    else:
        show.result(sent, as_json=True)


@webhooks.command()
def recover(
    endpoint_id: EndpointId,
    since: Annotated[str, typer.Option(metavar="TIME", help="From then on: 2026-01-01T12:00:00Z.")],
    until: Annotated[str | None, typer.Option(metavar="TIME", help="To before then; default: now.")] = None,
    mode: Annotated[
        str, typer.Option(help="failed (tried in vain), missing (never tried), or all.")
    ] = "failed",
    per_second: Annotated[
        float | None, typer.Option(metavar="N", help="So many a second; default: 10.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, only count.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send again what an endpoint did not get."""
    said = {"since": since, "until": until, "mode": mode, "per_second": per_second, "dry_run": not yes}
    body = {name: value for name, value in said.items() if value is not None}
    with Client.from_environment() as client:
        answer = client.post(f"{_endpoint(endpoint_id)}/recover", body)
    if not show.for_eyes(as_json=as_json):
        show.result(answer, as_json=True)
    elif yes:
        print(f"recovery {answer['id']} is {answer['status']}")
    else:
        print(f"{answer['count']} would be sent")
    if not yes:
        print("laneway: nothing was done; repeat it with --yes", file=sys.stderr)


@webhooks.command("test")
def send_test(endpoint_id: EndpointId, as_json: AsJson = False) -> None:
    """Send an endpoint a test event and print how it went. Exit code 0 when the receiver took it."""
    rest = threading.Event()
    with Client.from_environment() as client:
        path = _delivery(client.post(f"{_endpoint(endpoint_id)}/test", None)["delivery_id"])
        looks = int(TEST_SECONDS / LOOK_SECONDS)
        while (delivery := client.get(path))["status"] in _ON_ITS_WAY and looks:
            rest.wait(LOOK_SECONDS)
            looks -= 1
    show.result(delivery, as_json=as_json)
    if delivery["status"] in _ON_ITS_WAY:
        print(
            f"laneway: it is still {delivery['status']}; paused, blocked, or no courier runs?",
            file=sys.stderr,
        )
        raise typer.Exit(ExitCode.TIMEOUT)
    if delivery["status"] != "delivered":
        raise typer.Exit(ExitCode.FAILED)


@webhooks.command()
def endpoints(as_json: AsJson = False) -> None:
    """List the registered endpoints and how they have been answering."""
    with Client.from_environment() as client:
        found = client.get("/webhooks/endpoints")["data"]
    if show.for_eyes(as_json=as_json):
        found = [
            each
            | {
                "event_types": " ".join(each["event_types"]),
                "failures": each["health"]["consecutive_failures"],
                "blocked_until": each["health"]["blocked_until"],
            }
            for each in found
        ]
    columns = {
        "id": "id",
        "status": "status",
        "failures": "failures in a row",
        "blocked_until": "blocked until",
        "event_types": "events",
        "url": "url",
    }
    show.rows(found, columns, as_json=as_json)


@webhooks.command()
def secret(tenant: Annotated[str, typer.Option(help="Its name.")] = "default") -> None:
    """Print what signs the webhooks to a tenant's jobs' own URLs, for receivers to verify: whsec_…"""
    import sqlalchemy as sa

    from laneway.engine.access.callers import webhook_secret
    from laneway.models import tenants

    settings = read_settings()
    with migrated_store(settings) as database:
        with database.read() as connection:
            tenant_id = connection.execute(
                sa.select(tenants.c.id).where(tenants.c.name == tenant)
            ).scalar_one_or_none()
        if tenant_id is None:
            raise NotFound(f"there is no tenant {tenant!r}; `laneway keys create --tenant` makes one")
        try:
            text = webhook_secret(database, secret_box(settings), tenant_id)
        except ValueError as error:
            raise LanewayError(f"the secret of tenant {tenant!r} does not open: {error}") from None
    print(text)


@webhooks.command()
def rekey() -> None:
    """Seal every secret again with the first of LANEWAY_ENCRYPTION_KEYS; the other keys may go then.

    Safe beside everything that runs, and to repeat. Exit code 1 when something does not open: it is
    named, and stays as it was.
    """
    from laneway.clock import SystemClock
    from laneway.webhooks.rekey import rekey as seal_again

    settings = read_settings()
    with migrated_store(settings) as database:
        done = seal_again(database, secret_box(settings), now=SystemClock().now())
    print(f"sealed again: {done.tenants} tenants, {done.endpoints} endpoints, {done.jobs} jobs")
    if done.unreadable:
        left = "\n".join(done.unreadable)
        raise LanewayError(f"keep the old keys, these do not open:\n{left}")


@webhooks.command()
def listen(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 9000,
    secret: Annotated[
        str | None,
        typer.Option(
            envvar="WEBHOOK_SECRET", metavar="WHSEC", help="Default: the tenant's, asked of the API."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    as_json: AsJson = False,
) -> None:
    """Receive webhooks here: verify each and print it, until Ctrl-C.

    Answers 204 to what verifies and 401 to the rest.
    """
    from laneway.cli.receiver import Listener
    from laneway.webhooks.secrets import parse_webhook_secret

    if secret is None:
        with Client.from_environment() as client:
            secret = client.get("/webhooks/secret")["secret"]
    try:
        known = parse_webhook_secret(secret)
    except ValueError as error:
        raise typer.BadParameter(f"--secret: {error}") from None
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with Listener(_printer(known, as_json=as_json), bind(host, port)) as listener:
        print(f"laneway: listening on {listener.origin}; Ctrl-C ends it", file=sys.stderr, flush=True)
        stopping.wait()


def _printer(secret: str, *, as_json: bool) -> Callable[[bytes, dict[str, str]], bool]:
    """What verifies a request and prints it; whether it verified."""
    from laneway.errors import WebhookNotVerified
    from laneway.webhooks.signing import ID_HEADER, verify_webhook

    seen: set[str] = set()
    lock = threading.Lock()

    def take(body: bytes, headers: dict[str, str]) -> bool:
        payload: Any = None
        reason: str | None = None
        try:
            payload = verify_webhook(body, headers, secret)
        except WebhookNotVerified as error:
            reason = error.facts["reason"]
        except ValueError:
            reason = "not_json"
        webhook_id = headers.get(ID_HEADER)
        with lock:
            came = {
                "verified": reason is None,
                "reason": reason,
                "webhook_id": webhook_id,
                "again": webhook_id in seen,
                "payload": payload,
            }
            if reason is None and webhook_id is not None:
                seen.add(webhook_id)
            if show.for_eyes(as_json=as_json):
                said = (
                    "verified" + ", came before" * came["again"] if reason is None else f"REFUSED: {reason}"
                )
                print(f"{webhook_id} {said}")
            show.result(payload if show.for_eyes(as_json=as_json) else came, as_json=as_json)
        return reason is None

    return take


def _delivery(delivery_id: str) -> str:
    return f"/webhooks/deliveries/{quote(delivery_id, safe='')}"


def _endpoint(endpoint_id: str) -> str:
    return f"/webhooks/endpoints/{quote(endpoint_id, safe='')}"
