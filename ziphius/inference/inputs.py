"""What the matrices of one layer are multiplied with: recorded while the layer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ziphius.checkpoint.compressed import is_quantizable
from ziphius.model.block import Block
from ziphius.model.experts import RoutedExperts
from ziphius.model.layers import Linear
from ziphius.model.router import Router, Routing


class LayerInputs:
    """Hessians ``X^T X`` of a layer's matrices, by published name.

    Those of linear layers are summed up while the layer runs. Experts would be too many: of them
    the routed rows are kept, and each Hessian is made when it is asked for.
    """

    def __init__(self, block: Block, prefix: str) -> None:
        self._block, self._prefix = block, prefix
        self._hessians: dict[str, Tensor] = {}
        self._rows: list[Tensor] = []
        self._routings: list[Routing] = []
        self._latest: tuple[int, Tensor] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what passes while the block is open for the work of the ``with`` block."""
        hooks = []
        for path, module in self._block.named_modules():
            name = f"{self._prefix}{path}.weight"
            if isinstance(module, Linear) and is_quantizable(name):
                hooks.append(module.register_forward_pre_hook(partial(self._add, name)))
            if isinstance(module, Router):
                hooks.append(module.register_forward_hook(self._keep))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def expert_of(self, name: str) -> int | None:
        """Return the routed expert that a weight belongs to, if it does."""
        parts = name.removeprefix(self._prefix).split(".")
        return int(parts[2]) if parts[:2] == ["mlp", "experts"] else None

    def rows_of(self, expert: int) -> int:
        """Count the rows that reached an expert."""
        return sum(int((r.chosen_NK == expert).sum()) for r in self._routings)

    def hessian(self, name: str) -> Tensor:
        """Return the Hessian of a matrix's inputs, ``[I, I]``."""
        expert = self.expert_of(name)
        if expert is None:
            return self._hessians[name]
        if name.endswith("down_proj.weight"):
            hidden_MF = self._hidden(expert)
            return hidden_MF.T @ hidden_MF
        if self._latest is None or self._latest[0] != expert:
            rows_MD, _ = self._routed(expert)
            self._latest = expert, rows_MD.T @ rows_MD  # gate and up read the same rows
        return self._latest[1]

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if name not in self._hessians:
            self._hessians[name] = x_NI.new_zeros(x_NI.shape[1], x_NI.shape[1])
        self._hessians[name].addmm_(x_NI.T, x_NI)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
        self._rows.append(inputs[0])
        self._routings.append(routing)

    def _routed(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the rows that reached an expert ``[M, D]`` and their routing weights ``[M]``."""
        rows, gates = [], []
        for u_ND, routing in zip(self._rows, self._routings, strict=True):
            token, choice = (routing.chosen_NK == expert).nonzero(as_tuple=True)
            rows.append(u_ND[token])
            gates.append(routing.weights_NK[token, choice])
        return torch.cat(rows), torch.cat(gates)

    def _hidden(self, expert: int) -> Tensor:
        """Return the inputs of an expert's down projection, ``[M, F]``."""
        experts = self._block.get_submodule("mlp.experts")
        assert isinstance(experts, RoutedExperts), "only mixtures have routed experts"
        rows_MD, gates_M = self._routed(expert)
        slot = experts.store.slot_to_expert.index(expert)
        return experts.activate(rows_MD @ experts.store.gate_up()[slot].T, gates_M)
