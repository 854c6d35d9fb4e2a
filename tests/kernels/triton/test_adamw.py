"""A step of AdamW: within a few roundings of the same in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, on_cpu
from tests.support import F32, random_batch, random_model, step_settings
from tests.training.test_optimizer import settings as recipe
from ziphius.config.errors import BadInput
from ziphius.kernels.adamw import Rates, adamw_step
from ziphius.kernels.select import Kernels
from ziphius.kernels.triton.adamw import adamw_step_triton
from ziphius.training.optimizer import AdamW
from ziphius.training.step import train_step

few = settings(max_examples=60 if ON_GPU else 15)
KEPT = [torch.float32, torch.bfloat16]
# What keeping may change, relative; the interpreter cuts BF16 off instead of rounding it.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8 if ON_GPU else 2**-7}


def rates_at(step: int, decay: float, gradient_scale: float) -> Rates:
    return Rates(0.9, 0.95, decay, 1e-2 / (1 - 0.9**step), 1 - 0.95**step, 1e-8, gradient_scale)


def draw(count: int, kept: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, grad, m = torch.randn(3, count, generator=generator).unbind()
    v = torch.rand(count, generator=generator)
    return [t.to(DEVICE) for t in (p, grad * 30, m.to(kept), v.to(kept))]


@few
@given(
    *(st.integers(1, 3000), st.sampled_from(KEPT), st.integers(1, 9)),
    *(st.sampled_from([1.0, 0.97]), st.sampled_from([1.0, 2.0**-9, 0.013])),
    st.integers(0, 10**6),
)
def test_a_step(
    count: int, kept: torch.dtype, step: int, decay: float, scale: float, seed: int
) -> None:
    p, grad, m, v = draw(count, kept, seed)
    rates = rates_at(step, decay, scale)
    wide = [on_cpu(t).double() for t in (p, grad, m, v)]
    adamw_step(*wide, rates)
    before, old = grad.clone(), p.clone()
    adamw_step_triton(p, grad, m, v, rates)
    assert torch.equal(grad, before)
    assert (m.dtype, v.dtype) == (kept, kept)
    # A few roundings of what is added, and that of what is kept. A weight's terms may cancel.
    size = on_cpu(old).double().abs() + wide[0].abs()
    assert bool(((on_cpu(p).double() - wide[0]).abs() <= 2**-20 * size + 1e-6).all())
    spread = 1 + scale * 30
    tolerance = ROUNDING[kept] * 1.01
    atol = 4 * 2**-24 * spread
    torch.testing.assert_close(on_cpu(m).double(), wide[2], rtol=tolerance + 4e-7, atol=atol)
    torch.testing.assert_close(on_cpu(v).double(), wide[3], rtol=tolerance + 4e-7, atol=1e-30)


def test_steps_that_follow_each_other_stay_with_the_reference() -> None:
    ours, plain = draw(700, torch.float32, 1), draw(700, torch.float32, 1)
    for step in range(1, 9):
        grad = torch.randn(700, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        for update, (p, _, m, v) in ((adamw_step_triton, ours), (adamw_step, plain)):
            update(p, grad, m, v, rates_at(step, 0.99, 0.25))
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_the_change_is_seen_by_autograd() -> None:
    p, grad, m, v = draw(10, torch.float32, 2)
    before = [t._version for t in (p, m, v)]
    adamw_step_triton(p, grad, m, v, rates_at(1, 0.9, 1.0))
    assert all(t._version > old for t, old in zip((p, m, v), before, strict=True))


def test_shapes_gradients_with_gaps_and_nothing_at_all() -> None:
    p, grad, m, v = (t.view(7, 5) for t in draw(35, torch.float32, 3))
    joined = [t.clone() for t in (p, m, v)]
    rates = rates_at(2, 0.9, 0.5)
    adamw_step_triton(joined[0], grad, *joined[1:], rates)
    adamw_step_triton(p, grad.T.contiguous().T, m, v, rates)
    assert all(torch.equal(a, b) for a, b in zip((p, m, v), joined, strict=True))
    adamw_step_triton(*(t[:0] for t in (p, grad, m, v)), rates)


def test_a_number_that_is_none_stays_seen() -> None:
    p, grad, m, v = draw(5, torch.float32, 4)
    grad[3] = float("nan")
    adamw_step_triton(p, grad, m, v, rates_at(1, 0.9, 1.0))
    for t in (p, m, v):
        assert t.isnan().tolist() == [False, False, False, True, False]


def test_weights_in_float64_are_refused() -> None:
    p = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(BadInput, match="float64"):
        adamw_step_triton(p, p.clone(), p.clone(), p.clone(), rates_at(1, 0.9, 1.0))


def test_a_training_is_that_of_the_plain_update() -> None:
    config = recipe(moments="float32", clip_norm=0.1)
    ends: list[Any] = []
    for chosen in ("torch", "triton"):
        model = random_model(precision=F32, kernels=Kernels(adamw=chosen)).to(DEVICE)
        optimizer = AdamW(model.parameters(), config, model.kernels)
        for seed in range(2):
            batch = random_batch(model.config, 2, 9, seed=seed).to(DEVICE)
            result = train_step(model, optimizer, batch, config, step_settings(config, 1e-3))
            assert result.grad_norm > 1, "it clips"
        ends.append((result.total_loss, [p.detach() for p in model.parameters()]))
    (plain_loss, plain), (loss, found) = ends
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)
