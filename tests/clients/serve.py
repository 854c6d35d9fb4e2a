"""``ziphius serve`` in a process of its own, and a checkpoint for it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MOST_TOKENS = 32
_URL = re.compile(r"chat page (http://\S+?)/ ")
# The smallest recipe, two steps of it: what is answered is noise, and that is all it takes.
_SHORT = (
    "pretrain.batch_size=2", "pretrain.micro_batch_size=1", "pretrain.sequence_length=64",
    "run.validate_bytes=2000", "model.max_position_embeddings=1024",
)  # fmt: skip


class NoServer(Exception):
    """The server did not start, or did not end well; the message says how."""


def small_checkpoint(folder: Path) -> Path:
    """Return a checkpoint below ``folder``; it is trained unless it is there."""
    run = folder / "checkpoint"
    if not (run / "checkpoint" / "config.json").is_file():
        print("training a small checkpoint", flush=True)
        settings = [part for one in _SHORT for part in ("--set", one)]
        command = [
            sys.executable, "-m", "ziphius", "pretrain", "tiny", "--out", str(run), "--steps", "2",
            *settings,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoServer(f"no checkpoint could be trained: {done.stderr.strip()[-300:]}")
        # Chats that set no bound end early: what makes up requests sends thousands.
        defaults = run / "checkpoint" / "generation_config.json"
        told = json.loads(defaults.read_text("utf-8")) | {"max_new_tokens": MOST_TOKENS}
        defaults.write_text(json.dumps(told), "utf-8")
        (defaults.parent / "manifest.json").unlink()  # it says what the file was
    return run


@contextmanager
def serving(checkpoint: Path, log: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """Serve a checkpoint at the URL that is given, until the block ends.

    What the server says goes to ``log``. Raises NoServer where it does not start, and where it
    does not end by itself when it is asked to.
    """
    command = [sys.executable, "-m", "ziphius", "serve", str(checkpoint), "--port", "0", *flags]
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield _ready(server, log)
            server.send_signal(signal.SIGTERM)
            code = server.wait(timeout=60)
            # uvicorn passes the signal on once everything has ended.
            if code not in (0, -signal.SIGTERM):
                raise NoServer(f"the server ended with exit code {code}: see {log}")
        except subprocess.TimeoutExpired:
            raise NoServer(f"the server did not end in 60 s: see {log}") from None
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()


def _ready(server: subprocess.Popen[bytes], log: Path, seconds: float = 180.0) -> str:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and server.poll() is None:
        if found := _URL.search(log.read_text("utf-8")):
            with urllib.request.urlopen(f"{found[1]}/health", timeout=30):
                return found[1]
        time.sleep(0.1)
    raise NoServer(f"the server did not start: {log.read_text('utf-8').strip()[-300:]}")
