"""What a rank has of parameters that FSDP2 has spread, and how they leave by their names.

Trainable or not, every parameter is cut along one dimension: the first, or a stack of experts along
their rows where that is even. Hugging Face tensors are views of whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ziphius.config.errors import ZiphiusError
from ziphius.model.experts import RoutedExperts
from ziphius.model.transformer import Transformer
from ziphius.model.weights import Split, named_weights
from ziphius.parallel.collectives import Axis
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.rectangles import Rectangle, SplitOf, unsplit

Parts = Mapping[str, Tensor]  # what a rank has of each parameter, by its name in the model


class Named(NamedTuple):
    """A Hugging Face tensor as a view of a whole parameter."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Shards:
    """The parameters of a model that ``apply_fsdp`` has spread, by their names in it.

    A step is ``begin``, passes (each a forward of ``Transformer.features`` and its backward), and
    ``end``; then parameters and gradients are in shards.
    """

    def __init__(self, model: Transformer, mesh: Mesh, *, every_pass: bool) -> None:
        """Note where every weight lies, while all are whole. Raises ValueError."""
        self.model, self.mesh, self.every_pass = model, mesh, every_pass
        parameters = dict(model.named_parameters())
        _check(list(parameters.values()))
        experts = set(experts_of(model))
        self.axes = {
            name: mesh["expert_shard" if p in experts else "shard"]
            for name, p in parameters.items()
        }
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.named, self.biases = _places(model, parameters)
        self._gathered: set[Tensor] = set()
        self._backwards: int | None = None
        self._passes = 0
        self._unfinished = False

    def begin(self, backwards: int | None = None) -> None:
        """Drop gradients. ``backwards`` passes will bring a step's, and the last sums over ranks.

        Where that is not known, with None, each sums.
        """
        if self._unfinished:
            self._recover()
        self.let_go()
        self.model.zero_grad()
        self._backwards, self._passes, self._unfinished = backwards, 0, False

    def end(self) -> None:
        """Take the passes for done. Raises RuntimeError where fewer were made than announced."""
        if self._backwards is not None and self._passes < self._backwards:
            raise RuntimeError(f"{self._passes} of {self._backwards} announced passes were made")
        self._unfinished = False

    def let_go(self) -> None:
        """Leave no weight whole. A pass without backward leaves those outside blocks."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters, as DTensors where they are spread."""
        self.let_go()
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self.shapes}

    def parts(self) -> dict[str, Tensor]:
        """Return what this rank has of every parameter: who writes there sets the weight."""
        return {name: local(p) for name, p in self.parameters().items()}

    def square_norm(self) -> Tensor:
        """Sum the squares of gradients, float64: every element is counted on one rank only."""
        norms = [torch.zeros((), dtype=torch.float64, device=self.model.device)]
        if self.mesh.place.dp_replicate == 0:
            gradients = [p.grad for p in self.parameters().values() if p.grad is not None]
            norms += [torch.linalg.vector_norm(local(g)).double() for g in gradients]
        return torch.stack(norms).square().sum()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Join what all ranks have of a parameter, or of its moment: they do it together."""
        shape, axis, dim = self.shapes[name], self.axes[name], self.dimension(name)
        padded = part.new_zeros(_each(shape[dim], axis), *shape[:dim], *shape[dim + 1 :])
        padded[: part.shape[dim]] = part.movedim(dim, 0)
        return axis.all_gather(padded)[: shape[dim]].movedim(0, dim).contiguous()

    def gathered(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor), in the order of parameters; to be read.

        All ranks do this together, to the end. There is one whole parameter at a time, and what
        it takes to join it; tensors of one are views of it.
        """
        for name, part in parts.items():
            whole = self.whole(name, part)
            for place in self.named[name]:
                yield place.name, whole.as_strided(place.shape, place.stride, place.offset)

    def held(self, parts: Parts) -> Iterator[Rectangle]:
        """Yield what this rank has of named tensors, as views of its parts: rows, side by side.

        Replicas have the same; otherwise every number is on one rank.
        """
        for name, part in parts.items():
            shape, dim = self.shapes[name], self.dimension(name)
            start = min(shape[dim], self.axes[name].place * _each(shape[dim], self.axes[name]))
            for place in self.named[name]:
                yield from _rows(place, shape, part, dim, start)

    @torch.no_grad()
    def load(self, parts: Parts, read: Callable[[str], Tensor]) -> None:
        """Fill parts from whole tensors, or from the rows here; only of what this rank has of."""
        for name, (start, *_), _, own in self.held(parts):
            given = read(name)
            own.copy_(given if given.shape == own.shape else given[start : start + len(own)])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, what this rank holds): views, of rows where ``split_of`` says so."""
        yield from ((piece.name, piece.data) for piece in self.held(self.parts()))
        yield from self.biases.items()

    def split_of(self, name: str) -> Split | None:
        """Say which rows of a named tensor this rank holds; None of one that is whole."""
        return self._splits.get(name)

    @cached_property
    def _splits(self) -> dict[str, Split]:
        pieces = (p for p in self.held(self.parts()) if len(p.data) < p.whole[0])
        return {p.name: Split(0, p.offsets[0], len(p.data), p.whole[0]) for p in pieces}

    def dimension(self, name: str) -> int:
        """Return the dimension that a parameter is cut along."""
        return _dimension(self.shapes[name], self.axes[name].size)

    def forward(self) -> None:
        """Count a forward pass that a backward pass will follow."""
        if self._backwards is not None and self._passes == self._backwards:
            raise RuntimeError("a pass after those that were announced: call begin first")
        self._passes += 1
        self._unfinished = True
        if isinstance(self.model, FSDPModule):
            last = self._backwards in (None, self._passes)
            self.model.set_requires_gradient_sync(last or self.every_pass)

    def remember(self, module: nn.Module) -> None:
        """Remember the weights that were brought together for a module."""
        self._gathered.update(p for p in module.parameters() if not isinstance(p, DTensor))

    def _recover(self) -> None:
        """Forget a step that failed between its passes or inside one. Raises ZiphiusError."""
        if isinstance(self.model, FSDPModule):
            if not hasattr(self.model, "reset_iter_state"):
                raise ZiphiusError(
                    "FSDP: a step failed inside a pass, and torch before 2.13 cannot go on from "
                    "there: start again from the last checkpoint"
                )
            self.model.reset_iter_state()
        for p in self._gathered:
            p.grad = None


def held_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, what this rank holds) of a model's weights, spread or not."""
    shards: Shards | None = getattr(model, "shards", None)
    return named_weights(model) if shards is None else shards.weights()


def split_of(model: Transformer) -> SplitOf:
    """Return which rows of its weights this rank holds."""
    shards: Shards | None = getattr(model, "shards", None)
    return unsplit if shards is None else shards.split_of


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """Return a view of this rank's part of a tensor, or of all of one that is not spread."""
    own = x.to_local() if isinstance(x, DTensor) else x
    return own.detach()  # torch 2.11 gives what the DTensor itself holds


def experts_of(model: Transformer) -> Iterator[nn.Parameter]:
    """Yield the parameters of routed experts."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            yield from module.parameters()


def _check(parameters: list[nn.Parameter]) -> None:
    if any(isinstance(p, DTensor) or hasattr(p, "main_grad") for p in parameters):
        raise ValueError("parameters are sharded already")
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.float64}:
        raise ValueError(f"weights in {dtypes}: an optimizer updates FP32 or float64, all alike")
    if len({p.untyped_storage().data_ptr() for p in parameters}) < len(parameters):
        raise ValueError("parameters share memory: each must have its own to be spread")


def _places(
    model: Transformer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, list[Named]], dict[str, Tensor]]:
    """Return the Hugging Face tensors of every parameter, and the routing biases by their names."""
    owners = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
    named: dict[str, list[Named]] = {name: [] for name in parameters}
    biases = {}
    for name, tensor in named_weights(model):
        owner = owners.get(tensor.untyped_storage().data_ptr())
        if owner is None:
            biases[name] = tensor
        else:
            offset = tensor.storage_offset() - parameters[owner].storage_offset()
            named[owner].append(Named(name, tensor.shape, tensor.stride(), int(offset)))
    return named, biases


def _dimension(shape: torch.Size, ranks: int) -> int:
    """Cut along the first dimension, or a stack of experts along their rows if only those fit."""
    inside = len(shape) == 3 and shape[0] % ranks and not shape[1] % ranks
    return 1 if inside else 0


def _each(length: int, axis: Axis) -> int:
    """Return how much of a dimension a rank has; the last ones may have less or nothing."""
    return -(-length // axis.size)


def _rows(
    place: Named, shape: torch.Size, part: Tensor, dim: int, start: int
) -> Iterator[Rectangle]:
    """Yield the rows of a named tensor in a part, whose place along ``dim`` begins at ``start``."""
    stop, number = start + part.shape[dim], place.shape[0]
    if len(shape) < 3:  # the tensor is the parameter
        if start < stop:
            yield _from_row(place, start, part)
        return
    # An expert's tensor is one slot of a stack [slots, rows, columns], or half of its rows.
    slot, first = divmod(place.offset // shape[2], shape[1])
    if dim == 0:
        if start <= slot < stop:
            own = part[slot - start, first : first + number]
            yield _from_row(place, 0, own)
        return
    low, high = max(first, start), min(first + number, stop)
    if low < high:
        own = part[slot, low - start : high - start]
        yield _from_row(place, low - first, own)


def _from_row(place: Named, start: int, rows: Tensor) -> Rectangle:
    offsets = (start, *(0 for _ in place.shape[1:]))
    return Rectangle(place.name, offsets, tuple(place.shape), rows)
