"""Recomputation, applied to a model from outside (report section 3.2.3; facts 5.7).

*Selective* keeps no output of a function that is cheap to compute again: RMSNorm, the MLA
up-projections and SwiGLU. Whatever node of the graph would save such an output saves how to compute
it instead. *Full* keeps only the inputs of two stages of a block. Either way the values are those
of the first forward pass, bit for bit, and no token is counted or routed twice: ``full`` saves the
chosen experts and replays them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ziphius.model.block import Attended, Block
from ziphius.model.experts import RoutedExperts
from ziphius.model.ffn import SwiGLU
from ziphius.model.layers import RMSNorm
from ziphius.model.mla import MLA, LayerCache
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer


def apply_recompute(model: Transformer, how: Literal["none", "selective", "full"]) -> None:
    """Make a model recompute activations in backward, as ``parallel.recompute`` says."""
    if how == "selective":
        _recompute_functions(model)
    elif how == "full":
        for _, _, block in model.blocks():
            _recompute_stages(block)


# --- selective: outputs of single functions -------------------------------------------------------


class _Recipe:
    """How to compute a function's outputs again.

    The outputs are kept from the first use in backward to the last, so that a function runs once
    more however many nodes had saved its outputs.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.uses = 0
        self._outputs: tuple[Tensor, ...] | None = None
        self._uses_left = 0

    def output(self, position: int) -> Tensor:
        if self._outputs is None:
            with torch.no_grad():
                self._outputs = _as_tuple(self.function(*self.inputs))
            self._uses_left = self.uses
        result = self._outputs[position]
        self._uses_left -= 1
        if self._uses_left <= 0:
            self._outputs = None
        return result


class _Saved:
    """Stands for a saved tensor: a view of output ``position`` of a recipe."""

    def __init__(self, recipe: _Recipe, position: int, view: Tensor, output: Tensor) -> None:
        self.recipe, self.position = recipe, position
        self.size, self.stride = view.size(), view.stride()
        self.offset = view.storage_offset() - output.storage_offset()
        recipe.uses += 1

    def restore(self) -> Tensor:
        output = self.recipe.output(self.position)
        return output.as_strided(self.size, self.stride, output.storage_offset() + self.offset)


class _Ledger:
    """Knows, during one forward pass, which live storages can be computed again."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[_Recipe, int, weakref.ref[Tensor]]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        """Watch what autograd saves, for the length of a forward pass."""
        if not torch.is_grad_enabled():
            return nullcontext()
        self._entries.clear()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with its outputs entered in the ledger."""

        def recorded(*inputs: Any) -> Any:
            outputs = function(*inputs)
            if torch.is_grad_enabled():
                detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
                recipe = _Recipe(function, detached)
                for position, output in enumerate(_as_tuple(outputs)):
                    key = output.untyped_storage().data_ptr()
                    self._entries[key] = (recipe, position, weakref.ref(output))
            return outputs

        return recorded

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        entry = self._entries.get(tensor.untyped_storage().data_ptr())
        if entry is None:
            return tensor
        recipe, position, reference = entry
        output = reference()
        # A dead output's address may belong to another tensor by now.
        if output is None or output.dtype != tensor.dtype:
            return tensor
        return _Saved(recipe, position, tensor, output)


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.restore() if isinstance(saved, _Saved) else saved


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _recompute_functions(model: Transformer) -> None:
    ledger = _Ledger()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            _replace(module, "forward", ledger.wrap(module.forward))
        elif isinstance(module, MLA):
            _replace(module, "expand", ledger.wrap(module.expand))
        elif isinstance(module, RoutedExperts | SwiGLU):
            _replace(module, "activate", ledger.wrap(module.activate))
    features = model.features

    def watched(tokens_BS: Tensor) -> Any:
        with ledger.hooks():
            return features(tokens_BS)

    _replace(model, "features", watched)


# --- full: whole stages ---------------------------------------------------------------------------


def _recompute_stages(block: Block) -> None:
    attend, experts = block.attend, block.experts

    def attend_again(
        x_BTD: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        chosen_NK: Tensor | None = None,
    ) -> Attended:
        if cache is not None or not torch.is_grad_enabled():
            return attend(x_BTD, rope, cache, chosen_NK)
        replay: list[Tensor] = [] if chosen_NK is None else [chosen_NK]

        def stage(x_BTD: Tensor) -> Attended:
            attended = attend(x_BTD, rope, None, replay[0] if replay else None)
            if attended.routed is not None and not replay:
                replay.append(attended.routed.routing.chosen_NK)
            return attended

        return checkpoint(stage, x_BTD, use_reentrant=False)

    def experts_again(sent: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return experts(sent)
        return checkpoint(experts, sent, use_reentrant=False)

    _replace(block, "attend", attend_again)
    _replace(block, "experts", experts_again)


def _replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Shadow a method on one instance; its class and its weights' names stay as they are."""
    object.__setattr__(module, name, function)
