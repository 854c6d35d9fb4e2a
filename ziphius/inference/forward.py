"""The model over a step's tokens: hidden states, logits, drafts of the MTP module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ziphius.checkpoint.expert_stores import LazyExperts
from ziphius.inference.paged import Batch, Feed, PagedCache
from ziphius.inference.repeat import Part, Repeats
from ziphius.kernels.latent import LatentPages
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.rope import Rope
from ziphius.model.transformer import Cache, Transformer


class Forward:
    """Runs a model for the engine. ``exact``: no token's numbers depend on its neighbours.

    Compiled kernels have this property by themselves. torch's do not: their sums depend on the
    size of the batch and on a row's place in it. There tokens pass one by one, which is slow.
    """

    def __init__(self, model: Transformer, cache: PagedCache, *, exact: bool) -> None:
        self.model, self.cache = model, cache
        library = model.kernels.library
        self.singly = exact and library is None
        self.repeats = Repeats(model, cache, library) if library is not None else None
        self.prepare()

    def prepare(self) -> None:
        """Derive what answers multiply by from the weights. To be called when they change."""
        for _, _, block in self.model.blocks():
            attention = block.self_attn
            attention.absorbed = attention.absorb(self.model.precision.compute)
            # Lazy experts have places of their own.
            if not isinstance(block.mlp, MixtureOfExperts) or block.mlp.mixture is None:
                continue
            if not isinstance(block.mlp.places, LazyExperts):
                block.mlp.places = block.mlp.locate()
        if self.repeats is not None:
            self.repeats.forget()

    @torch.no_grad()
    def hidden(self, feeds: Sequence[Feed]) -> Tensor:
        """Run the main layers over the tokens of ``feeds``, in order: ``[N, D]``, normed.

        The result is valid until the next step.
        """
        batch = Batch(self.cache, feeds)
        embedded_BTD = self.model.embed_tokens(batch.tokens_BT)
        hidden_ND, *chosen = self._run(self._main, batch, embedded_BTD)
        self.cache.note(batch, chosen)
        return hidden_ND

    def _main(self, rope: Rope, cache: Cache, x_BTD: Tensor) -> tuple[Tensor, ...]:
        hidden_BTD, routings = self.model.layers_on(x_BTD, rope, cache)
        return hidden_BTD[0], *(routings[layer].chosen_NK for layer in sorted(routings))

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Apply the output head: ``[N, V]`` on the processor, at least FP32."""
        head = self.model.lm_head
        if self.singly:
            logits_NV = torch.cat([head(row_1D) for row_1D in hidden_ND.split(1)])
        else:
            logits_NV = head(hidden_ND)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).cpu()

    @torch.no_grad()
    def draft(self, feeds: Sequence[Feed], hidden_ND: Tensor) -> Tensor:
        """Run the MTP module: token ``i`` of ``feeds`` meets the hidden state of the one before it.

        Rows go to the tokens' own slots, whose rotary position is one less: ``h_{i-1}`` with
        ``t_i`` (facts 3.3). Returns the block's output ``[N, D]``, not normed.
        """
        batch = Batch(self.cache, feeds, turned=1)
        embedded_BTD = self.model.embed_tokens(batch.tokens_BT)
        return self._run(self._mtp, batch, embedded_BTD, hidden_ND.unsqueeze(0))[0]

    def _mtp(
        self, rope: Rope, cache: Cache, embedded_BTD: Tensor, h_BTD: Tensor
    ) -> tuple[Tensor, ...]:
        layer = cache.layer(len(self.model.layers))
        return (self.model.mtp[0](h_BTD, embedded_BTD, rope, layer)[0][0],)

    @torch.no_grad()
    def draft_logits(self, hidden_ND: Tensor) -> Tensor:
        """Apply the MTP module's norm and the shared head: ``[N, V]``."""
        if not self.singly:
            return self.logits(self.model.mtp[0].norm(hidden_ND))
        norm = self.model.mtp[0].norm
        return self.logits(torch.cat([norm(row_1D) for row_1D in hidden_ND.split(1)]))

    def _run(self, part: Part, batch: Batch, *rows: Tensor) -> tuple[Tensor, ...]:
        """Compute a part of the model over a batch, whose rows are ``[1, N, ..]``."""
        N = batch.tokens_BT.shape[1]
        if self.singly:
            each = (One(batch, n) for n in range(N))
            alone = [(one, [x[:, n : n + 1] for x in rows]) for n, one in enumerate(each)]
            made = [part(one.rope(self.model, 1), one, *x) for one, x in alone]
            return tuple(map(torch.cat, zip(*made, strict=True)))
        repeated = None if self.repeats is None else self.repeats.run(part, batch, *rows)
        if repeated is not None:
            return repeated
        return part(batch.rope(self.model, N), batch, *rows)


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
