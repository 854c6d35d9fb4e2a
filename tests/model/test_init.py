"""Initial values: named randomness, and the table of what starts how."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support import tiny_config
from ziphius.config.model import ModelConfig
from ziphius.config.recipe import load_recipe
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights


def weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    model = Transformer(config, Precision(dtype, dtype))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    initialise(model, seed)
    return {name: tensor.clone() for name, tensor in named_weights(model)}


def assert_common_weights_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    common = a.keys() & b.keys()
    assert len(common) > 20
    for name in common:
        if a[name].shape == b[name].shape:
            assert torch.equal(a[name], b[name]), name


def test_a_seed_repeats_and_another_differs() -> None:
    assert_common_weights_equal(weights(tiny_config(), 5), weights(tiny_config(), 5))
    a, b = weights(tiny_config(), 5), weights(tiny_config(), 6)
    drawn = [name for name in a if not name.endswith(("norm.weight", "bias"))]
    assert not any(torch.equal(a[name], b[name]) for name in drawn)


def test_a_weight_depends_on_its_name_and_not_on_the_others() -> None:
    """The same weight in a deeper model, with more experts, without MTP: the same numbers."""
    small = weights(tiny_config(num_nextn_predict_layers=0))
    large = weights(tiny_config(num_hidden_layers=5, n_routed_experts=16))
    assert_common_weights_equal(small, large)
    name = "model.layers.2.mlp.experts.7.gate_proj.weight"
    assert torch.equal(small[name], large[name])


def test_the_global_generator_plays_no_part_and_is_left_alone() -> None:
    torch.manual_seed(1)
    a = weights(tiny_config())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert_common_weights_equal(a, weights(tiny_config()))
    torch.manual_seed(1)
    weights(tiny_config())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_dtype_starts_from_the_same_numbers() -> None:
    single, double = weights(tiny_config()), weights(tiny_config(), dtype=torch.float64)
    half = weights(tiny_config(), dtype=torch.bfloat16)
    for name, tensor in single.items():
        if tensor.std() > 0:
            torch.testing.assert_close(double[name].float(), tensor, rtol=1e-6, atol=0)
            assert torch.equal(half[name], double[name].bfloat16()), name


def test_no_two_weights_are_equal() -> None:
    drawn = [t.flatten()[:32] for t in weights(tiny_config()).values() if t.ndim == 2]
    firsts = {tuple(t.tolist()) for t in drawn}
    assert len(firsts) == len(drawn)


def test_nothing_is_left_undefined_and_every_weight_has_its_rule() -> None:
    config = tiny_config(hidden_size=128, vocab_size=512, intermediate_size=200)
    for name, tensor in weights(config).items():
        assert tensor.isfinite().all(), name
        if name.endswith("e_score_correction_bias"):
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:
            # Four standard errors of a standard deviation and of a mean.
            n = tensor.numel()
            assert tensor.std().item() == pytest.approx(config.init_std, rel=4 / (2 * n) ** 0.5)
            assert abs(tensor.mean().item()) < 4 * config.init_std / n**0.5, name


def test_the_distribution_is_normal() -> None:
    config = tiny_config(hidden_size=128, vocab_size=2048)
    drawn = weights(config)["model.embed_tokens.weight"].flatten() / config.init_std
    for bound, share in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
        assert (drawn.abs() < bound).double().mean().item() == pytest.approx(share, abs=3e-3)
    assert drawn.abs().max() > 4, "the tails are cut off"


def test_the_published_standard_deviation_and_the_rule_for_smaller_networks() -> None:
    """0.006 at hidden size 7168 (facts 6.2), not the 0.02 of the config file (facts 13.16)."""
    v3 = load_recipe("671b").model
    assert v3.init_std == 0.006
    assert v3.model_copy(update={"initializer_range": None}).init_std == pytest.approx(0.006)
    for width in (24, 192, 2048):
        std = tiny_config(hidden_size=width).init_std
        assert std * width**0.5 == pytest.approx(0.006 * 7168**0.5)
    assert tiny_config(initializer_range=0.5).init_std == 0.5
