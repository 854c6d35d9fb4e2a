"""The one way weights leave a model: by their Hugging Face names (design seam 7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ziphius.model.experts import ExpertStore
from ziphius.model.transformer import Transformer

ROUTING_BIAS = "e_score_correction_bias"


class Split(NamedTuple):
    """Which stretch of a whole tensor a process holds: ``size`` of ``whole`` along ``dim``."""

    dim: int
    start: int
    size: int
    whole: int

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the stretch of a whole tensor, a view."""
        return tensor.narrow(self.dim, self.start, self.size)

    def whole_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of the whole of which a stretch has ``shape``."""
        return torch.Size([*shape[: self.dim], self.whole, *shape[self.dim + 1 :]])


def named_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of every weight, routing biases included.

    The tensors are views of the model's own storage: copying into one sets the weight. An expert in
    several slots is yielded once a slot, under one name. Embedding
    and head are shared with the MTP modules and yielded once; the copies that a published
    checkpoint holds are the business of ``checkpoint/keys.py``. A part yields what it holds, under
    the names that the whole network has for it.
    """
    if model.part.embeds:
        yield "model.embed_tokens.weight", model.embed_tokens.weight.detach()
    for index, depth, block in model.blocks():
        prefix = f"model.layers.{index}"
        if depth:
            module = model.mtp[depth - 1]
            yield f"{prefix}.enorm.weight", module.enorm.weight.detach()
            yield f"{prefix}.hnorm.weight", module.hnorm.weight.detach()
            yield f"{prefix}.eh_proj.weight", module.eh_proj.weight.detach()
        for name, tensor in _block_weights(block):
            yield f"{prefix}.{name}", tensor
        if depth:
            yield f"{prefix}.shared_head.norm.weight", model.mtp[depth - 1].norm.weight.detach()
    if model.part.ends:
        yield "model.norm.weight", model.norm.weight.detach()
        yield "lm_head.weight", model.lm_head.weight.detach()
        if model.config.num_labels:
            yield "score.weight", model.score.weight.detach()


def _block_weights(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a block's weights: modules bear the published names, except stacked experts."""
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, ExpertStore):
            experts = prefix.removesuffix("store.")
            for name, tensor in module.named_experts():
                yield experts + name, tensor.detach()
            continue
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, parameter.detach()
        for name, buffer in module.named_buffers(recurse=False):
            yield prefix + name, buffer
