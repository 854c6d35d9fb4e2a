"""AdamW over the shards of FSDP2 and HSDP: moments lie where the weights do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ziphius.config.pretrain import TrainingConfig
from ziphius.kernels.select import Kernels
from ziphius.parallel.rectangles import Rectangle, SplitOf, unsplit
from ziphius.parallel.spread import Shards, local
from ziphius.training.optimizer import Named, Optimizer, Size, zero_moments


class FullyShardedAdamW(Optimizer):
    """``AdamW`` of which this rank computes what it has of the weights; all ranks do it together.

    Weights and moments have the names of the model that was spread, whatever ``weights`` says.
    """

    def __init__(
        self, shards: Shards, config: TrainingConfig, kernels: Kernels | None = None
    ) -> None:
        self.update = (kernels or Kernels()).function("adamw")
        self.shards, self.config = shards, config
        self.answers = shards.mesh.place.dp_replicate == 0
        self.first, self.second = self._zeros(), self._zeros()

    def begin(self, backwards: int | None = None) -> None:
        self.shards.begin(backwards)

    @torch.no_grad()
    def measure(self, scale: float = 1.0) -> Size:
        self.shards.end()
        square = self.shards.mesh["world"].all_reduce(self.shards.square_norm())
        return self.size(square.sqrt().item(), scale)

    @torch.no_grad()
    def step(self, learning_rate: float, factor: float = 1.0) -> None:
        self.shards.end()
        self.steps += 1
        for name, p in self.shards.parameters().items():
            if p.grad is not None and local(p).numel():
                moments = self.first[name], self.second[name]
                rates = self.rates(p, learning_rate, factor)
                self.update(local(p), local(p.grad), *moments, rates)
            p.grad = None

    def named_moments(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield moments gathered one parameter at a time: all ranks do this, to the end."""
        for kind, moments in (("first", self.first), ("second", self.second)):
            for name, moment in self.shards.gathered(moments):
                yield f"{kind}.{name}", moment

    def load_moments(self, weights: Named, read: Callable[[str], Tensor]) -> None:
        """Read what this rank has a part of, however many ranks wrote it."""
        self.shards.load(self.first, lambda name: read(f"first.{name}"))
        self.shards.load(self.second, lambda name: read(f"second.{name}"))

    def held_moments(self, weights: Named, split_of: SplitOf = unsplit) -> Iterator[Rectangle]:
        for kind, moments in (("first", self.first), ("second", self.second)):
            for piece in self.shards.held(moments):
                yield piece._replace(name=f"{kind}.{piece.name}")

    def _zeros(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.shards.parameters().items() if p.requires_grad}
        return {name: zero_moments(local(p), self.config) for name, p in trained.items()}
