"""Balancing: loads in integers, the sign rule, and a toy run that it levels."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support import F32, random_batch, random_model, step_settings, tiny_config
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.router import Routing
from ziphius.model.transformer import Transformer
from ziphius.training.balance import ExpertLoads, update_biases
from ziphius.training.optimizer import AdamW
from ziphius.training.step import train_step


def settings(**changes: Any) -> PretrainConfig:
    given: dict[str, Any] = {
        "steps": 100,
        "batch_size": 8,
        "micro_batch_size": 8,
        "sequence_length": 12,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
    }
    return PretrainConfig(**{**given, **changes})


def routing(chosen: list[list[int]], n_experts: int) -> Routing:
    chosen_NK = torch.tensor(chosen)
    scores_NE = torch.zeros(len(chosen), n_experts)
    return Routing(chosen_NK, torch.ones(chosen_NK.shape), scores_NE)


def biases(model: Transformer) -> dict[int, Tensor]:
    return {
        layer: block.mlp.gate.e_score_correction_bias
        for layer, _, block in model.blocks()
        if hasattr(block.mlp, "gate")
    }


def loads_of(model: Transformer, counts: list[int]) -> ExpertLoads:
    """The same loads for every MoE layer of a model."""
    loads = ExpertLoads(len(counts))
    loads.counts = {layer: torch.tensor(counts) for layer in biases(model)}
    return loads


def updated(counts: list[int], speed: float) -> list[float]:
    """What one update does to biases that start at zero, in the first MoE layer."""
    model = Transformer(
        tiny_config(n_routed_experts=len(counts), n_group=1, topk_group=1, num_experts_per_tok=1)
    )
    initialise(model, 0)
    update_biases(model, loads_of(model, counts), speed)
    return biases(model)[1].tolist()


# Loads


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=40),
    st.integers(1, 40),
)
def test_loads_add_up_over_micro_batches(choices: list[list[int]], cut: int) -> None:
    whole, parts = ExpertLoads(6), ExpertLoads(6)
    whole.add({1: routing(choices, 6), 3: routing(choices[::-1], 6)})
    for part in filter(None, (choices[:cut], choices[cut:])):
        parts.add({1: routing(part, 6), 3: routing(part[::-1], 6)})
    flat = [expert for pair in choices for expert in pair]
    for layer in (1, 3):
        assert whole.counts[layer].dtype == parts.counts[layer].dtype == torch.int64
        assert parts.counts[layer].tolist() == whole.counts[layer].tolist()
        assert whole.counts[layer].tolist() == [flat.count(expert) for expert in range(6)]


def test_adding_does_not_change_what_was_added_before() -> None:
    loads = ExpertLoads(3)
    loads.add({0: routing([[0], [0]], 3)})
    first = loads.counts[0]
    loads.add({0: routing([[2]], 3)})
    assert first.tolist() == [2, 0, 0]
    assert loads.counts[0].tolist() == [2, 0, 1]


def test_max_violation_is_the_mean_over_layers() -> None:
    loads = ExpertLoads(4)
    loads.counts = {1: torch.tensor([8, 4, 2, 2]), 2: torch.tensor([3, 3, 3, 3])}
    # Layer 1: the mean is 4, the largest load 8: 1.0. Layer 2 is level: 0.
    assert loads.max_violation() == 0.5
    assert ExpertLoads(4).max_violation() == 0.0


# The sign rule


def test_bias_moves_against_the_load_and_not_at_the_mean() -> None:
    speed = 0.001
    step = torch.tensor(speed, dtype=torch.float32).item()
    assert updated([6, 2, 4, 4], speed) == [-step, step, 0.0, 0.0]


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=9))
def test_sign_rule_is_exact_in_integers(counts: list[int]) -> None:
    total, E = sum(counts), len(counts)
    signs = [(total > E * c) - (total < E * c) for c in counts]
    assert updated(counts, 1.0) == [float(sign) for sign in signs]


def test_loads_that_a_float_mean_would_confuse() -> None:
    # Above 2^24 neighbouring integers are one float32: 2^24 + 1 rounds to 2^24. The first two
    # loads are a third below the mean and must rise, the last is above it and must fall.
    base = 2**24
    counts = [base, base, base + 1]
    assert len(set(torch.tensor(counts).float().tolist())) == 1, "the case is no case any more"
    assert updated(counts, 0.5) == [0.5, 0.5, -0.5]
    # And a load equal to the mean stays, where a float mean is off by rounding.
    level = [3 * base + 1] * 5
    assert updated(level, 0.5) == [0.0] * 5


@pytest.mark.parametrize("depth", [1, 2])
def test_regression_mtp_router_biases_are_never_updated(depth: int) -> None:
    model = random_model(num_nextn_predict_layers=depth)
    before = {layer: bias.clone() for layer, bias in biases(model).items()}
    assert set(before) == {1, 2, *(3 + k for k in range(depth))}
    config = settings(bias_update_speed=0.01)
    optimizer = AdamW(model.parameters(), config)
    batch = random_batch(model.config, 8, 13)
    train_step(model, optimizer, batch, config, step_settings(config, 1e-3))
    for layer, bias in biases(model).items():
        moved = (bias - before[layer]).abs()
        assert moved.max() == pytest.approx(0.01, rel=1e-4), f"layer {layer} stands still"


def test_speed_zero_freezes_biases() -> None:
    model = random_model()
    before = {layer: bias.clone() for layer, bias in biases(model).items()}
    config = settings(bias_update_speed=0.0)
    batch, optimizer = random_batch(model.config, 8, 13), AdamW(model.parameters(), config)
    train_step(model, optimizer, batch, config, step_settings(config, 1e-3))
    assert all(torch.equal(bias, before[layer]) for layer, bias in biases(model).items())


def test_a_loads_object_without_a_layer_is_an_error() -> None:
    model = random_model()
    with pytest.raises(KeyError):
        update_biases(model, ExpertLoads(model.config.n_routed_experts), 0.001)


# What the bias is


def test_bias_is_no_parameter_and_has_no_gradient() -> None:
    model = random_model()
    config = settings()
    optimizer = AdamW(model.parameters(), config)
    held = {tensor.data_ptr() for tensor in optimizer.parameters}
    batch = random_batch(model.config, 8, 13)
    train_step(model, optimizer, batch, config, step_settings(config, 1e-3))
    for bias in biases(model).values():
        assert bias.data_ptr() not in held
        assert not bias.requires_grad
        assert bias.grad is None
    assert not any("bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "precision",
    [
        F32,
        Precision.for_training(torch.bfloat16),
        Precision.for_inference(torch.bfloat16),
        Precision.for_training(torch.float64),
    ],
    ids=["float32", "bfloat16 training", "bfloat16 weights", "float64"],
)
def test_regression_bf16_bias_above_two_stands_still(precision: Precision) -> None:
    model = random_model(precision=precision)
    for bias in biases(model).values():
        bias.fill_(2.5)
    counts = [5, 1, 1, 1, 1, 1, 1, 1]
    for _ in range(10):
        update_biases(model, loads_of(model, counts), 0.001)
    for bias in biases(model).values():
        assert bias.dtype == torch.float32
        assert bias[0].item() == pytest.approx(2.490, abs=1e-5)
        assert bias[1].item() == pytest.approx(2.510, abs=1e-5)


# A whole training


def skewed_model() -> Transformer:
    """A model whose tokens share a direction that the first experts like and the last do not."""
    model = random_model()
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = 1.0
        for _, _, block in model.blocks():
            if isinstance(block.mlp, MixtureOfExperts):
                weight_ED = block.mlp.gate.weight
                weight_ED[:, 0] = torch.linspace(1.0, -1.0, len(weight_ED))
                block.mlp.gate.e_score_correction_bias.zero_()
    return model


def violations(speed: float, steps: int = 40) -> list[float]:
    model = skewed_model()
    config = settings(
        bias_update_speed=speed,
        batch_size=16,
        micro_batch_size=8,
        balance_loss_weight=0.0,
        moments="float32",
    )
    optimizer, rate = AdamW(model.parameters(), config), step_settings(config, 1e-4)
    return [
        train_step(
            model, optimizer, random_batch(model.config, 16, 13, seed=step), config, rate
        ).max_violation
        for step in range(steps)
    ]


def test_a_skewed_training_becomes_level() -> None:
    balanced, frozen = violations(0.02), violations(0.0, steps=20)
    start, end = sum(balanced[:5]) / 5, sum(balanced[-10:]) / 10
    assert start > 1.0, "the start must be skewed, or the test shows nothing"
    assert end < 0.5 * start
    assert sum(frozen[-10:]) / 10 > 0.8 * start, "without updates it stays skewed"
    assert violations(0.02, steps=5) == balanced[:5], "the run repeats exactly"
