"""Products that read weights as codes: an answer of few rows waits for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from ziphius.kernels import integers
from ziphius.kernels.quantize import TILE, quantize_blocks
from ziphius.kernels.stored import Codes

BF16, TINY = "torch BF16", "torch int4 (tinygemm)"
FORMS = ("int8", "int4", "fp8")


@dataclass(frozen=True)
class Sizes:
    """Rows of a batch, and the matrix."""

    rows: Sequence[int]
    shape: tuple[int, int]


FULL = Sizes((1, 8, 64), (7168, 7168))
SMALL = Sizes((1, 8), (1024, 1024))
TOY = Sizes((1, 5), (48, 160))


class Coded(NamedTuple):
    """Rows, and a weight in codes."""

    x_NI: Tensor
    weight: Codes


def weight_only(place: Place, sizes: Sizes) -> list[Entry]:
    """Return products with INT8 and INT4 in groups of 128, and with FP8 in blocks."""
    return [_entry(place, form, N, *sizes.shape) for form in FORMS for N in sizes.rows]


def coded(weight_OI: Tensor, form: str) -> Codes:
    """Round a weight, and store it as a checkpoint does."""
    if form == "fp8":
        q = quantize_blocks(weight_OI)
        return Codes(q.codes.view(torch.uint8), q.scales, form, TILE, TILE)
    bits = 8 if form == "int8" else 4
    codes_OI, scales_OG = integers.quantize(weight_OI, bits)
    stored = integers.stored_bytes(integers.pack(codes_OI, bits), bits, weight_OI.shape[1])
    return Codes(stored.contiguous(), scales_OG.float(), form, integers.GROUP_SIZE)


def _entry(place: Place, form: str, N: int, O: int, I: int) -> Entry:  # noqa: E741
    def make(generator: Generator) -> Coded:
        weight_OI = place.normal(generator, O, I, dtype=torch.float32) * 0.02
        return Coded(place.normal(generator, N, I), coded(weight_OI, form))

    def ours(x: Coded) -> Tensor:
        from ziphius.kernels.triton.weight_only import weight_only_triton

        return weight_only_triton(x.x_NI, x.weight)

    def candidates() -> Sequence[Version]:
        from ziphius.kernels.triton.weight_only import ONE_ROW, ROWS, weight_only_triton

        def with_config(config: Any) -> Version:
            return Version(str(tuple(config)), lambda x: weight_only_triton(*x, config=config))

        return [with_config(config) for config in (ONE_ROW if N == 1 else ROWS)]

    scales = -(-O // TILE) if form == "fp8" else O
    return Entry(
        section="weights",
        name=f"{form.upper()}, {N} x {I} by {O} x {I}",
        make=make,
        reference=lambda x: x.x_NI.double() @ x.weight.decode(torch.float64).T,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: x.x_NI @ x.weight.decode(place.storage).T),
        peers=_peers(place, form),
        flops=2.0 * N * O * I,
        nbytes=O * I * (0.5 if form == "int4" else 1.0)
        + 4.0 * scales * -(-I // TILE)
        + N * (O + I) * place.storage.itemsize,
        bound=1e-2 if place.storage == torch.bfloat16 else 1e-5,
        goal=(COPY, 0.8),
        candidates=candidates,
    )


def _peers(place: Place, form: str) -> Sequence[Version]:
    """Return the product with the weight in BF16, and torch's own one in INT4 for GPUs."""

    def in_bf16(x: Coded) -> tuple[Tensor, Tensor]:
        return x.x_NI.bfloat16(), x.weight.decode(torch.bfloat16)

    bf16 = Version(BF16, lambda xw: xw[0] @ xw[1].T, in_bf16, bound=2e-2)
    if place.device.type != "cuda" or form != "int4":
        return (bf16,)

    def packed(x: Coded) -> tuple[Tensor, Tensor, Tensor]:
        # torch has the even input in the upper half of a byte, and a zero beside every scale.
        turned = (x.weight.data << 4) | (x.weight.data >> 4)
        scales_OG = x.weight.scales.bfloat16()
        scales_OG2 = torch.stack((scales_OG, torch.zeros_like(scales_OG)), -1)
        matrix = torch.ops.aten._convert_weight_to_int4pack(turned, 8)
        return x.x_NI.bfloat16(), matrix, scales_OG2.transpose(0, 1).contiguous()

    def run(x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x[0], x[1], integers.GROUP_SIZE, x[2])

    return bf16, Version(TINY, run, packed, bound=2e-2)
