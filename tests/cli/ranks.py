"""Runs of several ranks: by torchrun itself, and as the processes that it would start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.cli.launch import Command, Patch
from tests.training.support import metrics

SECONDS = 120


class Ranks:
    """``ziphius ARGUMENTS`` in as many processes as ``torchrun`` would start, and no ``torchrun``.

    Nobody ends the others when one has failed. They start at once, and the store that torchrun
    would bring is here. ``patch`` is called on each of them, and may ask who it is: ``rank()``.
    """

    def __init__(
        self, *arguments: str, world: int, logs: Path, patch: Patch | None = None, per_node: int = 0
    ) -> None:
        waiting = timedelta(seconds=SECONDS)
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=waiting
        )
        told = {
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": per_node or world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        self.commands = []
        for rank in range(world):
            own = {"RANK": rank, "LOCAL_RANK": rank % (per_node or world)}
            environment = {name: str(value) for name, value in (told | own).items()}
            self.commands.append(
                Command(*arguments, logs=logs / str(rank), patch=patch, environment=environment)
            )

    def codes(self) -> list[int]:
        """Wait for their ends."""
        return [command.code() for command in self.commands]

    def shown(self) -> str:
        """Return what stands on the terminal that they share, but errors."""
        return "".join(command.shown() for command in self.commands)

    def errors(self) -> list[str]:
        """Return the lines of error of all of them."""
        return "".join(command.error() for command in self.commands).splitlines()

    def line(self, code: int, but: Sequence[int] = ()) -> str:
        """Wait until all have ended with ``code``, one line of error in all; return it.

        Ranks in ``but`` may end otherwise.
        """
        codes = self.codes()
        ended = [found for rank, found in enumerate(codes) if rank not in but]
        assert ended == [code] * len(ended), (codes, self.errors())
        [line] = self.errors()
        return line

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank in range(len(self.commands)) if ranks is None else ranks:
            self.commands[rank].signal(number)

    def until_step(self, out: Path, step: int) -> None:
        self.commands[0].until_step(out, step)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for command in self.commands:
            command.process.kill()
            command.process.join()


def rank() -> int:
    """Return which rank this process is."""
    return int(os.environ["RANK"])


class Torchrun:
    """``torchrun OPTIONS -m ziphius ARGUMENTS``, its output in a file.

    With ``patch``, a function of a module, ``tests.cli.patched`` calls it before the command.
    """

    def __init__(
        self,
        *arguments: str,
        ranks: int,
        log: Path,
        patch: Patch | None = None,
        options: Sequence[str] = (),
    ) -> None:
        module = ["-m", "ziphius"]
        if patch is not None:
            module = ["-m", "tests.cli.patched", f"{patch.__module__}:{patch.__qualname__}"]
        self.log = log
        self._file = log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *(f"--nproc-per-node={ranks}", *options, *module, *arguments),
            ],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def shown(self) -> str:
        return self.log.read_text("utf-8")

    def code(self) -> int:
        """Wait for its end."""
        return self.process.wait(SECONDS)

    def workers(self) -> dict[int, int]:
        """Return the process of every rank, by what torchrun has told it."""
        found = {}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for pid in map(int, children.read_text("ascii").split()):
            with suppress(OSError):
                told = Path(f"/proc/{pid}/environ").read_bytes()
                if number := re.search(rb"(?:^|\0)RANK=(\d+)\0", told):
                    found[int(number[1])] = pid
        return found

    def until(self, reached: Callable[[], object]) -> None:
        """Wait until something is true of the running job."""
        deadline = time.monotonic() + SECONDS
        while not reached():
            assert self.process.poll() is None, f"it ended by itself: {self.shown()}"
            assert time.monotonic() < deadline, f"it never came: {self.shown()}"
            time.sleep(0.005)

    def until_step(self, out: Path, step: int) -> None:
        """Wait until the run has written the metrics of ``step``."""
        path = out / "metrics.jsonl"
        self.until(lambda: path.is_file() and len(metrics(out)) >= step)

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in self.workers().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        self._file.close()
