"""A training step on 1, 2 and 4 processes in several layouts: time, waiting, and bytes sent.

All layouts take a step in turn on the same global batch, each of its processes with one thread; a
layout's ratio is the median over rounds of its seconds by those of one process. On processors the
processes share cores, so a ratio says what a layout costs there and no speedup is to be expected.
``waited`` is the share of a step in which a process stood still for others: messages that were not
hidden, ranks that were late, and idle places of a pipeline (on GPUs: in which its stream did).
Pipelines cut a batch into twice as many micro-batches as they have ranks, or as it has rows.

The bytes that a rank sends are set beside the least that it must (``support/bounds.py``).

With ``--device cuda`` every process has a GPU and speaks NCCL; what has too few GPUs is left out,
and named. The last line is one JSON object.

    python benchmarks/scaling.py
    python benchmarks/scaling.py mini --device cuda --processes 1 2 4 8
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import report
from support.bounds import BOUNDS, Step, bounds, by_kind
from support.ranks import Ranks

from ziphius.config.recipe import load_recipe
from ziphius.data.rows import Batch
from ziphius.parallel.collectives import Axis
from ziphius.parallel.experts import AllToAllDispatcher
from ziphius.parallel.journey import Departure
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.training.run import build, make_optimizer, resolve
from ziphius.training.schedule import settings_at
from ziphius.training.sharded import ShardedAdamW
from ziphius.training.step import train_step

SCHEDULES = ("1f1b", "zb1p", "dualpipe")


def layouts(world: int) -> dict[str, tuple[str, ...]]:
    """Return the layouts of so many processes: names, and settings below ``parallel``."""
    if world == 1:
        return {"one": ()}
    found: dict[str, tuple[str, ...]] = {
        f"dp{world}": (),
        f"ep{world}": (f"ep={world}",),
        f"tp{world}": (f"tp={world}",),
        f"cp{world}": (f"cp={world}",),
    }
    for name in SCHEDULES:
        found[f"pp{world} {name}"] = (f"pp={world}", f"schedule={name}")
    if world >= 4:
        half = world // 2
        found[f"ep{world}, 2 nodes"] = (f"ep={world}", f"ranks_per_node={half}")
        found[f"pp2 dualpipe, ep{half}"] = ("pp=2", "schedule=dualpipe", f"ep={half}")
    return found


class Trainer:
    """One rank's part of a layout; every call is a step on the same batch."""

    def __init__(self, recipe: str, device: str, asked: tuple[str, ...], world: int) -> None:
        # Context parallelism has torch's attention only.
        plain = device == "cpu" or any(setting.startswith("cp=") for setting in asked)
        chosen = [f"run.device={device}", f"run.kernels={'torch' if plain else 'auto'}"]
        # A clock would choose the products, in each process anew.
        chosen += ["run.threads=1", "run.products=native"]
        settings = [*chosen, *(f"parallel.{setting}" for setting in asked)]
        config = load_recipe(recipe, settings)
        if config.parallel.pp > 1:
            # As many micro-batches as DualPipe needs: with one, the ranks of a pipeline take turns.
            rows = config.pretrain.batch_size * config.parallel.pp // world
            size = max(1, rows // (2 * config.parallel.pp))
            settings.append(f"pretrain.micro_batch_size={size}")
        self.recipe = resolve(load_recipe(recipe, settings))
        mesh = make_mesh(Layout.of(self.recipe.parallel, world), device=device)
        self.mesh, self.passes = mesh, build(self.recipe, mesh)
        self.optimizer = make_optimizer(self.recipe, self.passes)
        config = self.recipe.pretrain
        size = (config.batch_size, config.sequence_length + 1)
        generator = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(2, self.recipe.model.vocab_size, size, generator=generator)
        self.batch = Batch(tokens_BS.to(device), torch.zeros_like(tokens_BS, device=device))
        self.settings = settings_at(config, step=1, tokens=0)
        self.loss = float("nan")

    def step(self) -> tuple[float, float]:
        """Train; return the seconds that it took and those that were waited."""
        self.mesh["world"].barrier()
        waits = Waits(self.mesh.device)
        self.mesh.traffic.waited = 0.0
        began = time.perf_counter()
        with waits.watched():
            config = self.recipe.pretrain
            result = train_step(self.passes, self.optimizer, self.batch, config, self.settings)
        if waits.on_gpu:
            torch.cuda.synchronize()
        self.loss = result.loss
        return time.perf_counter() - began, waits.seconds(self.mesh.traffic.waited)

    def counted(self) -> dict[str, Any]:
        """Train; return the bytes that were sent and the least, by kind."""
        before, departures = Counter(self.mesh.traffic.sent), []
        with departing(departures):
            self.step()
        sharding = self.optimizer.sharding if isinstance(self.optimizer, ShardedAdamW) else None
        parts, length = self.passes.cut(self.batch), self.recipe.pretrain.sequence_length
        step = Step(self.passes, sharding, parts, departures, length)
        sent = by_kind(step, self.mesh.traffic.sent - before)
        return {"sent": dict(sent), "least": bounds(step), "loss": self.loss}


class Waits:
    """Finds how long a GPU's stream stood still for communication; a processor knows by itself.

    A rank's stream waits for NCCL where ``Axis.named`` ends: events before and behind tell how
    long.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note every wait inside."""
        if not self.on_gpu:
            yield
            return
        plain = Axis.named

        @contextmanager
        def named(axis: Axis, operation: str) -> Iterator[None]:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            with plain(axis, operation):
                yield
            ended.record()
            self.events.append((began, ended))

        Axis.named = named  # type: ignore[method-assign]
        try:
            yield
        finally:
            Axis.named = plain  # type: ignore[method-assign]

    def seconds(self, waited: float) -> float:
        """Return the seconds that were waited; of a GPU's process ``waited`` are not all."""
        if not self.on_gpu:
            return waited
        return sum(began.elapsed_time(ended) for began, ended in self.events) / 1000


@contextmanager
def departing(found: list[Departure]) -> Iterator[None]:
    """Note which tokens go where, of every layer of experts."""
    plain = AllToAllDispatcher.sort

    def sort(dispatcher: AllToAllDispatcher, *args: Any) -> Departure:
        found.append(plain(dispatcher, *args))
        return found[-1]

    AllToAllDispatcher.sort = sort  # type: ignore[method-assign]
    try:
        yield
    finally:
        AllToAllDispatcher.sort = plain  # type: ignore[method-assign]


class Trainers:
    """One rank of a world, in all of its layouts."""

    def __init__(self, rank: int, recipe: str, device: str, world: int) -> None:
        torch.set_num_threads(1)
        self.made = {
            name: Trainer(recipe, device, asked, world) for name, asked in layouts(world).items()
        }

    def step(self, name: str) -> tuple[float, float]:
        """Train in one of them."""
        return self.made[name].step()

    def counted(self, name: str) -> dict[str, Any]:
        """Count in one of them."""
        return self.made[name].counted()


def make(rank: int, recipe: str, device: str, world: int) -> Trainers:
    """Make what a rank of a world works with."""
    return Trainers(rank, recipe, device, world)


def measure(worlds: dict[int, Ranks], rounds: int) -> dict[str, dict[str, Any]]:
    """Let all layouts take steps in turn, and count the bytes of one more."""
    calls: dict[str, Callable[..., Any]] = {}
    sizes: dict[str, int] = {}
    for world, ranks in worlds.items():
        for name in layouts(world):
            calls[name], sizes[name] = ranks, world
    steps: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            ranks = call("step", name)
            if turn:
                steps[name].append(ranks)
    one = [max(seconds for seconds, _ in ranks) for ranks in steps["one"]]
    found = {}
    for name, call in calls.items():
        seconds = [max(took for took, _ in ranks) for ranks in steps[name]]
        shares = [statistics.mean(w / took for took, w in ranks) for ranks in steps[name]]
        ratios = [s / o for s, o in zip(seconds, one, strict=True)]
        found[name] = {
            "processes": sizes[name],
            "seconds": round(statistics.median(seconds), 4),
            "by_one_process": round(statistics.median(ratios), 3),
            "by_one_process_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "waited": round(statistics.median(shares), 3),
            **bytes_of(call("counted", name)),
        }
    return found


def bytes_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put what ranks have sent beside the least, by kind: means over the ranks."""
    kinds = sorted({kind for rank in ranks for kind in rank["sent"] if rank["sent"][kind]})
    sent = {k: sum(rank["sent"].get(k, 0) for rank in ranks) for k in kinds}
    least = {k: sum(rank["least"].get(k, 0) for rank in ranks) for k in kinds if k != "other"}
    return {
        "loss": ranks[0]["loss"],
        "sent_per_rank": {k: sent[k] // len(ranks) for k in kinds},
        "least_per_rank": {k: least[k] // len(ranks) for k in least},
        "sent_by_least": {k: round(sent[k] / least[k], 3) for k in least if least[k]},
    }


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print a table for people."""
    table = Table("layout", "seconds", "by one process", "waited", "MB a rank", "sent / least")
    for name, line in found.items():
        ratios = ", ".join(f"{kind} {ratio}" for kind, ratio in line["sent_by_least"].items())
        sent = sum(line["sent_per_rank"].values()) / 1e6
        cells = (f"{line['seconds']:.3f}", f"{line['by_one_process']:.2f}")
        table.add_row(name, *cells, f"{line['waited']:.0%}", f"{sent:.2f}", ratios)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--record", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    gpus, asked = torch.cuda.device_count(), sorted({1, *arguments.processes})
    usable = [n for n in asked if arguments.device == "cpu" or n <= gpus]
    if not usable:
        raise SystemExit("error: --device cuda: there is no GPU here: use --device cpu")
    left = [n for n in asked if n not in usable]
    note = f"{left} processes were left out: {gpus} GPU(s) here" if left else None
    if arguments.device == "cpu":
        note = f"gloo; the processes share {os.cpu_count()} cores: no speedup is to be expected"
        note += "; no figures of NCCL: fewer than two GPUs here" if gpus < 2 else ""
    worlds: dict[int, Ranks] = {}
    try:
        for n in usable:
            job = partial(make, recipe=arguments.recipe, device=arguments.device, world=n)
            worlds[n] = Ranks(n, arguments.device, job)
        found = measure(worlds, arguments.rounds)
    finally:
        for ranks in worlds.values():
            ranks.close()
    show(found)
    if note:
        print(note)
    figures = {
        "recipe": arguments.recipe,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "backend": "nccl" if arguments.device == "cuda" else "gloo",
        "rounds": arguments.rounds,
        "threads_a_process": 1,
        "note": note,
        "least": BOUNDS,
        "layouts": found,
    }
    report("scaling", figures, record=arguments.record)


if __name__ == "__main__":
    main()
