"""The whole network: embedding, blocks, final norm, head, and the MTP modules behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.kernels.latent import LatentPages
from ziphius.kernels.log_probs import Softmax, WholeSoftmax, linear_log_probs
from ziphius.kernels.loss import linear_cross_entropy
from ziphius.kernels.select import Kernels
from ziphius.model.block import Block
from ziphius.model.layers import Device, Embedding, Linear, RMSNorm
from ziphius.model.mtp import MTPModule
from ziphius.model.part import Part
from ziphius.model.positions import AllPositions, Positions
from ziphius.model.precision import Precision
from ziphius.model.rope import Rope, rope_at
from ziphius.model.router import Routing


class Cache(Protocol):
    """The past of the sequences whose new tokens a forward pass is given, ``[1, N]``."""

    def rope(self, model: Transformer, length: int) -> Rope:
        """Return the rotary tables of the ``length`` new tokens."""
        ...

    def layer(self, index: int) -> LatentPages:
        """Return the part of one layer, by its global index."""
        ...


class BlockPlace(NamedTuple):
    """A block and where it stands. MTP modules continue the main layers' numbers."""

    layer: int
    mtp_depth: int
    block: Block


class Features(NamedTuple):
    """What training needs of a forward pass."""

    hidden_BTD: Tensor  # after the final norm, input of the head; or what leaves a part before it
    mtp_hidden: list[Tensor]  # depth k at k - 1: [B, T - k, D], normed for the shared head
    routings: dict[int, Routing]  # by global layer index, MTP blocks included


class Transformer(nn.Module):
    """A DeepSeek-V3 network (report section 2), or a part of one.

    A part lacks the attributes of what it does not hold, and its ``layers`` are those it holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision | None = None,
        *,
        kernels: Kernels | None = None,
        device: Device = None,
        part: Part | None = None,
    ) -> None:
        """Lay out a network whose weights are still undefined: initialise or load them next."""
        super().__init__()
        precision = precision or Precision()
        kernels = kernels or Kernels()
        if kernels.library is not None and torch.device(device or "cpu").type == "cuda":
            raise BadInput(f"kernels {kernels}: compiled ones run on processors, not on {device}")
        self.config, self.precision, self.kernels = config, precision, kernels
        self.part = part = part or Part.whole(config)
        self.positions: Positions = AllPositions()
        V, D = config.vocab_size, config.hidden_size
        if part.embeds:
            self.embed_tokens = Embedding(V, D, precision, device)
        blocks = [
            Block(config, precision, kernels, device, dense=i < config.first_k_dense_replace)
            for i in range(part.first, part.end)
        ]
        self.layers = cast("Sequence[Block]", nn.ModuleList(blocks))
        if part.ends:
            self.norm = RMSNorm(D, config.rms_norm_eps, precision, kernels, device)
            self.lm_head = Linear(D, V, precision, kernels, device, kind="head")
            if config.num_labels:
                self.score = Linear(D, config.num_labels, precision, kernels, device, kind="head")
        modules = [
            MTPModule(config, precision, kernels, device)
            for _ in range(config.num_nextn_predict_layers if part.ends else 0)
        ]
        self.mtp = cast("Sequence[MTPModule]", nn.ModuleList(modules))

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute logits ``[B, T, V]`` for token ids ``[B, T]``.

        With a cache they are ``[1, N]`` tokens of many sequences, which follow what it holds and
        which it takes up. The logits have the compute dtype.
        """
        hidden_BTD, _ = self.trunk(tokens_BT, cache)
        return self.lm_head(hidden_BTD)

    def trunk(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Run the main layers; return the final normed hidden state and every layer's routing."""
        T = tokens_BT.shape[1]
        rope = self.rope(T) if cache is None else cache.rope(self, T)
        x_BTD = self.positions.embed(self.embed_tokens, tokens_BT, 0)
        return self.layers_on(x_BTD, rope, cache, documents_BT)

    def layers_on(
        self,
        x_BTD: Tensor,
        rope: Rope,
        cache: Cache | None = None,
        documents_BT: Tensor | None = None,
        chosen: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Do the same from the embedded tokens and their rotary tables.

        A part takes what left the part before it, and only the last one norms. Layers that are in
        ``chosen`` take those experts, ``[N, K]``.
        """
        routings = {}
        for index, block in enumerate(self.layers, self.part.first):
            layer_cache = None if cache is None else cache.layer(index)
            told_NK = None if chosen is None else chosen.get(index)
            x_BTD, routing = block(x_BTD, rope, layer_cache, documents_BT, told_NK)
            if routing is not None:
                routings[index] = routing
        return (self.norm(x_BTD) if self.part.ends else x_BTD), routings

    def features(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        x_BTD: Tensor | None = None,
        experts_BSLK: Tensor | None = None,
    ) -> Features:
        """Run everything for training on rows of T + 1 tokens: inputs, and one last target.

        Depth k meets token i + k, so it has T - k positions (eq. 21-24). Depth 1 starts from the
        hidden state after the final norm, as serving engines do (facts 3.1).

        With ``documents``, int ``[B, T + 1]``, the number of the document of every token in its
        row and -1 in padding, no token attends outside its document: so in fine-tuning, and not in
        pre-training (facts 6.2). Positions go on over a row; rotary attention sees differences.

        A part that does not begin the network takes ``x``, which left the part before it. Where
        ``positions`` are some of a row's, ``x`` and what is returned is of those.

        ``experts`` are those that the main layers that route are to take, in the order of the
        layers: routing replay.
        """
        with self.training_pass():
            return self._features(tokens_BS, documents_BS, x_BTD, experts_BSLK)

    def replayed(self, experts_BSLK: Tensor | None, length: int) -> dict[int, Tensor]:
        """Return the experts that this part's layers are to take, int64 ``[N, K]`` by layer."""
        if experts_BSLK is None:
            return {}
        first = self.config.first_k_dense_replace
        own_BtLK = self.positions.own(experts_BSLK[:, :length], 0).long()
        layers = range(max(first, self.part.first), self.part.first + len(self.layers))
        return {layer: own_BtLK[:, :, layer - first].flatten(0, 1) for layer in layers}

    def training_pass(self) -> AbstractContextManager[None]:
        """Return that in which a forward pass of training runs, which may be left and reentered.

        Recomputation puts another one here.
        """
        return nullcontext()

    def _features(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None,
        x_BTD: Tensor | None,
        experts_BSLK: Tensor | None,
    ) -> Features:
        T = tokens_BS.shape[1] - 1
        documents_BT = None if documents_BS is None else documents_BS[:, :T]
        if x_BTD is None:
            x_BTD = self.positions.embed(self.embed_tokens, tokens_BS[:, :T], 0)
        chosen = self.replayed(experts_BSLK, T)
        hidden_BTD, routings = self.layers_on(
            x_BTD, self.rope(T), documents_BT=documents_BT, chosen=chosen
        )
        h_BTD, mtp_hidden = hidden_BTD, []
        for k, module in enumerate(self.mtp, start=1):
            embedded_BTD = self.positions.embed(self.embed_tokens, tokens_BS[:, k:T], k)
            rope = self.rope(T - k)
            documents_BT = None if documents_BS is None else documents_BS[:, : T - k]
            h_BTD = h_BTD[:, : self.positions.count(T, k)]
            h_BTD, routing = module(h_BTD, embedded_BTD, rope, documents_BT=documents_BT)
            mtp_hidden.append(module.norm(h_BTD))
            routings[self.part.end + k - 1] = routing
        return Features(hidden_BTD, mtp_hidden, routings)

    def cross_entropy(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Sum the head's cross entropy over rows, in nats (see ``linear_cross_entropy``)."""
        return linear_cross_entropy(
            hidden_ND,
            self.lm_head.weight,
            targets_N,
            rows_loss=self.kernels.function("loss"),
            widened=self.kernels.product_dtype(hidden_ND.dtype) != hidden_ND.dtype,
        )

    def log_probs(
        self, hidden_ND: Tensor, targets_N: Tensor, softmax: Softmax | None = None
    ) -> Tensor:
        """Return every target's log-probability, ``[N]`` (see ``linear_log_probs``)."""
        return linear_log_probs(
            hidden_ND,
            self.lm_head.weight,
            targets_N,
            widened=self.kernels.product_dtype(hidden_ND.dtype) != hidden_ND.dtype,
            softmax=softmax or WholeSoftmax(self.kernels.function("loss")),
        )

    def scores(self, hidden_BTD: Tensor) -> Tensor:
        """Return the second head's scores of every position, ``[B, T, num_labels]``.

        In at least FP32: scores are compared with one another. Raises AttributeError where the
        config has none.
        """
        high = self.precision.high
        return F.linear(hidden_BTD.to(high), self.score.weight.to(high))

    def rope(self, length: int) -> Rope:
        """Compute the rotary tables of the first ``length`` positions, on the model's device.

        The angles are float64 on the CPU: some devices have none.
        """
        rope = rope_at(self.config, torch.arange(length), self.precision.high)
        return Rope(rope.cos_Tr.to(self.device), rope.sin_Tr.to(self.device))

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.parameters()).device

    def blocks(self) -> Iterator[BlockPlace]:
        """Yield every block this process holds with its place, MTP blocks included."""
        for index, block in enumerate(self.layers, self.part.first):
            yield BlockPlace(index, 0, block)
        for depth, module in enumerate(self.mtp, start=1):
            yield BlockPlace(self.part.end + depth - 1, depth, module.block)
