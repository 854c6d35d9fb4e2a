"""The paged latent cache: attention split and merged, shared by neighbours; rows and queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.near import assert_near
from tests.support import latent_pages
from ziphius.kernels.attention import causal_attention_reference
from ziphius.kernels.latent import LatentPages, TorchLatent
from ziphius.kernels.triton.latent import (
    Launch,
    Launches,
    TritonLatent,
    choose_launches,
    split_count,
    tile_of,
)

WIDTHS = st.sampled_from([(16, 4), (48, 8), (40, 6), (64, 16), (5, 2)])  # C, R
STARTS = st.sampled_from([0, 1, 15, 31, 33, 70, 300])
SPANS = st.lists(st.tuples(STARTS, st.integers(1, 5)), min_size=1, max_size=3).map(
    lambda spans: [(start, start + count) for start, count in spans]
)
# Both orders of the product, whatever is chosen by the number of rows.
KEYS_FIRST = Launch(16, 4, 2, 264, True)
ROWS_FIRST = Launch(16, 4, 2, 264, False)
ORDERS = [*(Launches(order, order) for order in (KEYS_FIRST, ROWS_FIRST)), None]


def on(cache: LatentPages, device: torch.device) -> LatentPages:
    """Move to where kernels run."""
    return LatentPages(*(x.to(device) for x in cache[:5]), cache.first)


def exact(q_NHc: Tensor, C: int, scale: float, cache: LatentPages) -> Tensor:
    """Attend in float64 by the reference."""
    wide = on(cache, torch.device("cpu"))
    wide = wide._replace(pages=wide.pages.double())
    return TorchLatent().attend(q_NHc.cpu().double(), C, scale, wide)


def ruin(cache: LatentPages, spans: list[tuple[int, int]]) -> None:
    """Put NaN into all rows that are no key of any sequence."""
    page = cache.pages.shape[1]
    keys = torch.zeros(cache.pages.shape[:2], dtype=torch.bool).flatten()
    for number, (_, end) in enumerate(spans):
        at = torch.arange(cache.first, end)
        keys[cache.tables[number][at // page] * page + at % page] = True
    cache.pages.flatten(0, 1)[~keys] = float("nan")


def turns(N: int, R: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles_Nr = torch.rand(N, R // 2, device=device) * 6
    return angles_Nr.cos(), angles_Nr.sin()


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("launches", ORDERS)
@settings(max_examples=8, deadline=None)
@given(
    SPANS,
    st.sampled_from([1, 3, 16, 70]),
    WIDTHS,
    st.sampled_from([8, 32, 64]),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
def test_attention(
    device: torch.device,
    storage: torch.dtype,
    launches: Launches | None,
    spans: list[tuple[int, int]],
    heads: int,
    widths: tuple[int, int],
    page: int,
    first: int,
    seed: int,
) -> None:
    """Several sequences and queries, pages in no order; what is no key is NaN."""
    torch.manual_seed(seed)
    C, R = widths
    spans = [(start + first, end + first) for start, end in spans]
    cache = latent_pages(spans, C + R, storage, page=page, first=first, seed=seed)
    ruin(cache, spans)
    cache = on(cache, device)
    q_NHc = torch.randn(len(cache.slots_N), heads, C + R).to(device, storage)
    found_NHC = TritonLatent(launches).attend(q_NHc, C, 0.3, cache)
    assert found_NHC.dtype == storage
    assert_near(found_NHC, exact(q_NHc, C, 0.3, cache), storage)


@pytest.mark.parametrize("launches", ORDERS)
@pytest.mark.parametrize("starts", [(5, 34, 90), (0, 0, 0), (299, 16, 1)])
def test_two_queries_a_sequence(
    device: torch.device,
    storage: torch.dtype,
    launches: Launches | None,
    starts: tuple[int, ...],
) -> None:
    """MTP's: the second sees one row more than the first, and they share a program."""
    cache = on(latent_pages([(s, s + 2) for s in starts], 72, storage, page=64), device)
    q_NHc = torch.randn(6, 16, 72).to(device, storage)
    assert tile_of(6, 16, len(cache.tables)) == (2, 16)
    found_NHC = TritonLatent(launches).attend(q_NHc, 64, 0.3, cache)
    assert_near(found_NHC, exact(q_NHc, 64, 0.3, cache), storage)


def test_a_chunk_beside_single_tokens(device: torch.device, storage: torch.dtype) -> None:
    """Groups begin where a sequence does, behind more than a look back as well."""
    spans = [(7, 8), (20, 161), (40, 41), (0, 3)]
    cache = on(latent_pages(spans, 24, storage), device)
    q_NHc = torch.randn(len(cache.slots_N), 2, 24).to(device, storage)
    assert tile_of(len(q_NHc), 2, 4)[0] == 32
    found_NHC = TritonLatent().attend(q_NHc, 16, 0.3, cache)
    assert_near(found_NHC, exact(q_NHc, 16, 0.3, cache), storage)


def test_it_is_attention_with_one_key_for_all_heads(
    device: torch.device, storage: torch.dtype
) -> None:
    """Not against the reference of the cache: keys are the rows whole, values their start."""
    cache = on(latent_pages([(0, 40)], 72, storage), device)
    q_NHc = torch.randn(40, 3, 72).to(device, storage)
    rows_Sc = cache.pages[cache.tables[0]].flatten(0, 1)[:40].cpu().double()
    keys = rows_Sc.expand(1, 3, -1, -1)
    q_1HNc = q_NHc.cpu().double().transpose(0, 1).unsqueeze(0)
    expected = causal_attention_reference(q_1HNc, keys, keys[..., :64], 0.2)
    found_NHC = TritonLatent().attend(q_NHc, 64, 0.2, cache)
    assert_near(found_NHC, expected[0].transpose(0, 1), storage)


def test_published_widths(device: torch.device, storage: torch.dtype) -> None:
    """Long and short sequences together, so that some parts of the split are empty."""
    lengths = [1500, 3] if device.type == "cpu" else [4096, 3, 1, 2000]
    cache = latent_pages([(n - 1, n) for n in lengths], 576, storage, page=64)
    cache = on(cache, device)
    q_NHc = torch.randn(len(lengths), 16, 576).to(device, storage)
    found_NHC = TritonLatent().attend(q_NHc, 512, 0.1, cache)
    assert_near(found_NHC, exact(q_NHc, 512, 0.1, cache), storage)


def test_tables_may_be_wider_than_any_sequence(device: torch.device, storage: torch.dtype) -> None:
    """Padding of the tables is not followed: it names pages that do not exist."""
    cache = latent_pages([(40, 41), (3, 4)], 24, storage)
    wide = torch.full((5, 64), 10**9)
    wide[:2, :2] = cache.tables
    wide[1, 1:] = 10**9
    wide_cache = on(cache._replace(tables=wide), device)
    q_NHc = torch.randn(2, 4, 24).to(device, storage)
    found_NHC = TritonLatent().attend(q_NHc, 16, 0.3, wide_cache)
    assert_near(found_NHC, exact(q_NHc, 16, 0.3, cache), storage)


@pytest.mark.parametrize("size", [1e3, 1e15])
def test_large_scores_are_finite(device: torch.device, storage: torch.dtype, size: float) -> None:
    cache = on(latent_pages([(0, 40)], 20, storage), device)
    q_NHc = torch.randn(40, 2, 20).to(device, storage) * size
    assert TritonLatent().attend(q_NHc, 16, 1.0, cache).isfinite().all()


def test_how_work_is_cut() -> None:
    assert tile_of(64, 16, 64) == (1, 16)
    assert tile_of(128, 16, 64) == (2, 16)
    assert tile_of(4096, 16, 4) == (4, 16)
    assert tile_of(64, 128, 64) == (1, 64)
    assert tile_of(3, 2, 3) == (1, 16)
    assert split_count(64, 4096, 264) == 4
    assert split_count(64, 512, 264) == 2
    assert split_count(500, 4096, 264) == 1
    assert split_count(1, 10, 264) == 1


# --- rows and queries -----------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(SPANS, WIDTHS, st.integers(0, 10**6))
def test_rows_are_normed_turned_and_written_where_they_belong(
    device: torch.device,
    storage: torch.dtype,
    spans: list[tuple[int, int]],
    widths: tuple[int, int],
    seed: int,
) -> None:
    """Rows whose slot is -1 are not written, and nothing else changes."""
    torch.manual_seed(seed)
    C, R = widths
    cache = latent_pages(spans, C + R, storage, seed=seed)
    N = len(cache.slots_N)
    slots_N = cache.slots_N.masked_fill(torch.rand(N) < 0.3, -1)
    cache = on(cache._replace(slots_N=slots_N), device)
    # A slice of wider rows, as a product of several matrices leaves it.
    kv_Nc = torch.randn(N, C + R + 3).to(device, storage)[:, : C + R]
    angles, gain_C = turns(N, R, device), 1 + 0.3 * torch.randn(C, device=device)
    found = cache._replace(pages=cache.pages.clone())
    TritonLatent().append(kv_Nc, gain_C, 1e-6, angles, found)
    expected = cache._replace(pages=cache.pages.double())
    wide = tuple(angle.double() for angle in angles)
    TorchLatent().append(kv_Nc.double(), gain_C.double(), 1e-6, wide, expected)
    written = torch.zeros(found.pages.shape[:2], dtype=torch.bool, device=device)
    written.view(-1)[cache.slots_N[cache.slots_N >= 0]] = True
    assert torch.equal(found.pages[~written], cache.pages[~written])
    assert_near(found.pages[written], expected.pages[written], storage)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 13),
    st.integers(1, 5),
    WIDTHS,
    st.sampled_from([1, 7, 32]),
    st.integers(0, 10**6),
)
def test_queries_and_values(
    device: torch.device,
    storage: torch.dtype,
    N: int,
    heads: int,
    widths: tuple[int, int],
    nope: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    C, R = widths
    q_NHd, angles = torch.randn(N, heads, nope + R).to(device, storage), turns(N, R, device)
    keys_HCn = torch.randn(heads, C, nope).to(device, storage)
    values_HvC = torch.randn(heads, nope + 2, C).to(device, storage)
    found_NHc = TritonLatent().queries(q_NHd, keys_HCn, angles)
    wide = tuple(angle.double() for angle in angles)
    expected = TorchLatent().queries(q_NHd.double(), keys_HCn.double(), wide)
    assert found_NHc.dtype == storage
    assert_near(found_NHc, expected, storage)
    z_NHC = torch.randn(N, heads, C).to(device, storage)
    found_NHv = TritonLatent().values(z_NHC, values_HvC)
    assert_near(found_NHv, TorchLatent().values(z_NHC.double(), values_HvC.double()), storage)


def test_no_tokens(device: torch.device, storage: torch.dtype) -> None:
    cache = on(latent_pages([(3, 4)], 24, storage), device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    cache = cache._replace(slots_N=none, sequence_N=none, position_N=none)
    latent, before = TritonLatent(), cache.pages.clone()
    kv_Nc, gain_C = torch.empty(0, 24).to(device, storage), torch.ones(16, device=device)
    latent.append(kv_Nc, gain_C, 1e-6, turns(0, 8, device), cache)
    assert torch.equal(cache.pages, before)
    assert latent.attend(torch.empty(0, 2, 24).to(device, storage), 16, 1.0, cache).numel() == 0


def test_gradients_are_refused_where_they_would_be_lost(
    device: torch.device, storage: torch.dtype
) -> None:
    cache = on(latent_pages([(0, 3)], 24, storage), device)
    q_NHc = torch.randn(3, 2, 24).to(device, storage).requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        TritonLatent().attend(q_NHc, 16, 1.0, cache)


def test_pages_have_whole_blocks() -> None:
    """Where one can be had, that is; the published page has 64 rows, ours 32."""
    for page in (32, 64, 128):
        assert all(page % launch.met == 0 for launch in choose_launches(torch.bfloat16, page))
