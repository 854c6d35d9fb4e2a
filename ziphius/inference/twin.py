"""A second model over the weights of a first: one that answers beside one that learns."""

from __future__ import annotations

import torch

from ziphius.checkpoint.expert_stores import Fp8Experts, StoredExperts
from ziphius.config.errors import BadInput
from ziphius.kernels.select import Kernels
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.transformer import Transformer


def twin(model: Transformer, kernels: Kernels, device: torch.device) -> Transformer:
    """Return a model on ``device`` that computes with ``kernels`` and has no weight of its own.

    Weights that are there are shared, so what changes them in place changes both; those on another
    device are copied. Raises BadInput for a model whose experts stay as a file has them.
    """
    if any(isinstance(module, StoredExperts | Fp8Experts) for module in model.modules()):
        raise BadInput(
            "this model's experts are held as its file has them: open the checkpoint by LLM(path)"
        )
    other = Transformer(model.config, model.precision.for_answers(), kernels=kernels, device="meta")
    share(model, other, device)
    return other.eval()


def share(model: Transformer, other: Transformer, device: torch.device) -> None:
    """Make the weights of ``model`` those of ``other``, a model of the same configuration."""
    state = {name: tensor.to(device) for name, tensor in model.state_dict().items()}
    other.load_state_dict(state, assign=True)
    other.requires_grad_(False)
    for ours, theirs in zip(model.blocks(), other.blocks(), strict=True):
        if isinstance(ours.block.mlp, MixtureOfExperts):
            assert isinstance(theirs.block.mlp, MixtureOfExperts), "the configuration is the same"
            slots = ours.block.mlp.experts.store.slot_to_expert
            theirs.block.mlp.experts.store.slot_to_expert = slots
