"""AdamW against torch's own in float32 and float64, and against a slow BF16 formula."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import F64, random_batch, random_model
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.select import Kernels, compiled_kernels, has_compiler
from ziphius.training.objective import losses
from ziphius.training.optimizer import AdamW

SHAPES = {"matrix": (7, 5), "stack": (3, 4, 6), "gain": (9,), "unused": (4, 4)}
CACHE = Path("~/.cache/ziphius").expanduser()
RATES = [3e-3, 1e-2, 4e-3, 2e-3, 8e-3, 1e-3, 5e-3, 9e-3]


def settings(**changes: Any) -> PretrainConfig:
    given: dict[str, Any] = {
        "steps": 10,
        "batch_size": 2,
        "micro_batch_size": 2,
        "sequence_length": 8,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "beta1": 0.87,
        "beta2": 0.93,
        "adam_eps": 1e-7,
        "weight_decay": 0.3,
        "moments": "float32",
    }
    return PretrainConfig(**{**given, **changes})


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Different sizes at every step; ``unused`` has none."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + step)).to(dtype)
        for name, shape in SHAPES.items()
        if name != "unused"
    }


def give(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=["f32", "f64"]
)
def test_full_moments_equal_torch_adamw_with_decay_on_matrices_only(
    dtype: torch.dtype, tolerance: float
) -> None:
    config = settings()
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = AdamW(ours.values(), config)
    reference = torch.optim.AdamW(
        [
            {
                "params": [p for p in theirs.values() if p.ndim > 1],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
    )
    for step, rate in enumerate(RATES):
        give(ours, gradients(step, dtype))
        give(theirs, gradients(step, dtype))
        optimizer.step(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        for name in SHAPES:
            torch.testing.assert_close(
                ours[name],
                theirs[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: n + m,
            )
        kept = dict(zip(ours, zip(optimizer.first, optimizer.second, strict=True), strict=True))
        for name, parameter in theirs.items():
            if name == "unused":
                continue
            state = reference.state[parameter]
            for ours_kept, theirs_kept in zip(
                kept[name], (state["exp_avg"], state["exp_avg_sq"]), strict=True
            ):
                assert ours_kept.dtype == dtype
                torch.testing.assert_close(ours_kept, theirs_kept, rtol=tolerance, atol=tolerance)


def test_decay_takes_no_part_in_the_moments_and_spares_vectors() -> None:
    parameters_ = parameters(torch.float64)
    before = {name: p.detach().clone() for name, p in parameters_.items()}
    optimizer = AdamW(parameters_.values(), settings())
    give(parameters_, {name: torch.zeros(s).double() for name, s in SHAPES.items()})
    optimizer.step(0.1)
    for name, parameter in parameters_.items():
        factor = 1.0 if name == "gain" else 1 - 0.1 * 0.3
        torch.testing.assert_close(parameter.data, before[name] * factor, rtol=1e-14, atol=0)
    assert all(not m.any() for m in [*optimizer.first, *optimizer.second])


# BF16 moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_moments_round_what_is_kept_and_nothing_else(dtype: torch.dtype) -> None:
    config = settings(moments="bfloat16")
    ours, slow = parameters(dtype), {n: p.detach().double() for n, p in parameters(dtype).items()}
    optimizer = AdamW(ours.values(), config)
    m = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    v = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step, rate in enumerate(RATES, start=1):
        given = gradients(step, dtype)
        give(ours, given)
        optimizer.step(rate)
        for position, name in enumerate(SHAPES):
            assert optimizer.first[position].dtype == torch.bfloat16
            assert optimizer.second[position].dtype == torch.bfloat16
            if name not in given:
                continue
            g = given[name].double()
            # This step uses the unrounded moments; only the next one sees the rounding. Both
            # sides start a step from the same rounded moments, so that a tie cannot grow.
            new_m = config.beta1 * m[name] + (1 - config.beta1) * g
            new_v = config.beta2 * v[name] + (1 - config.beta2) * g * g
            if len(SHAPES[name]) > 1:
                slow[name] = slow[name] * (1 - rate * config.weight_decay)
            hat_m = new_m / (1 - config.beta1**step)
            hat_v = new_v / (1 - config.beta2**step)
            slow[name] = slow[name] - rate * hat_m / (hat_v.sqrt() + config.adam_eps)
            m[name], v[name] = (
                optimizer.first[position].double(),
                optimizer.second[position].double(),
            )
            spacing = 2.0**-8  # half a unit in the last place of BF16, relative
            torch.testing.assert_close(m[name], new_m, rtol=spacing * 1.001, atol=1e-12)
            torch.testing.assert_close(v[name], new_v, rtol=spacing * 1.001, atol=1e-12)
    for name in SHAPES:
        torch.testing.assert_close(ours[name].data.double(), slow[name], rtol=1e-5, atol=1e-6)


def test_bfloat16_moments_stay_close_to_full_ones() -> None:
    updates = {}
    for moments in ("float32", "bfloat16"):
        ours = parameters(torch.float32)
        optimizer = AdamW(ours.values(), settings(moments=moments, weight_decay=0.0))
        for step, rate in enumerate(RATES):
            give(ours, gradients(step, torch.float32))
            optimizer.step(rate)
        start = parameters(torch.float32)
        updates[moments] = torch.cat(
            [(ours[n] - start[n]).detach().flatten() for n in SHAPES if n != "unused"]
        )
    difference = (updates["bfloat16"] - updates["float32"]).norm() / updates["float32"].norm()
    assert 0 < difference < 0.02


# Clipping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.001, 30.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**13])
def test_gradients_are_clipped_to_the_global_norm(
    dtype: torch.dtype, size: float, scale: float
) -> None:
    """The norm is that without the loss's scale; what is multiplied is what the gradients hold."""
    ours = parameters(dtype)
    given = {name: g * size for name, g in gradients(0, dtype).items()}
    held = {name: g * scale for name, g in given.items()}
    give(ours, held)
    optimizer = AdamW(ours.values(), settings(clip_norm=0.7))
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in given.values()))
    factor = min(1.0, 0.7 / norm)
    assert (factor == 1.0) == (size < 1), "one case clips, the other does not"
    found = optimizer.measure(scale)
    assert found.norm == pytest.approx(norm, rel=1e-5)
    for name, gradient in given.items():
        unclipped = ours[name].grad
        assert unclipped is not None
        assert torch.equal(unclipped, held[name]), "the update multiplies them"
        clipped = unclipped * found.factor
        torch.testing.assert_close(clipped, gradient * factor, rtol=1e-5, atol=1e-9)
    assert ours["unused"].grad is None
    if factor == 1:
        assert found.factor == 1 / scale, "what is not clipped keeps its bits"


@pytest.mark.parametrize("version", ["torch", "cpp"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_step_takes_the_factor_for_gradients_that_were_multiplied(
    moments: str, version: str
) -> None:
    """A power of two to the bit, another within rounding; moments too."""
    if version == "cpp" and not has_compiler():
        pytest.skip("there is no C++ compiler")
    kernels = Kernels() if version == "torch" else compiled_kernels(CACHE)

    def stepped(factor: float, *, before: bool) -> list[Tensor]:
        ours = parameters(torch.float32)
        optimizer = AdamW(ours.values(), settings(moments=moments), kernels)
        for step, rate in enumerate(RATES):
            given = gradients(step, torch.float32)
            give(ours, {name: g * factor for name, g in given.items()} if before else given)
            optimizer.step(rate, 1.0 if before else factor)
        return [*(p.detach() for p in ours.values()), *optimizer.first, *optimizer.second]

    for factor, tolerance in ((2.0**-10, 0.0), (0.37, 1e-6)):
        pairs = zip(stepped(factor, before=True), stepped(factor, before=False), strict=True)
        for expected, found in pairs:
            kept = 2**-7 if expected.dtype == torch.bfloat16 and tolerance else tolerance
            torch.testing.assert_close(found, expected, rtol=kept, atol=tolerance)


def test_a_norm_that_is_no_number_is_told_and_makes_no_small_step() -> None:
    ours = parameters(torch.float32)
    give(ours, gradients(0, torch.float32))
    assert ours["gain"].grad is not None
    ours["gain"].grad[2] = math.nan
    found = AdamW(ours.values(), settings()).measure()
    assert math.isnan(found.norm)
    assert math.isnan(found.factor)


# What is touched


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_parameters_without_gradient_are_untouched(moments: str) -> None:
    ours = parameters(torch.float32)
    before = ours["unused"].detach().clone()
    optimizer = AdamW(ours.values(), settings(moments=moments))
    for step in range(3):
        give(ours, gradients(step, torch.float32))
        optimizer.step(0.1)
    assert torch.equal(ours["unused"], before), "not even decay may touch it"
    assert not optimizer.first[3].any()
    assert not optimizer.second[3].any()


def test_parameters_that_need_no_gradient_are_not_held() -> None:
    ours = parameters(torch.float32)
    ours["gain"].requires_grad_(False)
    optimizer = AdamW(ours.values(), settings())
    assert [tuple(p.shape) for p in optimizer.parameters] == [(7, 5), (3, 4, 6), (4, 4)]


def test_a_step_drops_the_gradients_and_counts() -> None:
    ours = parameters(torch.float32)
    optimizer = AdamW(ours.values(), settings())
    give(ours, gradients(0, torch.float32))
    optimizer.step(0.1)
    assert all(p.grad is None for p in ours.values())
    assert optimizer.steps == 1


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_model_in_float64_descends(moments: str) -> None:
    """The first step of Adam is the sign of the gradient: every weight moves by the rate."""
    model = random_model(precision=F64)
    config = settings(moments=moments, weight_decay=0.0, adam_eps=1e-30)
    batch = random_batch(model.config, 2, 9)
    parts, _ = losses(model, batch, config, mtp_loss_weight=0.3, target_count=16, sequence_count=2)
    parts.total.backward()
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    signs = {name: p.grad.sign() for name, p in named.items() if p.grad is not None}
    assert signs.keys() == named.keys()
    AdamW(model.parameters(), config).step(1e-3)
    for name, parameter in named.items():
        assert parameter.dtype == torch.float64
        torch.testing.assert_close(
            parameter.data, before[name] - 1e-3 * signs[name], rtol=1e-12, atol=1e-14
        )
