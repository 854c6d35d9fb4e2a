"""AdamW whose moments are spread over ranks, ZeRO-1 (report section 3.3; facts 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ziphius.config.pretrain import TrainingConfig
from ziphius.kernels.select import Kernels
from ziphius.parallel.collectives import Axis
from ziphius.parallel.rectangles import Rectangle, SplitOf, unsplit
from ziphius.parallel.sharding import Buffer, Sharding, held_shards, load_shards, named_shards
from ziphius.training.optimizer import Named, Optimizer, Size, zero_moments


class ShardedAdamW(Optimizer):
    """``AdamW`` of which this rank computes a shard; all ranks call all of it together.

    ``world`` are all ranks that hold parts of the model: the norm is that of all their gradients.
    Where axes have one rank, this is ``AdamW`` with its gradients kept in one place.
    """

    def __init__(
        self,
        sharding: Sharding,
        world: Axis,
        config: TrainingConfig,
        kernels: Kernels | None = None,
    ) -> None:
        self.update = (kernels or Kernels()).function("adamw")
        self.sharding, self.world, self.config = sharding, world, config
        self.first = self._zeros()
        self.second = self._zeros()

    def begin(self, backwards: int | None = None) -> None:
        self.sharding.begin(backwards)

    @torch.no_grad()
    def measure(self, scale: float = 1.0) -> Size:
        """Sum the gradients over ranks, then measure them."""
        self.sharding.reduce()
        square = self.world.all_reduce(self.sharding.square_norm())
        return self.size(square.sqrt().item(), scale)

    @torch.no_grad()
    def step(self, learning_rate: float, factor: float = 1.0) -> None:
        self.sharding.reduce()
        self.steps += 1
        for p, weights, gradients, buffer, kept in self.sharding.pieces():
            if p in self.sharding.met:
                moments = (self.first[buffer][kept], self.second[buffer][kept])
                self.update(weights, gradients, *moments, self.rates(p, learning_rate, factor))
        self.sharding.gather()
        self.sharding.begin()

    def named_moments(self, weights: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield copies, gathered a bucket at a time: all ranks do this together, to the end.

        Every rank gets all moments of its part of the model, in the order of memory.
        """
        named = list(weights)
        for kind, shards in (("first", self.first), ("second", self.second)):
            for name, moment in named_shards(self.sharding, shards, named):
                yield f"{kind}.{name}", moment

    @torch.no_grad()
    def load_moments(self, weights: Named, read: Callable[[str], Tensor]) -> None:
        """Read what this rank's shard has a part of, however many ranks wrote it."""
        named = list(weights)
        load_shards(self.sharding, self.first, named, lambda name: read(f"first.{name}"))
        load_shards(self.sharding, self.second, named, lambda name: read(f"second.{name}"))

    def held_moments(self, weights: Named, split_of: SplitOf = unsplit) -> Iterator[Rectangle]:
        named = list(weights)
        for kind, shards in (("first", self.first), ("second", self.second)):
            for piece in held_shards(self.sharding, shards, named, split_of):
                yield piece._replace(name=f"{kind}.{piece.name}")

    def _zeros(self) -> dict[Buffer, Tensor]:
        return {
            buffer: zero_moments(buffer.weights[: buffer.shard_size], self.config)
            for buffer in self.sharding.buffers
        }
