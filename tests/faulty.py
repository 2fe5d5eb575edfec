"""A server of chat completions on 127.0.0.1 that fails as it is told, alone or before another."""

import collections
import contextlib
import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """One HTTP request that arrived: when, with which headers, and its body."""

    moment: float
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def sample(self) -> tuple[str, int | None]:
        """What tells one sample from another."""
        return self.body["messages"][-1]["content"], self.body.get("seed")


def completion(text: str, finish: str | None = "stop", tokens: int | None = 3, **message: str):
    """The body of a chat completion."""
    usage = {} if tokens is None else {"usage": {"prompt_tokens": 5, "completion_tokens": tokens}}
    whole = {"role": "assistant", "content": text, **message}
    return {"choices": [{"index": 0, "message": whole, "finish_reason": finish}], **usage}


def echo(asked: Asked) -> dict[str, Any]:
    """An answer that a sample alone decides."""
    text, seed = asked.sample
    return completion(f"{text} [{seed}]")


class Server:
    """`faults(asked, attempt)` names what befalls a sample's attempt, counted from 1.

    None answers; an int is a status; "cut", "html", "empty" are bodies that are none; "hang" keeps
    the connection open; (429, "2") is a status with its Retry-After.
    """

    def __init__(
        self,
        faults: Callable[[Asked, int], Any] = lambda asked, attempt: None,
        answer: Callable[[Asked], dict[str, Any]] = echo,
        upstream: str = "",
    ):
        self.faults, self.answer, self.upstream = faults, answer, upstream
        self.asked: list[Asked] = []
        self.answered: collections.Counter[tuple[str, int | None]] = collections.Counter()
        self.open = self.most_open = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def attempts(self, asked: Asked) -> int:
        """How often a sample was asked for."""
        return sum(other.sample == asked.sample for other in self.asked)

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        size = int(handler.headers["Content-Length"])
        data = handler.rfile.read(size)
        if len(data) < size:  # who asked is gone
            handler.close_connection = True
            return
        body = json.loads(data)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(time.monotonic(), headers, body)
        with self.lock:
            self.asked.append(asked)
            attempt = self.attempts(asked)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            self.reply(handler, asked, self.faults(asked, attempt))
        finally:
            with self.lock:
                self.open -= 1

    def reply(self, handler: Any, asked: Asked, fault: Any) -> None:
        if fault == "hang":
            self.closing.wait(30.0)
            handler.close_connection = True
            return
        if fault is None:
            status, data = self.real(asked)
            if status == 200:
                self.answered[asked.sample] += 1
            return self.send(handler, status, data)
        if fault == "cut":
            data = json.dumps(self.answer(asked)).encode()
            self.send(handler, 200, data[: len(data) // 2], length=len(data))
            handler.close_connection = True
        elif fault == "html":
            self.send(handler, 200, b"<html>an error page</html>")
        elif fault == "empty":
            self.send(handler, 200, b'{"choices": []}')
        else:
            status, after = fault if isinstance(fault, tuple) else (fault, None)
            extra = {"Retry-After": after} if after else {}
            text = f"no luck with {asked.headers.get('authorization', '')}"
            body = {"error": {"message": text}}
            self.send(handler, status, json.dumps(body).encode(), **extra)

    def real(self, asked: Asked) -> tuple[int, bytes]:
        if not self.upstream:
            return 200, json.dumps(self.answer(asked)).encode()
        request = urllib.request.Request(
            f"{self.upstream}/chat/completions",
            json.dumps(asked.body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as found:
                return found.status, found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def send(
        self, handler: Any, status: int, data: bytes, length: int | None = None, **extra: str
    ) -> None:
        handler.send_response(status)
        for name, value in extra.items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(length or len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[str]:
    """The base URL at which it listens."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                server.handle(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}/v1"
    finally:
        server.closing.set()
        listening.shutdown()
        listening.server_close()
