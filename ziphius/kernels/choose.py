"""The choice of experts for processors: one visit a token, where torch sorts and masks in turn.

What it computes is written out in ``model/router.py``.
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
    """Do what ``model.router.choose`` does; of equal scores the expert with the lowest number."""
    scores_NE = scores_NE.contiguous()
    chosen_NK = torch.empty(len(scores_NE), top_k, dtype=torch.int64)
    sizes = (*scores_NE.shape, top_k, n_group, topk_group)
    library.call("choose", scores_NE.dtype, scores_NE, bias_E.float(), chosen_NK, *sizes)
    return chosen_NK


# None: the model's own steps, which are the specification.
VERSIONS: dict[str, Callable[[Tensor, Tensor, int, int, int], Tensor] | None] = {"torch": None}
COMPILED = choose_compiled
