"""``ziphius serve`` as a user starts it: its process, the engine's, and a tiny checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import ziphius
from tests.serving.clients import LONG, error_of, events_of
from tests.serving.support import make_model, make_tokenizer

# The same server with limits that have no option, so that tests need not wait for a minute.
_WITH_LIMITS = """
import json, sys
from ziphius.serving.options import EngineSettings, Limits, ServeOptions
from ziphius.serving.server import bind, serve
folder, limits = sys.argv[1], json.loads(sys.argv[2])
listening = bind("127.0.0.1", 0)
port = listening.getsockname()[1]
def ready(application):
    print(f"chat page http://127.0.0.1:{port}/ ", file=sys.stderr, flush=True)
engine = EngineSettings(checkpoint=folder, how={"cache_tokens": 16384})
serve(ServeOptions(model_name="whale", engine=engine, limits=Limits(**limits)), listening,
      on_ready=ready)
"""
REPOSITORY = Path(ziphius.__file__).parents[1]


def write_checkpoint(folder: Path) -> Path:
    """Save a tiny model of random weights, with room for answers that take long."""
    ziphius.save(make_model(max_position_embeddings=16_384), folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


# More than is written while a test waits for anything.
ENDLESS = {**LONG, "max_tokens": 15_000}


@dataclass
class Program:
    """A server's process. ``lines`` are what it has said on its standard error."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    @property
    def url(self) -> str:
        """Where it answers; there once it is ready."""
        told = next(line for line in self.lines if "chat page http" in line)
        return told.split("chat page ")[1].split("/ ")[0]

    def until_ready(self, seconds: float = 120) -> None:
        """Wait until it answers. Raises AssertionError where it ends instead."""
        self.until(lambda: any("chat page http" in line for line in self.lines), seconds)

    def until(self, true: Any, seconds: float) -> float:
        """Wait until something is so; return the seconds it took."""
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < began + seconds, f"not so after {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - began

    def health(self) -> int:
        """Return the status of /health."""
        return httpx.get(f"{self.url}/health", timeout=10).status_code

    def engine(self) -> int:
        """Return the process id of the present engine."""
        (found,) = children(self.process.pid)
        return found

    def ends(self, seconds: float) -> int:
        """Return the exit code, once it has ended by itself."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def post(self, body: Mapping[str, Any], **options: Any) -> httpx.Response:
        """Ask for a completion."""
        options = {"timeout": 60, **options}
        return httpx.post(f"{self.url}/v1/completions", json=dict(body), **options)


class Asking(threading.Thread):
    """A client that waits for an answer, and what it got, when."""

    def __init__(self, served: Program, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.served, self.body = served, body
        self.begun = threading.Event()
        self.text, self.status, self.ended = "", 0, 0.0
        self.start()

    def run(self) -> None:
        url = f"{self.served.url}/v1/completions"
        # A server that is killed cuts its streams off.
        broken = suppress(httpx.RemoteProtocolError, httpx.ReadError)
        with broken, httpx.stream("POST", url, json=self.body, timeout=100) as answer:
            self.status = answer.status_code
            for text in answer.iter_text():
                self.text += text
                self.begun.set()
        self.ended = time.monotonic()

    def error(self) -> dict[str, Any]:
        """Return the error it got: in its stream, or as its answer."""
        if self.status == 200:
            *_, last = events_of(self.text)
            return dict(last["error"])
        return error_of(httpx.Response(self.status, text=self.text))


def written(asking: Asking) -> str:
    """Return a stream's text, which has come to its end."""
    *chunks, done = events_of(asking.text)
    assert done == "[DONE]"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@contextmanager
def program(
    folder: Path, home: Path, *options: str, limits: Mapping[str, float] | None = None
) -> Iterator[Program]:
    """Start a server of a checkpoint; it is killed at the end, and so is its engine.

    ``home`` is the user's folder; without ``limits`` it is ``ziphius serve`` with ``options``.
    """
    command = [sys.executable, "-m", "ziphius", "serve", str(folder), "--port", "0", *options]
    if limits is not None:
        command = [sys.executable, "-c", _WITH_LIMITS, str(folder), json.dumps(dict(limits))]
    environment = {
        **os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    started = Program(process)
    try:
        yield started
    finally:
        engines = children(process.pid)
        if process.poll() is None:
            process.kill()
        process.wait()
        for engine in engines:
            with suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)


def children(process: int) -> list[int]:
    """Return the ids of a process's children."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(one) for one in task.read_text().split()]
    return found


def alive(process: int) -> bool:
    """Whether a process is there, and is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
