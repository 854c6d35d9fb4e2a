"""Multi-head latent attention in its two forms (report section 2.1.1; facts 1.3, 1.6).

*Expanded*, for training: keys and values of every head are computed from the latent.
*Absorbed*, over the latent cache: the up-projections move to the query and to the output, so that
all heads share one key, the latent itself. Both compute the same function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels import attention
from ziphius.kernels.fp8 import Operand
from ziphius.kernels.latent import LatentPages
from ziphius.kernels.select import Kernels
from ziphius.kernels.stored import Codes
from ziphius.model.layers import Device, Linear, RMSNorm
from ziphius.model.positions import InPlace, Meeting
from ziphius.model.precision import Precision
from ziphius.model.rope import Rope, rotate, softmax_scale

# The norms on the latents have this eps in the published code and in transformers, whatever the
# config's rms_norm_eps says (facts 1.2 gives the same value for both).
LATENT_NORM_EPS = 1e-6


class Absorbed(NamedTuple):
    """The up-projections of every head as queries and outputs meet them."""

    keys_HCn: Tensor
    values_HvC: Tensor


class MLA(nn.Module):
    """Multi-head latent attention, without the block's norm and residual."""

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.attention = kernels.function("attention")
        self.expand_heads = kernels.function("expand")
        self.paged = kernels.function("latent")()
        self.absorbed: Absorbed | None = None
        self.meeting: Meeting = InPlace()
        self.pads = kernels.attention in attention.WANT_EQUAL_WIDTHS
        H, D, Q = self.heads, config.hidden_size, config.q_lora_rank
        q_out = H * config.qk_head_dim
        self.has_query_latent = Q is not None

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, LATENT_NORM_EPS, precision, kernels, device)

        if Q is None:
            self.q_proj = Linear(D, q_out, precision, kernels, device)
        else:
            self.q_a_proj = Linear(D, Q, precision, kernels, device)
            self.q_a_layernorm = norm(Q)
            self.q_b_proj = Linear(Q, q_out, precision, kernels, device)
        self.kv_a_proj_with_mqa = Linear(D, self.latent + self.rope, precision, kernels, device)
        self.kv_a_layernorm = norm(self.latent)
        self.kv_b_proj = Linear(self.latent, H * (self.nope + self.v), precision, kernels, device)
        self.o_proj = Linear(H * self.v, D, precision, kernels, device)

    def forward(
        self,
        x_BTD: Operand,
        rope: Rope,
        cache: LatentPages | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Attend causally; ``x`` is normed ``[B, T, D]``, the result has its shape.

        Without a cache the expanded form runs on the ``T`` tokens alone, inside their documents
        if those are given. With one the tokens are those of many sequences, ``[1, N, D]``, and the
        absorbed form runs over the pages, which take up their rows: a sequence is one document.
        """
        if cache is not None:
            assert documents_BT is None, "a cache holds one document a sequence"
            return self.core(self.project(x_BTD, rope, cache), cache)
        met = self.meeting.compress(self, x_BTD, rope)
        q_BHTd, k_BHTd, v_BHTv = self.expand(*met)
        # Backward of attention and of the output projection read one copy, in twelve bits.
        fp8 = self.o_proj.fp8
        kept = None if fp8 is None else fp8.keep_output(self.v)
        out_BHTv = self.attention(q_BHTd, k_BHTd, v_BHTv, self.scale, documents_BT, kept)
        out_BTD = self.o_proj(out_BHTv[..., : self.v].transpose(1, 2).flatten(-2), kept)
        return self.meeting.give_back(out_BTD, rope)

    def project(self, x_BTD: Operand, rope: Rope, cache: LatentPages) -> Tensor:
        """Append the rows of new tokens ``[1, N, D]``; return their queries in the rows' form.

        The result is ``[N, H, C + R]`` (eq. 1-9 with the keys' up-projection absorbed).
        """
        q_BTQ, kv_BTc = self.compress(x_BTD)
        gain_C, eps = self.kv_a_layernorm.weight, self.kv_a_layernorm.eps
        self.paged.append(kv_BTc[0], gain_C, eps, rope, cache)
        if self.has_query_latent:
            q_BTQ = self.q_b_proj(self.q_a_layernorm.operand(q_BTQ))
        up = self.absorbed or self.absorb(q_BTQ.dtype)
        q_NHd = q_BTQ[0].unflatten(-1, (self.heads, -1))
        return self.paged.queries(q_NHd, up.keys_HCn, rope)

    def core(self, q_NHc: Tensor, cache: LatentPages) -> Tensor:
        """Attend over the pages, and bring what was gathered to the output: ``[1, N, D]``."""
        up = self.absorbed or self.absorb(q_NHc.dtype)
        z_NHC = self.paged.attend(q_NHc, self.latent, self.scale, cache)
        return self.o_proj(self.paged.values(z_NHC, up.values_HvC).flatten(-2).unsqueeze(0))

    def absorb(self, dtype: torch.dtype) -> Absorbed:
        """Derive from ``kv_b_proj`` what the absorbed form multiplies by (facts 1.6)."""
        weight = self.kv_b_proj.weight
        dense = weight.decode(dtype) if isinstance(weight, Codes) else weight.detach().to(dtype)
        dense_HoC = dense.unflatten(0, (self.heads, -1))
        keys_HCn = dense_HoC[:, : self.nope].transpose(1, 2).contiguous()
        return Absorbed(keys_HCn, dense_HoC[:, self.nope :])

    def compress(self, x_BTD: Operand) -> tuple[Tensor, Tensor]:
        """Down-project to the query latent (or to whole queries, without one) and to latent and
        rotary key side by side; nothing is normed yet.
        """
        query = self.q_a_proj if self.has_query_latent else self.q_proj
        return query(x_BTD), self.kv_a_proj_with_mqa(x_BTD)

    def queries(self, q_BTQ: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Up-project to the heads' queries: ``[B, T, H, nope]``, and rotated ``[B, T, H, R]``."""
        if self.has_query_latent:
            q_BTQ = self.q_b_proj(self.q_a_layernorm.operand(q_BTQ))
        q_BTHd = q_BTQ.unflatten(-1, (self.heads, -1))
        q_nope_BTHn, q_rope_BTHR = q_BTHd.split((self.nope, self.rope), dim=-1)
        return q_nope_BTHn, rotate(q_rope_BTHR, rope)

    def latents(self, kv_BTc: Tensor, rope: Rope) -> tuple[Operand, Tensor]:
        """Norm the latent ``[B, T, C]`` and rotate the key that all heads share ``[B, T, R]``.

        The rotary key goes round the norm (facts 13.5).
        """
        latent_BTC, k_rope_BTR = kv_BTc.split((self.latent, self.rope), dim=-1)
        k_rope_BTR = rotate(k_rope_BTR.unsqueeze(2), rope).squeeze(2)
        return self.kv_a_layernorm.operand(latent_BTC), k_rope_BTR

    def expand(
        self, q_BTQ: Tensor, kv_BTc: Tensor, rope: Rope, key_rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values of every head, each ``[B, H, T, width]`` (eq. 1-9).

        Queries may be of fewer positions than keys: each have their own rotary tables.
        They are padded here where the attention kernel would do it: what is computed again in
        backward must be what the kernel saves.
        """
        if self.expand_heads is not None:
            return self._expand_in_one(q_BTQ, kv_BTc, rope)
        q_BTHd = torch.cat(self.queries(q_BTQ, rope), dim=-1)
        latent_BTC, k_rope_BTR = self.latents(kv_BTc, key_rope)
        kv_BTHo = self.kv_b_proj(latent_BTC).unflatten(-1, (self.heads, -1))
        k_nope_BTHn, v_BTHv = kv_BTHo.split((self.nope, self.v), dim=-1)
        k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand(-1, -1, self.heads, -1)
        k_BTHd = torch.cat((k_nope_BTHn, k_rope_BTHR), dim=-1)
        if self.pads:
            q_BTHd, k_BTHd, v_BTHv = attention.equal_widths(q_BTHd, k_BTHd, v_BTHv)
        return q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHv.transpose(1, 2)

    def _expand_in_one(
        self, q_BTQ: Tensor, kv_BTc: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same by a kernel that takes everything after the up-projections."""
        if self.has_query_latent:
            q_BTQ = self.q_b_proj(self.q_a_layernorm.operand(q_BTQ))
        latent_BTC, k_rope_BTR = torch.split(kv_BTc, [self.latent, self.rope], dim=-1)
        kv_BTo = self.kv_b_proj(self.kv_a_layernorm.operand(latent_BTC))
        kv_BTHo = kv_BTo.unflatten(-1, (self.heads, -1))
        q_BTHd = q_BTQ.unflatten(-1, (self.heads, -1))
        # Queries that come from a latent were made here; others are the caller's, who may give them
        # again when this is computed again.
        q_BTHd, k_BTHd, v_BTHv = self.expand_heads(
            q_BTHd, kv_BTHo, k_rope_BTR, *rope, own_q=self.has_query_latent
        )
        if self.pads:
            q_BTHd, k_BTHd, v_BTHv = attention.equal_widths(q_BTHd, k_BTHd, v_BTHv)
        return q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHv.transpose(1, 2)
