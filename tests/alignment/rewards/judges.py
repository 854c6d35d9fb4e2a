"""A small OpenAI-compatible endpoint whose answers a test decides, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# From the request's body: a text to say, a status to fail with, seconds to wait, or bytes to send.
Decide = Callable[[dict[str, Any]], str | int | float | bytes]


class FakeJudge:
    """What was asked, how many at once at most, and where."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()


@contextmanager
def fake_judge(decide: Decide) -> Iterator[FakeJudge]:
    """Serve until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.asked.append({**body, "path": self.path})
                fake.headers.append(dict(self.headers))
                fake.under_way += 1
                fake.most = max(fake.most, fake.under_way)
            said = decide(body)
            if isinstance(said, float):
                time.sleep(said)
                said = "[[A]]"
            with fake.lock:  # before the caller has its answer and sends the next question
                fake.under_way -= 1
            with suppress(OSError):  # the caller did not wait
                self._answer(said)

        def _answer(self, said: str | int | bytes) -> None:
            status, data = 200, b""
            if isinstance(said, int):
                status, data = said, b"refused: the key was " + repr(self.headers).encode()
            elif isinstance(said, bytes):
                data = said
            else:
                message = {"role": "assistant", "content": said}
                data = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake = FakeJudge(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two answers of a request, as it shows them: A, then B."""
    asked = body["messages"][1]["content"]
    a, _, b = asked.partition("# Answer A\n\n")[2].partition("\n\n# Answer B\n\n")
    return a, b
