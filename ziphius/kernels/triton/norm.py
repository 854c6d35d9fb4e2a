"""RMSNorm on a GPU: a row is read once forward, and its input and gradient once backward.

The codes are those of the norm as it is returned, rounded. No sum over a row depends on how many
rows there are; that of the weight's gradient has an order that their number fixes. With codes and
without, a row's sum may have another order, since the compiler spreads a row otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import Fp8, tile_count
from ziphius.kernels.triton.bits import encode, interpreted, scale_of_magnitude
from ziphius.kernels.triton.groups import codes_of, empty_tiles, largest, rows_of

# Numbers that a program holds at a time, at least a row; and programs of backward, each of which
# sums the weight's gradient over its share of the rows.
NUMBERS = 4096
SHARES = 264
# Columns of a program that adds the shares up.
COLUMNS = 32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, _, inverse_root = _forward(x, weight, eps, None)
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
    x: Tensor, weight: Tensor, eps: float, *, power_of_two: bool = False
) -> tuple[Tensor, Fp8, Tensor]:
    """Do what ``norm.norm_tiles_reference`` does, in one reading."""
    out, q, inverse_root = _forward(x, weight, eps, power_of_two)
    assert q is not None
    return out, q, inverse_root


def norm_backward_triton(
    x: Tensor, weight: Tensor, inverse_root: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what ``norm.norm_backward_reference`` does: gradients of ``x`` and ``weight``."""
    x_MD, dout_MD, gain_D = rows_of(x), rows_of(dout), weight.contiguous()
    rows, columns = x_MD.shape
    block, lines, warps = _sizes(columns)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shares = min(triton.cdiv(rows, lines), SHARES)
    partial_SD = torch.empty(shares, columns, dtype=torch.float32, device=x.device)
    dweight_D = torch.zeros_like(gain_D)
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
            num_warps=warps,
        )
        _norm_sum_kernel[(triton.cdiv(columns, COLUMNS),)](
            partial_SD,
            dweight_D,
            shares,
            columns,
            SHARES=triton.next_power_of_2(shares),
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return dx, dweight_D


def _forward(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool | None
) -> tuple[Tensor, Fp8 | None, Tensor]:
    """Normalise, and quantise where ``power_of_two`` says how."""
    x_MD = rows_of(x)
    rows, columns = x_MD.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse_root = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    q = None if power_of_two is None else empty_tiles(x.shape, x.device)
    block, lines, warps = _sizes(columns)
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
            POWER_OF_TWO=bool(power_of_two),
            INTERPRETED=interpreted(),
            num_warps=warps,
        )
    return out, q, inverse_root


def _sizes(columns: int) -> tuple[int, int, int]:
    """Return columns and rows that a program holds at a time, and its warps."""
    block = max(triton.next_power_of_2(columns), 128)
    warps = 4 if block <= NUMBERS else 8 if block <= 2 * NUMBERS else 16
    return block, max(NUMBERS // block, 1), warps


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
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = row < rows
    mask = valid[:, None] & (column < columns)[None, :]
    at = x + (row * stride)[:, None] + column[None, :]
    number = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(number * number, 1), columns * 1.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(inverse_root + row, inverse, mask=valid)
    value = (number * inverse[:, None] * gain[None, :]).to(out.dtype.element_ty)
    place = (row * columns)[:, None] + column[None, :]
    tl.store(out + place, value, mask=mask)
    if codes is not None:
        GROUPS: tl.constexpr = BLOCK // 128
        groups = tl.reshape(value.to(tl.float32), (LINES * GROUPS, 128))
        scale = scale_of_magnitude(largest(groups, 1, INTERPRETED), POWER_OF_TWO, INTERPRETED)
        code = encode(groups, scale[:, None], POWER_OF_TWO, INTERPRETED)
        tl.store(codes + place, tl.reshape(code, (LINES, BLOCK)), mask=mask)
        tile = tl.arange(0, GROUPS)[None, :]
        own = scales + (row * tiles)[:, None] + tile
        tl.store(own, tl.reshape(scale, (LINES, GROUPS)), mask=valid[:, None] & (tile < tiles))


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
) -> None:
    """Take every ``num_programs``th group of rows, and sum the weight's gradient over them."""
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    step = tl.num_programs(0) * LINES
    for first in range(tl.program_id(0) * LINES, rows, step):
        row = (first + tl.arange(0, LINES)).to(tl.int64)
        valid = row < rows
        mask = valid[:, None] & (column < columns)[None, :]
        at = x + (row * stride)[:, None] + column[None, :]
        inverse = tl.load(inverse_root + row, mask=valid, other=0.0)[:, None]
        unit = tl.load(at, mask=mask, other=0.0).to(tl.float32) * inverse
        at = dout + (row * dout_stride)[:, None] + column[None, :]
        grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * unit, 0)
        dunit = grad * gain[None, :]
        along = tl.div_rn(tl.sum(dunit * unit, 1), columns * 1.0)
        result = (dunit - unit * along[:, None]) * inverse
        at = dx + (row * columns)[:, None] + column[None, :]
        tl.store(at, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * columns + column, total, column < columns)


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
