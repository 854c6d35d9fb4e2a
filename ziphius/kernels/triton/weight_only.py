"""Products with weights that stay stored as codes: int8, int4 or FP8 with FP32 scales, on a GPU.

A weight is ``bf16(code * scale)``, the number that ``Codes.decode`` returns, wherever this runs.
Three ways: one row of ``x`` multiplies and adds as codes come in; up to some hundred rows go
through the tensor cores against decoded tiles of the matrix; for more, the matrix is decoded once
to BF16 and multiplied by torch, which then costs less than decoding it for every tile of rows.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.stored import Codes
from ziphius.kernels.triton import bits
from ziphius.kernels.triton.product import sum_parts

# Rows from which decoding the whole matrix first is cheaper.
_MANY_ROWS = 256
_MULTIPROCESSORS = 132
_FORMS = {"fp8": 0, "int8": 1, "int4": 2}
_FP8, _INT4 = tl.constexpr(0), tl.constexpr(2)


class Config(NamedTuple):
    """Tiles of the matrix, ``block_o`` by ``block_k``, and how many programs share a row's sum.

    ``dots`` is the way through the tensor cores; the other one is for a single row of ``x``.
    """

    dots: bool
    block_o: int
    block_k: int
    warps: int
    stages: int
    splits: int


# What a benchmark sweeps: for any number of rows, and for one.
DOTS = tuple(
    Config(True, block_o, 128, 4, stages, splits)
    for block_o, stages in ((64, 3), (64, 5), (32, 4))
    for splits in (2, 8)
)
ONE_ROW = tuple(
    Config(False, block_o, block_k, 4, stages, splits)
    for block_o, block_k, stages in ((16, 512, 3), (16, 256, 4), (8, 512, 3), (16, 512, 1))
    for splits in (2,)
)


@triton.jit
def _rounded(x, INTERPRETED: tl.constexpr):
    """Round FP32 to BF16's numbers, to nearest even, and keep the type."""
    if INTERPRETED:
        word = x.to(tl.uint32, bitcast=True)
        nearest = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
        result = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    else:
        # Two at a time: the instruction for one alone has a quarter of the rate.
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 two; cvt.rn.bf16x2.f32 two, $3, $2;"
            " shl.b32 $0, two, 16; and.b32 $1, two, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return result


@triton.jit
def _above(code, BIAS: tl.constexpr):
    """Return a code of 0 to 255 less its bias in FP32: as the last bits of 2^23, which is exact.

    An instruction converts too, at a quarter of the rate.
    """
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + BIAS)


@triton.jit
def _weights(
    data, scales, rows, k, outputs, inputs, groups,
    FORM: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return ``code * scale`` of ``rows`` from column ``k`` on: ``[BLOCK_O, BLOCK_K]``, 0 outside.

    With ``EVEN`` nothing is outside.
    """
    chunks = k + tl.arange(0, BLOCK_K // CHUNK) * CHUNK
    scale_at = scales + (rows // SCALE_ROWS)[:, None] * groups + (chunks // GROUP)[None, :]
    PACKED: tl.constexpr = 2 if FORM == _INT4 else 1
    columns = k // PACKED + tl.arange(0, BLOCK_K // PACKED)
    at = data + rows.to(tl.int64)[:, None] * (inputs // PACKED) + columns[None, :]
    if EVEN:
        scale = tl.load(scale_at)
        codes = tl.load(at)
    else:
        inside = (rows < outputs)[:, None]
        scale = tl.load(scale_at, mask=inside & (chunks < inputs)[None, :], other=0.0)
        # A code that stands for zero.
        ZERO: tl.constexpr = 0.0 if FORM == _FP8 else (0x88 if FORM == _INT4 else 128)
        codes = tl.load(at, mask=inside & (columns < inputs // PACKED)[None, :], other=ZERO)
    if FORM == _FP8:
        values = codes.to(tl.float32)
    elif FORM == _INT4:
        pairs = codes.to(tl.int32)
        values = tl.join(_above(pairs & 15, 8), _above(pairs >> 4, 8)).reshape(BLOCK_O, BLOCK_K)
    else:
        values = _above(codes.to(tl.int32), 128)
    chunked = values.reshape(BLOCK_O, BLOCK_K // CHUNK, CHUNK) * scale[:, :, None]
    return chunked.reshape(BLOCK_O, BLOCK_K)


@triton.jit
def _coded_row_kernel(
    x, data, scales, out, outputs, inputs, groups,
    FORM: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    steps = tl.cdiv(inputs, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    sums = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    end = tl.minimum((split + 1) * share, steps)
    for step in tl.range(split * share, end, num_stages=STAGES):
        k = step * BLOCK_K
        w = _weights(
            data, scales, rows, k, outputs, inputs, groups,
            FORM, GROUP, SCALE_ROWS, BLOCK_O, BLOCK_K, CHUNK, EVEN,
        )  # fmt: skip
        ks = k + tl.arange(0, BLOCK_K)
        x_K = tl.load(x + ks, mask=ks < inputs, other=0.0).to(tl.float32)
        sums += _rounded(w, INTERPRETED) * x_K[None, :]
    total = tl.sum(sums, 1).to(out.dtype.element_ty)
    tl.store(out + split * outputs + rows, total, mask=rows < outputs)


@triton.jit
def _coded_rows_kernel(
    x, data, scales, out, N, outputs, inputs, groups,
    FORM: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    ns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(inputs, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    sums = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    for step in tl.range(split * share, tl.minimum((split + 1) * share, steps)):
        k = step * BLOCK_K
        w = _weights(
            data, scales, rows, k, outputs, inputs, groups,
            FORM, GROUP, SCALE_ROWS, BLOCK_O, BLOCK_K, CHUNK, EVEN,
        )  # fmt: skip
        ks = k + tl.arange(0, BLOCK_K)
        x_at = x + ns.to(tl.int64)[None, :] * inputs + ks[:, None]
        x_KN = tl.load(x_at, mask=(ns < N)[None, :] & (ks < inputs)[:, None], other=0.0)
        if INTERPRETED or x.dtype.element_ty != tl.bfloat16:
            w = _rounded(w, INTERPRETED)
            x_KN = x_KN.to(tl.float32)
        else:
            w = w.to(tl.bfloat16)
        sums += tl.dot(w, x_KN, input_precision="ieee")
    at = out + (split * N + ns).to(tl.int64)[None, :] * outputs + rows[:, None]
    mask = (ns < N)[None, :] & (rows < outputs)[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _decode_codes_kernel(
    data, scales, out, outputs, inputs, groups,
    FORM: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.program_id(1) * BLOCK_K
    w = _weights(
        data, scales, rows, k, outputs, inputs, groups,
        FORM, GROUP, SCALE_ROWS, BLOCK_O, BLOCK_K, CHUNK, EVEN,
    )  # fmt: skip
    columns = k + tl.arange(0, BLOCK_K)
    at = out + rows.to(tl.int64)[:, None] * inputs + columns[None, :]
    w = _rounded(w, INTERPRETED).to(out.dtype.element_ty)
    tl.store(at, w, mask=(rows < outputs)[:, None] & (columns < inputs)[None, :])


def weight_only_triton(x_NI: Tensor, weight: Codes, *, config: Config | None = None) -> Tensor:
    """Return ``x W^T`` ``[N, O]`` in the dtype of ``x``, BF16 or FP32, summed in FP32.

    ``config`` replaces the choice, for a benchmark. The sum of a row depends on how many rows
    there are, never on what the others hold.
    """
    N, (O, I) = len(x_NI), weight.shape  # noqa: E741
    if not (N and O and I):
        return x_NI.new_zeros(N, O)
    if N > _MANY_ROWS:
        return x_NI @ decode_triton(weight, x_NI.dtype).T
    x = x_NI.contiguous()
    chosen = config or choose(N, O, I, weight.form)
    splits = min(chosen.splits, triton.cdiv(I, chosen.block_k))
    out_NO = x.new_empty(N, O)
    target = out_NO if splits == 1 else x.new_empty(splits, N, O, dtype=torch.float32)
    data, scales, constants = _arguments(weight, chosen.block_o, chosen.block_k)
    grid = (triton.cdiv(O, chosen.block_o), splits)
    sizes = (O, I, scales.shape[1])
    if not chosen.dots:
        _coded_row_kernel[grid](
            x, data, scales, target, *sizes, *constants, chosen.stages, splits, bits.interpreted(),
            num_warps=chosen.warps,
        )  # fmt: skip
    else:
        block_n = min(max(triton.next_power_of_2(N), 16), 128)
        _coded_rows_kernel[(*grid, triton.cdiv(N, block_n))](
            x, data, scales, target, N, *sizes, *constants, block_n, splits, bits.interpreted(),
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    if splits > 1:
        sum_parts(target, out_NO)
    return out_NO


def decode_triton(weight: Codes, dtype: torch.dtype) -> Tensor:
    """Do what ``weight.decode(dtype)`` does, in one pass."""
    O, I = weight.shape  # noqa: E741
    out_OI = torch.empty(O, I, dtype=dtype, device=weight.data.device)
    data, scales, constants = _arguments(weight, 16, 256)
    if out_OI.numel():
        grid = (triton.cdiv(O, 16), triton.cdiv(I, 256))
        _decode_codes_kernel[grid](
            data, scales, out_OI, O, I, scales.shape[1], *constants, bits.interpreted(), num_warps=4
        )
    return out_OI


def choose(N: int, O: int, I: int, form: str) -> Config:  # noqa: E741
    """Pick by shape: enough programs that memory is always asked for something.

    One row of int8 or FP8 multiplies outside the tensor cores, 8 instructions a weight; int4, twice
    as many weights a byte, has not the time, and goes through them with 7.
    """
    dots = N > 1 or form == "int4"
    block_o, block_k, wanted = (64, 128, 3) if dots else (16, 512, 6)
    programs = triton.cdiv(O, block_o) * triton.cdiv(N, 128)
    splits = 1
    while programs * splits < wanted * _MULTIPROCESSORS and 4 * splits * block_k <= I:
        splits *= 2
    return Config(dots, block_o, block_k, 4, 3, splits)


def _arguments(weight: Codes, block_o: int, block_k: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return codes, scales and the constants that say how they lie."""
    O, I = weight.shape  # noqa: E741
    data = weight.data.contiguous()
    if weight.form == "fp8":
        data = data.view(torch.float8_e4m3fn)
    # One scale a chunk: of the group or, where groups are no powers of two, of what divides them.
    chunk = math.gcd(weight.group, block_k)
    even = O % block_o == 0 and I % block_k == 0
    way = (_FORMS[weight.form], weight.group, weight.scale_rows)
    return data, weight.scales.contiguous(), (*way, block_o, block_k, chunk, even)
