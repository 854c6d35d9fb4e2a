"""Where routed experts live, and what one computes (report eq. 12; design seam 8)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels.fp8 import Arithmetic
from ziphius.kernels.grouped import COUNT_ON_DEVICE
from ziphius.kernels.mixture import Expert
from ziphius.kernels.select import Kernels
from ziphius.model.derived import Derived
from ziphius.model.dispatch import Sent
from ziphius.model.layers import Device
from ziphius.model.precision import Precision

# A step of so few tokens gives every expert room for all of them. What is computed for nothing,
# SwiGLU on E * 8 rows, takes under a fiftieth of reading the weights of the experts it meets.
FEW_TOKENS = 8


def slots_of(chosen_NK: Tensor, slot_to_expert: Sequence[int], n_experts: int) -> Tensor:
    """Return a slot that holds each chosen expert, int64 ``[N, K]``: see ``ExpertStore.slots``."""
    if tuple(slot_to_expert) == tuple(range(n_experts)):
        return chosen_NK
    copies: list[list[int]] = [[] for _ in range(n_experts)]
    for slot, expert in enumerate(slot_to_expert):
        copies[expert].append(slot)
    if absent := {int(e) for e in chosen_NK.unique() if not copies[int(e)]}:
        raise ValueError(f"experts {sorted(absent)} are chosen and not resident")
    most = max(len(slots) for slots in copies)
    turns = [[slots[i % len(slots)] if slots else 0 for i in range(most)] for slots in copies]
    numbers = torch.tensor([max(1, len(slots)) for slots in copies], device=chosen_NK.device)
    token_N1 = torch.arange(len(chosen_NK), device=chosen_NK.device).unsqueeze(1)
    table = torch.tensor(turns, device=chosen_NK.device)
    return table[chosen_NK, token_N1 % numbers[chosen_NK]]


class ExpertStore(nn.Module, ABC):
    """Slots that hold experts: kernels take a store's slots and the segments of their rows.

    ``slot_to_expert[s]`` is the logical expert in slot ``s``; more than one slot may hold the same
    one, and experts that are nowhere in the list are not resident.
    """

    n_experts: int
    slot_to_expert: tuple[int, ...]
    stacked = True  # whether gate_up() and down() are there, and not made from parts

    def slots(self, chosen_NK: Tensor) -> Tensor:
        """Return the slot that serves each chosen expert, int64 ``[N, K]``.

        Tokens take the copies of an expert in turn. Raises ValueError for an expert that is not
        resident.
        """
        return slots_of(chosen_NK, self.slot_to_expert, self.n_experts)

    @abstractmethod
    def gate_up(self) -> Tensor:
        """Gate and up projections of every slot as stored, ``[slots, 2F, D]``, the gate first."""

    @abstractmethod
    def down(self) -> Tensor:
        """Down projections of every slot as stored, ``[slots, D, F]``."""

    @abstractmethod
    def in_memory(self) -> list[Expert]:
        """The weights of every logical expert, in order, where they lie."""

    @abstractmethod
    def named_experts(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (``EXPERT.gate_proj.weight`` and so on, writable view) of every slot's expert."""


class StackedExperts(ExpertStore):
    """The slots in one stacked tensor; by default every expert in a slot, in order."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        device: Device,
        slot_to_expert: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.n_experts = config.n_routed_experts
        F, D = config.moe_intermediate_size, config.hidden_size
        self.slot_to_expert = tuple(slot_to_expert or range(self.n_experts))
        S, dtype = len(self.slot_to_expert), precision.storage
        self.gate_up_proj = nn.Parameter(torch.empty(S, 2 * F, D, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(S, D, F, dtype=dtype, device=device))

    def gate_up(self) -> Tensor:
        return self.gate_up_proj

    def down(self) -> Tensor:
        return self.down_proj

    def in_memory(self) -> list[Expert]:
        slot_of = {expert: slot for slot, expert in enumerate(self.slot_to_expert)}
        F = self.down_proj.shape[-1]
        found = []
        for expert in range(self.n_experts):
            gate_up_GD = self.gate_up_proj[slot_of[expert]]
            down_DF = self.down_proj[slot_of[expert]]
            found.append(Expert(gate_up_GD[:F], gate_up_GD[F:], down_DF))
        return found

    def named_experts(self) -> Iterator[tuple[str, Tensor]]:
        F = self.down_proj.shape[-1]
        for slot, expert in enumerate(self.slot_to_expert):
            gate_up_GD = self.gate_up_proj[slot]
            yield f"{expert}.gate_proj.weight", gate_up_GD[:F]
            yield f"{expert}.up_proj.weight", gate_up_GD[F:]
            yield f"{expert}.down_proj.weight", self.down_proj[slot]


class RoutedExperts(nn.Module):
    """``down(silu(gate(x)) * up(x) * routing weight)`` for rows sorted by expert, in ``dtype``.

    The routing weight enters before the down projection, exactly once, so that combining is a
    plain sum (facts 1.7).
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.dtype = kernels.product_dtype(precision.dtype("linear"))
        self.grouped = kernels.function("grouped")
        self.counts_on_device = kernels.grouped in COUNT_ON_DEVICE
        self.linear = kernels.function("linear")
        self.swiglu = kernels.function("swiglu")
        self.fp8 = kernels.fp8(precision.power_of_two) if precision.in_fp8("linear") else None
        self.derived = Derived()
        self.store: ExpertStore = StackedExperts(config, precision, device)

    def forward(self, sent: Sent) -> Tensor:
        """Compute the experts' rows ``[M, D]`` in the order they were sent."""
        if self.fp8 is not None:
            return self._in_fp8(self.fp8, sent)
        if not self.store.stacked:
            return self._one_by_one(sent)
        counts = sent.counts_E if self.counts_on_device else sent.counts
        gate_up_MG = self.grouped(sent.rows_MD, self.store.gate_up(), counts)
        hidden_MF = self.activate(gate_up_MG, sent.gates_M)
        out_MD: Tensor = self.grouped(hidden_MF, self.store.down(), counts)
        return out_MD

    def _in_fp8(self, fp8: Arithmetic, sent: Sent) -> Tensor:
        gate_up, down, counts_E = self.store.gate_up(), self.store.down(), sent.counts_E
        rows_MD = fp8.operand(sent.rows_MD, power_of_two=True)
        gate_up_fp8 = self.derived.get("gate_up", gate_up, fp8.weight)
        down_fp8 = self.derived.get("down", down, fp8.weight)
        # No token chooses an expert twice.
        if sent.tokens <= FEW_TOKENS and not torch.is_grad_enabled():
            blocks = (gate_up_fp8.blocks, down_fp8.blocks)
            return fp8.few(rows_MD, *blocks, sent.gates_M, counts_E, sent.tokens)
        gate_up_MG = fp8.grouped_linear(rows_MD, gate_up, gate_up_fp8, counts_E)
        where = (counts_E, sent.gradient)
        return fp8.gated_linear(gate_up_MG, None, sent.gates_M, down, down_fp8, *where)

    def _one_by_one(self, sent: Sent) -> Tensor:
        """Multiply by one expert's matrices after the other's, as they are stored."""
        assert isinstance(sent.rows_MD, Tensor), "tiles are for products in FP8"
        out_MD = torch.empty_like(sent.rows_MD)
        segments = (x.split(sent.counts) for x in (sent.rows_MD, sent.gates_M, out_MD))
        for expert, *segment in zip(self.store.in_memory(), *segments, strict=True):
            rows_mD, gates_m, out_mD = segment
            if len(rows_mD):
                gate_mF, up_mF = (self.linear(rows_mD, w, self.dtype) for w in expert[:2])
                hidden_mF = self.swiglu(gate_mF, up_mF, gates_m)
                out_mD.copy_(self.linear(hidden_mF, expert.down, self.dtype))
        return out_MD

    def activate(self, gate_up_MG: Tensor, gates_M: Tensor) -> Tensor:
        """SwiGLU times the routing weight, ``[M, F]``."""
        hidden_MF: Tensor = self.swiglu(gate_up_MG, None, gates_M)
        return hidden_MF
