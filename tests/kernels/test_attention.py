"""Causal attention: versions against each other, against loops, and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.attention import (
    VERSIONS,
    WANT_EQUAL_WIDTHS,
    causal_attention_reference,
    equal_widths,
)

SHAPES = [(2, 3, 7, 6, 4), (1, 1, 1, 2, 2), (2, 2, 9, 4, 11), (1, 4, 16, 8, 8)]  # B H T d v


def qkv(
    B: int, H: int, T: int, d: int, v: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, B, H, T, d, dtype=torch.float64).to(dtype)
    return q, k, torch.randn(B, H, T, v, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_by_hand(shape: tuple[int, ...]) -> None:
    """Every query alone, over the keys up to its own (report eq. 10)."""
    q, k, v = qkv(*shape)
    out = causal_attention_reference(q, k, v, 0.37)
    assert out.shape == v.shape
    for b, h, t in itertools.product(*map(range, shape[:3])):
        scores = torch.tensor([0.37 * (q[b, h, t] @ k[b, h, s]).item() for s in range(t + 1)])
        weights = (scores.double() - scores.max()).exp()
        expected = (weights / weights.sum()) @ v[b, h, : t + 1]
        torch.testing.assert_close(out[b, h, t], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_versions_equal_the_reference(version: str, shape: tuple[int, ...]) -> None:
    q, k, v = qkv(*shape)
    out = VERSIONS[version](q, k, v, 0.37)
    torch.testing.assert_close(out, causal_attention_reference(q, k, v, 0.37))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_versions_in_lower_precision(version: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 3, 40, 6, 4, dtype)
    out = VERSIONS[version](q, k, v, 0.5)
    expected = causal_attention_reference(q.double(), k.double(), v.double(), 0.5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("d", "v"), [(4, 2), (2, 4), (3, 3)])
def test_gradients(version: str, d: int, v: int) -> None:
    inputs = [x.requires_grad_() for x in qkv(1, 2, 4, d, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: VERSIONS[version](q, k, v, 0.6), inputs)


@pytest.mark.parametrize("version", VERSIONS)
def test_large_scores_do_not_overflow(version: str) -> None:
    q, k, v = qkv(1, 1, 6, 4, 4, torch.float32)
    assert VERSIONS[version](q * 1e3, k * 1e3, v, 1.0).isfinite().all()


# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
def test_queries_see_the_earlier_keys_of_their_document(
    version: str, numbers: int, T: int, seed: int
) -> None:
    """One query after the other over the keys it may see, documents in pieces included."""
    torch.manual_seed(seed)
    q, k, v = qkv(2, 2, T, 4, 3)
    documents_BT = torch.randint(-1, numbers, (2, T))
    out = VERSIONS[version](q, k, v, 0.7, documents_BT)
    for b, t in itertools.product(range(2), range(T)):
        seen = [s for s in range(t + 1) if documents_BT[b, s] == documents_BT[b, t]]
        scores_Hs = 0.7 * torch.einsum("hd,hsd->hs", q[b, :, t], k[b, :, seen])
        expected = torch.einsum("hs,hsv->hv", scores_Hs.softmax(-1), v[b, :, seen])
        torch.testing.assert_close(out[b, :, t], expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_inside_documents(version: str) -> None:
    inputs = [x.requires_grad_() for x in qkv(2, 2, 5, 4, 3)]
    documents_BT = torch.tensor([[0, 0, 1, 1, 1], [4, 2, 2, -1, -1]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: VERSIONS[version](q, k, v, 0.6, documents_BT), inputs
    )


# --- equal widths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "v"), [(4, 2), (2, 4), (3, 3)])
def test_padding_to_equal_widths_changes_nothing(d: int, v: int) -> None:
    inputs = qkv(1, 2, 5, d, v)
    padded = equal_widths(*inputs)
    assert {x.shape[-1] for x in padded} == {max(d, v)}
    for before, after in zip(inputs, padded, strict=True):
        width = before.shape[-1]
        assert torch.equal(after[..., :width], before)
        assert not after[..., width:].any()
    out = causal_attention_reference(*padded, 0.4)
    torch.testing.assert_close(out[..., :v], causal_attention_reference(*inputs, 0.4))


def test_versions_that_pad_are_versions() -> None:
    assert set(VERSIONS) >= WANT_EQUAL_WIDTHS
