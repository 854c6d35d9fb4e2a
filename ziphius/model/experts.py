"""Where routed experts live, and what one computes (report eq. 12; design seam 8)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels import grouped
from ziphius.kernels.select import Kernels
from ziphius.kernels.swiglu import swiglu
from ziphius.model.dispatch import Sent
from ziphius.model.layers import Device
from ziphius.model.precision import Precision


class ExpertStore(nn.Module, ABC):
    """Slots that hold experts: kernels take a store and the segments of its slots' rows.

    ``slot_to_expert[s]`` is the logical expert in slot ``s``; more than one slot may hold the same
    one, and experts that are nowhere in the list are not resident.
    """

    slot_to_expert: tuple[int, ...]

    @abstractmethod
    def gate_up(self, dtype: torch.dtype) -> Tensor:
        """Gate and up projections of every slot, ``[slots, 2F, D]``, the gate first."""

    @abstractmethod
    def down(self, dtype: torch.dtype) -> Tensor:
        """Down projections of every slot, ``[slots, D, F]``."""

    @abstractmethod
    def named_experts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (``EXPERT.gate_proj.weight`` and so on, writable view) of each resident expert."""


class StackedExperts(ExpertStore):
    """Every expert in one stacked tensor, one slot each."""

    def __init__(self, config: ModelConfig, precision: Precision, device: Device) -> None:
        super().__init__()
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.slot_to_expert = tuple(range(E))
        dtype = precision.storage
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(E, D, F, dtype=dtype, device=device))

    def gate_up(self, dtype: torch.dtype) -> Tensor:
        return self.gate_up_proj.to(dtype)

    def down(self, dtype: torch.dtype) -> Tensor:
        return self.down_proj.to(dtype)

    def named_experts(self) -> Iterator[tuple[str, Tensor]]:
        F = self.down_proj.shape[-1]
        for slot, expert in enumerate(self.slot_to_expert):
            gate_up_GD = self.gate_up_proj[slot]
            yield f"{expert}.gate_proj.weight", gate_up_GD[:F]
            yield f"{expert}.up_proj.weight", gate_up_GD[F:]
            yield f"{expert}.down_proj.weight", self.down_proj[slot]


class RoutedExperts(nn.Module):
    """``down(silu(gate(x)) * up(x) * routing weight)`` for rows sorted by expert.

    The routing weight enters before the down projection, exactly once, so that combining is a
    plain sum (facts 1.7).
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.dtype = precision.dtype("linear")
        self.grouped = grouped.VERSIONS[kernels.grouped]
        self.store: ExpertStore = StackedExperts(config, precision, device)

    def forward(self, sent: Sent) -> Tensor:
        """Compute the experts' rows ``[M, D]`` in the order they were sent."""
        gate_up_MG = self.grouped(sent.rows_MD, self.store.gate_up(self.dtype), sent.counts)
        hidden_MF = self.activate(gate_up_MG, sent.gates_M)
        return self.grouped(hidden_MF, self.store.down(self.dtype), sent.counts)

    def activate(self, gate_up_MG: Tensor, gates_M: Tensor) -> Tensor:
        """SwiGLU times the routing weight, ``[M, F]``."""
        gate_MF, up_MF = gate_up_MG.chunk(2, dim=-1)
        return swiglu(gate_MF, up_MF, gates_M)
