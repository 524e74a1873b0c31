"""`laneway webhooks …` against a running stack, and `listen` against what it sends."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from laneway.clock import SystemClock
from laneway.webhooks.secrets import new_webhook_secret
from laneway.webhooks.signing import sign, signature_headers
from laneway_process import Running, laneway
from process.test_cli_jobs import on_a_terminal
from servers import wait_until
from webhook_receiver import Receiver, in_turn

pytestmark = pytest.mark.xdist_group("dev stack")

Client = dict[str, object]
NOBODY = "00000000-0000-7000-8000-000000000000"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The variables that lead to a running stack."""
    folder = tmp_path_factory.mktemp("dev")
    data = folder / "data"
    variables = {"LANEWAY_RATE_LIMITS": "off"}
    with Running(folder, "dev", "--port", 0, "--data-dir", data, "--workers", 1, **variables) as dev:
        dev.says("curl -sS")
        yield {"LANEWAY_URL": dev.out.split("API")[1].split()[0], "LANEWAY_DATA_DIR": data}
        assert dev.stop() == 0, dev.evidence()


def lines(text: str) -> list[Any]:
    """Each line as the JSON that it is."""
    return [json.loads(line) for line in text.splitlines()]


def call(client: Client, method: str, path: str, body: Any) -> Any:
    key = (Path(str(client["LANEWAY_DATA_DIR"])) / "admin.key").read_text().strip()
    answer = httpx.request(
        method, f"{client['LANEWAY_URL']}/api/v1{path}", json=body, headers={"Authorization": f"Bearer {key}"}
    )
    assert answer.is_success, answer.text
    return answer.json()


def endpoint(client: Client, url: str, **fields: Any) -> tuple[str, str]:
    """The id and the secret of a new endpoint."""
    made = call(client, "POST", "/webhooks/endpoints", {"url": url} | fields)
    return made["id"], made["secret"]


def of_job(client: Client, job_id: str, status: str) -> str:
    """The id of the job's delivery, as soon as it has this status."""

    def found() -> str | None:
        listed = lines(laneway("webhooks", "ls", "--job", job_id, "--status", status, **client).stdout)
        return listed[0]["id"] if listed else None

    return str(wait_until(found, what=f"a delivery of {job_id} is {status}"))


def test_a_delivery_is_listed_shown_and_sent_again(client: Client) -> None:
    with Receiver(in_turn(200)) as receiver:
        job_id = laneway(
            "enqueue", "demo.noop", "--webhook-url", receiver.url(), "--wait", "--json", **client
        )
        assert job_id.returncode == 0, job_id.stderr
        [request] = receiver.wait_for(1)
        about = json.loads(request.body)["data"]["job_id"]
        delivery_id = of_job(client, about, "delivered")
        shown = laneway("webhooks", "show", delivery_id, **client)
        (said,) = lines(shown.stdout)
        assert said["payload"].encode() == request.body
        assert [each["status_code"] for each in said["attempts"]] == [200]
        again = laneway("webhooks", "redeliver", delivery_id, **client)
        assert (again.returncode, again.stderr) == (0, "")
        second = receiver.wait_for(2)[1]
    assert second.body == request.body
    assert second.headers["webhook-id"] == request.headers["webhook-id"]
    assert laneway("webhooks", "ls", "--status", "dead", "--event", "job.completed", **client).stdout == ""


def test_what_is_not_there_or_makes_no_sense_says_so(client: Client) -> None:
    for command in (("show", NOBODY), ("redeliver", NOBODY)):
        done = laneway("webhooks", *command, **client)
        assert (done.returncode, "no webhook delivery" in done.stderr) == (3, True)
    for command in (
        ("test", NOBODY),
        ("recover", NOBODY, "--since", "2026-01-01T00:00:00Z"),
    ):
        done = laneway("webhooks", *command, **client)
        assert (done.returncode, "no webhook endpoint" in done.stderr) == (3, True)
    assert laneway("webhooks", "ls", "--status", "lost", **client).returncode == 2


def test_an_endpoint_is_listed_and_tested(client: Client) -> None:
    with Receiver(in_turn(200, 500)) as receiver:
        endpoint_id, _ = endpoint(client, receiver.url(), event_types=["job.cancelled"])
        took = laneway("webhooks", "test", endpoint_id, **client)
        assert (took.returncode, took.stderr) == (0, "")
        assert [each["status_code"] for each in lines(took.stdout)[0]["attempts"]] == [200]
        refused = laneway("webhooks", "test", endpoint_id, **client)
        assert (refused.returncode, lines(refused.stdout)[0]["status"]) == (1, "dead")
    listed = {each["id"]: each for each in lines(laneway("webhooks", "endpoints", **client).stdout)}
    assert listed[endpoint_id]["url"] == receiver.url()
    assert "enabled" in on_a_terminal("webhooks", "endpoints", **client)
    call(client, "PATCH", f"/webhooks/endpoints/{endpoint_id}", {"status": "paused"})


def test_an_endpoint_that_came_later_is_told_what_it_missed(client: Client) -> None:
    """First it is only counted."""
    since = SystemClock().now().isoformat()
    with Receiver() as others, Receiver() as receiver:
        laneway("enqueue", "demo.noop", "--webhook-url", others.url(), "--wait", **client)
        [told] = others.wait_for(1)
        endpoint_id, _ = endpoint(client, receiver.url())
        wish = ("webhooks", "recover", endpoint_id, "--since", since, "--mode", "missing")
        counted = laneway(*wish, **client)
        assert lines(counted.stdout) == [{"dry_run": True, "count": 1}]
        assert "repeat it with --yes" in counted.stderr
        started = laneway(*wish, "--per-second", "50", "--yes", **client)
        assert lines(started.stdout)[0]["per_second"] == 50
        [request] = receiver.wait_for(1)
    assert (request.body, request.headers["webhook-id"]) == (told.body, told.headers["webhook-id"])
    call(client, "PATCH", f"/webhooks/endpoints/{endpoint_id}", {"status": "paused"})


def signed(secret: str, body: bytes, message_id: str = "msg_1") -> dict[str, str]:
    now = int(SystemClock().now().timestamp())
    return signature_headers([sign(secret, message_id, now, body)], message_id=message_id, timestamp=now)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_listen_verifies_and_prints_until_it_is_told_to_stop(tmp_path: Path, how: signal.Signals) -> None:
    secret, other = new_webhook_secret(), new_webhook_secret()
    command = ("webhooks", "listen", "--port", 0, "--secret", secret)
    with Running(tmp_path, *command, PYTHONUNBUFFERED=1) as listening:
        listening.says("Ctrl-C ends it")
        url = listening.err.split("listening on ")[1].split(";")[0]
        body = '{"type":"job.completed","data":{"text":"grüße"}}'.encode()
        headers = signed(secret, body)
        statuses = [
            httpx.post(url, content=body, headers=headers).status_code,
            httpx.post(f"{url}/any/path", content=body, headers=headers).status_code,
            httpx.post(url, content=body, headers=signed(other, body)).status_code,
            httpx.post(url, content=body).status_code,
            httpx.post(url, content=b"x" * (1024 * 1024 + 1), headers=headers).status_code,
            httpx.post(url, content=iter([body]), headers=headers).status_code,
            httpx.post(url, content=b"no JSON", headers=signed(secret, b"no JSON")).status_code,
        ]
        assert statuses == [204, 204, 401, 401, 413, 411, 401]
        assert listening.stop(how) == 0, listening.evidence()
        came = lines(listening.out)
    assert [(each["verified"], each["reason"], each["again"]) for each in came] == [
        (True, None, False),
        (True, None, True),
        (False, "no_match", True),
        (False, "missing_header", False),
        (False, "not_json", True),
    ]
    assert came[0]["payload"] == json.loads(body)
    assert came[2]["payload"] is None
    assert secret not in listening.out + listening.err


def test_listen_takes_the_tenants_secret_from_the_api(client: Client, tmp_path: Path) -> None:
    with Running(tmp_path, "webhooks", "listen", "--port", 0, PYTHONUNBUFFERED=1, **client) as listening:
        listening.says("Ctrl-C ends it")
        url = listening.err.split("listening on ")[1].split(";")[0]
        laneway("enqueue", "demo.noop", "--webhook-url", url, "--wait", **client)
        listening.says('"verified":true')
        assert listening.stop(signal.SIGINT) == 0


def test_listen_says_what_is_wrong(tmp_path: Path) -> None:
    wrong = laneway("webhooks", "listen", "--port", 0, "--secret", "whsec_canary")
    assert (wrong.returncode, "canary" in wrong.stderr) == (2, False)
    with Receiver() as holder:
        taken = laneway("webhooks", "listen", "--port", holder.port, "--secret", new_webhook_secret())
    assert (taken.returncode, "is taken" in taken.stderr) == (1, True)
