"""Couriers as processes of their own, ended politely and otherwise."""

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from laneway.db import Database
from laneway.webhooks.health import FIRST_CAP
from webhook_office import Office
from webhook_receiver import Receiver, hang, ok

PROGRAM = """
from laneway.settings import Settings
from laneway.webhooks.courier import main
main(Settings())
"""


@contextmanager
def courier_process(office: Office) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LANEWAY_DATABASE_URL": office.database.url.render_as_string(hide_password=False),
        "LANEWAY_REDIS_URL": office.settings.redis_url,
        "LANEWAY_WEBHOOK_ALLOW_HTTP": "1",
        "LANEWAY_WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
        "LANEWAY_ENCRYPTION_KEYS": f"k1:{base64.b64encode(bytes(32)).decode()}",
    }
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=os.environ | environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def test_a_killed_courier_loses_no_message(database: Database) -> None:
    office = Office(database)
    with Receiver(hang) as receiver:
        posted = [office.post(receiver.url()) for _ in range(FIRST_CAP)]
        with courier_process(office) as process:
            receiver.wait_for(FIRST_CAP)
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        receiver.mode = ok
        office.clock.advance(seconds=60)  # past the dead courier's leases
        with office.open():
            for job_id in posted:
                office.wait(job_id, status="delivered", attempts=2)
    first, again = receiver.requests[:FIRST_CAP], receiver.requests[FIRST_CAP:]
    assert {request.headers["webhook-id"] for request in first} == {
        request.headers["webhook-id"] for request in again
    }
    assert {request.body for request in first} == {request.body for request in again}


def test_sigterm_lets_a_courier_finish_and_end_well(database: Database) -> None:
    office = Office(database)
    with Receiver(hang) as receiver:
        job_id = office.post(receiver.url())
        with courier_process(office) as process:
            receiver.wait_for(1)
            process.send_signal(signal.SIGTERM)
            receiver.let_go.set()
            assert process.wait(30) == 0
        assert office.delivery(job_id)["status"] == "delivered"
    assert len(receiver.requests) == 1
