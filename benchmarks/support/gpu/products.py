"""FP8 products of linear layers and of experts, at the report's shapes (facts 9.8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from support.gpu import torch_products as peers
from support.gpu.entry import OURS, PLAIN, Entry, Place, Version
from ziphius.kernels import gemm, grouped_gemm
from ziphius.kernels.quantize import (
    Fp8,
    dequantize,
    quantize_blocks,
    quantize_tiles,
    segment_starts,
    turn,
    turned_width,
)


@dataclass(frozen=True)
class Sizes:
    """``(N, K)`` and rows of dense products; experts, rows each and ``(N, K)`` of grouped ones."""

    shapes: Sequence[tuple[int, int]]
    rows: Sequence[int]
    expert_shapes: Sequence[tuple[int, int]]
    contiguous: Sequence[tuple[int, int]]
    masked: Sequence[tuple[int, int]]


FULL = Sizes(
    shapes=((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)),
    rows=(4096, 128, 64, 8192),
    expert_shapes=((4096, 7168), (7168, 2048)),
    contiguous=((4, 8192), (8, 4096)),
    masked=((1, 1024), (2, 512), (4, 256)),
)
SMALL = Sizes(((512, 512),), (64,), ((256, 512),), ((4, 64),), ((2, 32),))
TOY = Sizes(((136, 200),), (33,), ((72, 136),), ((3, 40),), ((2, 24),))


class Operands(NamedTuple):
    """Two matrices in FP8, and the rows of every expert where there are any."""

    a: Fp8
    b: Fp8
    counts_E: Tensor | None = None


def bound_of(place: Place) -> float:
    """Return what products may be off: sums in another order, results in the storage's dtype."""
    return 1e-2 if place.storage == torch.bfloat16 else 1e-5


def dense(place: Place, sizes: Sizes) -> list[Entry]:
    """Return the products of linear layers."""
    pairs = ((M, N, K) for M in sizes.rows for N, K in sizes.shapes)
    return [_dense(place, M, N, K) for M, N, K in pairs]


def _dense(place: Place, M: int, N: int, K: int) -> Entry:
    def make(generator: Generator) -> Operands:
        x_MK = place.outliers(generator, M, K)
        w_NK = place.normal(generator, N, K) * 0.02
        return Operands(quantize_tiles(x_MK), quantize_blocks(w_NK))

    def ours(x: Operands) -> Tensor:
        from ziphius.kernels.triton.gemm import gemm_triton

        return gemm_triton(x.a, x.b, place.storage)

    return Entry(
        section="gemm",
        name=f"M {M}, N {N}, K {K}",
        make=make,
        reference=lambda x: dequantize(x.a, torch.float64) @ dequantize(x.b, torch.float64).T,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: gemm.gemm_reference(x.a, x.b, place.storage)),
        peers=peers.dense(place),
        # One of torch's products wants whole blocks of columns.
        answer=lambda x, result: (result[:, :N],),
        flops=2.0 * M * N * K,
        nbytes=_bytes(M, K) + _bytes(N, K, blocks=True) + 2 * M * N,
        peak="fp8",
        bound=bound_of(place),
        goal=(peers.BF16, 1.5) if M >= 4096 else None,
    )


def grouped(place: Place, sizes: Sizes) -> list[Entry]:
    """Return the three forms of the experts' products."""
    entries = []
    for E, each in sizes.contiguous:
        entries += [_contiguous(place, E, each, N, K) for N, K in sizes.expert_shapes]
    for E, each in sizes.masked:
        entries += [_masked(place, E, each, N, K) for N, K in sizes.expert_shapes]
    for E, each in sizes.contiguous:
        entries += [_along_k(place, E, each, N, K) for N, K in sizes.expert_shapes]
    return entries


def uneven(total: int, E: int) -> list[int]:
    """Share rows out between 0.7 and 1.3 of the mean, to no multiple of a tile, as routing does."""
    shares = [1 + 0.3 * math.cos(2.4 * e) for e in range(E)]
    counts = [math.floor(total * share / sum(shares)) for share in shares]
    counts[0] += total - sum(counts)
    return counts


def _counts(place: Place, total: int, E: int) -> Tensor:
    return torch.tensor(uneven(total, E), dtype=torch.int64, device=place.device)


def _weights(place: Place, generator: Generator, E: int, N: int, K: int) -> Fp8:
    """Quantise one expert at a time: all in FP32 at once would be large."""
    parts = [quantize_blocks(place.normal(generator, N, K) * 0.02) for _ in range(E)]
    return Fp8(torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts]), 128)


def _contiguous(place: Place, E: int, each: int, N: int, K: int) -> Entry:
    M = E * each

    def make(generator: Generator) -> Operands:
        x_MK = place.outliers(generator, M, K)
        weights = _weights(place, generator, E, N, K)
        return Operands(quantize_tiles(x_MK), weights, _counts(place, M, E))

    def reference(x: Operands) -> Tensor:
        rows = dequantize(x.a, torch.float64).split(uneven(M, E))
        parts = (
            part @ dequantize(Fp8(x.b.codes[e], x.b.scales[e], 128), torch.float64).T
            for e, part in enumerate(rows)
        )
        return torch.cat(list(parts))

    def ours(x: Operands) -> Tensor:
        from ziphius.kernels.triton.grouped_gemm import grouped_gemm_triton

        return grouped_gemm_triton(*x, place.storage)

    return Entry(
        section="grouped",
        name=f"contiguous {E} x {each}, N {N}, K {K}",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: grouped_gemm.grouped_gemm_reference(*x, place.storage)),
        peers=peers.contiguous(place),
        flops=2.0 * M * N * K,
        nbytes=_bytes(M, K) + E * _bytes(N, K, blocks=True) + 2 * M * N,
        peak="fp8",
        bound=bound_of(place),
    )


def _masked(place: Place, E: int, each: int, N: int, K: int) -> Entry:
    """Room for twice the rows that come on average."""
    room, counts = 2 * each, uneven(E * each, E)

    def make(generator: Generator) -> Operands:
        x_EMK = place.outliers(generator, E, room, K)
        weights = _weights(place, generator, E, N, K)
        return Operands(quantize_tiles(x_EMK), weights, _counts(place, E * each, E))

    def reference(x: Operands) -> Tensor:
        wide_EMK, wide_ENK = (dequantize(q, torch.float64) for q in (x.a, x.b))
        parts = (wide_EMK[e, :count] @ wide_ENK[e].T for e, count in enumerate(counts))
        return torch.cat(list(parts))

    def answer(x: Operands, result: Tensor) -> Sequence[Tensor]:
        if result.ndim == 2:
            return (result,)
        return (torch.cat([rows[:count] for rows, count in zip(result, counts, strict=True)]),)

    def ours(x: Operands) -> Tensor:
        from ziphius.kernels.triton.grouped_gemm import masked_gemm_triton

        return masked_gemm_triton(*x, place.storage)

    M = E * each
    return Entry(
        section="grouped",
        name=f"masked {E} x {each}, N {N}, K {K}",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: grouped_gemm.masked_gemm_reference(*x, place.storage)),
        peers=peers.masked(place, counts),
        answer=answer,
        flops=2.0 * M * N * K,
        nbytes=_bytes(M, K) + E * _bytes(N, K, blocks=True) + 2 * M * N,
        peak="fp8",
        bound=bound_of(place),
    )


class Turned(NamedTuple):
    """Both operands of a weight's gradient, turned, the rows they were, and their segments."""

    dy: Fp8
    x: Fp8
    dy_MN: Tensor
    x_MK: Tensor
    counts_E: Tensor


def _along_k(place: Place, E: int, each: int, N: int, K: int) -> Entry:
    """The gradients of all experts' weights, in FP32."""
    M = E * each
    counts = uneven(M, E)

    def make(generator: Generator) -> Turned:
        dy_MN, x_MK = place.normal(generator, M, N), place.outliers(generator, M, K)
        counts_E = _counts(place, M, E)
        return Turned(turn(dy_MN, counts_E), turn(x_MK, counts_E), dy_MN, x_MK, counts_E)

    def reference(x: Turned) -> Tensor:
        starts = segment_starts(x.counts_E).tolist()
        out_ENK = torch.empty(E, N, K, dtype=torch.float64, device=place.device)
        for expert, (start, count) in enumerate(zip(starts, counts, strict=True)):
            # What the last group of a segment has no row for is zero.
            columns = slice(start, -(-(start + count) // 128) * 128)
            groups = slice(start // 128, columns.stop // 128)
            dy_NS, x_KS = (
                dequantize(Fp8(q.codes[:, columns], q.scales[:, groups]), torch.float64)
                for q in (x.dy, x.x)
            )
            out_ENK[expert] = dy_NS @ x_KS.T
        return out_ENK

    def ours(x: Turned) -> Tensor:
        from ziphius.kernels.triton.grouped_gemm import grouped_gemm_along_k_triton

        return grouped_gemm_along_k_triton(x.dy, x.x, x.counts_E, torch.float32)

    def plain(x: Turned) -> Tensor:
        return grouped_gemm.grouped_gemm_along_k_reference(x.dy, x.x, x.counts_E, torch.float32)

    width = turned_width(M, E)
    return Entry(
        section="grouped",
        name=f"along K {E} x {each}, N {N}, K {K}",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, plain),
        peers=peers.along_k(place),
        flops=2.0 * M * N * K,
        nbytes=_bytes(N, width) + _bytes(K, width) + 4.0 * E * N * K,
        peak="fp8",
        bound=bound_of(place),
    )


def _bytes(rows: int, columns: int, *, blocks: bool = False) -> float:
    """Count the bytes of a matrix in FP8 with its FP32 scales."""
    scale_rows = -(-rows // 128) if blocks else rows
    return rows * columns + 4.0 * scale_rows * -(-columns // 128)
