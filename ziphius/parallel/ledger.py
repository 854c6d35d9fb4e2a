"""Saved activations replaced by how to compute them again.

A function whose outputs are cheap is *recorded*: the ledger then knows their storages. Whatever
node of the graph would save such an output, or a view of it, saves its place in a recipe instead,
and backward runs the function once more. A recipe's inputs may themselves be outputs of other
recipes. torch's checkpointing computes whole regions again, up to the last thing that was saved;
here it is single functions, wherever their consumers are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Kept:
    """A saved tensor that no recipe makes.

    Hooks on saved tensors switch off torch's check for changes in place, so it is done here. The
    tensor is detached: an output that held its own graph would live until a backward pass.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def claim(self) -> None:
        """Nothing to count: the tensor is here."""

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {list(self.tensor.shape)} at version {self.tensor._version}, "
                f"expected version {self.version}"
            )
        return self.tensor


class _Recipe:
    """How to compute a function's outputs again.

    The outputs are kept from the first use in backward to the last, so that the function runs once
    more however many nodes had saved them.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self._uses = self._uses_left = 0
        self._outputs: tuple[Tensor, ...] | None = None

    def claim(self) -> None:
        """Count a use; the first one is also a use of every input that a recipe makes."""
        if self._uses == 0:
            for value in self.inputs:
                if isinstance(value, _Kept | _Made):
                    value.claim()
        self._uses += 1

    def output(self, position: int) -> Tensor:
        if self._outputs is None:
            inputs = [x.restore() if isinstance(x, _Kept | _Made) else x for x in self.inputs]
            with torch.no_grad():
                self._outputs = _as_tuple(self.function(*inputs))
            self._uses_left = self._uses
        result = self._outputs[position]
        self._uses_left -= 1
        if self._uses_left <= 0:
            self._outputs = None
        return result


class _Made:
    """A view of a recipe's output, in place of a saved tensor."""

    def __init__(self, recipe: _Recipe, position: int, view: Tensor, output: Tensor) -> None:
        self.recipe, self.position = recipe, position
        self.size, self.stride = view.size(), view.stride()
        self.offset = view.storage_offset() - output.storage_offset()

    def claim(self) -> None:
        self.recipe.claim()

    def restore(self) -> Tensor:
        output = self.recipe.output(self.position)
        return output.as_strided(self.size, self.stride, output.storage_offset() + self.offset)


class _Entry(NamedTuple):
    recipe: _Recipe
    position: int
    output: weakref.ref[Tensor]
    version: int


class Ledger:
    """Knows, during a forward pass, which live storages can be computed again."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._watching = False

    def watching(self) -> AbstractContextManager[None]:
        """Return what replaces that which autograd saves, for the length of a forward pass.

        A pass that another one interrupts leaves it and enters it again.
        """
        return _Pass(self)

    @contextmanager
    def _turn(self, entries: dict[int, _Entry]) -> Iterator[None]:
        if not torch.is_grad_enabled():
            yield
            return
        self._entries, self._watching = entries, True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._entries, self._watching = {}, False

    def record(self, module: nn.Module, name: str) -> None:
        """Record the outputs of one method of one module."""
        method = getattr(type(module), name)

        def recorded(module: nn.Module, *inputs: Any) -> Any:
            return self.run(MethodType(method, module), *inputs)

        shadow(module, name, recorded)

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call a function; while watching, enter its outputs."""
        outputs = function(*inputs)
        if self._watching and torch.is_grad_enabled():
            held = tuple(self._hold(x.detach()) if isinstance(x, Tensor) else x for x in inputs)
            recipe = _Recipe(function, held)
            for position, output in enumerate(_as_tuple(outputs)):
                entry = _Entry(recipe, position, weakref.ref(output), output._version)
                self._entries[output.untyped_storage().data_ptr()] = entry
        return outputs

    def _hold(self, tensor: Tensor) -> _Kept | _Made:
        entry = self._entries.get(tensor.untyped_storage().data_ptr())
        if entry is not None:
            output = entry.output()
            # A dead output's address may belong to another tensor by now.
            if (
                output is not None
                and output.dtype == tensor.dtype
                and tensor._version == entry.version
            ):
                return _Made(entry.recipe, entry.position, tensor, output)
        return _Kept(tensor)

    def _pack(self, tensor: Tensor) -> _Kept | _Made:
        held = self._hold(tensor)
        held.claim()
        return held


class _Pass(AbstractContextManager[None]):
    """One forward pass, and what it has recorded so far."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._entries = ledger, dict[int, _Entry]()
        self._turn: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        self._turn = self._ledger._turn(self._entries)
        self._turn.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        assert self._turn is not None, "left after it was entered"
        turn, self._turn = self._turn, None
        return turn.__exit__(*raised)


def shadow(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Put ``function(module, ...)`` over a method of one instance.

    Its class and the names of its weights stay as they are. A bound method, and not a closure over
    the module, so that a deep copy of the module computes with its own weights.
    """
    object.__setattr__(module, name, MethodType(function, module))


def _unpack(held: _Kept | _Made) -> Tensor:
    return held.restore()


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
