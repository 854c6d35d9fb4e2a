"""Attention over the paged latent cache: the reference by hand, the compiled kernels against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.weights import DTYPES, TOLERANCE, assert_near
from tests.support import latent_pages
from ziphius.kernels.attention import causal_attention_reference
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.latent import TILE, CompiledLatent, Latent, LatentPages, TorchLatent

WIDTHS = st.sampled_from([(1, 2), (5, 2), (16, 4), (40, 6), (64, 8), (128, 16), (70, 10)])  # C, R
STARTS = st.sampled_from([0, 1, 5, 31, 32, 33, 70])
SPANS = st.lists(st.tuples(STARTS, st.integers(1, 13)), min_size=1, max_size=3).map(
    lambda spans: [(start, start + count) for start, count in spans]
)


@pytest.fixture
def compiled(library: Library) -> CompiledLatent:
    return CompiledLatent(library)


@pytest.fixture(params=["torch", "compiled"])
def latent(request: pytest.FixtureRequest) -> Latent:
    if request.param == "torch":
        return TorchLatent()
    return CompiledLatent(request.getfixturevalue("library"))


def queries(cache: LatentPages, heads: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(len(cache.slots_N), heads, cache.pages.shape[-1]).to(dtype)


def only(cache: LatentPages, place: slice) -> LatentPages:
    """Return the same pages for some of the tokens."""
    return cache._replace(
        slots_N=cache.slots_N[place],
        sequence_N=cache.sequence_N[place],
        position_N=cache.position_N[place],
    )


def turns(N: int, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(dtype, torch.float32)
    angles_Nr = torch.rand(N, R // 2, dtype=high) * 6
    return angles_Nr.cos(), angles_Nr.sin()


# --- attention ------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2), st.integers(0, 10**6))
def test_it_is_attention_with_one_key_for_all_heads(
    library: Library, heads: int, length: int, first: int, seed: int
) -> None:
    """Keys are the rows whole, values their first numbers, both from ``first`` on."""
    torch.manual_seed(seed)
    C, R, end = 5, 2, length + first
    cache = latent_pages([(first, end)], C + R, torch.float64, first=first, seed=seed)
    q_NHc = queries(cache, heads, torch.float64)
    rows_Sc = cache.pages[cache.tables[0]].flatten(0, 1)[first:end]
    keys = rows_Sc.expand(1, heads, -1, -1)
    expected = causal_attention_reference(
        q_NHc.transpose(0, 1).unsqueeze(0), keys, keys[..., :C], 0.4
    )
    for latent in (TorchLatent(), CompiledLatent(library)):
        found_NHC = latent.attend(q_NHc, C, 0.4, cache)
        torch.testing.assert_close(found_NHC, expected[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(
    SPANS,
    st.sampled_from([1, 3, 12, 16]),
    WIDTHS,
    st.sampled_from([TILE, 2 * TILE]),
    st.integers(0, 1),
    st.integers(0, 10**6),
)
def test_compiled(
    library: Library,
    dtype: torch.dtype,
    spans: list[tuple[int, int]],
    heads: int,
    widths: tuple[int, int],
    page: int,
    first: int,
    seed: int,
) -> None:
    """Several sequences, pages in no order, rows that no key is: near the reference."""
    torch.manual_seed(seed)
    C, R = widths
    spans = [(start + first, end + first) for start, end in spans]
    cache = latent_pages(spans, C + R, dtype, page=page, first=first, seed=seed)
    q_NHc, compiled = queries(cache, heads, dtype), CompiledLatent(library)
    found_NHC = compiled.attend(q_NHc, C, 0.3, cache)
    assert_near(found_NHC, TorchLatent().attend(q_NHc, C, 0.3, cache), dtype, roundings=2)
    # A query's result is the same bits alone.
    for n in range(len(q_NHc)):
        place = slice(n, n + 1)
        alone_1HC = compiled.attend(q_NHc[place], C, 0.3, only(cache, place))
        assert torch.equal(alone_1HC[0], found_NHC[n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_pages_lie_does_not_show(compiled: CompiledLatent, dtype: torch.dtype) -> None:
    cache = latent_pages([(0, 100), (60, 65)], 70, dtype)
    q_NHc = queries(cache, 3, dtype)
    found_NHC = compiled.attend(q_NHc, 64, 0.3, cache)
    order_P = torch.randperm(len(cache.pages))
    moved = cache._replace(pages=cache.pages[order_P], tables=order_P.argsort()[cache.tables])
    assert torch.equal(compiled.attend(q_NHc, 64, 0.3, moved), found_NHC)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_show(compiled: CompiledLatent, threads: int) -> None:
    """They decide how many heads share a visit of the keys."""
    cache = latent_pages([(0, 40), (33, 34)], 72, torch.bfloat16)
    q_NHc = queries(cache, 16, torch.bfloat16)
    expected_NHC = compiled.attend(q_NHc, 64, 0.3, cache)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(compiled.attend(q_NHc, 64, 0.3, cache), expected_NHC)
    finally:
        torch.set_num_threads(before)


def test_sums_are_at_least_fp32(latent: Latent) -> None:
    """BF16 queries over a BF16 cache: rounded are the weights, and once the result."""
    cache = latent_pages([(299, 300)], 20, torch.bfloat16)
    q_NHc = queries(cache, 4, torch.bfloat16)
    found_NHC = latent.attend(q_NHc, 16, 0.1, cache)
    wide = cache._replace(pages=cache.pages.double())
    exact_NHC = TorchLatent().attend(q_NHc.double(), 16, 0.1, wide)
    assert found_NHC.dtype == torch.bfloat16
    # What the rounding of weights can do is a share of the values' size, not of their sum.
    size = wide.pages[..., :16].abs().mean()
    assert (found_NHC.double() - exact_NHC).abs().max() <= 2**-8 * (size + exact_NHC.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e3, 1e15])
def test_large_scores_are_finite(latent: Latent, dtype: torch.dtype, size: float) -> None:
    cache = latent_pages([(0, 40)], 20, dtype)
    found_NHC = latent.attend(queries(cache, 2, dtype) * size, 16, 1.0, cache)
    assert found_NHC.isfinite().all()


def test_later_rows_and_those_before_the_first_have_no_influence(latent: Latent) -> None:
    cache = latent_pages([(1, 3), (4, 5)], 9, torch.float32, first=1)
    q_NHc = queries(cache, 2, torch.float32)
    before_NHC = latent.attend(q_NHc, 7, 0.5, cache)
    rows = cache.pages.clone()
    for sequence, seen in ((0, 3), (1, 5)):
        rows[cache.tables[sequence, 0], 0] = 50
        rows[cache.tables[sequence, 0], seen:] = 50
    assert torch.equal(latent.attend(q_NHc, 7, 0.5, cache._replace(pages=rows)), before_NHC)


def test_a_page_of_broken_tiles_is_refused(compiled: CompiledLatent) -> None:
    cache = latent_pages([(0, 4)], 9, torch.float32, page=48)
    with pytest.raises(ValueError, match="whole tiles of 32 positions, not 48"):
        compiled.attend(queries(cache, 1, torch.float32), 7, 0.5, cache)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(SPANS, WIDTHS, st.integers(0, 10**6))
def test_rows_are_normed_turned_and_written_where_they_belong(
    library: Library,
    dtype: torch.dtype,
    spans: list[tuple[int, int]],
    widths: tuple[int, int],
    seed: int,
) -> None:
    """Rows whose slot is -1 are not written, and nothing else changes."""
    torch.manual_seed(seed)
    C, R = widths
    cache = latent_pages(spans, C + R, dtype, seed=seed)
    N = len(cache.slots_N)
    cache = cache._replace(slots_N=cache.slots_N.masked_fill(torch.rand(N) < 0.3, -1))
    kv_Nc, angles = torch.randn(N, C + R).to(dtype), turns(N, R, dtype)
    gain_C = 1 + 0.3 * torch.randn(C, dtype=angles[0].dtype)
    found = cache._replace(pages=cache.pages.clone())
    expected = cache._replace(pages=cache.pages.clone())
    CompiledLatent(library).append(kv_Nc, gain_C, 1e-6, angles, found)
    TorchLatent().append(kv_Nc, gain_C, 1e-6, angles, expected)
    written_N = cache.slots_N[cache.slots_N >= 0]
    ours, theirs = (c.pages.flatten(0, 1) for c in (found, expected))
    untouched = torch.ones(len(ours), dtype=torch.bool).index_fill(0, written_N, False)
    for rows in (ours, theirs):
        assert torch.equal(rows[untouched], cache.pages.flatten(0, 1)[untouched])
    torch.testing.assert_close(
        ours[written_N], theirs[written_N], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_a_row_by_hand(latent: Latent) -> None:
    """Facts 1.5: after the norm, after the rotation; the key goes round the norm."""
    cache = latent_pages([(0, 1)], 4, torch.float64)
    kv_Nc = torch.tensor([[3.0, 4.0, 1.0, 2.0]], dtype=torch.float64)
    angles = tuple(torch.tensor([[x]], dtype=torch.float64) for x in (0.6, 0.8))
    gain_C = torch.tensor([1.0, 2.0], dtype=torch.float64)
    latent.append(kv_Nc, gain_C, 0.0, angles, cache)
    root = 12.5**0.5
    expected = torch.tensor([3 / root, 8 / root, 0.6 - 1.6, 0.8 + 1.2], dtype=torch.float64)
    torch.testing.assert_close(cache.pages.flatten(0, 1)[cache.slots_N[0]], expected)


def test_gains_of_master_weights_are_not_rounded(latent: Latent) -> None:
    """A BF16 row under FP32 gains is rounded once, after the product."""
    cache = latent_pages([(0, 13)], 34, torch.bfloat16)
    kv_Nc, angles = torch.randn(13, 34).bfloat16(), turns(13, 2, torch.bfloat16)
    gain_C = 1 + torch.rand(32) * 2**-8
    latent.append(kv_Nc, gain_C, 1e-6, angles, cache)
    wide_NC = kv_Nc[:, :32].double()
    normed_NC = wide_NC / (wide_NC.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found_NC = cache.pages.flatten(0, 1)[cache.slots_N][:, :32].double()
    exact_NC = normed_NC * gain_C.double()
    assert ((found_NC - exact_NC).abs() <= exact_NC.abs() * 2**-8 * 1.001).all()


# --- queries and values ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(
    st.integers(1, 13),
    st.integers(1, 5),
    WIDTHS,
    st.sampled_from([1, 7, 32, 40]),
    st.integers(0, 10**6),
)
def test_queries_and_values(
    library: Library,
    dtype: torch.dtype,
    N: int,
    heads: int,
    widths: tuple[int, int],
    nope: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    C, R = widths
    q_NHd, angles = torch.randn(N, heads, nope + R).to(dtype), turns(N, R, dtype)
    keys_HCn = (torch.randn(heads, C, nope) * nope**-0.5).to(dtype)
    values_HvC = (torch.randn(heads, nope + 2, C) * C**-0.5).to(dtype)
    compiled, plain = CompiledLatent(library), TorchLatent()
    found_NHc = compiled.queries(q_NHd, keys_HCn, angles)
    assert_near(found_NHc, plain.queries(q_NHd, keys_HCn, angles), dtype)
    z_NHC = torch.randn(N, heads, C).to(dtype)
    found_NHv = compiled.values(z_NHC, values_HvC)
    assert_near(found_NHv, plain.values(z_NHC, values_HvC), dtype)
    for n in range(N):
        place = slice(n, n + 1)
        own: Any = tuple(turn[place] for turn in angles)
        assert torch.equal(compiled.queries(q_NHd[place], keys_HCn, own)[0], found_NHc[n])
        assert torch.equal(compiled.values(z_NHC[place], values_HvC)[0], found_NHv[n])


def test_inputs_stay_what_they_are(latent: Latent) -> None:
    cache = latent_pages([(0, 3)], 9, torch.float32)
    q_NHc, before = queries(cache, 2, torch.float32), cache.pages.clone()
    given_NHc = q_NHc.clone()
    latent.attend(q_NHc, 7, 0.3, cache)
    latent.queries(q_NHc, torch.randn(2, 3, 7), turns(3, 2, torch.float32))
    assert torch.equal(q_NHc, given_NHc)
    assert torch.equal(cache.pages, before)


def test_a_cache_keeps_no_graph() -> None:
    cache = latent_pages([(0, 3)], 9, torch.float32)
    kv_Nc = torch.randn(3, 9, requires_grad=True)
    TorchLatent().append(kv_Nc, torch.ones(7), 1e-6, turns(3, 2, torch.float32), cache)
    assert not cache.pages.requires_grad


def test_gradients_are_refused_where_they_would_be_lost(compiled: CompiledLatent) -> None:
    cache, angles = latent_pages([(0, 3)], 9, torch.float32), turns(3, 2, torch.float32)
    with pytest.raises(RuntimeError, match="no backward"):
        compiled.append(torch.randn(3, 9, requires_grad=True), torch.ones(7), 1e-6, angles, cache)
    with pytest.raises(RuntimeError, match="no backward"):
        compiled.queries(torch.randn(3, 2, 9, requires_grad=True), torch.randn(2, 3, 7), angles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [9, 64])
def test_what_lies_before_the_first_key_may_be_anything(
    latent: Latent, dtype: torch.dtype, width: int
) -> None:
    """The MTP layer never writes its first row: an earlier holder may have left NaN there."""
    cache = latent_pages([(1, 3), (30, 40)], width + 8, dtype, first=1)
    q_NHc = queries(cache, 2, dtype)
    before_NHC = latent.attend(q_NHc, width, 0.5, cache)
    rows = cache.pages.clone()
    for sequence in (0, 1):
        rows[cache.tables[sequence, 0], 0] = float("nan")
    after_NHC = latent.attend(q_NHc, width, 0.5, cache._replace(pages=rows))
    assert torch.equal(after_NHC, before_NHC)
    assert after_NHC.isfinite().all()
