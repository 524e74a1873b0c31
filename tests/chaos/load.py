"""The clients and the receiver of a run: they do what the plan says and write down what they were told."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from chaos.ground import Ground
from chaos.history import History
from chaos.plan import CANARY, Plan, PlannedFlow, PlannedJob
from webhook_receiver import Exchange, Mode, Receiver, endless_body, hang, ok, reset

CLIENTS = 24
ANSWER_SECONDS = 15.0
PATIENCE_SECONDS = 40.0  # how long a client tries to hand in one job
READS_PER_SECOND = 2.0


class Refused(Exception):
    """The request certainly did nothing: an error answer, or nobody to connect to."""

    def __init__(self, status: int | None = None, retry_after: str | None = None) -> None:
        super().__init__(status, retry_after)
        self.status = status
        self.retry_after = retry_after


class Unknown(Exception):
    """No answer: nobody knows whether it was done."""


class Client:
    """Calls the APIs in turn. One a thread; connections are not kept, so that none is stale."""

    def __init__(self, ground: Ground) -> None:
        self._ports = itertools.cycle(ground.ports)
        self._keys = ground.keys

    def call(
        self, method: str, path: str, tenant: str, body: Any = None, *, once: str = ""
    ) -> tuple[int, Any]:
        """Status and JSON of an answer below 400; `once` is an idempotency key. Raises Refused, Unknown."""
        connection = http.client.HTTPConnection("127.0.0.1", next(self._ports), timeout=ANSWER_SECONDS)
        headers = {"Authorization": f"Bearer {self._keys[tenant]}", "Content-Type": "application/json"}
        if once:
            headers["Idempotency-Key"] = once
        try:
            connection.connect()
        except OSError as error:
            raise Refused from error
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unknown from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise Refused(answer.status, answer.headers.get("Retry-After"))
        return answer.status, json.loads(text)


class Load:
    """Submits, cancels and reads by the plan, each in its time, from several threads."""

    def __init__(self, plan: Plan, ground: Ground, webhook_url: Callable[[int], str]) -> None:
        self._plan = plan
        self._ground = ground
        self._history = History(ground.history_folder, "driver")
        self._webhook_url = webhook_url
        self._pool = ThreadPoolExecutor(CLIENTS, thread_name_prefix="client")
        self._local = threading.local()
        self._later: SimpleQueue[tuple[float, Callable[[], None]]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._enough = threading.Event()
        self.accepted = 0
        self._under_way = 0
        self._complaints: list[str] = []
        self._count = threading.Lock()

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def finish(self, seconds: float) -> list[str]:
        """Wait until every client is done, then tell them to stop; what they had to complain about."""
        self._thread.join(seconds)
        self._enough.set()
        self._thread.join()
        self._pool.shutdown(wait=True)
        self._history.close()
        return self._complaints

    def _run(self) -> None:
        agenda: list[tuple[float, int, Callable[[], None]]] = []
        order = itertools.count()
        for job in self._plan.jobs:
            for _ in range(2 if job.doubled else 1):
                agenda.append((job.at, next(order), partial(self._submit, job)))
        for flow in self._plan.flows:
            agenda.append((flow.at, next(order), partial(self._submit_flow, flow)))
        for n in range(int(self._plan.seconds * READS_PER_SECOND)):
            agenda.append((n / READS_PER_SECOND, next(order), partial(self._read, n)))
        agenda.sort(reverse=True)
        while not self._enough.is_set():
            while not self._later.empty():
                at, what = self._later.get()
                agenda.append((at, next(order), what))
                agenda.sort(reverse=True)
            wait = self._began + agenda[-1][0] - time.monotonic() if agenda else 0.02
            if wait > 0:
                if not agenda and not self._under_way and self._later.empty():
                    return
                self._enough.wait(min(wait, 0.02))
                continue
            with self._count:
                self._under_way += 1
            self._pool.submit(self._guarded, agenda.pop()[2])

    def _guarded(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            self._complaints.append(f"a client failed: {type(error).__name__}: {error}")
        finally:
            with self._count:
                self._under_way -= 1

    def _client(self) -> Client:
        if not hasattr(self._local, "client"):
            self._local.client = Client(self._ground)
        client: Client = self._local.client
        return client

    def _submit(self, job: PlannedJob) -> None:
        body = dict(job.body)
        if job.webhook:
            body["webhook_url"] = self._webhook_url(job.number)
        tenant = self._ground.tenant_ids[job.tenant]
        asked = {"tenant": tenant, "unique_key": body.get("unique_key"), "number": job.number}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            op = self._history.invoke("submit", **asked)
            try:
                status, answer = self._client().call("POST", "/api/v1/jobs", job.tenant, body)
            except Refused as refused:
                op.fail(status=refused.status, retry_after=refused.retry_after)
                if refused.status not in (None, 429, 503):
                    self._complaints.append(f"job {job.number} was answered {refused.status}")
                    return
                self._enough.wait(0.3)
                continue
            except Unknown:
                op.info()
                if "unique_key" not in body:
                    return  # a second try would be a second job
                continue
            op.ok(tenant=tenant, status=status, job_id=answer["id"])
            with self._count:
                self.accepted += 1
            if job.cancel is not None:
                at = time.monotonic() - self._began + job.cancel.after_seconds
                self._later.put((at, partial(self._cancel, job, answer["id"])))
            return
        self._complaints.append(f"job {job.number} could not be handed in within {PATIENCE_SECONDS:g} s")

    def _submit_flow(self, flow: PlannedFlow) -> None:
        tenant = self._ground.tenant_ids[flow.tenant]
        path = "/api/v1/batches" if flow.kind == "batch" else "/api/v1/chains"
        asked = {"tenant": tenant, "kind": flow.kind, "number": flow.number}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            op = self._history.invoke("flow", **asked)
            try:
                once = f"flow-{flow.number}"
                _, answer = self._client().call("POST", path, flow.tenant, flow.body, once=once)
            except Refused as refused:
                op.fail(status=refused.status, retry_after=refused.retry_after)
                if refused.status not in (None, 409, 429, 503):  # 409: the first attempt is under way
                    self._complaints.append(f"{flow.kind} {flow.number} was answered {refused.status}")
                    return
                self._enough.wait(0.3)
                continue
            except Unknown:
                op.info()
                continue
            op.ok(**asked, flow_id=answer["id"])
            if flow.cancel_after_seconds is not None:
                at = time.monotonic() - self._began + flow.cancel_after_seconds
                self._later.put((at, partial(self._cancel_flow, flow, f"{path}/{answer['id']}/cancel")))
            return
        self._complaints.append(f"{flow.kind} {flow.number} could not be handed in")

    def _cancel_flow(self, flow: PlannedFlow, path: str) -> None:
        op = self._history.invoke("cancel_flow", tenant=self._ground.tenant_ids[flow.tenant])
        try:
            self._client().call("POST", path, flow.tenant, {"reason": "planned"})
        except Refused as refused:
            op.fail(status=refused.status, retry_after=refused.retry_after)
        except Unknown:
            op.info()
        else:
            op.ok(number=flow.number)

    def _cancel(self, job: PlannedJob, job_id: str) -> None:
        assert job.cancel is not None
        tenant = self._ground.tenant_ids[job.tenant]
        op = self._history.invoke("cancel", tenant=tenant, job_id=job_id)
        body = {"terminate": job.cancel.terminate, "reason": "planned"}
        try:
            status, answer = self._client().call("POST", f"/api/v1/jobs/{job_id}/cancel", job.tenant, body)
        except Refused as refused:
            op.fail(status=refused.status, retry_after=refused.retry_after)
        except Unknown:
            op.info()
        else:
            done = status == 200
            op.ok(tenant=tenant, job_id=job_id, done=done, attempt=answer["attempt"])

    def _read(self, n: int) -> None:
        name = list(self._ground.tenant_ids)[n % len(self._ground.tenant_ids)]
        op = self._history.invoke("read", tenant=self._ground.tenant_ids[name])
        try:
            _, answer = self._client().call("GET", "/api/v1/jobs?limit=20", name)
        except Refused as refused:
            op.fail(status=refused.status, retry_after=refused.retry_after)
        except Unknown:
            op.info()
        else:
            ids = [job["id"] for job in answer["data"]]
            strangers = {m[0] for m in CANARY.finditer(json.dumps(answer)) if m[1] != name}
            op.ok(tenant=self._ground.tenant_ids[name], ids=ids, foreign=sorted(strangers))


class Post:
    """Two receivers of webhooks: what they get is verified and written down, however they then answer.

    One always behaves; the other is the one that faults are about.
    """

    def __init__(self, ground: Ground) -> None:
        self._history = History(ground.history_folder, "receiver")
        self._verifiers = [Webhook(secret) for secret in ground.secrets.values()]
        self.steady = Receiver(self._recorded(ok))
        self.moody = Receiver(self._recorded(ok))

    def misbehaviours(self) -> list[Mode]:
        modes = (_server_error, hang, reset, _redirect, endless_body)
        return [self._recorded(mode) for mode in modes]

    def url(self, number: int) -> str:
        """Where the messages of a job go."""
        return (self.moody if number % 2 else self.steady).url(f"/{number}")

    def __enter__(self) -> Post:
        self.steady.__enter__()
        self.moody.__enter__()
        return self

    def __exit__(self, *how: object) -> None:
        self.moody.__exit__(*how)
        self.steady.__exit__(*how)
        self._history.close()

    def _recorded(self, mode: Mode) -> Mode:
        def receive(exchange: Exchange) -> None:
            request = exchange.request
            exchange.receiver.requests.clear()  # the history has them: a long run must not grow
            try:
                job_id = json.loads(request.body)["data"]["job_id"]
            except (ValueError, KeyError, TypeError):
                job_id = None
            self._history.note(
                "receive",
                webhook_id=request.headers.get("webhook-id"),
                job_id=job_id,
                verified=any(_verifies(each, request.body, request.headers) for each in self._verifiers),
            )
            mode(exchange)

        receive.__name__ = mode.__name__
        return receive


def _verifies(verifier: Webhook, body: bytes, headers: dict[str, str]) -> bool:
    try:
        verifier.verify(body, headers)
    except (WebhookVerificationError, ValueError):
        return False
    return True


def _server_error(exchange: Exchange) -> None:
    exchange.answer(500)


def _redirect(exchange: Exchange) -> None:
    exchange.answer(302, Location="http://169.254.169.254/")
