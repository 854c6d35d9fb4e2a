"""A process of ``benchmarks/overlap.py``, with its share of the experts and all of the rest.

It is told what to do in lines on standard input, and answers in lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from support.links import Slow
from ziphius.config.model import ModelConfig
from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import Batch
from ziphius.kernels.later import Later
from ziphius.kernels.select import Kernels
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.parallel.experts import AllToAllDispatcher, cut_experts
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.overlap import Event, Trace
from ziphius.parallel.pipeline.replay import hidden, replay, total, work
from ziphius.parallel.pipeline.runtime import Pipeline
from ziphius.parallel.pipeline.stage import build_stages
from ziphius.parallel.rows import MicroBatch
from ziphius.training.objective import PreTraining

# Attention takes about as long as the experts.
CONFIG = ModelConfig(
    vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    first_k_dense_replace=0, num_nextn_predict_layers=0, max_position_embeddings=512,
    num_attention_heads=12, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, n_shared_experts=1,
    num_experts_per_tok=4, moe_intermediate_size=192, n_group=4, topk_group=2,
    routed_scaling_factor=2.5,
)  # fmt: skip
LENGTH, MICRO_BATCHES = 256, 12
SETTINGS = PretrainConfig(
    steps=1, batch_size=1, micro_batch_size=1, sequence_length=LENGTH, learning_rate=1e-3,
    final_learning_rate=1e-4,
)  # fmt: skip
OBJECTIVE = PreTraining(
    SETTINGS, mtp_loss_weight=0.0, target_count=LENGTH, sequence_count=MICRO_BATCHES
)


class Steps:
    """A pipeline of one rank with two stages (DualPipeV), whose experts lie on all ranks."""

    def __init__(self, ranks: int) -> None:
        self.mesh = make_mesh(Layout.fill(ranks, ep=ranks))
        self.table, later = schedule("dualpipev", 1, MICRO_BATCHES), Later()
        precision = Precision(compute=torch.float32, storage=torch.float32)
        self.models = build_stages(CONFIG, self.table, 0, precision, kernels=Kernels(), later=later)
        self.delay, self.link = 0.0, None
        for model in self.models.values():
            initialise(model, 0)
            cut_experts(model, self.mesh, combine="fast")
            for _, _, block in model.blocks():
                self._slow(block.mlp)
        make = partial(Pipeline, self.table, self.models, self.mesh["pp"], later)
        self.trace = Trace()
        self.pipelines = {"off": make(), "on": make(overlap=True, trace=self.trace)}
        generator = torch.Generator().manual_seed(self.mesh.rank)
        size = (MICRO_BATCHES, LENGTH + 1)
        tokens_BS = torch.randint(2, CONFIG.vocab_size, size, generator=generator)
        rows = Batch(tokens_BS, torch.zeros_like(tokens_BS)).split(1)
        self.batches = [MicroBatch(row, counts=True) for row in rows]

    def _slow(self, mlp: Any) -> None:
        """Put one link before all layers' second hop."""
        assert isinstance(mlp, MixtureOfExperts)
        assert isinstance(mlp.dispatcher, AllToAllDispatcher)
        network = mlp.dispatcher.network
        self.link = self.link or Slow(network.node, self._seconds)
        mlp.dispatcher.network = replace(network, node=self.link)

    def _seconds(self, x: Tensor, counts: Sequence[int]) -> float:
        return self.delay if x.ndim == 2 and x.is_floating_point() else 0.0

    def run(self, name: str) -> float:
        """Run a step; return its seconds, on the rank that took longest."""
        for model in self.models.values():
            model.zero_grad()
        self.trace.clear()
        self.mesh["world"].barrier()
        begun = time.perf_counter()
        self.pipelines[name].run(self.batches, OBJECTIVE)
        self.mesh["world"].barrier()
        return time.perf_counter() - begun

    def seconds_of(self, rounds: int) -> dict[str, float]:
        """Return what every computation takes by its kind, the median over blocks and rounds."""
        found = defaultdict(list)
        for _ in range(rounds):
            self.run("on")
            for e in self.trace:
                if e.moment == "compute":
                    found[f"{e.direction} {e.stage}"].append(e.stop - e.start)
        return {kind: median(times) for kind, times in found.items()}


def calibrate(steps: Steps, rounds: int) -> dict[str, Any]:
    """Find what a step computes, and so what it shall communicate."""
    steps.run("off")
    steps.run("on")
    sent = steps.mesh.traffic.sent
    before = sum(sent.values())
    kinds = steps.seconds_of(rounds)
    computed = sum(kinds[f"{e.direction} {e.stage}"] for e in steps.trace if e.moment == "compute")
    flights = sum(e.moment == "carry" for e in steps.trace)
    world = steps.mesh["world"]
    mean = float(world.all_reduce(torch.tensor([computed], dtype=torch.float64))) / world.size
    return {
        "kinds": kinds,
        "computed": mean,
        "flights": flights,
        "bytes": (sum(sent.values()) - before) // rounds,
        "program": [e for e in steps.trace if e.moment != "carry"],
    }


def predict(steps: Steps, found: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a step in which every flight takes an equal part of the computing."""
    flight = found["computed"] / found["flights"]

    def seconds(event: Event) -> float | None:
        if event.moment == "carry":
            return flight if event.stage in ("dispatch", "combine") else None
        return found["kinds"].get(f"{event.direction} {event.stage}", 0.0)

    program = replay(found["program"], seconds)
    return {
        "off": sum(work(program)),
        "on": total(program),
        "hidden": hidden(program),
        "hidden_in_pairs": hidden(pairs(steps, program)),
    }


def pairs(steps: Steps, trace: Trace) -> Trace:
    """Return what a trace has of steps that are pairs."""
    wanted = {
        (action.kind, action.stage, action.micro_batch)
        for step in steps.table.steps[0]
        if len(step.actions) == 2
        for action in step.actions
    }
    return [e for e in trace if (e.direction.replace("W", "B"), *e.label[2:4]) in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--delay", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def told() -> list[str]:
        return sys.stdin.readline().split()

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    told()  # the network is there
    store, seconds = f"file://{arguments.store}", timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=store, rank=arguments.rank, world_size=arguments.ranks, timeout=seconds
    )
    steps = Steps(arguments.ranks)
    _, rounds = told()
    found = calibrate(steps, int(rounds))
    say(predicted=predict(steps, found), **{k: v for k, v in found.items() if k != "program"})
    if arguments.delay:
        steps.delay = found["computed"] / found["flights"]
    while words := told():
        seconds_taken = steps.run(words[0])
        answer: dict[str, Any] = {"seconds": seconds_taken}
        if words[0] == "on":
            both = pairs(steps, steps.trace)
            answer |= {
                "hidden": hidden(steps.trace),
                "hidden_in_pairs": hidden(both),
                "work": work(steps.trace),
                "trace": steps.trace,
            }
        say(**answer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
