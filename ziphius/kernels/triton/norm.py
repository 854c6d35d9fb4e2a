"""RMSNorm on a GPU: a row is read once forward, and its input and gradient once backward.

The codes are those of the norm as it is returned, rounded. No sum over a row depends on how many
rows there are; that of the weight's gradient has an order that their number fixes.
A row lies in a few blocks side by side, so that its width need not be near a power of two, and a
program of few warps has all of its loads on their way before it waits for the first.
"""

# Tuples of kernels grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import Fp8, tile_count
from ziphius.kernels.triton.bits import encode, interpreted, narrow, scale_of_magnitude, wide
from ziphius.kernels.triton.groups import codes_of, empty_tiles, largest, rows_of

# Registers of a multiprocessor.
REGISTERS = 65536
# Columns of a program that adds the shares up, and its warps.
COLUMNS, SUM_WARPS = 32, 8


class Launch(NamedTuple):
    """A program's warps, and how many numbers of each block a thread has."""

    warps: int = 8
    vector: int = 4


class BackwardLaunch(NamedTuple):
    """The same; programs, each of which sums the weight's gradient over its share of the rows; two
    programs of 128 registers run side by side, so that one loads while the other computes.
    """

    warps: int = 8
    vector: int = 4
    shares: int = 264
    registers: int | None = 128


CANDIDATES = (Launch(), Launch(4, 8), Launch(8, 8), Launch(16, 4))
BACKWARD_CANDIDATES = (
    BackwardLaunch(),
    BackwardLaunch(shares=132),
    BackwardLaunch(4, 8, registers=None),
)
# Blocks of a row that a program's registers hold.
BLOCKS = 8


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, _, inverse_root = norm_forward(x, weight, eps, None)
        ctx.save_for_backward(x, weight, inverse_root)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_root = ctx.saved_tensors
        return *norm_backward_triton(x, weight, inverse_root, grads[0]), None


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do what ``norm.rms_norm`` does, in FP32 or BF16; rows of ``x`` may lie apart."""
    return _RMSNorm.apply(x, weight, eps)


def norm_tiles_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    power_of_two: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Fp8, Tensor]:
    """Do what ``norm.norm_tiles_reference`` does, in one reading."""
    out, q, inverse_root = norm_forward(x, weight, eps, power_of_two, launch)
    assert q is not None
    return out, q, inverse_root


def norm_backward_triton(
    x: Tensor,
    weight: Tensor,
    inverse_root: Tensor,
    dout: Tensor,
    *,
    launch: BackwardLaunch | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what ``norm.norm_backward_reference`` does: gradients of ``x`` and ``weight``."""
    x_MD, dout_MD, gain_D = rows_of(x), rows_of(dout), weight.contiguous()
    rows, columns = x_MD.shape
    size = launch or BackwardLaunch()
    warps, block, lines = _sizes(columns, size.warps, size.vector)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shares = min(triton.cdiv(rows, lines), size.shares)
    partial_SD = torch.empty(shares, columns, dtype=torch.float32, device=x.device)
    dweight_D = torch.empty_like(gain_D) if x.numel() else torch.zeros_like(gain_D)
    if x.numel():
        _norm_backward_kernel[(shares,)](
            x_MD,
            gain_D,
            inverse_root,
            dout_MD,
            dx,
            partial_SD,
            x_MD.stride(0),
            dout_MD.stride(0),
            rows,
            columns,
            LINES=lines,
            BLOCK=block,
            BLOCKS=triton.cdiv(columns, block),
            INTERPRETED=interpreted(),
            num_warps=warps,
            maxnreg=size.registers and min(size.registers, REGISTERS // (32 * warps)),
        )
        _norm_sum_kernel[(triton.cdiv(columns, COLUMNS),)](
            partial_SD,
            dweight_D,
            shares,
            columns,
            SHARES=triton.next_power_of_2(shares),
            COLUMNS=COLUMNS,
            num_warps=SUM_WARPS,
        )
    return dx, dweight_D


def norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    power_of_two: bool | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Fp8 | None, Tensor]:
    """Normalise, and quantise where ``power_of_two`` says how."""
    x_MD = rows_of(x)
    rows, columns = x_MD.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse_root = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    q = None if power_of_two is None else empty_tiles(x.shape, x.device)
    warps, block, lines = _sizes(columns, *(launch or Launch()))
    if x.numel():
        _norm_kernel[(triton.cdiv(rows, lines),)](
            x_MD,
            weight.contiguous(),
            out,
            inverse_root,
            None if q is None else codes_of(q),
            None if q is None else q.scales,
            x_MD.stride(0),
            rows,
            columns,
            tile_count(columns),
            eps,
            LINES=lines,
            BLOCK=block,
            BLOCKS=triton.cdiv(columns, block),
            POWER_OF_TWO=bool(power_of_two),
            INTERPRETED=interpreted(),
            num_warps=warps,
        )
    return out, q, inverse_root


def _sizes(columns: int, warps: int, vector: int) -> tuple[int, int, int]:
    """Return warps, and the columns of a row's blocks and the rows that they have at a time.

    Of the blocks with the fewest columns beyond the row's end it is the largest.
    """
    while columns > BLOCKS * 32 * warps * vector and warps < 32:
        warps *= 2
    numbers = 32 * warps * vector
    least = max(numbers // 32, 128, min(numbers, triton.next_power_of_2(columns) // BLOCKS))
    blocks = [numbers >> n for n in range(6) if numbers >> n >= least]
    block = min(blocks, key=lambda block: (triton.cdiv(columns, block) * block, -block))
    return warps, block, numbers // block


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    inverse_root: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    eps: tl.tensor,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64)
    valid = row < rows
    # As wide as a block in both dimensions: what is read through it needs no other place.
    column = tl.zeros((LINES, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
    begin, number = x + (row * stride)[:, None], ()
    for block in tl.static_range(BLOCKS):
        at = column + block * BLOCK
        mask = valid[:, None] & (at < columns)
        number += (tl.load(begin + at, mask=mask, other=0.0, eviction_policy="evict_first"),)
    square = tl.zeros((LINES, BLOCK), tl.float32)
    for block in tl.static_range(BLOCKS):
        wider = wide(number[block], INTERPRETED)
        square += wider * wider
    mean = tl.div_rn(tl.sum(square, 1), columns * 1.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(inverse_root + row, inverse, mask=valid)
    begin = (row * columns)[:, None]
    for block in tl.static_range(BLOCKS):
        at = column + block * BLOCK
        mask = valid[:, None] & (at < columns)
        # Of BF16 the numbers are made wider again rather than kept.
        value = wide(number[block], INTERPRETED, True) * inverse[:, None]
        value *= _gain(weight, at, columns)
        value = narrow(value, out.dtype.element_ty, INTERPRETED)
        tl.store(out + begin + at, value, mask=mask)
        if codes is not None:
            groups = tl.reshape(wide(value, INTERPRETED), (LINES * (BLOCK // 128), 128))
            scale = scale_of_magnitude(largest(groups, 1, INTERPRETED), POWER_OF_TWO, INTERPRETED)
            code = encode(groups, scale[:, None], POWER_OF_TWO, INTERPRETED)
            tl.store(codes + begin + at, tl.reshape(code, (LINES, BLOCK)), mask=mask)
            tile = block * (BLOCK // 128) + tl.arange(0, BLOCK // 128)[None, :]
            own = scales + (row * tiles)[:, None] + tile
            scale = tl.reshape(scale, (LINES, BLOCK // 128))
            tl.store(own, scale, mask=valid[:, None] & (tile < tiles))


@triton.jit
def _gain(weight: tl.tensor, at: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """Read some of the weight, which all programs read."""
    gain = tl.load(weight + at, mask=at < columns, other=0.0, eviction_policy="evict_last")
    return gain.to(tl.float32)


@triton.jit
def _norm_backward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    inverse_root: tl.tensor,
    dout: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    stride: tl.tensor,
    dout_stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Take every ``num_programs``th group of rows, and sum the weight's gradient over them."""
    column = tl.zeros((LINES, 1), tl.int32) + tl.arange(0, BLOCK)[None, :]
    gain, total = (), ()
    for block in tl.static_range(BLOCKS):
        at = column + block * BLOCK
        gain += (_gain(weight, at, columns),)
        total += (tl.zeros((LINES, BLOCK), tl.float32),)
    step = tl.num_programs(0) * LINES
    # One stage: rows that are copied ahead through shared memory come later, as measured.
    for first in tl.range(tl.program_id(0) * LINES, rows, step, num_stages=1):
        row = (first + tl.arange(0, LINES)).to(tl.int64)
        valid = row < rows
        inverse = tl.load(inverse_root + row, mask=valid, other=0.0)[:, None]
        number, grad = (), ()
        for block in tl.static_range(BLOCKS):
            at = column + block * BLOCK
            mask = valid[:, None] & (at < columns)
            from_x, from_dout = x + (row * stride)[:, None], dout + (row * dout_stride)[:, None]
            number += (tl.load(from_x + at, mask=mask, other=0.0),)
            grad += (tl.load(from_dout + at, mask=mask, other=0.0),)
        along = tl.zeros((LINES, BLOCK), tl.float32)
        sums = ()
        for block in tl.static_range(BLOCKS):
            unit = wide(number[block], INTERPRETED) * inverse
            product = wide(grad[block], INTERPRETED) * unit
            sums += (total[block] + product,)
            along += product * gain[block]
        total = sums
        mean = tl.div_rn(tl.sum(along, 1), columns * 1.0)[:, None]
        for block in tl.static_range(BLOCKS):
            at = column + block * BLOCK
            unit = wide(number[block], INTERPRETED, True) * inverse
            dunit = wide(grad[block], INTERPRETED, True) * gain[block]
            result = narrow((dunit - unit * mean) * inverse, dx.dtype.element_ty, INTERPRETED)
            mask = valid[:, None] & (at < columns)
            tl.store(dx + (row * columns)[:, None] + at, result, mask=mask)
    begin = partial + tl.program_id(0).to(tl.int64) * columns
    for block in tl.static_range(BLOCKS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(begin + at, tl.sum(total[block], 0), mask=at < columns)


@triton.jit
def _norm_sum_kernel(
    partial: tl.tensor,
    dweight: tl.tensor,
    shares: tl.tensor,
    columns: tl.tensor,
    SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    share = tl.arange(0, SHARES)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (share < shares) & (column < columns)[None, :]
    part = tl.load(partial + share * columns + column[None, :], mask=mask, other=0.0)
    total = tl.sum(part, 0).to(dweight.dtype.element_ty)
    tl.store(dweight + column, total, mask=column < columns)
