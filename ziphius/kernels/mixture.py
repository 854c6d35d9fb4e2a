"""A mixture layer's experts for tokens where they lie, for answering: nothing is sorted or kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.project import require_no_gradient
from ziphius.kernels.stored import WORDS, Codes, Weight, describe


class Expert(NamedTuple):
    """The three matrices of one expert, ``[F, D]``, ``[F, D]`` and ``[D, F]``."""

    gate: Weight
    up: Weight
    down: Weight


class Experts:
    """The routed experts of a layer and its shared ones, with their places in memory."""

    def __init__(self, routed: Sequence[Expert], shared: Sequence[Expert]) -> None:
        self.routed, self.shared = list(routed), tuple(shared)
        words = [describe(weight) for expert in (*routed, *shared) for weight in expert]
        self.table = torch.tensor(words, dtype=torch.int64).view(-1, WORDS)

    @property
    def count(self) -> int:
        """Routed experts."""
        return len(self.routed)

    def get(self, expert: int) -> Expert:
        """Return a routed expert that ``require`` was asked for."""
        return self.routed[expert]

    def require(self, chosen_NK: Tensor) -> None:
        """Have every chosen expert in memory; here they all are."""

    def place(self, expert: int, weights: Expert) -> None:
        """Note where the matrices of one routed expert lie."""
        words = [describe(weight) for weight in weights]
        self.table[3 * expert : 3 * expert + 3] = torch.tensor(words, dtype=torch.int64)


def mixture_reference(
    u_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, experts: Experts
) -> Tensor:
    """Sum the rows of every token's experts, then of the shared ones: ``[N, D]``.

    A row is ``down(silu(gate(u)) * up(u) * gates)``; projections, the hidden row, the sum of the
    routed rows in the order of the choices, and every sum after it are rounded to the dtype of
    ``u``; between roundings the arithmetic is at least FP32.
    """
    experts.require(chosen_NK)
    high = torch.promote_types(u_ND.dtype, torch.float32)
    out_ND = torch.empty_like(u_ND)
    for n, u_D in enumerate(u_ND.unbind(0)):
        total_D = torch.zeros_like(u_D, dtype=high)
        for expert, gate in zip(chosen_NK[n].tolist(), gates_NK[n].unbind(0), strict=True):
            total_D += _row(u_D, experts.get(expert), gate.to(high))
        out_ND[n] = total_D.to(u_ND.dtype)
        for shared in experts.shared:
            out_ND[n] = (out_ND[n].to(high) + _row(u_D, shared, torch.ones((), dtype=high))).to(
                u_ND.dtype
            )
    return out_ND


def _row(u_D: Tensor, expert: Expert, gate: Tensor) -> Tensor:
    dtype, high = u_D.dtype, gate.dtype

    def project(x: Tensor, weight: Weight) -> Tensor:
        matrix = weight.decode(high) if isinstance(weight, Codes) else weight.to(dtype).to(high)
        return (matrix @ x.to(high)).to(dtype)

    gated, up = project(u_D, expert.gate).to(high), project(u_D, expert.up).to(high)
    return project((F.silu(gated) * up * gate).to(dtype), expert.down).to(high)


def mixture_compiled(
    library: Library, u_ND: Tensor, chosen_NK: Tensor, gates_NK: Tensor, experts: Experts
) -> Tensor:
    """Do the same, weights read where they are stored. A row does not depend on its neighbours."""
    require_no_gradient(u_ND)
    u_ND, chosen_NK = u_ND.contiguous(), chosen_NK.contiguous()
    experts.require(chosen_NK)
    high = torch.promote_types(u_ND.dtype, torch.float32)
    gates_NK = gates_NK.to(high).contiguous()
    out_ND = torch.empty_like(u_ND)
    sizes = (*u_ND.shape, chosen_NK.shape[1], experts.count, len(experts.shared))
    rows = (u_ND, chosen_NK, gates_NK, experts.table, out_ND)
    library.call("mixture", u_ND.dtype, *rows, *sizes, behind=experts)
    return out_ND


# None: the stages of the block, one after the other.
VERSIONS: dict[str, Callable[..., Any] | None] = {"stages": None, "reference": mixture_reference}
COMPILED = mixture_compiled
