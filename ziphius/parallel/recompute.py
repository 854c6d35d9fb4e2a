"""Recomputation, applied to a model from outside (report section 3.2.3; facts 5.7).

*Selective* keeps no output of a function that is cheap to compute again: RMSNorm, the MLA
up-projections, SwiGLU, and the router's widened input. *Full* keeps only the inputs of the stages
``attend`` and ``experts`` of a block, and of its shared experts. Either way the values are those of
the first forward pass, bit for bit, and no token is counted or routed twice: ``full`` saves the
chosen experts and replays them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ziphius.config.errors import BadInput
from ziphius.kernels.latent import LatentPages
from ziphius.model.block import Attended, Block
from ziphius.model.experts import RoutedExperts
from ziphius.model.ffn import SwiGLU
from ziphius.model.layers import RMSNorm
from ziphius.model.mla import MLA
from ziphius.model.rope import Rope
from ziphius.model.router import Router
from ziphius.model.transformer import Transformer
from ziphius.parallel.ledger import Ledger, shadow

# What selective recomputation computes again: these methods of these modules.
SELECTIVE = (
    (RMSNorm, "forward"),
    (RMSNorm, "tiled"),
    (MLA, "expand"),
    (RoutedExperts, "activate"),
    (SwiGLU, "activate"),
    (Router, "widen"),
)


def apply_recompute(model: Transformer, how: Literal["none", "selective", "full"]) -> None:
    """Make a model recompute activations in backward, as ``parallel.recompute`` says.

    *Selective* works in ``Transformer.training_pass``, so in ``features``.
    """
    if how == "selective":
        _recompute_functions(model)
    elif how == "full":
        for _, _, block in model.blocks():
            _recompute_stages(block)
    elif how != "none":
        raise BadInput(f"parallel.recompute = '{how}': use 'none', 'selective' or 'full'")


def _recompute_functions(model: Transformer) -> None:
    ledger = Ledger()
    for module in model.modules():
        for kind, method in SELECTIVE:
            if isinstance(module, kind):
                ledger.record(module, method)
    shadow(model, "training_pass", lambda model: ledger.watching())


def _recompute_stages(block: Block) -> None:
    shadow(block, "attend", _attend_again)
    shadow(block, "experts", _again(type(block).experts))
    shadow(block, "shared", _again(type(block).shared))


def _attend_again(
    block: Block,
    x_BTD: Tensor,
    rope: Rope,
    cache: LatentPages | None = None,
    chosen_NK: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Attended:
    """Run stage ``attend`` so that backward runs it again with the experts of the first time."""
    attend = type(block).attend
    if cache is not None or not torch.is_grad_enabled():
        return attend(block, x_BTD, rope, cache, chosen_NK, documents_BT)
    replay = [] if chosen_NK is None else [chosen_NK]

    def stage(x_BTD: Tensor) -> Attended:
        attended = attend(block, x_BTD, rope, None, replay[0] if replay else None, documents_BT)
        if attended.routed is not None and not replay:
            replay.append(attended.routed.routing.chosen_NK)
        return attended

    result: Attended = checkpoint(stage, x_BTD, use_reentrant=False, preserve_rng_state=False)
    return result


def _again(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stage so that backward runs it again."""

    def run(block: Block, given: Any) -> Any:
        if not torch.is_grad_enabled():
            return stage(block, given)
        return checkpoint(stage, block, given, use_reentrant=False, preserve_rng_state=False)

    return run
