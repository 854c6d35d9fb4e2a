"""Processes that stay: a test gives each rank of a small world a function, and gets the results.

Starting Python and torch takes seconds, a world of gloo milliseconds. A task is a function at the
top of a module and its arguments; it runs on ranks 0 to ``world - 1``, each of which has its own
process group, made for the task and destroyed behind it.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forks import fork_server

TASK_SECONDS = 120


class Pool:
    """Up to ``most`` processes, started when a task first needs so many."""

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self._context = fork_server()
        self._folder = tempfile.TemporaryDirectory()
        self._members: list[tuple[Any, Connection]] = []
        self._tasks = 0

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank of a world; return what each returned.

        Raises AssertionError with the traces of those that failed, and of those that hang.
        """
        self._grow(world)
        self._tasks += 1
        store = str(Path(self._folder.name) / f"store{self._tasks}")
        members = self._members[:world]
        for rank, (_, pipe) in enumerate(members):
            pipe.send((rank, world, store, function, args))
        answers = []
        for rank, (process, pipe) in enumerate(members):
            if not pipe.poll(TASK_SECONDS) or not process.is_alive():
                where = self._stacks(world)
                self.close()
                raise AssertionError(f"rank {rank} of {world} hangs or is gone: {function}{where}")
            answers.append(pipe.recv())
        if failed := [f"rank {rank}: {e}" for rank, (e, _) in enumerate(answers) if e]:
            raise AssertionError("\n".join(failed))
        return [result for _, result in answers]

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join()
        self._members = []

    def _stacks(self, world: int) -> str:
        """Return where every process of a world is."""
        found = []
        for rank, (process, _) in enumerate(self._members[:world]):
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
                text = Path(self._folder.name, f"stack{process.pid}").read_text("utf-8")
                found.append(f"\nrank {rank} is at\n{text}")
        return "".join(found)

    def _grow(self, world: int) -> None:
        assert world <= self.most, f"the pool has {self.most} processes at most"
        while len(self._members) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, self._folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self._members.append((process, ours))


def _serve(pipe: Connection, folder: str) -> None:
    torch.set_num_threads(1)
    with Path(folder, f"stack{os.getpid()}").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        _answer(pipe)


def _answer(pipe: Connection) -> None:
    while True:
        try:
            rank, world, store, function, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TASK_SECONDS / 2),
            )
            dist.barrier()  # one that ends early must not be missed by others that begin
            torch.manual_seed(0)
            answer = (None, function(*args))
        except Exception:
            answer = (traceback.format_exc(), None)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
        del function, args, answer
        gc.collect()  # models are cycles, and this process stays
