"""Tensor parallelism: which weights are cut, where, and the cutting.

Heads of attention (the up-projections' rows, the output projection's columns), the width of dense
feed-forward layers, and the vocabulary. Everything else is held alike by all ranks of ``tp``, the
experts too: each rank sends its own tokens to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.model.transformer import Transformer
from ziphius.model.weights import Split
from ziphius.parallel.layout import Layout


class Cut(NamedTuple):
    """Where a weight is cut: along ``dim``, between the units that ``number`` counts.

    ``widths`` add up to the rows or columns of a unit; without any it has one. These are fields of
    the model's configuration.
    """

    dim: int
    number: str
    widths: tuple[str, ...] = ()


_HEADS = "num_attention_heads"
_QUERY = Cut(0, _HEADS, ("qk_nope_head_dim", "qk_rope_head_dim"))
# By what the name ends in; the experts' names, shared ones too, have more before ``gate_proj``.
TABLE: Mapping[str, Cut] = {
    "self_attn.q_proj.weight": _QUERY,
    "self_attn.q_b_proj.weight": _QUERY,
    "self_attn.kv_b_proj.weight": Cut(0, _HEADS, ("qk_nope_head_dim", "v_head_dim")),
    "self_attn.o_proj.weight": Cut(1, _HEADS, ("v_head_dim",)),
    "mlp.gate_proj.weight": Cut(0, "intermediate_size"),
    "mlp.up_proj.weight": Cut(0, "intermediate_size"),
    "mlp.down_proj.weight": Cut(1, "intermediate_size"),
    "embed_tokens.weight": Cut(0, "vocab_size"),
    "lm_head.weight": Cut(0, "vocab_size"),
    "shared_head.head.weight": Cut(0, "vocab_size"),  # the same, as a published file has it again
}


def split_of(name: str, config: ModelConfig, tp: int, place: int) -> Split | None:
    """Return which part of a weight the rank at ``place`` of ``tp`` holds; None: all of it.

    ``name`` is the Hugging Face name, or that of the model's parameter: they end alike. Shares are
    as even as can be.
    """
    cut = next((cut for suffix, cut in TABLE.items() if name.endswith(suffix)), None)
    if cut is None or tp == 1:
        return None
    units = getattr(config, cut.number)
    unit = sum(getattr(config, width) for width in cut.widths) if cut.widths else 1
    first, end = place * units // tp, (place + 1) * units // tp
    return Split(cut.dim, first * unit, (end - first) * unit, units * unit)


def check_tensor(config: ModelConfig, tp: int) -> None:
    """Refuse what does not divide among ``tp`` ranks. Raises BadInput."""
    heads = config.num_attention_heads
    if heads % tp:
        near = min((d for d in range(1, heads + 1) if heads % d == 0), key=lambda d: abs(d - tp))
        raise BadInput(
            f"parallel.tp = {tp} does not divide model.num_attention_heads = {heads}: use {near}"
        )
    names = {"vocab_size", "intermediate_size"}
    if small := [name for name in sorted(names) if getattr(config, name) < tp]:
        least = min(getattr(config, name) for name in small)
        raise BadInput(
            f"parallel.tp = {tp} is more than model.{small[0]} = {getattr(config, small[0])}: "
            f"use {least} or less"
        )


@torch.no_grad()
def cut_weights(model: Transformer, tp: int, place: int) -> None:
    """Keep of a whole model's weights those of one rank, in place.

    Weights that it has are kept; it may as well be initialised or loaded afterwards. A module that
    several models share is cut once.
    """
    for name, parameter in list(model.named_parameters()):
        split = split_of(name, model.config, tp, place)
        if split is not None and parameter.shape[split.dim] == split.whole:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(split.cut(parameter.detach()).clone())


def gradient_axis(name: str, config: ModelConfig, layout: Layout) -> str:
    """Return the axis over which the gradient of a parameter has to be summed, by its name.

    What ``tp`` cuts is alike over ``dp``; what it does not cut, over ``dp`` and ``tp``, which
    together are a stage. Routed experts are alike over ``edp``, which includes ``tp``.
    """
    if ".experts." in name:
        return "edp"
    if layout.tp == 1 or split_of(name, config, layout.tp, 0) is not None:
        return "dp"
    return "stage"
