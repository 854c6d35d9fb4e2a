"""Multi-head latent attention: two forms of one function, and what is easily got wrong in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.support import F64, Past, latent_pages, random_model, random_tokens, tiny_config
from ziphius.config.model import ModelConfig, Yarn
from ziphius.kernels.latent import LatentPages
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


def attention(
    config: ModelConfig,
    seed: int = 0,
    precision: Precision = F64,
    kernels: Kernels | None = None,
) -> MLA:
    """Build one layer's attention with weights large enough that the softmax is not flat."""
    mla = MLA(config, precision, kernels or Kernels(), None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in mla.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(drawn * 0.5 + ("norm" in name))
    return mla


def attend(mla: MLA, config: ModelConfig, x_BTD: Tensor) -> Tensor:
    return mla(x_BTD, rope_at(config, torch.arange(x_BTD.shape[1]), torch.float64))


def one_page(config: ModelConfig, length: int, dtype: torch.dtype = torch.float64) -> LatentPages:
    """Return pages for the first ``length`` positions of one sequence."""
    return latent_pages([(0, length)], config.kv_lora_rank + config.qk_rope_head_dim, dtype)


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
@pytest.mark.parametrize("chunks", [[12], [5, 4, 3], [1] * 12, [33, 1, 31, 5]])
def test_absorbed_equals_expanded(
    changes: dict[str, Any], chunks: list[int], answering: Kernels
) -> None:
    """The same numbers, whether the cache is filled at once, in chunks or token by token."""
    plain = random_model(tiny_config(**changes), precision=F64)
    model = random_model(tiny_config(**changes), precision=F64, kernels=answering)
    tokens_BT = random_tokens(model.config, 2, sum(chunks))
    past = Past(model, batch=2, capacity=sum(chunks))
    with torch.no_grad():
        parts = [past(part_BT) for part_BT in tokens_BT.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), plain(tokens_BT), rtol=1e-9, atol=1e-9)


def test_absorbed_equals_expanded_in_bfloat16(answering: Kernels) -> None:
    config = tiny_config()
    mla = attention(config, precision=Precision(torch.bfloat16, torch.bfloat16), kernels=answering)
    rope = rope_at(config, torch.arange(10), torch.float32)
    x_BTD = torch.randn(1, 10, 24).bfloat16()
    with torch.no_grad():
        expanded = mla(x_BTD, rope)
        absorbed = mla(x_BTD, rope, one_page(config, 10, torch.bfloat16))
    assert expanded.dtype == absorbed.dtype == torch.bfloat16
    worst = (expanded.float() - absorbed.float()).abs().max()
    assert worst < 0.03 * expanded.float().abs().max()


def test_the_two_parts_of_decoding_make_the_cached_forward(answering: Kernels) -> None:
    """And what the first part appends is the normed latent and the turned key (facts 1.5)."""
    config = tiny_config()
    mla, x_BTD = attention(config, kernels=answering), torch.randn(1, 6, 24, dtype=torch.float64)
    rope = rope_at(config, torch.arange(6), torch.float64)
    pages = [one_page(config, 6) for _ in range(2)]
    with torch.no_grad():
        whole = mla(x_BTD, rope, pages[0])
        q_NHc = mla.project(x_BTD, rope, pages[1])
        assert q_NHc.shape == (6, config.num_attention_heads, 10 + 4)
        assert torch.equal(pages[0].pages, pages[1].pages)
        torch.testing.assert_close(mla.core(q_NHc, pages[1]), whole, rtol=0, atol=0)
        latent_BTC, k_rope_BTR = mla.latents(mla.kv_a_proj_with_mqa(x_BTD), rope)
    rows_Nc = pages[1].pages.flatten(0, 1)[pages[1].slots_N]
    torch.testing.assert_close(rows_Nc, torch.cat((latent_BTC, k_rope_BTR), -1)[0])


def test_absorbed_projections_are_kept_until_they_are_derived_again(answering: Kernels) -> None:
    config = tiny_config()
    mla, x_BTD = attention(config, kernels=answering), torch.randn(1, 6, 24, dtype=torch.float64)
    rope = rope_at(config, torch.arange(6), torch.float64)
    with torch.no_grad():
        derived = mla(x_BTD, rope, one_page(config, 6))
        mla.absorbed = mla.absorb(torch.float64)
        assert torch.equal(mla(x_BTD, rope, one_page(config, 6)), derived)
        mla.kv_b_proj.weight.mul_(2)
        mla.absorbed = mla.absorb(torch.float64)
        again = mla(x_BTD, rope, one_page(config, 6))
        mla.absorbed = None
        assert torch.equal(mla(x_BTD, rope, one_page(config, 6)), again)
    assert not torch.equal(again, derived)


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
def test_the_softmax_scale_is_that_of_the_expanded_heads(cached: bool, answering: Kernels) -> None:
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
    mla = attention(config, kernels=answering)
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
    cache = one_page(config, 2) if cached else None
    with torch.no_grad():
        out_BTD = mla(x_BTD, rope_at(config, torch.arange(2), torch.float64), cache)
    score, size = 3 * 8**0.5 * (4 + 2) ** -0.5, 8**0.5
    weight = 1 / (1 + math.exp(-score))
    expected = [size * (1 - weight), size * weight, 0, 0]
    assert out_BTD[0, 1, :4].tolist() == pytest.approx(expected, 1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_the_future_does_not_change_the_past(cached: bool, answering: Kernels) -> None:
    model = random_model(precision=F64, kernels=answering)
    tokens_BT = random_tokens(model.config, 1, 12)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % model.config.vocab_size

    @torch.no_grad()
    def logits(tokens_BT: Tensor) -> Tensor:
        return (Past(model, 1, 12)(tokens_BT) if cached else model(tokens_BT))[0]

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


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_latent_norms_have_an_eps_of_their_own(cached: bool, answering: Kernels) -> None:
    """1e-6 in the published code, whatever rms_norm_eps says."""
    x_BTD = torch.randn(1, 3, 24, dtype=torch.float64) * 1e-3
    found = []
    for eps in (1e-6, 0.5):
        config = tiny_config(rms_norm_eps=eps)
        rope = rope_at(config, torch.arange(3), torch.float64)
        cache = one_page(config, 3) if cached else None
        found.append(attention(config, kernels=answering)(x_BTD, rope, cache))
    assert torch.equal(*found)
