"""The forward and backward passes of a step, wherever the blocks of the network are.

``InOne`` runs a model that is whole on this rank; ``pipeline/runtime.py`` one that lies on several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ziphius.config.model import ModelConfig
from ziphius.data.rows import EXPERTS, Batch
from ziphius.model.router import Routing, expert_counts
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.collectives import Axis
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.rows import MicroBatch, own_micro_batches


class Parts(Protocol):
    """What a part of the network gives of a micro-batch: a loss, from which backward goes.

    ``training/objective.py`` makes them.
    """

    @property
    def total(self) -> Tensor: ...

    def numbers(self) -> Tensor:
        """Return what is to be added up over micro-batches and ranks, ``[n]``."""
        ...


class Objective(Protocol):
    """What is computed of a micro-batch: ``numbers`` of them are added up."""

    @property
    def size(self) -> int:
        """How many numbers there are."""
        ...

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> Parts:
        """Compute what a part of the network gives of some rows."""
        ...


@dataclass
class Result:
    """Sums over the micro-batches that this rank has run; over all ranks, those of the batch.

    ``sums``: the objective's numbers, float64 ``[n]``. ``loads``: the tokens of every expert, int64
    ``[L, E]``, of all layers by their global index, MTP included. ``peak`` is for how many (stage,
    micro-batch) activations were held at the worst moment, ``peak_sent`` how many messages were
    that had been sent.
    """

    sums: Tensor
    loads_LE: Tensor
    peak: int = 0
    peak_sent: int = 0

    @classmethod
    def zero(cls, config: ModelConfig, device: torch.device, numbers: int) -> Result:
        """Return the result of no micro-batch."""
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        loads = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64, device=device)
        return cls(torch.zeros(numbers, dtype=torch.float64, device=device), loads)

    def add(self, parts: Parts, routings: dict[int, Routing]) -> None:
        """Add a micro-batch's numbers and choices."""
        self.sums += parts.numbers().detach().double()
        for layer, routing in routings.items():
            self.loads_LE[layer] += expert_counts(routing.chosen_NK, self.loads_LE.shape[1])

    def over(self, axis: Axis) -> Result:
        """Add up all ranks' in place."""
        axis.all_reduce(self.sums)
        axis.all_reduce(self.loads_LE)
        return self

    def counts(self) -> dict[int, Tensor]:
        """Return the loads of layers that route, as ``training/balance.py`` keeps them."""
        routed = self.loads_LE.any(1).tolist()
        return {layer: self.loads_LE[layer] for layer, routes in enumerate(routed) if routes}


class Passes(Protocol):
    """What a rank holds of a network, and how it is run together with the other ranks."""

    @property
    def models(self) -> tuple[Transformer, ...]:
        """The parts of the network that this rank holds, in the order of the network."""
        ...

    @property
    def mesh(self) -> Mesh:
        """Who else holds parts of it."""
        ...

    def cut(self, batch: Batch) -> list[MicroBatch]:
        """Return this rank's micro-batches of a global batch. Raises BadInput for too few rows."""
        ...

    def backwards(self, parts: Sequence[MicroBatch]) -> int | None:
        """Return how many backward passes every parameter will see, where that is one number."""
        ...

    def run(self, parts: Sequence[MicroBatch], objective: Objective, scale: float) -> Result:
        """Run forward and backward; gradients, times ``scale``, are added to those there are."""
        ...

    def measure(self, parts: Sequence[MicroBatch], objective: Objective) -> Result:
        """Run forward only. Every rank of ``batch`` has as many micro-batches, one or more."""
        ...


class InOne:
    """All blocks are on this rank; its experts may be elsewhere."""

    def __init__(
        self, model: Transformer, mesh: Mesh, micro_batch_size: int, *, document_mask: bool = False
    ) -> None:
        self.model, self.mesh = model, mesh
        self.models: tuple[Transformer, ...] = (model,)
        self.size, self.document_mask = micro_batch_size, document_mask

    def cut(self, batch: Batch) -> list[MicroBatch]:
        return own_micro_batches(batch, self.size, self.mesh["batch"])

    def backwards(self, parts: Sequence[MicroBatch]) -> int | None:
        return len(parts)

    def run(self, parts: Sequence[MicroBatch], objective: Objective, scale: float) -> Result:
        result = Result.zero(self.model.config, self.model.device, objective.size)
        for rows, counts in parts:
            total = self._forward(rows, objective, result, counts=counts).total
            total.backward(torch.full_like(total, scale * counts))
        return result

    @torch.no_grad()
    def measure(self, parts: Sequence[MicroBatch], objective: Objective) -> Result:
        result = Result.zero(self.model.config, self.model.device, objective.size)
        for rows, counts in parts:
            self._forward(rows, objective, result, counts=counts)
        return result

    def _forward(self, rows: Batch, objective: Objective, result: Result, *, counts: bool) -> Parts:
        documents_BS = rows.documents_BS if self.document_mask else None
        experts_BSLK = rows.fields.get(EXPERTS)
        features = self.model.features(rows.tokens_BS, documents_BS, experts_BSLK=experts_BSLK)
        found = objective(self.model, features, rows)
        if counts:
            result.add(found, features.routings)
        return found
