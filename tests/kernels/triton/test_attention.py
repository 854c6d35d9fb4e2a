"""Causal attention: against the reference in float64, against torch's own, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.conftest import ON_GPU
from tests.kernels.triton.near import assert_near
from ziphius.kernels.attention import causal_attention_reference
from ziphius.kernels.e5m6 import TorchE5M6
from ziphius.kernels.kept import KeptOutput
from ziphius.kernels.triton.attention import Launch, Tiles, causal_attention_triton, parts

SMALL = Tiles(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1))
WIDTHS = [(16, 16), (24, 16), (48, 33), (5, 40), (40, 8), (192, 128)]  # d, v


def heads(B: int, H: int, T: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make ``[B, H, T, width]`` as projections leave it: a position's heads side by side."""
    return torch.randn(B, T, H, width).to(device, dtype).transpose(1, 2)


def documents(B: int, T: int, numbers: int, packed: bool) -> Tensor:
    """Number every position's document: rising and then padding, or in any order."""
    drawn_BT = torch.randint(0, numbers, (B, T))
    if not packed:
        return drawn_BT - 1
    drawn_BT = drawn_BT.sort(1).values
    drawn_BT[:, T - T // 5 :] = -1
    return drawn_BT


def check(
    q: Tensor, k: Tensor, v: Tensor, documents_BT: Tensor | None, tiles: Tiles | None = None
) -> None:
    """Compare result and gradients with the reference's in float64, on the same numbers."""
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    given_BT = None if documents_BT is None else documents_BT.to(q.device)
    out = causal_attention_triton(*ours, 0.3, given_BT, tiles=tiles)
    assert out.dtype == v.dtype
    dout = torch.randn_like(out)
    out.backward(dout)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = causal_attention_reference(*exact, 0.3, documents_BT)
    expected.backward(dout.cpu().double())
    assert_near(out, expected, v.dtype)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        # Of few keys one has nearly all the weight, and the gradient is a small difference, of
        # numbers that were rounded when stored.
        if theirs.shape[2] > (1 if v.dtype == torch.float32 else 8):
            assert_near(mine.grad, theirs.grad, v.dtype)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 45),
    st.sampled_from(WIDTHS[:-1]),
    st.sampled_from(["none", "packed", "any"]),
    st.integers(0, 10**6),
)
def test_result_and_gradients(
    device: torch.device,
    storage: torch.dtype,
    B: int,
    H: int,
    T: int,
    widths: tuple[int, int],
    kind: str,
    seed: int,
) -> None:
    """Ragged lengths and widths, heads strided, documents in order, in pieces or none."""
    torch.manual_seed(seed)
    q, k, v = (heads(B, H, T, w, storage, device) for w in (widths[0], widths[0], widths[1]))
    documents_BT = None if kind == "none" else documents(B, T, 4, kind == "packed")
    check(q, k, v, documents_BT, tiles=None if ON_GPU else SMALL)


@pytest.mark.parametrize("packed", [False, True])
def test_published_widths(device: torch.device, storage: torch.dtype, packed: bool) -> None:
    torch.manual_seed(3)
    T = 1000 if ON_GPU else 70
    q, k, v = (heads(1, 2, T, w, storage, device) for w in (192, 192, 128))
    check(q, k, v, documents(1, T, 5, True) if packed else None)


def test_whole_blocks(device: torch.device, storage: torch.dtype) -> None:
    """A length of whole blocks takes the way without masks."""
    torch.manual_seed(4)
    T = 512 if ON_GPU else 64
    q, k, v = (heads(2, 2, T, w, storage, device) for w in (48, 48, 32))
    check(q, k, v, None)
    check(q, k, v, documents(2, T, 9, True))


def test_it_is_torch_s_attention(device: torch.device, storage: torch.dtype) -> None:
    """Not against our own reference."""
    torch.manual_seed(5)
    q, k, v = (heads(2, 3, 45, 32, storage, device) for _ in range(3))
    found = causal_attention_triton(q, k, v, 32**-0.5)
    exact = (x.cpu().double() for x in (q, k, v))
    assert_near(found, F.scaled_dot_product_attention(*exact, is_causal=True), storage)


def test_the_first_query_has_the_first_value(device: torch.device, storage: torch.dtype) -> None:
    """So has the first of each document, bit for bit."""
    q, k, v = (heads(1, 2, 40, 16, storage, device) for _ in range(3))
    documents_BT = torch.arange(40).div(10, rounding_mode="floor").unsqueeze(0).to(device)
    out = causal_attention_triton(q, k, v, 1.0, documents_BT)
    assert torch.equal(out[:, :, ::10], v[:, :, ::10])


def test_skipped_blocks_are_not_read(device: torch.device, storage: torch.dtype) -> None:
    """A whole document of NaN does not show in the next one, nor in its gradients."""
    q, k, v = (heads(1, 1, 96, 16, storage, device) for _ in range(3))
    documents_BT = (torch.arange(96) >= 64).long().unsqueeze(0).to(device)
    k[:, :, :32] = v[:, :, :32] = float("nan")
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = causal_attention_triton(*inputs, 0.5, documents_BT, tiles=SMALL)
    assert out[:, :, :32].isnan().any()
    assert out[:, :, 64:].isfinite().all()
    out[:, :, 64:].sum().backward()
    assert all(x.grad is not None and x.grad[:, :, 64:].isfinite().all() for x in inputs)


def test_large_scores_do_not_overflow(device: torch.device, storage: torch.dtype) -> None:
    q, k, v = (heads(1, 1, 40, 16, storage, device) for _ in range(3))
    assert causal_attention_triton(q * 1e3, k * 1e3, v, 1.0).isfinite().all()


def test_equal_bits_every_time(device: torch.device, storage: torch.dtype) -> None:
    inputs = [heads(1, 2, 50, w, storage, device).requires_grad_() for w in (24, 24, 16)]
    results = []
    for _ in range(2):
        out = causal_attention_triton(*inputs, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing(device: torch.device, storage: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = [heads(*shape, 16, storage, device).requires_grad_() for _ in range(3)]
    out = causal_attention_triton(*inputs, 0.3)
    out.sum().backward()
    assert out.shape == (*shape, 16)


def test_columns_are_split_where_that_wastes_nothing() -> None:
    assert parts(192) == (128, 64)
    assert parts(128) == (128, 0)
    assert parts(24) == (16, 16)
    assert parts(5) == (16, 0)


@pytest.mark.parametrize("T", [40, 64])
def test_what_is_kept_of_the_output_is_read_in_backward(
    T: int, device: torch.device, storage: torch.dtype
) -> None:
    """Gradients are those of the reference that keeps the same twelve bits; padding is not kept."""
    torch.manual_seed(5)
    q, k, v = (heads(2, 3, T, w, storage, device) for w in (24, 24, 20))
    dout, results = torch.randn(2, T, 3, 20).transpose(1, 2), []
    for attend, where in (
        (causal_attention_triton, device),
        (causal_attention_reference, torch.device("cpu")),
    ):
        kept = KeptOutput(20, TorchE5M6())
        given = [x.detach().to(where).requires_grad_() for x in (q, k, v)]
        out = attend(*given, 0.3, None, kept)
        out.backward(dout.to(where, storage))
        assert kept.tensors[0].shape == (2, T, 90)  # 60 numbers of twelve bits
        results.append([out.detach(), *(x.grad for x in given)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        near = (ours.cpu() - theirs).norm() / theirs.norm()
        assert near < 2**-7, "an output near a tie of the twelve bits may round the other way"
