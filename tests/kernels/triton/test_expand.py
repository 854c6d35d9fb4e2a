"""Queries, keys and values of every head: the bits of the model's steps, forward and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu.steps import Gradients, Projected, expand, expand_backward
from torch import Tensor

from tests.kernels.triton.support import DEVICE, ON_GPU, STORAGE, distance, on_cpu
from tests.support import F32, random_batch, random_model
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.select import Kernels
from ziphius.kernels.triton import expand as module
from ziphius.kernels.triton.expand import expand_backward_triton, expand_heads_triton
from ziphius.model.transformer import Transformer
from ziphius.parallel.recompute import apply_recompute
from ziphius.training.objective import losses

few = settings(max_examples=60 if ON_GPU else 15)
WIDTHS = [(128, 64, 128), (7, 4, 5), (3, 10, 9), (16, 2, 8), (24, 6, 40)]
# The sum over heads, rounded once.
CLOSE = 2**-8 if ON_GPU else 2**-21


class Case(NamedTuple):
    given: Projected
    grads: tuple[Tensor, Tensor, Tensor]

    @property
    def back(self) -> Gradients:
        return Gradients(*self.grads, *self.given[3:])


def case(
    B: int, T: int, H: int, widths: tuple[int, int, int], seed: int, dtype: torch.dtype = STORAGE
) -> Case:
    """Draw everything; the rotary key is a part of a wider product, as it is in the model."""
    generator = torch.Generator().manual_seed(seed)
    nope, R, v = widths

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    q, kv = normal(B, T, H, nope + R), normal(B, T, H, nope + v)
    angles_Tr = (torch.rand(T, R // 2, generator=generator) * 100).to(DEVICE)
    given = Projected(q, kv, normal(B, T, 5 + R)[..., 5:], angles_Tr.cos(), angles_Tr.sin())
    return Case(given, (normal(*q.shape), normal(*q.shape), normal(B, T, H, v)))


def leaves(x: Projected) -> Projected:
    """Copy, so that gradients arrive and nothing else changes."""
    copies = [t.clone().requires_grad_() for t in x[:3]]
    return Projected(*copies, *x[3:])


@few
@given(
    *(st.integers(1, 3), st.integers(1, 6), st.integers(1, 20)),
    *(st.sampled_from(WIDTHS), st.booleans(), st.integers(0, 10**6)),
)
def test_bits_are_those_of_the_models_steps(
    B: int, T: int, H: int, widths: tuple[int, int, int], own_q: bool, seed: int
) -> None:
    x = case(B, T, H, widths, seed)
    plain, ours = leaves(x.given), leaves(x.given)
    expected = expand(plain)
    torch.autograd.backward(expected, x.grads)
    # Not a leaf, which nobody may write to; its memory is the test's own.
    q_BTHd = ours.q_BTHd * 1
    found = expand_heads_triton(q_BTHd, *ours[1:], own_q=own_q)
    for result, wanted in zip(found, expected, strict=True):
        assert result.dtype == STORAGE
        assert torch.equal(result, wanted)
    assert torch.equal(q_BTHd, found[0] if own_q else ours.q_BTHd)
    torch.autograd.backward(found, x.grads)
    assert torch.equal(ours.q_BTHd.grad, plain.q_BTHd.grad)
    assert torch.equal(ours.kv_BTHo.grad, plain.kv_BTHo.grad)
    exact = expand_backward(Gradients(*(on_cpu(t).double() for t in x.back)))[2]
    assert ours.k_rope_BTR.grad.dtype == STORAGE
    assert distance(ours.k_rope_BTR.grad, exact) < CLOSE * 4
    again = expand_backward_triton(*x.back)
    assert torch.equal(again[2], ours.k_rope_BTR.grad), "the order of a sum is fixed"


def test_more_heads_than_a_program_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUMBERS", 64)
    monkeypatch.setattr(module, "NUMBERS_BACK", 64)
    x = case(2, 3, 13, (16, 4, 12), 1)
    for result, wanted in zip(expand_heads_triton(*x.given), expand(x.given), strict=True):
        assert torch.equal(result, wanted)
    dq, dkv, dk_rope = expand_backward_triton(*x.back)
    wanted_q, wanted_kv, _ = expand_backward(x.back)
    assert torch.equal(dq, wanted_q)
    assert torch.equal(dkv, wanted_kv)
    exact = expand_backward(Gradients(*(on_cpu(t).double() for t in x.back)))[2]
    assert distance(dk_rope, exact) < CLOSE * 4


def test_values_and_owned_queries_take_no_memory() -> None:
    x = case(1, 3, 4, (8, 4, 6), 2).given
    before = x.q_BTHd.clone()
    q, k, v = expand_heads_triton(*x)
    assert v.data_ptr() == x.kv_BTHo[..., 8:].data_ptr()
    assert torch.equal(x.q_BTHd, before)
    others = {t.untyped_storage().data_ptr() for t in x}
    assert not others & {t.untyped_storage().data_ptr() for t in (q, k)}
    q, _, _ = expand_heads_triton(*x, own_q=True)
    assert q.data_ptr() == x.q_BTHd.data_ptr()


def test_queries_with_gaps_are_copied_even_if_they_are_owned() -> None:
    x = case(1, 4, 3, (8, 4, 6), 3).given
    apart = x._replace(q_BTHd=x.q_BTHd.transpose(1, 2).contiguous().transpose(1, 2))
    before = apart.q_BTHd.clone()
    found = expand_heads_triton(*apart, own_q=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expand(x), strict=True))
    assert torch.equal(apart.q_BTHd, before)


def test_whoever_saved_the_owned_queries_is_told() -> None:
    x = case(1, 3, 4, (8, 4, 6), 4).given
    q_BTHd = x.q_BTHd.requires_grad_() * 1
    saved = q_BTHd.square()
    q_out, _, _ = expand_heads_triton(q_BTHd, *x[1:], own_q=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (saved.sum() + q_out.sum()).backward()


def test_gradients_that_arrive_expanded_and_stay_unchanged() -> None:
    x = case(2, 3, 4, (8, 4, 6), 5)
    ours = leaves(x.given)
    outputs = expand_heads_triton(*ours)
    ones = [torch.ones(1, dtype=STORAGE, device=DEVICE).expand(t.shape) for t in outputs]
    torch.autograd.backward(outputs, ones)
    wanted = expand_backward(Gradients(*ones, *x.given[3:]))
    assert torch.equal(ours.q_BTHd.grad, wanted[0])
    assert torch.equal(ours.kv_BTHo.grad, wanted[1])
    assert distance(ours.k_rope_BTR.grad, wanted[2]) < CLOSE * 4
    assert all(bool((one == 1).all()) for one in ones)


def test_outputs_that_nobody_uses() -> None:
    x = leaves(case(1, 3, 4, (8, 4, 6), 6).given)
    _, _, v = expand_heads_triton(*x)
    v.sum().backward()
    assert not x.q_BTHd.grad.any()
    assert not x.kv_BTHo.grad[..., :8].any()
    assert bool((x.kv_BTHo.grad[..., 8:] == 1).all())


def test_no_tokens() -> None:
    x = case(1, 0, 4, (8, 4, 6), 7)
    assert [t.shape for t in expand_heads_triton(*x.given)] == [(1, 0, 4, w) for w in (12, 12, 6)]
    shapes = [t.shape for t in expand_backward_triton(*x.back)]
    assert shapes == [(1, 0, 4, 12), (1, 0, 4, 14), (1, 0, 4)]


# --- in a model -----------------------------------------------------------------------------------

SETTINGS = PretrainConfig(
    steps=10,
    batch_size=2,
    micro_batch_size=2,
    sequence_length=6,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
)


def gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    batch = random_batch(model.config, 2, 7).to(DEVICE)
    parts, _ = losses(
        model, batch, SETTINGS, mtp_loss_weight=0.3, target_count=12, sequence_count=2
    )
    parts.total.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return parts.total.detach(), {name: g for name, g in found.items() if g is not None}


def assert_equal(found: Tensor, expected: Tensor, name: str = "loss") -> None:
    """To the bit, but for sums of torch's own that have no fixed order on a GPU."""
    if ON_GPU:
        assert distance(found, expected) < 1e-5, name
    else:
        assert torch.equal(found, expected), name


def build(expand: str, how: Any, changes: dict[str, Any]) -> Transformer:
    attention = changes.pop("attention", "reference")
    kernels = Kernels(expand=expand, attention=attention)
    model = random_model(precision=F32, kernels=kernels, **changes).to(DEVICE)
    apply_recompute(model, how)
    return model


# SDPA saves what it is given, and not copies as the reference does.
PADDED = {"attention": "sdpa"}


@pytest.mark.parametrize(
    "changes",
    [{}, PADDED, {**PADDED, "q_lora_rank": None}, {"attention": "triton"}],
    ids=["query latent", "padded", "whole queries", "attention of ours"],
)
@pytest.mark.parametrize("how", ["selective", "full"])
def test_a_model_computes_the_same_again(how: str, changes: dict[str, Any]) -> None:
    """A second turn of queries that were turned already would show."""
    if not ON_GPU and changes.get("attention") == "triton" and how == "full":
        pytest.skip("slow under the interpreter")
    plain_loss, plain = gradients(build("torch", "none", dict(changes)))
    once_loss, once = gradients(build("triton", "none", dict(changes)))
    loss, again = gradients(build("triton", how, dict(changes)))
    assert_equal(once_loss, plain_loss)
    assert_equal(loss, plain_loss)
    assert again.keys() == once.keys() == plain.keys()
    for name, expected in once.items():
        assert_equal(again[name], expected, name)
        assert distance(expected, plain[name]) < 1e-5, name
