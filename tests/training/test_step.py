"""One optimizer step: micro-batches, failures, repetition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import F32, F64, random_batch, random_model, step_settings, tiny_config
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.training import objective
from ziphius.training.objective import losses
from ziphius.training.optimizer import AdamW
from ziphius.training.step import StepResult, train_step

RATE = 2e-3


def settings(**changes: Any) -> PretrainConfig:
    given: dict[str, Any] = {
        "steps": 50,
        "batch_size": 16,
        "micro_batch_size": 16,
        "sequence_length": 10,
        "learning_rate": RATE,
        "final_learning_rate": 1e-4,
        "bias_update_speed": 0.01,
        "moments": "float32",
    }
    return PretrainConfig(**{**given, **changes})


def weights(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(model)}


def numbers(result: StepResult) -> dict[str, float]:
    return {name: value for name, value in vars(result).items() if isinstance(value, float)}


def run(
    model: Transformer, config: PretrainConfig, steps: int, first_seed: int = 0
) -> list[StepResult]:
    optimizer = AdamW(model.parameters(), config)
    return [
        train_step(
            model,
            optimizer,
            random_batch(model.config, config.batch_size, 11, seed=first_seed + number),
            config,
            step_settings(config, RATE),
        )
        for number in range(steps)
    ]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("micro", [4, 1])
def test_micro_batches_equal_the_whole_batch(micro: int, depth: int) -> None:
    whole = random_model(precision=F64, num_nextn_predict_layers=depth)
    parts = random_model(precision=F64, num_nextn_predict_layers=depth)
    expected = run(whole, settings(), steps=2)
    found = run(parts, settings(micro_batch_size=micro), steps=2)
    for a, b in zip(expected, found, strict=True):
        assert b.loads == a.loads
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-9)
    expected_weights = weights(whole)
    for name, tensor in named_weights(parts):
        # Adam divides by the size of the gradient, so that rounding in a tiny one is enlarged.
        torch.testing.assert_close(
            tensor, expected_weights[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, expected_weights[name]), name


def test_the_result_says_what_the_losses_say() -> None:
    model = random_model(precision=F64)
    config = settings(micro_batch_size=4)
    batch = random_batch(model.config, 16, 11)
    found, routings = losses(
        model, batch, config, mtp_loss_weight=0.3, target_count=160, sequence_count=16
    )
    found.total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = sum(float((g**2).sum()) for g in gradients) ** 0.5
    counts = [r.chosen_NK.flatten().bincount(minlength=8).tolist() for r in routings.values()]
    violation = sum(max(c) / (sum(c) / 8) - 1 for c in counts) / len(counts)
    model.zero_grad()
    optimizer = AdamW(model.parameters(), config)
    result = train_step(model, optimizer, batch, config, step_settings(config, RATE))
    assert result.loss == pytest.approx(found.main.item(), rel=1e-12)
    assert result.mtp_loss == pytest.approx(found.mtp.item(), rel=1e-12)
    assert result.balance_loss == pytest.approx(found.balance.item(), rel=1e-12)
    assert result.total_loss == pytest.approx(found.total.item(), rel=1e-12)
    assert result.grad_norm == pytest.approx(norm, rel=1e-9)
    assert result.max_violation == pytest.approx(violation, rel=1e-12)


# Failure


def poisoned(where: str) -> tuple[Transformer, PretrainConfig]:
    """A model whose loss is not finite."""
    model = random_model()
    with torch.no_grad():
        if where == "loss is NaN":
            model.norm.weight[0] = float("nan")
        else:
            model.lm_head.weight[:, 0] = 3e38
            model.norm.weight[0] = 3e38
    return model, settings()


@pytest.mark.parametrize("where", ["loss is NaN", "loss is infinite"])
def test_a_loss_that_is_not_finite_changes_nothing(where: str) -> None:
    model, config = poisoned(where)
    before = weights(model)
    optimizer = AdamW(model.parameters(), config)
    batch = random_batch(model.config, 16, 11)
    result = train_step(model, optimizer, batch, config, step_settings(config, RATE))
    assert result.skipped is not None
    assert "not finite" in result.skipped
    for name, tensor in named_weights(model):
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert optimizer.steps == 0
    assert not any(moment.any() for moment in [*optimizer.first, *optimizer.second])


def test_a_loss_that_is_not_finite_is_noticed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients may well be finite: those of another loss in the sum are."""
    plain = objective.part_losses

    def infinite(*args: Any, **kwargs: Any) -> Any:
        parts = plain(*args, **kwargs)
        return replace(parts, mtp=parts.mtp + float("inf"))

    monkeypatch.setattr(objective, "part_losses", infinite)
    model, config = random_model(), settings()
    before = weights(model)
    batch, optimizer = random_batch(model.config, 16, 11), AdamW(model.parameters(), config)
    assert train_step(model, optimizer, batch, config, step_settings(config, RATE)).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, config = random_model(), settings()
    before = weights(model)
    optimizer = AdamW(model.parameters(), config)
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    batch = random_batch(model.config, 16, 11)
    assert train_step(model, optimizer, batch, config, step_settings(config, RATE)).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model))
    assert optimizer.steps == 0


def test_a_step_after_a_failed_one_is_as_if_nothing_had_happened() -> None:
    """A guard that skips a bad batch must not find the bad gradients in the next sum."""
    config, batch = settings(), random_batch(tiny_config(), 16, 11)
    other = random_batch(tiny_config(), 16, 11, seed=1)
    rate = step_settings(config, RATE)
    expected = random_model()
    train_step(expected, AdamW(expected.parameters(), config), batch, config, rate)
    model = random_model()
    optimizer = AdamW(model.parameters(), settings())
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    assert train_step(model, optimizer, other, config, rate).skipped
    handle.remove()
    assert train_step(model, optimizer, batch, config, rate).skipped is None
    expected_weights = weights(expected)
    for name, tensor in named_weights(model):
        assert torch.equal(tensor, expected_weights[name]), name


def test_a_step_that_is_judged_bad_changes_nothing_and_is_told() -> None:
    model, config = random_model(), settings()
    before, batch = weights(model), random_batch(model.config, 16, 11)
    optimizer = AdamW(model.parameters(), config)
    seen = []

    def judge(loss: float, norm: float) -> str:
        seen.append((loss, norm))
        return "not today"

    result = train_step(model, optimizer, batch, config, step_settings(config, RATE), judge)
    assert result.skipped == "not today"
    assert seen == [(result.total_loss, result.grad_norm)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model))
    assert optimizer.steps == 0


# A run


def test_loss_falls_on_a_repeated_batch() -> None:
    model = Transformer(tiny_config())
    initialise(model, 0)
    config = settings(micro_batch_size=8, moments="bfloat16")
    optimizer = AdamW(model.parameters(), config)
    batch, rate = random_batch(model.config, 16, 11), step_settings(config, 1e-2)
    results = [train_step(model, optimizer, batch, config, rate) for _ in range(30)]
    assert results[0].loss == pytest.approx(4.11, abs=0.3), "it starts at log(61)"
    assert results[-1].loss < 0.8 * results[0].loss
    assert results[-1].mtp_loss < 0.9 * results[0].mtp_loss


@pytest.mark.parametrize(
    "precision",
    [F32, Precision.for_training(torch.bfloat16)],
    ids=["float32", "bfloat16"],
)
def test_two_runs_of_one_seed_are_bitwise_equal(precision: Precision) -> None:
    ends = []
    for seed in (5, 5, 6):
        model = Transformer(tiny_config(), precision)
        initialise(model, seed)
        results = run(model, settings(micro_batch_size=8, moments="bfloat16"), steps=3)
        ends.append((results, weights(model)))
    (first, first_weights), (second, second_weights), (other, _) = ends
    assert first == second
    assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)
    assert first != other


def test_gradients_are_gone_after_a_step() -> None:
    model = random_model()
    run(model, settings(), steps=1)
    assert all(p.grad is None for p in model.parameters())
