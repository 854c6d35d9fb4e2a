"""Processes that train together, told by another one what to do next."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WAIT_SECONDS = 600


class Ranks:
    """``world`` processes in one process group; each has what ``make(rank)`` returned there."""

    def __init__(self, world: int, device: str, make: Callable[[int], Any]) -> None:
        """``make`` is a function at the top of a module, or a ``partial`` of one."""
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._members: list[tuple[Any, Connection]] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, device, store, make, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        self._answers()

    def __call__(self, method: str, *args: Any) -> list[Any]:
        """Call a method of what each rank has, on all of them at a time."""
        for _, pipe in self._members:
            pipe.send((method, args))
        return self._answers()

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join()
        self._folder.cleanup()

    def _answers(self) -> list[Any]:
        answers: Sequence[tuple[str | None, Any]] = [
            pipe.recv() if pipe.poll(WAIT_SECONDS) else ("no answer", None)
            for _, pipe in self._members
        ]
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if failed:
            self.close()
            raise RuntimeError("\n".join(failed))
        return [value for _, value in answers]


def _serve(
    rank: int, world: int, device: str, store: str, make: Callable[[int], Any], pipe: Connection
) -> None:
    """Join, make what is to be worked with, and answer until the other end is closed."""
    try:
        backend = "gloo"
        if device == "cuda":
            torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl"
        if world > 1:
            where = f"file://{store}"
            dist.init_process_group(backend, init_method=where, rank=rank, world_size=world)
        made = make(rank)
        pipe.send((None, None))
        while True:
            method, args = pipe.recv()
            pipe.send((None, getattr(made, method)(*args)))
    except EOFError:
        return
    except Exception:
        pipe.send((traceback.format_exc(), None))
