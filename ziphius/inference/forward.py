"""The model over a step's tokens: hidden states, logits, drafts of the MTP module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ziphius.checkpoint.in_place import LazyExperts
from ziphius.inference.paged import Batch, Feed, PagedCache
from ziphius.kernels.latent import LatentPages
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer


class Forward:
    """Runs a model for the engine. ``exact``: no token's numbers depend on its neighbours.

    Compiled kernels have this property by themselves. torch's do not: their sums depend on the
    size of the batch and on a row's place in it. There tokens pass one by one, which is slow.
    """

    def __init__(self, model: Transformer, cache: PagedCache, *, exact: bool) -> None:
        self.model, self.cache = model, cache
        self.singly = exact and model.kernels.library is None
        self.prepare()

    def prepare(self) -> None:
        """Derive what answers multiply by from the weights. To be called when they change."""
        for _, _, block in self.model.blocks():
            attention = block.self_attn
            attention.absorbed = attention.absorb(self.model.precision.compute)
            # Lazy experts have places of their own.
            if isinstance(block.mlp, MixtureOfExperts) and not isinstance(
                block.mlp.places, LazyExperts
            ):
                block.mlp.places = block.mlp.locate()

    @torch.no_grad()
    def hidden(self, feeds: Sequence[Feed]) -> Tensor:
        """Run the main layers over the tokens of ``feeds``, in order: ``[N, D]``, normed."""
        batch = Batch(self.cache, feeds)
        if not self.singly:
            return self.model.trunk(batch.tokens_BT, batch)[0][0]
        return self._singly(lambda one, _: self.model.trunk(one.tokens_BT, one)[0][0], batch)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Apply the output head: ``[N, V]``, at least FP32."""
        head = self.model.lm_head
        if self.singly:
            logits_NV = torch.cat([head(row_1D) for row_1D in hidden_ND.split(1)])
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
        if not self.singly:
            return self._draft(batch, hidden_ND)
        return self._singly(lambda one, n: self._draft(one, hidden_ND[n : n + 1]), batch)

    def _draft(self, batch: Batch | One, hidden_ND: Tensor) -> Tensor:
        model, module = self.model, self.model.mtp[0]
        embedded_BTD = model.embed_tokens(batch.tokens_BT)
        rope = batch.rope(model, embedded_BTD.shape[1])
        layer = batch.layer(len(model.layers))
        return module(hidden_ND.unsqueeze(0), embedded_BTD, rope, layer)[0][0]

    @torch.no_grad()
    def draft_logits(self, hidden_ND: Tensor) -> Tensor:
        """Apply the MTP module's norm and the shared head: ``[N, V]``."""
        if not self.singly:
            return self.logits(self.model.mtp[0].norm(hidden_ND))
        norm = self.model.mtp[0].norm
        return self.logits(torch.cat([norm(row_1D) for row_1D in hidden_ND.split(1)]))

    def _singly(self, run: Callable[[One, int], Tensor], batch: Batch) -> Tensor:
        return torch.cat([run(One(batch, n), n) for n in range(batch.tokens_BT.shape[1])])


class One:
    """One token of a batch."""

    def __init__(self, batch: Batch, place: int) -> None:
        self.batch, self._place = batch, slice(place, place + 1)
        self.tokens_BT = batch.tokens_BT[:, self._place]

    def rope(self, model: Transformer, length: int) -> Rope:
        """Return the rotary tables of the token."""
        whole = self.batch.rope(model, length)
        return Rope(whole.cos_Tr[self._place], whole.sin_Tr[self._place])

    def layer(self, index: int) -> LatentPages:
        """Return a layer's pages and the token's place in them."""
        whole = self.batch.layer(index)
        return whole._replace(
            slots_N=whole.slots_N[self._place],
            sequence_N=whole.sequence_N[self._place],
            position_N=whole.position_N[self._place],
        )
