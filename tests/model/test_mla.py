"""Multi-head latent attention: two forms of one function, and what is easily got wrong in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.support import F64, random_model, random_tokens, tiny_config
from ziphius.config.model import ModelConfig, Yarn
from ziphius.inference.cache import LatentCache
from ziphius.kernels.select import Kernels
from ziphius.model.mla import MLA
from ziphius.model.precision import Precision
from ziphius.model.rope import rope_at

YARN = Yarn(original_max_position_embeddings=8, factor=4.0)
SHAPES: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None},
    {"qk_nope_head_dim": 3, "v_head_dim": 9, "rope_scaling": YARN},
    {"qk_rope_head_dim": 10, "qk_nope_head_dim": 2, "num_attention_heads": 1},
]


def attention(config: ModelConfig, seed: int = 0, precision: Precision = F64) -> MLA:
    """Build one layer's attention with weights large enough that the softmax is not flat."""
    mla = MLA(config, precision, Kernels(), None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in mla.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(drawn * 0.5 + ("norm" in name))
    return mla


def attend(mla: MLA, config: ModelConfig, x_BTD: Tensor) -> Tensor:
    return mla(x_BTD, rope_at(config, torch.arange(x_BTD.shape[1]), torch.float64))


def by_hand(mla: MLA, c: ModelConfig, x_TD: Tensor) -> Tensor:
    """Report eq. 1-11 for one sequence, token by token and head by head."""

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def rope(x_R: Tensor, position: int) -> Tensor:
        R = len(x_R)
        angle = torch.tensor([position * c.rope_theta ** (-2 * i / R) for i in range(R // 2)])
        pairs = torch.view_as_complex(x_R.reshape(-1, 2).clone())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten()

    w = {name: p.detach().double() for name, p in mla.named_parameters()}
    n, v, C = c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    torch.set_default_dtype(torch.float64)
    rows = []
    for t, x_D in enumerate(x_TD):
        heads = []
        for h in range(c.num_attention_heads):
            q_d = (
                w["q_b_proj.weight"] @ norm(w["q_a_proj.weight"] @ x_D, w["q_a_layernorm.weight"])
                if c.q_lora_rank
                else w["q_proj.weight"] @ x_D
            ).unflatten(0, (c.num_attention_heads, -1))[h]
            scores, values = [], []
            for s in range(t + 1):
                compressed = w["kv_a_proj_with_mqa.weight"] @ x_TD[s]
                latent_C = norm(compressed[:C], w["kv_a_layernorm.weight"])
                up = w["kv_b_proj.weight"].unflatten(0, (c.num_attention_heads, -1))[h] @ latent_C
                k_d = torch.cat((up[:n], rope(compressed[C:], s)))
                scores.append(torch.cat((q_d[:n], rope(q_d[n:], t))) @ k_d * c.qk_head_dim**-0.5)
                values.append(up[n : n + v])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"qk_nope_head_dim": 3}])
def test_equals_the_reports_equations(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    mla, x_BTD = attention(config), torch.randn(1, 6, 24, dtype=torch.float64)
    torch.testing.assert_close(attend(mla, config, x_BTD)[0], by_hand(mla, config, x_BTD[0]))


# --- the two forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("chunks", [[12], [5, 4, 3], [1] * 12, [7, 1, 1, 3]])
def test_absorbed_equals_expanded(changes: dict[str, Any], chunks: list[int]) -> None:
    """The same numbers, whether the cache is filled at once, in chunks or token by token."""
    model = random_model(tiny_config(**changes), precision=F64)
    tokens_BT = random_tokens(model.config, 2, 12)
    cache = LatentCache(model, batch=2, capacity=12)
    with torch.no_grad():
        parts = [model(part_BT, cache) for part_BT in tokens_BT.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens_BT), rtol=1e-9, atol=1e-9)


def test_absorbed_equals_expanded_in_bfloat16() -> None:
    config = tiny_config()
    mla = attention(config, precision=Precision(torch.bfloat16, torch.bfloat16))
    rope = rope_at(config, torch.arange(10), torch.float32)
    x_BTD = torch.randn(1, 10, 24).bfloat16()
    model = random_model(config, precision=Precision(torch.bfloat16, torch.bfloat16))
    cache = LatentCache(model, batch=1, capacity=10).layer(0)
    with torch.no_grad():
        expanded, absorbed = mla(x_BTD, rope), mla(x_BTD, rope, cache)
    assert expanded.dtype == absorbed.dtype == torch.bfloat16
    worst = (expanded.float() - absorbed.float()).abs().max()
    assert worst < 0.03 * expanded.float().abs().max()


def test_the_two_parts_of_decoding_make_the_cached_forward() -> None:
    config = tiny_config()
    mla, x_BTD = attention(config), torch.randn(2, 6, 24, dtype=torch.float64)
    rope = rope_at(config, torch.arange(6), torch.float64)
    model = random_model(config, precision=F64)
    caches = [LatentCache(model, batch=2, capacity=6).layer(0) for _ in range(2)]
    with torch.no_grad():
        whole = mla(x_BTD, rope, caches[0])
        new = mla.project(x_BTD, rope)
        torch.testing.assert_close(mla.core(new, caches[1]), whole, rtol=0, atol=0)
    assert new.latent_BTC.shape == (2, 6, config.kv_lora_rank)
    assert new.k_rope_BTR.shape == (2, 6, config.qk_rope_head_dim)


def test_kernel_versions_agree() -> None:
    config = tiny_config(v_head_dim=13)
    x_BTD = torch.randn(2, 9, 24, dtype=torch.float64)
    mla, reference = attention(config), MLA(config, F64, Kernels(attention="reference"), None)
    reference.load_state_dict(mla.state_dict())
    torch.testing.assert_close(attend(mla, config, x_BTD), attend(reference, config, x_BTD))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_lora_rank", [None, 4])
def test_gradients(q_lora_rank: int | None) -> None:
    """Of the expanded form, in the input and in every weight."""
    config = tiny_config(
        hidden_size=5,
        num_attention_heads=2,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=3,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=3,
    )
    mla = attention(config)
    names = [name for name, _ in mla.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for _, p in mla.named_parameters()]
    rope = rope_at(config, torch.arange(4), torch.float64)
    x_BTD = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)

    def run(x_BTD: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(mla, dict(zip(names, weights, strict=True)), (x_BTD, rope))

    assert torch.autograd.gradcheck(run, (x_BTD, *weights))


# --- what is easily got wrong ---------------------------------------------------------------------


def test_the_rotary_key_goes_round_the_norm() -> None:
    """Its size must not matter to the latent, nor the latent's size to it (facts 13.5)."""
    config = tiny_config()
    mla, C = attention(config), config.kv_lora_rank
    kv_BTc = torch.randn(1, 5, C + config.qk_rope_head_dim, dtype=torch.float64)
    rope = rope_at(config, torch.arange(5), torch.float64)
    latent, k_rope = mla.latents(kv_BTc, rope)
    larger_BTc = torch.cat((kv_BTc[..., :C] * 7, kv_BTc[..., C:] * 3), -1)
    latent_of_larger, k_rope_of_larger = mla.latents(larger_BTc, rope)
    torch.testing.assert_close(latent_of_larger, latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k_rope_of_larger, k_rope * 3)


@pytest.mark.parametrize("cached", [False, True])
def test_the_softmax_scale_is_that_of_the_expanded_heads(cached: bool) -> None:
    """``(nope + rope)^-0.5`` in both forms, and not ``(latent + rope)^-0.5`` (facts 13.26).

    One head, values that name their position, a query that meets one key: the weight is known.
    """
    config = tiny_config(
        hidden_size=8,
        num_attention_heads=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
    )
    mla = attention(config)
    with torch.no_grad():
        for weight in mla.parameters():
            weight.zero_()
        mla.kv_a_layernorm.weight.fill_(1)
        mla.q_proj.weight[:4, :4] = torch.eye(4) * 3
        mla.kv_a_proj_with_mqa.weight[:4, :4] = torch.eye(4)
        mla.kv_b_proj.weight[:4, :4] = mla.kv_b_proj.weight[4:, :4] = torch.eye(4)
        mla.o_proj.weight[:4] = torch.eye(4)
    x_BTD = torch.zeros(1, 2, 8, dtype=torch.float64)
    x_BTD[0, 0, 0] = x_BTD[0, 1, 1] = 1.0  # latents of width 8, after the norm: 1 is sqrt(8)
    model = random_model(config, precision=F64)
    cache = LatentCache(model, batch=1, capacity=2).layer(0) if cached else None
    with torch.no_grad():
        out_BTD = mla(x_BTD, rope_at(config, torch.arange(2), torch.float64), cache)
    score, size = 3 * 8**0.5 * (4 + 2) ** -0.5, 8**0.5
    weight = 1 / (1 + math.exp(-score))
    expected = [size * (1 - weight), size * weight, 0, 0]
    assert out_BTD[0, 1, :4].tolist() == pytest.approx(expected, 1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_the_future_does_not_change_the_past(cached: bool) -> None:
    model = random_model(precision=F64)
    tokens_BT = random_tokens(model.config, 1, 12)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % model.config.vocab_size

    @torch.no_grad()
    def logits(tokens_BT: Tensor) -> Tensor:
        return model(tokens_BT, LatentCache(model, 1, 12) if cached else None)[0]

    before, after = logits(tokens_BT), logits(changed_BT)
    torch.testing.assert_close(after[:7], before[:7], rtol=1e-12, atol=1e-12)
    assert ((after[7:] - before[7:]).abs().amax(-1) > 1e-6).all()


def test_every_past_token_has_influence() -> None:
    config = tiny_config()
    mla = attention(config)
    x_BTD = torch.randn(1, 6, 24, dtype=torch.float64, requires_grad=True)
    attend(mla, config, x_BTD)[0, -1].sum().backward()
    assert (x_BTD.grad[0].abs().amax(-1) > 1e-9).all()


def test_the_cached_form_without_compression_has_no_latent_of_the_query() -> None:
    names = {name for name, _ in attention(tiny_config(q_lora_rank=None)).named_parameters()}
    assert names == {
        "q_proj.weight",
        "kv_a_proj_with_mqa.weight",
        "kv_a_layernorm.weight",
        "kv_b_proj.weight",
        "o_proj.weight",
    }


def test_latent_norms_have_an_eps_of_their_own() -> None:
    """1e-6 in the published code, whatever rms_norm_eps says."""
    x_BTD = torch.randn(1, 3, 24, dtype=torch.float64) * 1e-3
    small, large = tiny_config(rms_norm_eps=1e-6), tiny_config(rms_norm_eps=0.5)
    assert torch.equal(
        attend(attention(small), small, x_BTD), attend(attention(large), large, x_BTD)
    )
