"""The adapter for Ollama and other OpenAI-compatible servers, against a server on loopback."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest

from feedback_summaries.openai_compatible import MAX_QUOTED, OpenAICompatible
from feedback_summaries.summariser import Style, Summary, Tokens
from laneway import PermanentError, Retry, TransientError

KEY = "sk-test-4711-do-not-show"
COMMENTS = ["Your graph needs units. The talk was great!", "Great talk, but the graph lacks units."]
GOOD = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": " You spoke well. Add units.\n"}}],
    "usage": {"prompt_tokens": 120, "completion_tokens": 9, "total_tokens": 129},
}


@dataclass
class ModelServer:
    """Answers every POST with what the test put in here; `silent` keeps it from answering until the end."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    silent: bool = False
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""
    over: Event = field(default_factory=Event)

    def says(self, status: int, body: object, **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture
def server() -> Iterator[ModelServer]:
    model = ModelServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            model.asked.append((self.path, dict(self.headers), json.loads(body)))
            if model.silent:
                model.over.wait(60)
                return
            self.send_response_only(model.status)
            if "Date" not in model.headers:
                self.send_header("Date", "Thu, 01 Jan 2026 12:00:00 GMT")
            for name, value in model.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(model.body)))
            self.end_headers()
            self.wfile.write(model.body)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = False  # so that closing waits for them
    thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    model.url = f"http://127.0.0.1:{listening.server_port}/v1"
    model.says(200, GOOD)
    yield model
    model.over.set()
    listening.shutdown()
    listening.server_close()
    thread.join()


def ask(
    server: ModelServer,
    *,
    comments: list[str] = COMMENTS,
    key: str = KEY,
    timeout_seconds: float = 30.0,
    style: Style = "paragraph",
    language: str | None = "en",
    told: list[float] | None = None,
) -> Summary:
    adapter = OpenAICompatible(server.url, model="llama3.2", api_key=key, timeout_seconds=timeout_seconds)
    return adapter.summarise(
        comments,
        language=language,
        style=style,
        progress=lambda fraction, _message: told.append(fraction) if told is not None else None,
    )


def test_a_good_answer_becomes_the_summary_with_its_token_counts(server: ModelServer) -> None:
    told: list[float] = []
    summary = ask(server, told=told)
    assert summary.text == "You spoke well. Add units."
    assert summary.tokens == Tokens(prompt=120, completion=9)
    assert summary.engine == "openai-compatible:llama3.2"
    assert summary.sentences_read == 3
    assert {"talk", "graph", "units"} <= set(" ".join(summary.key_phrases).split())
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_question_names_the_model_the_shape_and_every_comment(server: ModelServer) -> None:
    ask(server, style="bullets", language="de-AT")
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "llama3.2"
    assert body["stream"] is False
    system, user = (message["content"] for message in body["messages"])
    assert "'- '" in system
    assert "de-AT" in system
    assert all(comment in user for comment in COMMENTS)


def test_without_a_key_no_authorization_is_sent(server: ModelServer) -> None:
    ask(server, key="")
    assert "Authorization" not in server.asked[0][1]


def test_nothing_to_sum_up_asks_nobody(server: ModelServer) -> None:
    told: list[float] = []
    assert ask(server, comments=["  "], told=told).text == ""
    assert server.asked == []
    assert told[-1] == 1.0


def test_an_answer_without_usage_has_no_token_counts(server: ModelServer) -> None:
    server.says(200, {"choices": GOOD["choices"]})
    assert ask(server).tokens is None


def test_what_a_model_thinks_aloud_is_left_out(server: ModelServer) -> None:
    content = "<think>\nThe user wants <b>…</b>\n</think>\n\nYou spoke well."
    server.says(200, {"choices": [{"message": {"content": content}}]})
    assert ask(server).text == "You spoke well."


@pytest.mark.parametrize(
    ("wait", "in_seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("3600", 3600.0),
        ("3601", 3600.0),
        ("9" * 400, 3600.0),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_that_names_a_time_is_tried_again_then(
    server: ModelServer, status: int, wait: str, in_seconds: float
) -> None:
    server.says(status, {"error": {"message": "slow down"}}, Retry_After=wait)
    with pytest.raises(Retry, match=f"{status} .*slow down") as caught:
        ask(server)
    assert caught.value.in_seconds == in_seconds


@pytest.mark.parametrize("wait", ["", "soon", "-1", "1.5", "²", "Thu, 01 Jan 2026"])
def test_a_time_that_cannot_be_read_leaves_it_to_the_backoff(server: ModelServer, wait: str) -> None:
    server.says(429, b"", Retry_After=wait)
    with pytest.raises(TransientError, match="429 Too Many Requests"):
        ask(server)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
def test_a_server_in_trouble_is_asked_again(server: ModelServer, status: int) -> None:
    server.says(status, b"<html>oops</html>")
    with pytest.raises(TransientError, match=str(status)):
        ask(server)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_another_refusal_is_final(server: ModelServer, status: int) -> None:
    server.says(status, {"error": "model 'llama3.2' not found"}, Retry_After="5")
    with pytest.raises(PermanentError, match=str(status)):
        ask(server)


def test_the_servers_reason_is_quoted_and_cut(server: ModelServer) -> None:
    server.says(404, {"error": {"message": "model 'llama3.2' not found, " + "x" * 500}})
    with pytest.raises(PermanentError) as caught:
        ask(server)
    _, _, quoted = str(caught.value).partition(": ")
    assert quoted.startswith("model 'llama3.2' not found")
    assert len(quoted) == MAX_QUOTED


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_points_at_the_setting(server: ModelServer, status: int) -> None:
    server.says(status, {"error": {"message": f"Incorrect API key provided: {KEY[:12]}"}})
    with pytest.raises(PermanentError, match="FEEDBACK_SUMMARIES_API_KEY") as caught:
        ask(server)
    assert KEY[:12] not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not json",
        b'{"choices": [',
        b"\xff\xfe",
        b"[" * 100_000,
        [],
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": "  \n"}}]},
        {"choices": [{"message": {"content": "<think>hm</think>"}}]},
        {"error": {"message": "but status 200"}},
    ],
)
def test_an_answer_that_is_no_completion_is_final(server: ModelServer, answer: object) -> None:
    server.says(200, answer)
    with pytest.raises(PermanentError, match="model"):
        ask(server)


def test_an_answer_that_cannot_be_unpacked_is_final(server: ModelServer) -> None:
    server.says(200, b"no gzip", Content_Encoding="gzip")
    with pytest.raises(PermanentError, match="cannot be decoded"):
        ask(server)


def test_a_silent_server_is_asked_again_later(server: ModelServer) -> None:
    server.silent = True
    with pytest.raises(TransientError, match=r"silent for 0\.2 s"):
        ask(server, timeout_seconds=0.2)


def test_a_server_that_is_not_there_is_asked_again_later(server: ModelServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        server.url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(TransientError, match="cannot be reached"):
            ask(server)


def test_a_url_that_cannot_be_called_is_final(server: ModelServer) -> None:
    server.url = "http://a\x00b/v1"
    with pytest.raises(PermanentError, match="FEEDBACK_SUMMARIES_URL"):
        ask(server)


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404, 422, 429, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": f"bad key {KEY}"}},
        {"error": f"{'x' * (MAX_QUOTED - 10)}{KEY}"},
        {"choices": [], KEY: KEY},
        f"plain {KEY}".encode(),
    ],
    ids=["message", "cut", "choices", "plain"],
)
def test_the_key_is_in_no_error_text(server: ModelServer, status: int, body: object) -> None:
    server.says(status, body, Retry_After="1")
    with pytest.raises((PermanentError, TransientError, Retry)) as caught:
        ask(server)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert KEY not in shown
    assert KEY[:10] not in shown
    assert server.asked[0][1]["Authorization"].endswith(KEY)
