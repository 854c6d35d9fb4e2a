"""The latent cache in pages, and a step's tokens as the tensors that the model meets it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.inference.sequence import Chunk
from ziphius.kernels.latent import TILE, LatentPages
from ziphius.kernels.select import TRITON
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer


class PagedCache:
    """The rows of all sequences: ``(C + R) * layers`` numbers a slot, MTP layers included.

    ``pages`` is ``[layers, n_pages, page_size, C + R]`` on the model's device and in its compute
    dtype, zero at first: what was never written is finite, and weighs nothing. With ``experts``
    every slot also has the experts that were chosen for its token, ``[slots, layers, K]`` int16, of
    the main layers that route: training can choose the same (routing replay).
    """

    def __init__(
        self, model: Transformer, n_pages: int, page_size: int, *, experts: bool = False
    ) -> None:
        if page_size < 1 or page_size % TILE:
            raise BadInput(f"page_size = {page_size}: use a multiple of {TILE}")
        if model.kernels.latent == TRITON and page_size & (page_size - 1):
            raise BadInput(f"page_size = {page_size}: on a GPU use a power of two")
        c = model.config
        layers = len(model.layers) + len(model.mtp)
        width = c.kv_lora_rank + c.qk_rope_head_dim
        self.page_size = page_size
        self.device = model.device
        sizes = (layers, n_pages, page_size, width)
        self.pages = torch.zeros(sizes, dtype=model.precision.compute, device=self.device)
        self._rope = model.rope(c.max_position_embeddings)
        self.experts: Tensor | None = None
        routing = max(0, len(model.layers) - c.first_k_dense_replace)
        if experts and routing:
            kept = (n_pages, page_size, routing, c.num_experts_per_tok)
            self.experts = torch.zeros(kept, dtype=torch.int16, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.pages.nbytes

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target), in order."""
        for source, target in pairs:
            self.pages[:, target] = self.pages[:, source]
            if self.experts is not None:
                self.experts[target] = self.experts[source]

    def note(self, batch: Batch, chosen: Sequence[Tensor]) -> None:
        """Keep the experts of a batch's tokens, int64 ``[N, K]`` a layer, if they are to be."""
        if self.experts is None:
            return
        slots_N = batch.slots_N
        new_N = slots_N >= 0  # others' rows are there, with their experts
        chosen_NLK = torch.stack(list(chosen), dim=1)[new_N]
        self.experts.flatten(0, 1)[slots_N[new_N]] = chosen_NLK.to(torch.int16)

    def chosen(self, pages: Sequence[int], length: int) -> Tensor:
        """Return the experts of a sequence's first tokens, int16 ``[length, layers, K]``."""
        assert self.experts is not None, "they are kept where that was asked for"
        used = list(pages[: -(-length // self.page_size)])
        return self.experts[used].flatten(0, 1)[:length].cpu()

    def rope(self, positions_N: Tensor) -> Rope:
        """Return the rotary tables of any positions."""
        return Rope(self._rope.cos_Tr[positions_N], self._rope.sin_Tr[positions_N])


@dataclass(frozen=True)
class Feed:
    """Tokens of one sequence in a batch, at ``start`` and behind; ``slots`` as in ``Chunk``."""

    table: Sequence[int]
    start: int
    tokens: Sequence[int]
    slots: Sequence[int]

    @classmethod
    def of(cls, chunk: Chunk) -> Feed:
        """Return what the main layers are fed of a chunk."""
        return cls(chunk.table.pages, chunk.start, chunk.tokens, chunk.slots)


class Batch:
    """The tokens of a step, flattened: ``[1, N]`` for the model, which takes this as its cache.

    ``turned`` is how far the rotary positions lie before those of the cache: 1 for MTP layers, the
    row of whose first token does not exist.
    """

    def __init__(self, cache: PagedCache, feeds: Sequence[Feed], turned: int = 0) -> None:
        self.cache, self.turned = cache, turned
        tokens: list[int] = []
        sequence: list[int] = []
        position: list[int] = []
        slots: list[int] = []
        longest = max(len(feed.table) for feed in feeds)
        tables = []
        for number, feed in enumerate(feeds):
            count = len(feed.tokens)
            tokens += feed.tokens
            sequence += [number] * count
            position += range(feed.start, feed.start + count)
            slots += feed.slots
            tables.append([*feed.table, *[0] * (longest - len(feed.table))])
        parts = _brought([tokens, slots, sequence, position, [*chain(*tables)]], cache.device)
        self.tokens_BT, self._tables = parts[0].unsqueeze(0), parts[4].view(len(feeds), longest)
        self.slots_N, self._sequence_N, self._position_N = parts[1:4]

    def rope(self, model: Transformer, length: int) -> Rope:
        """Return the rotary tables of the tokens."""
        return self.cache.rope(self._position_N - self.turned)

    def layer(self, index: int) -> LatentPages:
        """Return a layer's pages and the tokens' places in them."""
        where = (self.slots_N, self._tables, self._sequence_N, self._position_N)
        return LatentPages(self.cache.pages[index], *where, first=self.turned)


def _brought(parts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Bring numbers to a device in one copy, int64; each part begins at a multiple of 16 bytes.

    Kernels for GPUs are compiled once more for addresses that are none.
    """
    padded = [[*part, *[0] * (len(part) % 2)] for part in parts]
    whole = torch.tensor([*chain(*padded)]).to(device)
    pieces = whole.split([len(part) for part in padded])
    return [piece[: len(part)] for piece, part in zip(pieces, parts, strict=True)]
