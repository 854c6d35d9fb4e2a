"""The choice of experts for processors: one visit a token, where torch sorts and masks in turn.

What it computes is written out in ``route.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library


def choose_compiled(
    library: Library,
    scores_NE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
) -> Tensor:
    """Do what ``route.choose`` does; of equal scores the expert with the lowest number."""
    scores_NE = scores_NE.contiguous()
    chosen_NK = torch.empty(len(scores_NE), top_k, dtype=torch.int64)
    sizes = (*scores_NE.shape, top_k, n_group, topk_group)
    library.call("choose", scores_NE.dtype, scores_NE, bias_E.float(), chosen_NK, *sizes)
    return chosen_NK


def sigmoid_compiled(library: Library, logits: Tensor) -> Tensor:
    """Compute ``1 / (1 + exp(-x))`` in one arithmetic for every place of a number.

    torch's has another one for the last numbers of a tensor, so that a token's scores would depend
    on how many tokens there are.
    """
    scores = torch.empty_like(logits)
    library.call("sigmoids", logits.dtype, logits.contiguous(), scores, logits.numel())
    return scores


def gate_compiled(
    library: Library,
    scores_NE: Tensor,
    chosen_NK: Tensor,
    *,
    normalise: bool,
    scale: float,
    least: float,
) -> Tensor:
    """Do what ``route.gate`` does without a gradient, sums in the order of the choices."""
    scores_NE = scores_NE.contiguous()
    weights_NK = scores_NE.new_empty(chosen_NK.shape)
    sizes = (*scores_NE.shape, chosen_NK.shape[1], int(normalise), least, scale)
    library.call("gate", scores_NE.dtype, scores_NE, chosen_NK, weights_NK, *sizes)
    return weights_NK


# None: the model's own steps, which are the specification.
VERSIONS: dict[str, Callable[[Tensor, Tensor, int, int, int], Tensor] | None] = {"torch": None}
COMPILED = choose_compiled
SIGMOID_VERSIONS: dict[str, Callable[[Tensor], Tensor]] = {"torch": torch.sigmoid}
SIGMOID_COMPILED = sigmoid_compiled
GATE_VERSIONS: dict[str, Callable[..., Tensor] | None] = {"torch": None}
GATE_COMPILED = gate_compiled
# Sigmoid, choice and gate in one; None: one after the other.
ROUTE_VERSIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]] | None] = {"torch": None}
