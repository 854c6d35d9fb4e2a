"""The model over a step's tokens: hidden states, logits, drafts of the MTP module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ziphius.inference.paged import Batch, Feed, PagedCache
from ziphius.kernels.latent import LatentPages
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer

# Rows of a batch where kernels are torch's own: one shape for all, so that no token's numbers
# depend on how many there are.
TILE = 16


class Forward:
    """Runs a model for the engine. ``exact``: no token's numbers depend on its neighbours.

    Compiled kernels have this property by themselves. torch's have it for batches of one size, so
    tokens pass in tiles of ``TILE``, the last one filled up with tokens that leave no trace.
    """

    def __init__(self, model: Transformer, cache: PagedCache, *, exact: bool) -> None:
        self.model, self.cache = model, cache
        self.tiled = exact and model.kernels.library is None
        self.prepare()

    def prepare(self) -> None:
        """Derive what answers multiply by from the weights. To be called when they change."""
        for _, _, block in self.model.blocks():
            attention = block.self_attn
            attention.absorbed = attention.absorb(self.model.precision.compute)
            if isinstance(block.mlp, MixtureOfExperts):
                block.mlp.places = block.mlp.locate()

    @torch.no_grad()
    def hidden(self, feeds: Sequence[Feed]) -> Tensor:
        """Run the main layers over the tokens of ``feeds``, in order: ``[N, D]``, normed."""
        batch = Batch(self.cache, feeds)
        if not self.tiled:
            return self.model.trunk(batch.tokens_BT, batch)[0][0]
        return self._in_tiles(lambda tile: self.model.trunk(tile.tokens_BT, tile)[0][0], batch)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Apply the output head: ``[N, V]``, at least FP32."""
        head = self.model.lm_head
        if self.tiled:
            parts = [head(_filled(part))[: len(part)] for part in hidden_ND.split(TILE)]
            logits_NV = torch.cat(parts) if parts else head(hidden_ND)
        else:
            logits_NV = head(hidden_ND)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    @torch.no_grad()
    def draft(self, feeds: Sequence[Feed], hidden_ND: Tensor) -> Tensor:
        """Run the MTP module: token ``i`` of ``feeds`` meets the hidden state of the one before it.

        Rows go to the tokens' own slots, whose rotary position is one less: ``h_{i-1}`` with
        ``t_i`` (facts 3.3). Returns the block's output ``[N, D]``, not normed.
        """
        batch = Batch(self.cache, feeds, turned=1)
        if not self.tiled:
            return self._draft(batch, hidden_ND)
        parts = iter(hidden_ND.split(TILE))
        return self._in_tiles(lambda tile: self._draft(tile, _filled(next(parts))), batch)

    def _draft(self, batch: Batch | Tile, hidden_ND: Tensor) -> Tensor:
        model, module = self.model, self.model.mtp[0]
        embedded_BTD = model.embed_tokens(batch.tokens_BT)
        rope = batch.rope(model, embedded_BTD.shape[1])
        layer = batch.layer(len(model.layers))
        return module(hidden_ND.unsqueeze(0), embedded_BTD, rope, layer)[0][0]

    @torch.no_grad()
    def draft_logits(self, hidden_ND: Tensor) -> Tensor:
        """Apply the MTP module's norm and the shared head: ``[N, V]``."""
        if not self.tiled:
            return self.logits(self.model.mtp[0].norm(hidden_ND))
        norm = self.model.mtp[0].norm
        normed = [norm(_filled(part))[: len(part)] for part in hidden_ND.split(TILE)]
        return self.logits(torch.cat(normed))

    def _in_tiles(self, run: Callable[[Tile], Tensor], batch: Batch) -> Tensor:
        length = batch.tokens_BT.shape[1]
        parts = []
        for start in range(0, length, TILE):
            count = min(TILE, length - start)
            parts.append(run(Tile(batch, start, count))[:count])
        return torch.cat(parts)


def _filled(rows_nD: Tensor) -> Tensor:
    """Fill up with rows of zeros to ``TILE``."""
    return torch.nn.functional.pad(rows_nD, (0, 0, 0, TILE - len(rows_nD)))


class Tile:
    """Some tokens of a batch, filled up with copies of the first that write no row."""

    def __init__(self, batch: Batch, start: int, count: int) -> None:
        self.batch = batch
        places = [*range(start, start + count), *[start] * (TILE - count)]
        self._places_N = torch.tensor(places)
        self._count = count
        self.tokens_BT = batch.tokens_BT[:, self._places_N]

    def rope(self, model: Transformer, length: int) -> Rope:
        """Return the rotary tables of the tile's tokens."""
        whole = self.batch.rope(model, self.batch.tokens_BT.shape[1])
        return Rope(whole.cos_Tr[self._places_N], whole.sin_Tr[self._places_N])

    def layer(self, index: int) -> LatentPages:
        """Return a layer's pages and the tile's places in them."""
        whole = self.batch.layer(index)
        slots_N = whole.slots_N[self._places_N]
        slots_N[self._count :] = -1
        return whole._replace(
            slots_N=slots_N,
            sequence_N=whole.sequence_N[self._places_N],
            position_N=whole.position_N[self._places_N],
        )
