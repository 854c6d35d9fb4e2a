"""ZeRO-1: weights and gradients in flat buffers, of which every rank updates an equal part.

A rank holds all weights of its part of the model. Gradients of all micro-batches of a step add up
in ``main_grad``, at least FP32, and are summed over ranks once a step (report section 3.3; facts
5.1); a rank then updates its shard of the weights, for which alone it has moments, and all ranks
give each other what they updated.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ziphius.kernels.grouped import keep_gradient
from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Axis, Pending
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.pipeline.actions import Schedule
from ziphius.parallel.rectangles import Rectangle, SplitOf, rectangles, unsplit
from ziphius.parallel.tensor import gradient_axis

BUCKET_BYTES = 64 * 2**20
# Parameters and slices begin at multiples of so many elements: kernels want aligned memory.
_ALIGNED = 64
# While one bucket travels the next is made ready; more would only take memory.
_IN_FLIGHT = 2


class Span(NamedTuple):
    """Where a tensor lies in a buffer."""

    start: int
    stop: int


class Piece(NamedTuple):
    """What of a parameter this rank updates. Tensors are views, flat.

    ``kept`` is its place in the shard of ``buffer``, where the optimizer keeps its state.
    """

    parameter: nn.Parameter
    weights: Tensor
    gradients: Tensor
    buffer: Buffer
    kept: slice


class Buffer:
    """Parameters that the ranks of an axis hold alike, end to end, and their gradients likewise.

    Both are cut into buckets of one size, every bucket into equal slices, one a rank. A rank's
    shard is its slices of all buckets. What is left at the end is zeros.
    """

    def __init__(self, axis: Axis, parameters: list[nn.Parameter], bucket_bytes: int) -> None:
        """Move parameters into the buffer. Raises ValueError for weights narrower than FP32."""
        first = parameters[0]
        dtypes = {p.dtype for p in parameters}
        if len(dtypes) > 1 or torch.promote_types(first.dtype, torch.float32) != first.dtype:
            raise ValueError(
                f"weights in {dtypes}: an optimizer updates FP32 or float64, all alike"
            )
        self.axis = axis
        self.spans: dict[nn.Parameter, Span] = {}
        end = 0
        for p in parameters:
            self.spans[p] = Span(end, end + p.numel())
            end = _up(end + p.numel(), _ALIGNED)
        number = max(1, -(-end * first.element_size() // bucket_bytes))
        self.slice = _up(-(-end // (number * axis.size)), _ALIGNED)
        self.bucket = self.slice * axis.size
        self.n_buckets = -(-end // self.bucket)
        self.weights = first.detach().new_zeros(self.n_buckets * self.bucket)
        self.gradients = torch.zeros_like(self.weights)
        for p, span in self.spans.items():
            view = self.weights[slice(*span)].view(p.shape)
            view.copy_(p.detach())
            p.data = view
            p.main_grad = self.gradients[slice(*span)].view(p.shape)  # type: ignore[attr-defined]

    @property
    def shard_size(self) -> int:
        """How many elements a rank updates, padding included."""
        return self.n_buckets * self.slice

    def own(self, bucket: int) -> Span:
        """Return where this rank's slice of a bucket lies."""
        start = bucket * self.bucket + self.axis.place * self.slice
        return Span(start, start + self.slice)

    def overlaps(self, span: Span) -> Iterator[tuple[Span, slice]]:
        """Yield every part of a span that is this rank's, and its place in the shard."""
        for bucket in self.buckets_of(span):
            own = self.own(bucket)
            part = Span(max(span.start, own.start), min(span.stop, own.stop))
            if part.start < part.stop:
                kept = bucket * self.slice + part.start - own.start
                yield part, slice(kept, kept + part.stop - part.start)

    def buckets_of(self, span: Span) -> range:
        """Return the buckets that a span touches."""
        return range(span.start // self.bucket, -(-span.stop // self.bucket))

    def gathered(self, shard: Tensor, spans: Iterable[Span]) -> Iterator[Tensor]:
        """Yield what all shards together hold of spans, which ascend: flat copies.

        All ranks of the axis do this together, to the end. Memory is a bucket and the largest span.
        """
        window, begin, end = shard[:0], 0, 0
        for span in spans:
            while end < span.stop:
                bucket = end // self.bucket
                mine = shard[bucket * self.slice : (bucket + 1) * self.slice]
                window = torch.cat(
                    (window[max(0, span.start - begin) :], self.axis.all_gather(mine))
                )
                end += self.bucket
                begin = end - len(window)
            yield window[span.start - begin : span.stop - begin].clone()


class Sharding:
    """All buffers of a model part, and their communication.

    Buckets are reduced in one order on all ranks, from the last parameters to the first, as
    backward passes reach them; ``begin`` says after how many passes a parameter's gradient is
    whole, and from then on its bucket may travel while others are computed.
    """

    def __init__(
        self, parameters: Iterable[tuple[nn.Parameter, Axis]], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """Take parameters in the model's order, each with the axis whose ranks hold it alike.

        Every rank of the axis must have all of its parameters, in one order.
        """
        alike: dict[tuple[int, ...], tuple[Axis, list[nn.Parameter]]] = {}
        self.parameters: list[nn.Parameter] = []
        for p, axis in parameters:
            self.parameters.append(p)
            alike.setdefault(axis.ranks, (axis, []))[1].append(p)
        self.buffers = [Buffer(axis, members, bucket_bytes) for axis, members in alike.values()]
        self._buffer_of = {p: buffer for buffer in self.buffers for p in buffer.spans}
        self._order = self._last_first()
        take = partial(_take, weakref.ref(self))
        self._hooks = [p.register_post_accumulate_grad_hook(take) for p in self.parameters]
        self._pending: deque[tuple[Buffer, int, Pending]] = deque()
        self.begin()

    def begin(self, backwards: int | None = None) -> None:
        """Forget all gradients. ``backwards`` passes will bring a step's, each to every parameter.

        Where that is not known, with None, nothing travels before ``reduce``.
        """
        self._settle()  # of a step that failed
        self._backwards = backwards
        self._arrived = dict.fromkeys(self.parameters, 0)
        self._missing = [
            {p for p, span in buffer.spans.items() if bucket in buffer.buckets_of(span)}
            for buffer, bucket in self._order
        ]
        self._started = 0
        self._reduced = False
        self.met: set[nn.Parameter] = set()

    def close(self) -> None:
        """Let go of the gradients: backward passes leave them in ``grad`` again, on this rank."""
        self._settle()
        for hook in self._hooks:
            hook.remove()
        for p in self.parameters:
            del p.main_grad  # type: ignore[attr-defined]

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add to a parameter's ``main_grad``; backward passes do it by themselves."""
        if self._reduced or self._arrived[parameter] == self._backwards:
            raise RuntimeError("a gradient after those that were announced: call begin first")
        main: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        if self._arrived[parameter]:
            main.add_(gradient)
        else:
            main.copy_(gradient)
        self._arrived[parameter] += 1
        if self._arrived[parameter] == self._backwards:
            for missing in self._missing:
                missing.discard(parameter)
            while self._started < len(self._order) and not self._missing[self._started]:
                self._start()

    def put_off(self, weight: Tensor, gradient: Tensor) -> None:
        """Take a gradient that was computed later than backward (see ``kernels/later.py``)."""
        assert isinstance(weight, nn.Parameter), "products are of parameters"
        self.add(weight, gradient)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum gradients over ranks: then the shard's are whole, and those elsewhere undefined.

        ``met`` are the parameters that got a gradient on any rank.
        """
        if self._reduced:
            return
        for p, arrived in self._arrived.items():
            if not arrived:
                p.main_grad.zero_()  # type: ignore[attr-defined]
        while self._started < len(self._order):
            self._start()
        self._settle()
        for buffer in self.buffers:
            flags = [self._arrived[p] > 0 for p in buffer.spans]
            met = torch.tensor(flags, dtype=torch.uint8, device=buffer.weights.device)
            found = buffer.axis.all_reduce(met, dist.ReduceOp.MAX).tolist()
            self.met |= {p for p, yes in zip(buffer.spans, found, strict=True) if yes}
        self._reduced = True

    @torch.no_grad()
    def square_norm(self) -> Tensor:
        """Sum the squares of the shard's gradients, float64: every element is on one rank only."""
        slices = [
            buffer.gradients[slice(*buffer.own(bucket))]
            for buffer in self.buffers
            for bucket in range(buffer.n_buckets)
        ]
        norms = torch.stack([torch.linalg.vector_norm(x) for x in slices])
        return norms.double().square().sum()

    def pieces(self) -> Iterator[Piece]:
        """Yield what this rank updates, parameter by parameter, cut where slices end."""
        for buffer in self.buffers:
            for p, span in buffer.spans.items():
                for part, kept in buffer.overlaps(span):
                    where = slice(*part)
                    yield Piece(p, buffer.weights[where], buffer.gradients[where], buffer, kept)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the weights that other ranks have updated."""
        travelling: deque[tuple[Tensor, Pending]] = deque()
        for buffer, bucket in reversed(self._order):
            mine = buffer.weights[slice(*buffer.own(bucket))]
            whole = buffer.weights[bucket * buffer.bucket : (bucket + 1) * buffer.bucket]
            travelling.append((whole, buffer.axis.start_all_gather(mine)))
            if len(travelling) == _IN_FLIGHT:
                _arrive(travelling)
        while travelling:
            _arrive(travelling)
        # torch does not see that a change of the buffer is one of the parameters.
        torch.autograd.graph.increment_version(self.parameters)

    def placed(
        self, weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[Buffer, list[tuple[str, Tensor, Span]]]]:
        """Yield every buffer with the named views of parameters that lie in it, ascending."""
        inside: dict[int, list[tuple[str, Tensor, Span]]] = {}
        for name, weight in weights:
            start = int(weight.storage_offset())
            place = (name, weight, Span(start, start + weight.numel()))
            inside.setdefault(weight.untyped_storage().data_ptr(), []).append(place)
        for buffer in self.buffers:
            here = inside.get(buffer.weights.untyped_storage().data_ptr(), [])
            yield buffer, sorted(here, key=lambda place: place[2])

    def _last_first(self) -> list[tuple[Buffer, int]]:
        """Order the buckets that travel by when a backward pass is done with them."""
        place = {p: number for number, p in enumerate(self.parameters)}

        def first(entry: tuple[Buffer, int]) -> int:
            buffer, bucket = entry
            return min(
                place[p] for p, span in buffer.spans.items() if bucket in buffer.buckets_of(span)
            )

        travel = [(b, n) for b in self.buffers if b.axis.size > 1 for n in range(b.n_buckets)]
        return sorted(travel, key=first, reverse=True)

    def _start(self) -> None:
        if len(self._pending) == _IN_FLIGHT:
            self._settle_one()
        buffer, bucket = self._order[self._started]
        whole = buffer.gradients[bucket * buffer.bucket : (bucket + 1) * buffer.bucket]
        self._pending.append((buffer, bucket, buffer.axis.start_reduce_scatter(whole)))
        self._started += 1

    def _settle_one(self) -> None:
        buffer, bucket, pending = self._pending.popleft()
        buffer.gradients[slice(*buffer.own(bucket))].copy_(pending.wait())

    def _settle(self) -> None:
        while self._pending:
            self._settle_one()


def axes_of(
    models: Sequence[Transformer], mesh: Mesh, schedule: Schedule | None = None
) -> list[tuple[nn.Parameter, Axis]]:
    """Say over which ranks each trained parameter is alike, in an order that all of them have.

    ``gradient_axis`` says it of one direction. ``models`` are a rank's stages in the order of
    the network. The two directions of DualPipe hold the same stages; where MTP is on another rank
    than the first stage, both hold the embedding.
    """
    mirrored = schedule is not None and len(schedule.places) > 1
    table = _replicated_table(models, schedule)
    found: dict[nn.Parameter, Axis] = {}
    for model in models:
        for name, p in model.named_parameters():
            axis = gradient_axis(name, model.config, mesh.layout)
            if mirrored:
                axis = f"mirror_{axis}"
            if p is table:
                axis = "ends"
            if p.requires_grad:
                found.setdefault(p, mesh[axis])
    return list(found.items())


def _replicated_table(
    models: Sequence[Transformer], schedule: Schedule | None
) -> nn.Parameter | None:
    """Return the embedding, if the ends of a pipeline hold it on different ranks."""
    predicts = models[0].config.num_nextn_predict_layers > 0
    if schedule is None or not predicts or len(schedule.places) > 1:
        return None
    if schedule.holders(0) == schedule.holders(schedule.stages - 1):
        return None
    tables = [model.embed_tokens.weight for model in models if model.part.embeds]
    return tables[0] if tables else None


def named_shards(
    sharding: Sharding, shards: dict[Buffer, Tensor], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of what an optimizer keeps in ``shards``, by the weights' names.

    ``weights`` are this rank's, as ``named_weights`` gives them; the order is that of memory. All
    ranks do this together, to the end; every tensor is a copy of its own.
    """
    for buffer, places in sharding.placed(weights):
        tensors = buffer.gathered(shards[buffer], [span for _, _, span in places])
        for (name, weight, _), tensor in zip(places, tensors, strict=True):
            yield name, tensor.view(weight.shape)


def load_shards(
    sharding: Sharding,
    shards: dict[Buffer, Tensor],
    weights: Iterable[tuple[str, Tensor]],
    read: Callable[[str], Tensor],
) -> None:
    """Fill ``shards`` from whole tensors, of which a rank reads those that it has a part of.

    So the ranks that wrote them may have been fewer or more.
    """
    for buffer, places in sharding.placed(weights):
        for name, _, span in places:
            parts = list(buffer.overlaps(span))
            if parts:
                whole = read(name).flatten()
                for part, kept in parts:
                    source = whole[part.start - span.start : part.stop - span.start]
                    shards[buffer][kept].copy_(source)


def held_shards(
    sharding: Sharding,
    shards: dict[Buffer, Tensor],
    weights: Iterable[tuple[str, Tensor]],
    split_of: SplitOf = unsplit,
) -> Iterator[Rectangle]:
    """Yield this rank's part of what an optimizer keeps in ``shards``: views, nothing is sent.

    Over all ranks every number is there once, whatever the layout.
    """
    for buffer, places in sharding.placed(weights):
        for name, weight, span in places:
            for part, kept in buffer.overlaps(span):
                flat = shards[buffer][kept]
                start = part.start - span.start
                yield from rectangles(name, weight.shape, split_of(name), start, flat)


def _take(sharding: weakref.ref[Sharding], parameter: Tensor) -> None:
    """Take a gradient from where backward has left it.

    torch keeps this function where no collector sees it: if it held the sharding, which holds the
    parameters, none of them would ever be free.
    """
    held = sharding()
    if held is None or parameter.grad is None:  # nobody reduces it; it has been put off
        return
    assert isinstance(parameter, nn.Parameter)
    held.add(parameter, parameter.grad)
    keep_gradient(parameter)


def _arrive(travelling: deque[tuple[Tensor, Pending]]) -> None:
    whole, pending = travelling.popleft()
    whole.copy_(pending.wait())


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
