"""FP8 products of experts in Triton: segments of any length, with room, and along K."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.triton.conftest import ON_GPU
from tests.kernels.triton.products import close, exact, on
from ziphius.kernels.quantize import (
    Fp8,
    quantize_blocks,
    quantize_tiles,
    segment_starts,
    turn,
    turned_width,
)
from ziphius.kernels.triton.gemm import TILES_CANDIDATES
from ziphius.kernels.triton.grouped_gemm import (
    CANDIDATES,
    grouped_gemm_along_k_triton,
    grouped_gemm_triton,
    masked_gemm_triton,
    rows_config,
)
from ziphius.kernels.triton.product import Config
from ziphius.kernels.triton.tiles import groups_of_segments, tiles_of_rows

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
COUNTS = st.lists(st.sampled_from([0, 0, 1, 3, 64, 65, 128, 129]), min_size=1, max_size=5)
# A length that makes every kind of tile: whole ones, a rest, one row, none, none at the end.
SEGMENTS = [300, 0, 1, 128, 65, 0]


def matrices(counts: list[int], N: int, K: int) -> tuple[Tensor, Fp8, Tensor]:
    """Return rows, the experts' matrices and counts; experts differ in size, so none is another."""
    generator = torch.Generator().manual_seed(sum(counts) + N)
    x = torch.randn(sum(counts), K, generator=generator)
    w = torch.randn(len(counts), N, K, generator=generator)
    w *= torch.arange(1, len(counts) + 1)[:, None, None]
    return x, on(DEVICE, quantize_blocks(w)), torch.tensor(counts, device=DEVICE)


def rows_of(b: Fp8, expert: int) -> Fp8:
    return Fp8(b.codes[expert], b.scales[expert], b.rows)


def check_segments(counts: list[int], N: int, K: int, chosen: Config | None = None) -> None:
    x, b, counts_E = matrices(counts, N, K)
    a = on(DEVICE, quantize_tiles(x))
    out = grouped_gemm_triton(a, b, counts_E, torch.float32, config=chosen)
    assert out.shape == (sum(counts), N)
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        right = exact(Fp8(a.codes[part], a.scales[part]), rows_of(b, expert))
        assert close(out[part], right)


@settings(max_examples=10, deadline=None)
@given(counts=COUNTS, N=st.integers(1, 150), K=st.integers(1, 200))
def test_segments_of_any_length(counts: list[int], N: int, K: int) -> None:
    check_segments(counts, N, K)


@pytest.mark.parametrize("chosen", CANDIDATES if ON_GPU else CANDIDATES[-2:], ids=str)
def test_every_candidate_of_segments(chosen: Config) -> None:
    check_segments(SEGMENTS, 200, 272, chosen)


@pytest.mark.parametrize("counts", [[0, 70, 3], [70, 70, 70], [0, 0, 0]])
@pytest.mark.parametrize("chosen", CANDIDATES if ON_GPU else CANDIDATES[-1:], ids=str)
def test_room_for_every_expert(counts: list[int], chosen: Config) -> None:
    room, N, K = 70, 140, 144
    _, b, counts_E = matrices(counts, N, K)
    x = torch.randn(3, room, K, generator=torch.Generator().manual_seed(2))
    a = on(DEVICE, quantize_tiles(x))
    out = masked_gemm_triton(a, b, counts_E, torch.float32, config=chosen)
    assert out.shape == (3, room, N)
    for expert, count in enumerate(counts):
        part = Fp8(a.codes[expert, :count], a.scales[expert, :count])
        assert close(out[expert, :count], exact(part, rows_of(b, expert)))


def check_along_k(counts: list[int], N: int, K: int, chosen: Config | None = None) -> None:
    generator = torch.Generator().manual_seed(N)
    counts_E = torch.tensor(counts)
    x, y = (torch.randn(sum(counts), width, generator=generator) for width in (N, K))
    a, b = (on(DEVICE, turn(z, counts_E)) for z in (x, y))
    out = grouped_gemm_along_k_triton(a, b, counts_E.to(DEVICE), torch.float32, config=chosen)
    assert out.shape == (len(counts), N, K)
    for expert, (start, count) in enumerate(
        zip(segment_starts(counts_E).tolist(), counts, strict=True)
    ):
        columns, groups = (
            slice(start, start + count),
            slice(start // 128, -(-(start + count) // 128)),
        )
        parts = (Fp8(q.codes[:, columns], q.scales[:, groups]) for q in (a, b))
        right = exact(*parts) if count else torch.zeros(N, K, dtype=torch.float64)
        assert close(out[expert], right)


@settings(max_examples=10, deadline=None)
@given(counts=COUNTS.filter(any), N=st.integers(1, 150), K=st.integers(1, 150))
def test_sums_over_segments(counts: list[int], N: int, K: int) -> None:
    check_along_k(counts, N, K)


@pytest.mark.parametrize("chosen", TILES_CANDIDATES if ON_GPU else TILES_CANDIDATES[-1:], ids=str)
def test_every_candidate_along_k(chosen: Config) -> None:
    check_along_k(SEGMENTS, 200, 144, chosen)


def test_an_expert_that_is_not_finite_spoils_no_other(device: torch.device) -> None:
    x, b, counts_E = matrices([3, 2, 4], 20, 130)
    b.scales[1, 0, 1] = float("nan")
    out = grouped_gemm_triton(on(device, quantize_tiles(x)), b, counts_E, torch.float32).cpu()
    assert out[3:5].isnan().all()
    assert out[:3].isfinite().all()
    assert out[5:].isfinite().all()


@pytest.mark.parametrize(("stride", "first"), [(0, [0, 64, 67, 131]), (80, [0, 64, 160, 224])])
def test_table_of_tiles(stride: int, first: list[int], device: torch.device) -> None:
    counts_E = torch.tensor([67, 0, 65], device=device)
    table, total = tiles_of_rows(counts_E, 5, 64, stride)
    assert total.item() == 4
    experts, rows, ends = table[:4].T.tolist()
    assert experts == [0, 0, 2, 2]
    assert rows == first
    assert ends == [67, 67, first[2] + 65, first[2] + 65]


def test_table_of_groups(device: torch.device) -> None:
    counts = [0, 1, 128, 129, 0]
    table = groups_of_segments(torch.tensor(counts, device=device))
    assert table.tolist() == [[0, 0], [0, 1], [1, 2], [2, 4], [4, 4]]
    assert turned_width(sum(counts), len(counts)) >= 4 * 128


def test_choice_is_by_shape() -> None:
    assert rows_config(32768, 4096, 4).engine == "pairs"
    assert rows_config(256, 4096, 8).engine == "plain"
