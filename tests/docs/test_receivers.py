"""The receivers that docs/how-to/verify_a_webhook.md shows, as servers that real requests reach.

Go and Express are not installed where the tests run: Go's program is not run; of Express, the check itself
runs under Node.js behind `node:http`, and the route is parsed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from docs.markdown import ROOT, blocks
from laneway.webhooks.secrets import new_webhook_secret
from laneway.webhooks.signing import sign, signature_headers
from process.stack import Process
from servers import wait_until

PAGE = ROOT / "docs" / "how-to" / "verify_a_webhook.md"
SECRET, OLD_SECRET = new_webhook_secret(), new_webhook_secret()
BODY = '{"type":"job.completed","data":{"text":"grüße"}}'.encode()
LARGEST = b'{"type":"job.completed","data":"' + b"x" * (256 * 1024 - 34) + b'"}'
NODE_SERVER = """
import { createServer } from "node:http";
import { verifyWebhook } from "./verify_webhook.mjs";

createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const event = verifyWebhook(Buffer.concat(chunks), request.headers, process.env.WEBHOOK_SECRET);
  response.writeHead(event ? 204 : 401).end();
}).listen(Number(process.env.PORT), "127.0.0.1");
"""


def shown(language: str, holds: str) -> str:
    """The page's only block in `language` that holds this text."""
    (text,) = (block.text for block in blocks(PAGE) if block.language == language and holds in block.text)
    return text


def command(framework: str, folder: Path, port: str) -> list[str]:
    """What serves the page's receiver, written into `folder`."""
    if framework == "node":
        node = shutil.which("node")
        assert node, "Node.js is not installed"
        (folder / "verify_webhook.mjs").write_text(shown("js", "createHmac"))
        (folder / "server.mjs").write_text(NODE_SERVER)
        return [node, "server.mjs"]
    (folder / "receiver.py").write_text(shown("python", f"from {framework} import"))
    if framework == "fastapi":
        return [sys.executable, "-m", "uvicorn", "receiver:app", "--port", port]
    return [sys.executable, "-m", "flask", "--app", "receiver", "run", "--port", port]


@contextmanager
def serving(framework: str, folder: Path) -> Iterator[str]:
    """The URL of the receiver, for as long as it runs."""
    port = free_port()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "backend"), str(folder)]),
        "WEBHOOK_SECRET": SECRET,
        "PORT": port,
    }
    words = ["env", "-C", str(folder), *command(framework, folder, port)]
    process = Process(framework, words, log=folder / "log", env=env)
    url = f"http://127.0.0.1:{port}/hook"

    def answers() -> bool:
        try:
            return httpx.get(url).status_code < 500
        except httpx.TransportError:
            return process.ended()

    try:
        wait_until(answers, what=f"{framework} answers", evidence=process.said)
        assert not process.ended(), process.said()
        yield url
    finally:
        process.send(signal.SIGKILL)
        process.wait()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def signed(body: bytes, *secrets: str, age: int = 0) -> dict[str, str]:
    stamp = int(time.time()) - age
    signatures = [sign(secret, "msg_1", stamp, body) for secret in secrets or (SECRET,)]
    return signature_headers(signatures, message_id="msg_1", timestamp=stamp)


@pytest.mark.parametrize("framework", ["fastapi", "flask", "node"])
def test_a_receiver_takes_what_is_ours_and_nothing_else(framework: str, tmp_path: Path) -> None:
    with serving(framework, tmp_path) as url:

        def answer(body: bytes, headers: dict[str, str]) -> int:
            return httpx.post(url, content=body, headers=headers).status_code

        assert answer(BODY, signed(BODY)) == 204
        assert answer(LARGEST, signed(LARGEST)) == 204
        assert answer(BODY, signed(BODY, OLD_SECRET, SECRET)) == 204  # a secret is being rotated
        assert answer(BODY, signed(BODY, age=290)) == 204
        assert answer(BODY, signed(BODY, OLD_SECRET)) == 401
        assert answer(BODY + b" ", signed(BODY)) == 401
        assert answer(BODY, signed(BODY, age=310)) == 401
        assert answer(BODY, signed(BODY, age=-310)) == 401
        assert answer(BODY, signed(BODY) | {"webhook-id": "msg_2"}) == 401
        for header in ("webhook-id", "webhook-timestamp", "webhook-signature"):
            assert answer(BODY, {k: v for k, v in signed(BODY).items() if k != header}) == 401, header


def test_the_route_for_express_can_be_read(tmp_path: Path) -> None:
    route = tmp_path / "app.mjs"
    route.write_text(shown("js", "express.raw"))
    done = subprocess.run(
        [str(shutil.which("node")), "--check", route],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
