"""Rotary positions and YaRN, against the published check values and complex arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support import hf_config, random_model, random_tokens, tiny_config
from ziphius.config.model import ModelConfig, Yarn
from ziphius.config.recipe import load_recipe
from ziphius.model.rope import (
    frequencies,
    mscale,
    rope_at,
    rotate,
    rotation_scale,
    softmax_scale,
)

V3 = load_recipe("671b").model
EXTENDED = V3.model_copy(update={"rope_scaling": Yarn()})
# V2 and V2-Lite (facts 1.1, 7.3).
V2 = V3.model_copy(update={"rope_scaling": Yarn(mscale=0.707, mscale_all_dim=0.707)})


def turned(x_BTHR: Tensor, config: ModelConfig, start: int = 0) -> Tensor:
    positions_T = torch.arange(start, start + x_BTHR.shape[1])
    return rotate(x_BTHR, rope_at(config, positions_T, x_BTHR.dtype))


# --- YaRN -----------------------------------------------------------------------------------------


def test_plain_frequencies() -> None:
    expected = [10000 ** (-2 * i / 64) for i in range(32)]
    assert frequencies(V3).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        (0, 1.0),
        (10, 5.623413e-2),
        (11, 3.900693e-2),
        (12, 2.687936e-2),
        (16, 5.5e-3),
        (20, 7.905694e-4),
        (22, 1.778279e-4),
        (23, 3.333804e-5),
        (24, 2.5e-5),
        (31, 3.333804e-6),
    ],
)
def test_extended_frequencies(pair: int, value: float) -> None:
    """The check values of facts 7.2."""
    assert frequencies(EXTENDED)[pair].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("width", "yarn"),
    [
        (64, Yarn()),
        (64, Yarn(factor=10.0, original_max_position_embeddings=32_768, beta_fast=16)),
        (8, Yarn(original_max_position_embeddings=256)),
        (16, Yarn(factor=4.0, original_max_position_embeddings=100, mscale_all_dim=0.707)),
    ],
)
def test_the_same_as_transformers_for_the_same_config(width: int, yarn: Yarn) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    config = tiny_config(qk_rope_head_dim=width, rope_scaling=yarn)
    theirs = hf_config(config, _attn_implementation="eager")
    embedding = DeepseekV3RotaryEmbedding(theirs)
    torch.testing.assert_close(embedding.inv_freq.double(), frequencies(config), rtol=1e-5, atol=0)
    assert embedding.attention_scaling == pytest.approx(rotation_scale(config), rel=1e-6)
    attention = DeepseekV3Attention(theirs, 0)
    assert attention.scaling == pytest.approx(softmax_scale(config), rel=1e-6)


def test_the_blend_goes_from_pair_10_to_pair_23() -> None:
    ratio = frequencies(EXTENDED) / frequencies(V3)
    assert ratio[:11].tolist() == pytest.approx([1.0] * 11)
    assert ratio[23:].tolist() == pytest.approx([1 / 40] * 9)
    steps = ratio[10:24].diff()
    assert steps.tolist() == pytest.approx([steps[0].item()] * 13), "the blend is not linear"


def test_softmax_scales() -> None:
    """The check values of facts 1.3 and 7.3."""
    assert softmax_scale(V3) == pytest.approx(0.0721688, abs=1e-7)
    assert mscale(40, 1.0) == pytest.approx(1.3688879, abs=1e-7)
    assert softmax_scale(EXTENDED) == pytest.approx(0.13523378, abs=1e-8)
    assert mscale(40, 0.707) == pytest.approx(1.2608038, abs=1e-7)
    assert softmax_scale(V2) / softmax_scale(V3) == pytest.approx(1.5896262, abs=1e-7)


@pytest.mark.parametrize("config", [V3, EXTENDED, V2])
def test_cosine_and_sine_are_not_scaled_in_published_models(config: ModelConfig) -> None:
    assert rotation_scale(config) == 1.0
    rope = rope_at(config, torch.arange(50), torch.float64)
    torch.testing.assert_close(rope.cos_Tr**2 + rope.sin_Tr**2, torch.ones(50, 32).double())


def test_unequal_magnitudes_follow_hugging_face() -> None:
    def with_yarn(**values: float) -> ModelConfig:
        return V3.model_copy(update={"rope_scaling": Yarn(**values)})

    both = with_yarn(mscale=1.0, mscale_all_dim=0.5)
    ratio = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert rotation_scale(both) == pytest.approx(ratio)
    absent = with_yarn(mscale=1.0, mscale_all_dim=0.0)
    assert rotation_scale(absent) == pytest.approx(0.1 * math.log(40) + 1)
    assert softmax_scale(absent) == softmax_scale(V3)
    assert rotation_scale(with_yarn(factor=1.0)) == 1.0


def test_an_extension_by_one_changes_nothing() -> None:
    config = V3.model_copy(update={"rope_scaling": Yarn(factor=1.0)})
    torch.testing.assert_close(frequencies(config), frequencies(V3))
    assert softmax_scale(config) == softmax_scale(V3)


def test_the_extension_is_active_iff_the_config_has_it_whatever_the_length() -> None:
    """A short request and the head of a long one are the same computation (facts 13.4)."""
    yarn = Yarn(original_max_position_embeddings=64, factor=8.0)
    plain, extended = tiny_config(), tiny_config(rope_scaling=yarn)
    tokens_BT = random_tokens(plain, 1, 100)
    with torch.no_grad():
        long_BTV = random_model(extended)(tokens_BT)
        short_BTV = random_model(extended)(tokens_BT[:, :7])
        torch.testing.assert_close(short_BTV, long_BTV[:, :7])
        assert not torch.allclose(short_BTV, random_model(plain)(tokens_BT[:, :7]), atol=1e-2)
        no_factor = tiny_config(max_position_embeddings=100000)
        torch.testing.assert_close(
            random_model(no_factor)(tokens_BT), random_model(plain)(tokens_BT), rtol=0, atol=0
        )


# --- rotation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("yarn", [None, Yarn(original_max_position_embeddings=32)])
def test_neighbouring_pairs_turn_as_complex_numbers(yarn: Yarn | None) -> None:
    """The official code: view (2i, 2i + 1) as one complex number and multiply (facts 1.4)."""
    config = tiny_config(qk_rope_head_dim=8, rope_scaling=yarn)
    x_BTHR = torch.randn(2, 50, 3, 8, dtype=torch.float64)
    angles_Tr = torch.arange(50).double()[:, None] * frequencies(config)
    factor_Tr = torch.polar(torch.ones_like(angles_Tr), angles_Tr)
    complex_BTHr = torch.view_as_complex(x_BTHR.unflatten(-1, (4, 2)).contiguous())
    expected_BTHR = torch.view_as_real(complex_BTHr * factor_Tr[:, None]).flatten(-2)
    torch.testing.assert_close(turned(x_BTHR, config), expected_BTHR)


def test_position_zero_is_the_identity() -> None:
    x_BTHR = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.equal(turned(x_BTHR, tiny_config()), x_BTHR)


def test_positions_start_where_they_are_told() -> None:
    x_BTHR = torch.randn(1, 9, 1, 4, dtype=torch.float64)
    whole = turned(x_BTHR, tiny_config())
    torch.testing.assert_close(turned(x_BTHR[:, 6:], tiny_config(), start=6), whole[:, 6:])


def test_scores_depend_on_the_difference_of_positions_only() -> None:
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    config = tiny_config(qk_rope_head_dim=8)

    def score(at_q: int, at_k: int) -> float:
        return (turned(q, config, at_q) * turned(k, config, at_k)).sum().item()

    for distance in (0, 1, 17):
        scores = [score(start + distance, start) for start in (0, 5, 1000, 163_000)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-8)
    assert score(0, 3) != pytest.approx(score(3, 0), abs=1e-3), "direction is lost"


def test_rotation_keeps_norms() -> None:
    x_BTHR = torch.randn(1, 200, 2, 16, dtype=torch.float64)
    config = tiny_config(qk_rope_head_dim=16, rope_scaling=Yarn())
    torch.testing.assert_close(turned(x_BTHR, config).norm(dim=-1), x_BTHR.norm(dim=-1))


def test_bfloat16_is_turned_in_fp32_and_rounded_once() -> None:
    x_BTHR = torch.randn(1, 30, 2, 8).bfloat16()
    config = tiny_config(qk_rope_head_dim=8)
    rope = rope_at(config, torch.arange(30), torch.float32)
    result = rotate(x_BTHR, rope)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, rotate(x_BTHR.float(), rope).bfloat16())


def test_angles_of_far_positions_are_exact() -> None:
    """At position 163,839 an FP32 product of angle and position is wrong in the third digit."""
    rope = rope_at(V3, torch.tensor([163_839]), torch.float32)
    exact = [math.cos(163_839 * 10000 ** (-2 * i / 64)) for i in range(32)]
    assert rope.cos_Tr[0].tolist() == pytest.approx(exact, abs=1e-6)
