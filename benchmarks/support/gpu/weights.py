"""Products that read weights as integers: an answer of few rows waits for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from ziphius.kernels import integers
from ziphius.kernels.integers import QuantizedWeight

BF16, TINY = "torch BF16", "torch int4 (tinygemm)"


@dataclass(frozen=True)
class Sizes:
    """Rows of a batch, and the matrix."""

    rows: Sequence[int]
    shape: tuple[int, int]


FULL = Sizes((1, 8, 64), (7168, 7168))
SMALL = Sizes((1, 8), (1024, 1024))
TOY = Sizes((1, 5), (48, 160))


class Coded(NamedTuple):
    """Rows, and a weight in integers."""

    x_NI: Tensor
    weight: QuantizedWeight


def weight_only(place: Place, sizes: Sizes) -> list[Entry]:
    """Return products in INT8 and INT4, groups of 128."""
    return [_entry(place, bits, N, *sizes.shape) for bits in (8, 4) for N in sizes.rows]


def quantised(weight_OI: Tensor, bits: int) -> QuantizedWeight:
    """Round a weight, and store it as a checkpoint does."""
    codes_OI, scales_OG = integers.quantize(weight_OI, bits)
    words_OW = integers.pack(codes_OI, bits)
    stored = integers.stored_bytes(words_OW, bits, weight_OI.shape[1]).contiguous()
    return QuantizedWeight(stored, scales_OG, integers.GROUP_SIZE, bits, tuple(weight_OI.shape))


def _entry(place: Place, bits: int, N: int, O: int, I: int) -> Entry:  # noqa: E741
    def make(generator: Generator) -> Coded:
        weight_OI = place.normal(generator, O, I, dtype=torch.float32) * 0.02
        return Coded(place.normal(generator, N, I), quantised(weight_OI, bits))

    def ours(x: Coded) -> Tensor:
        from ziphius.kernels.triton.weight_only import weight_only_triton

        return weight_only_triton(x.x_NI, x.weight)

    def plain(x: Coded) -> Tensor:
        return x.x_NI @ x.weight.dequantize(place.storage).T

    def reference(x: Coded) -> Tensor:
        return x.x_NI.double() @ x.weight.dequantize(torch.float64).T

    groups = -(-I // integers.GROUP_SIZE)
    return Entry(
        section="weights",
        name=f"INT{bits}, {N} x {I} by {O} x {I}",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, plain),
        peers=_peers(place, bits),
        flops=2.0 * N * O * I,
        nbytes=O * I * bits / 8 + 2.0 * O * groups + N * (O + I) * place.storage.itemsize,
        bound=1e-2 if place.storage == torch.bfloat16 else 1e-5,
        goal=(COPY, 0.8),
    )


def _peers(place: Place, bits: int) -> Sequence[Version]:
    """Return the product with the weight in BF16, and torch's own one in INT4 for GPUs."""

    def in_bf16(x: Coded) -> tuple[Tensor, Tensor]:
        return x.x_NI.bfloat16(), x.weight.dequantize(torch.bfloat16)

    bf16 = Version(BF16, lambda xw: xw[0] @ xw[1].T, in_bf16, bound=2e-2)
    if place.device.type != "cuda" or bits != 4:
        return (bf16,)

    def packed(x: Coded) -> tuple[Tensor, Tensor, Tensor]:
        # torch has the even input in the upper half of a byte, and a zero beside every scale.
        turned = (x.weight.codes << 4) | (x.weight.codes >> 4)
        scales_GO2 = torch.stack((x.weight.scales, torch.zeros_like(x.weight.scales)), -1)
        matrix = torch.ops.aten._convert_weight_to_int4pack(turned, 8)
        return x.x_NI.bfloat16(), matrix, scales_GO2.transpose(0, 1).contiguous()

    def run(x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x[0], x[1], integers.GROUP_SIZE, x[2])

    return bf16, Version(TINY, run, packed, bound=2e-2)
