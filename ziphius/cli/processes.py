"""The processes of a run, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ziphius.config.errors import in_one_line

if TYPE_CHECKING:
    from torch.distributed import Store

    from ziphius.config.recipe import Recipe
    from ziphius.parallel.mesh import Mesh

# Processes that import from a slow disk come late, whatever a run's deadline is.
_COMING_SECONDS = 300.0
# So long a process that fails waits for the store, and for word from the others. These look every
# so often whether one has failed, and then end by themselves, or are ended after so long.
_STORE_SECONDS, _WORD_SECONDS, _LOOK_SECONDS, _END_SECONDS = 5.0, 2.0, 0.5, 5.0
# Keys of the store: that one process has told why the job ends; from whom there was word since.
_TOLD, _WORD = "told", "word/{}"


@dataclass(frozen=True)
class Processes:
    """What ``torchrun`` tells one of them; without it there is one.

    ``restarts`` is how often the job was begun again because a process was lost. ``job`` is the
    same for all of these attempts, and no other job's.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    per_node: int = 1
    restarts: int = 0
    job: str = ""

    @classmethod
    def told(cls) -> Processes:
        """Read the environment."""
        told = os.environ
        if "RANK" not in told or "WORLD_SIZE" not in told:
            return cls()
        rank, world = int(told["RANK"]), int(told["WORLD_SIZE"])
        local_rank = int(told.get("LOCAL_RANK", rank))
        per_node = int(told.get("LOCAL_WORLD_SIZE", world))
        restarts = int(told.get("TORCHELASTIC_RESTART_COUNT", 0))
        job = told.get("TORCHELASTIC_RUN_ID", "none")
        if job == "none":  # torchrun was given none; then its ranks stay where they are
            job = f"{socket.gethostname()} {os.getppid()}"
        return cls(rank, world, local_rank, per_node, restarts, job)

    def store(self) -> Store:
        """Open what all processes of this attempt can write to and read from.

        Raises RuntimeError where there is none, or no more.
        """
        from datetime import timedelta

        from torch.distributed import TCPStore

        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise RuntimeError(f"the environment says no place to meet: {error}") from None
        waiting = timedelta(seconds=_STORE_SECONDS)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=waiting)
        return self.own(store)

    def own(self, store: Store) -> Store:
        """Return the part of a store that is this attempt's: torchrun's outlives its processes."""
        from torch.distributed import PrefixStore

        return PrefixStore(f"ziphius/{self.restarts}", store)


@contextmanager
def joined(recipe: Recipe, processes: Processes) -> Iterator[Mesh]:
    """Give the mesh of a recipe, in which all processes take part, and leave it at the end.

    Raises BadInput for a layout that is not one of so many processes, and Lost when not all of them
    come.
    """
    import torch
    import torch.distributed as dist

    from ziphius.parallel.layout import Layout
    from ziphius.parallel.mesh import make_mesh

    layout = Layout.of(recipe.parallel, processes.world, processes.per_node)
    on_gpu = recipe.run.device.startswith("cuda")
    device = "cpu"
    if on_gpu:
        device = "cuda" if processes.world > 1 else recipe.run.device
    if processes.world == 1:
        yield make_mesh(layout, device=device)
        return
    if on_gpu:
        torch.cuda.set_device(processes.local_rank)
    with _coming(processes):
        _join("cpu:gloo,cuda:nccl" if on_gpu else "gloo", processes, recipe.parallel.deadline)
        mesh = make_mesh(layout, deadline=recipe.parallel.deadline, device=device)
    with _listening(processes):
        yield mesh
    # After a failure nobody waits for the others any more.
    dist.destroy_process_group()


def _join(backend: str, processes: Processes, deadline: float) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    limit = timedelta(seconds=max(deadline, _COMING_SECONDS))
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    own = processes.own(store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=limit)


@contextmanager
def _coming(processes: Processes) -> Iterator[None]:
    from ziphius.parallel.collectives import Lost

    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = in_one_line(error)
        raise Lost(f"rank {processes.rank}: not all processes have come: {reason}") from error


@contextmanager
def _listening(processes: Processes) -> Iterator[None]:
    """End this process when another has failed, whatever it waits for."""
    over = threading.Event()
    arguments = (processes, over)
    threading.Thread(target=_listen, args=arguments, name="failures", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _listen(processes: Processes, over: threading.Event) -> None:
    with suppress(RuntimeError):  # the store is gone: so is whoever had it, as others will notice
        store = processes.store()
        while not over.wait(_LOOK_SECONDS):
            if store.check([_TOLD]):
                store.set(_WORD.format(processes.rank), "")
                if not over.wait(_END_SECONDS):
                    os._exit(1)
                return


def told_by_another(processes: Processes) -> bool:
    """Say whether another process of the job tells why it ends: one of them is enough.

    Whoever is to tell is not to be stopped before: from here on SIGTERM, which torchrun sends when
    the first process has ended, is ignored.
    """
    if processes.world == 1:
        return False
    with suppress(ValueError):  # of a thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = processes.store()
        store.set(_WORD.format(processes.rank), "")
        return store.add(_TOLD, 1) > 1
    except RuntimeError:  # it went with the rank, or the machine, that had it
        return False


def no_word(processes: Processes) -> list[int]:
    """Return the ranks that are not heard of: dead, or frozen."""
    ranks = [rank for rank in range(processes.world) if rank != processes.rank]
    until = time.monotonic() + _WORD_SECONDS
    try:
        store = processes.store()
        while ranks and time.monotonic() < until:
            ranks = [rank for rank in ranks if not store.check([_WORD.format(rank)])]
            time.sleep(0.05)
    except RuntimeError:
        return []
    return ranks
