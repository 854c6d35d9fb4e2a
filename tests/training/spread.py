"""A tiny model on any layout of ranks, whose numbers follow from names: what holds what is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from tests.parallel.sharded import SMALL, settings
from tests.support import F64, tiny_config
from ziphius.model.transformer import Transformer
from ziphius.model.weights import Split, named_weights
from ziphius.parallel.collectives import Axis
from ziphius.parallel.experts import cut_experts
from ziphius.parallel.fsdp import apply_fsdp
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.stage import build_stages
from ziphius.parallel.sharding import Sharding, axes_of
from ziphius.parallel.spread import split_of
from ziphius.training.ema import WeightAverage
from ziphius.training.fully_sharded import FullyShardedAdamW
from ziphius.training.optimizer import AdamW, Optimizer
from ziphius.training.saving import Saver
from ziphius.training.sharded import ShardedAdamW

# Rows of the one and columns of the other are cut by tensor parallelism.
CUT = {"lm_head.weight": 0, "o_proj.weight": 1}
NUMBERS = {"optimizer_steps": 7, "average_updates": 5, "note": 2**60 + 1}


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the numbers that a tensor of the whole model has."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


@dataclass
class Spread:
    """What a rank has of a run."""

    mesh: Mesh
    parts: list[Transformer]
    optimizer: Optimizer
    saver: Saver
    average: WeightAverage

    def split_of(self, name: str) -> Split | None:
        return self.saver.split_of(name)

    def own(self, kind: str, name: str, like: Tensor) -> Tensor:
        """Return what this rank should have of a tensor."""
        split = self.split_of(name)
        if split is None:
            return value(kind + name, tuple(like.shape), like.dtype)
        shape = list(like.shape)
        shape[split.dim] = split.whole
        whole = value(kind + name, tuple(shape), like.dtype)
        return split.cut(whole)

    @torch.no_grad()
    def fill(self) -> None:
        weights = list(self.saver.weights())
        like = dict(weights)
        for name, weight in weights:
            weight.copy_(self.own("", name, weight))

        def read(name: str) -> Tensor:
            kind, _, weight = name.partition(".")
            return self.own(f"{kind}.", weight, like[weight])

        self.optimizer.load_moments(weights, read)
        for name, tensor in self.average.average.items():
            tensor.copy_(self.own("average.", name, tensor))

    def wrong(self) -> list[str]:
        """Name everything here that is not as it should be, bit for bit."""
        weights = list(self.saver.weights())
        found = [("", name, weight) for name, weight in weights]
        found += [("average.", *named) for named in self.average.average.items()]
        whole = not isinstance(self.optimizer, FullyShardedAdamW)
        held = ((name, data) for name, _, _, data in self.optimizer.held_moments(weights))
        for moment, tensor in self.optimizer.named_moments(weights) if whole else held:
            kind, _, name = moment.partition(".")
            found.append((f"{kind}.", name, tensor))
        return [k + n for k, n, tensor in found if not torch.equal(tensor, self.own(k, n, tensor))]

    def save(self, target: Path, *, at_once: bool = False, **numbers: Any) -> None:
        state = (self.optimizer, self.average, NUMBERS | numbers, tokenizer())
        self.saver.save(target, *state, at_once=at_once)


def tokenizer() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))


def spread(
    layout: dict[str, int] | None = None, *, sizes: Any = None, mesh: Any = None, **model: Any
) -> Spread:
    """Lay a model out over the ranks of this world; without a layout in this process alone."""
    world = torch.distributed.get_world_size() if layout is not None else 1
    asked = dict(layout or {})
    both_ways, fully = asked.pop("dualpipe", 0), asked.pop("fsdp", 0)
    places = Layout.fill(world, **asked)
    mesh = make_mesh(places, **(mesh or {}))
    config = tiny_config(num_hidden_layers=4, **model)
    parts = [Transformer(config, F64)]
    if places.pp > 1:
        stages = schedule("dualpipe" if both_ways else "1f1b", places.pp, 4)
        built = build_stages(config, stages, mesh.place.pp, F64)
        parts = [built[chunk] for chunk in sorted(built, key=lambda chunk: chunk.stage)]
    if places.ep > 1:
        parts = [cut_experts(part, mesh) for part in parts]
    cut = {name: split for part in parts for name, split in _cuts(part, mesh)}
    shards = apply_fsdp(parts[0], mesh) if fully else None
    saver = Saver(
        parts, mesh, split_of(parts[0]) if fully else cut.get, deadline=60, **(sizes or {})
    )
    average = WeightAverage(parts, 0.9, saver.owners.owns)
    if layout is None:
        optimizer: Optimizer = AdamW(parts[0].parameters(), settings())
    elif shards is not None:
        optimizer = FullyShardedAdamW(shards, settings())
    else:
        axes = dict(_axes(parts, mesh, cut))
        if both_ways:  # every rank has every stage
            axes = dict.fromkeys(axes, mesh["world"])
        sharding = Sharding(list(axes.items()), SMALL)
        optimizer = ShardedAdamW(sharding, mesh["world"], settings())
    return Spread(mesh, parts, optimizer, saver, average)


def _cuts(part: Transformer, mesh: Mesh) -> Iterator[tuple[str, Split]]:
    """Cut what tensor parallelism cuts, unevenly; yield the weights' names and what is left."""
    tp, place = mesh.layout.tp, mesh.place.tp
    for path, module in part.named_modules():
        name = "lm_head.weight" if path == "lm_head" else f"model.{path}.weight"
        dims = [dim for end, dim in CUT.items() if name.endswith(end) and "mtp" not in name]
        if tp > 1 and dims:
            (dim,) = dims
            weight = module.get_parameter("weight").detach()
            size = weight.shape[dim]
            step = -(-size // tp)
            start = place * step
            length = min(step, size - start)
            module.weight = nn.Parameter(weight.narrow(dim, start, length).clone())
            yield name, Split(dim, start, length, size)


def _axes(
    parts: list[Transformer], mesh: Mesh, cut: dict[str, Split]
) -> Iterator[tuple[nn.Parameter, Axis]]:
    """Say who holds each parameter alike, where ranks of other axes than ``dp`` do too."""
    for part in parts:
        names = {weight.data_ptr(): name for name, weight in named_weights(part)}
        for p, axis in axes_of([part], mesh):
            name = names.get(p.data_ptr(), "")
            embedding = (
                mesh.layout.pp > 1
                and "embed_tokens" in name
                and part.config.num_nextn_predict_layers
            )
            whole = mesh.layout.tp > 1 and axis.name == "dp" and name not in cut
            yield p, mesh["world"] if embedding or whole else axis
