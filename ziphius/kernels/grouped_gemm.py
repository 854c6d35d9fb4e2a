"""FP8 products of experts: each segment of rows meets the matrix of its own expert (facts 9.8).

Three forms: *contiguous*, segments one after the other; *masked*, room for the same number of rows
an expert, of which some count; and *along K*, the gradient of every expert's weight, which sums
over its segment. Segments need no padding; kernels pad to their own tiles inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.gemm import empty_product, factors, gemm_reference
from ziphius.kernels.quantize import Fp8, segment_starts, segments_of, tile_count


def grouped_gemm_reference(a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply ``counts[e]`` consecutive rows of ``a`` ``[M, K]`` by ``b[e]``: ``[M, N]``.

    ``a`` has tiles, ``b`` ``[E, N, K]`` blocks, ``sum(counts) == M``.
    """
    out_MN = torch.empty(len(a.codes), b.codes.shape[1], dtype=dtype, device=a.codes.device)
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = slice(start, start + count)
        start += count
        if count:
            part = Fp8(a.codes[rows], a.scales[rows])
            out_MN[rows] = gemm_reference(part, _matrix(b, expert), dtype)
    return out_MN


def masked_gemm_reference(a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the first ``counts[e]`` rows of ``a[e]`` by ``b[e]``: ``[E, M, N]``.

    ``a`` is ``[E, M, K]`` in tiles, ``b`` ``[E, N, K]`` in blocks. Other rows are left undefined.
    """
    experts, rows, _ = a.codes.shape
    out_EMN = torch.empty(experts, rows, b.codes.shape[1], dtype=dtype, device=a.codes.device)
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            part = Fp8(a.codes[expert, :count], a.scales[expert, :count])
            out_EMN[expert, :count] = gemm_reference(part, _matrix(b, expert), dtype)
    return out_EMN


def grouped_gemm_along_k_reference(a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over every segment of turned matrices ``a`` ``[N, S]``, ``b`` ``[K, S]``: ``[E, N, K]``.

    Segments lie as ``quantize.turn`` leaves them. An expert without rows gets zeros.
    """
    shape = (len(counts_E), len(a.codes), len(b.codes))
    out_ENK = torch.zeros(shape, dtype=dtype, device=a.codes.device)
    starts = segment_starts(counts_E).tolist()
    for expert, (start, count) in enumerate(zip(starts, counts_E.tolist(), strict=True)):
        if count:
            part_a, part_b = (_columns(q, start, count) for q in (a, b))
            out_ENK[expert] = gemm_reference(part_a, part_b, dtype)
    return out_ENK


def grouped_gemm_compiled(
    library: Library, a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Do what the reference does, all segments in one call; threads share blocks of rows."""
    (M, K), N = a.codes.shape, b.codes.shape[1]
    out_MN = empty_product(M, N, dtype=dtype)
    segments = segments_of(counts_E)
    library.call("fp8_gemm", out_MN.dtype, *factors(a, b), b.rows, out_MN, *segments, M, N, K)
    return out_MN.to(dtype)


def grouped_gemm_along_k_compiled(
    library: Library, a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Do what the reference does, all segments in one call; threads share blocks of gradients."""
    (N, S), K = a.codes.shape, len(b.codes)
    out_ENK = empty_product(len(counts_E), N, K, dtype=dtype)
    sizes = (*segments_of(counts_E), N, K, S)
    library.call("fp8_gemm_along_k", out_ENK.dtype, *factors(a, b), out_ENK, *sizes)
    return out_ENK.to(dtype)


def _matrix(q: Fp8, expert: int) -> Fp8:
    return Fp8(q.codes[expert], q.scales[expert], q.rows)


def _columns(q: Fp8, start: int, count: int) -> Fp8:
    first = tile_count(start)
    groups = slice(first, first + tile_count(count))
    return Fp8(q.codes[:, start : start + count], q.scales[:, groups])


Grouped = Callable[[Fp8, Fp8, Tensor, torch.dtype], Tensor]
VERSIONS: dict[str, Grouped] = {"reference": grouped_gemm_reference}
COMPILED = grouped_gemm_compiled
MASKED_VERSIONS: dict[str, Grouped] = {"reference": masked_gemm_reference}
ALONG_K_VERSIONS: dict[str, Grouped] = {"reference": grouped_gemm_along_k_reference}
ALONG_K_COMPILED = grouped_gemm_along_k_compiled
