"""BF16 products of experts on a GPU, and their gradients, as ``kernels/grouped.py`` says.

Counts stay on the device. Rows times an expert's matrix are cut into tiles whose rows a small
kernel finds (``tiles.py``); of a weight's gradient each tile sums over its expert's rows, in FP32,
and is stored so. What programs there are is bounded by shapes.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from ziphius.kernels.grouped import gradient_memory, grouped_linear_loop
from ziphius.kernels.later import Later, put_off
from ziphius.kernels.triton import bits
from ziphius.kernels.triton.tiles import ALONG_K, ROWS, groups_of_segments, locate, tiles_of_rows

# Bytes: what the copy engine asks of addresses and of rows.
_ALIGNMENT = 16
# Products that are summed between two waits.
_DEPTH = 64


class Cut(NamedTuple):
    """How a product is cut; tiles go in bands of ``band`` tiles of rows."""

    block_m: int
    block_n: int
    stages: int
    warps: int
    band: int = 8


# What a benchmark sweeps; `rows_cut` and `weights_cut` pick among them.
ROWS_CUTS = (
    Cut(128, 256, stages=4, warps=8),
    Cut(128, 256, stages=3, warps=8),
    Cut(128, 128, stages=3, warps=8),
    Cut(128, 128, stages=3, warps=4),
    Cut(64, 256, stages=4, warps=4),
    Cut(64, 128, stages=4, warps=4),
)
# Beside its stages a program holds the rest of a segment: one stage more.
WEIGHTS_CUTS = (
    Cut(128, 256, stages=3, warps=8),
    Cut(128, 128, stages=4, warps=8),
    Cut(128, 128, stages=2, warps=8),
    Cut(128, 128, stages=2, warps=4),
)
# Loads without the copy engine need many registers.
_NO_COPIES = Cut(64, 64, stages=2, warps=8)
# What fits into 99 KB, on GPUs that are no Hopper.
_SMALL = Cut(128, 128, stages=2, warps=8)
_FEW_ROWS = 64
# Below so many products a sum, tiles begin and end all the time: two a multiprocessor overlap.
_SHORT = 512
_HOPPER = 9


@triton.jit
def _masked(x, row, column, end, width, ROWS_: tl.constexpr, COLUMNS: tl.constexpr):
    """Load ``[ROWS_, COLUMNS]`` of rows ``width`` wide, zero from row ``end`` on."""
    rows = row + tl.arange(0, ROWS_)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * width + columns[None, :], inside, other=0.0)


@triton.jit
def _multiply(a, b, sums, INTERPRETED: tl.constexpr):
    """Return ``sums + a b``. The interpreter multiplies nothing but FP32."""
    if INTERPRETED:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def grouped_rows_kernel(
    a, b, out, table, total, N, K,
    TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, COPIES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of ``out [M, N]``: rows of ``a [M, K]`` times their expert's matrix.

    ``b`` has the experts' matrices below each other, ``[N, K]`` each if ``TURNED``, else
    ``[K, N]``.
    """
    tile = tl.program_id(0)
    row_tiles = tl.load(total)
    if tile >= row_tiles * tl.cdiv(N, BLOCK_N):
        return
    expert, row, end, column, _, _ = locate(
        tile, table, row_tiles, 0, N, 0, ROWS, BLOCK_M, BLOCK_N, BAND
    )
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        # What is read of other experts' rows and columns ends in sums that are not stored.
        if COPIES:
            a_block = a.load([row, k])
            if TURNED:
                b_block = b.load([expert * N + column, k]).T
            else:
                b_block = b.load([expert * K + k, column])
        else:
            a_block = _masked(a, row, k, end, K, BLOCK_M, BLOCK_K)
            if TURNED:
                first = expert * N
                b_block = _masked(b, first + column, k, first + N, K, BLOCK_N, BLOCK_K).T
            else:
                first = expert * K
                b_block = _masked(b, first + k, column, first + K, N, BLOCK_K, BLOCK_N)
        sums = _multiply(a_block, b_block, sums, INTERPRETED)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows < end)[:, None] & (columns < N)[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def grouped_weights_kernel(
    a, b, a_copies, b_copies, out, table, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, COPIES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of ``out [E, M, N]``: of every segment of rows ``a^T b``.

    ``a`` is ``[rows, M]``, ``b`` ``[rows, N]``; ``table`` has every segment's first row and its
    end. The copy engine loads whole blocks of rows by ``a_copies`` and ``b_copies``.
    """
    expert, row, _, column, first, end = locate(
        tl.program_id(0), table, tl.cdiv(M, BLOCK_M), M, N, 0, ALONG_K, BLOCK_M, BLOCK_N, BAND
    )
    # The rest must not see the next expert's rows. It is on its way while whole blocks are summed.
    last = first + (end - first) // BLOCK_K * BLOCK_K
    a_rest = _masked(a, last, row, end, M, BLOCK_K, BLOCK_M)
    b_rest = _masked(b, last, column, end, N, BLOCK_K, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(first, last, BLOCK_K):
        if COPIES:
            a_block = a_copies.load([k, row])
            b_block = b_copies.load([k, column])
        else:
            a_block = _masked(a, k, row, last, M, BLOCK_K, BLOCK_M)
            b_block = _masked(b, k, column, last, N, BLOCK_K, BLOCK_N)
        sums = _multiply(a_block.T, b_block, sums, INTERPRETED)
    sums = _multiply(a_rest.T, b_rest, sums, INTERPRETED)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    at = out + (expert.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)


def rows_cut(M: int, N: int, K: int, experts: int) -> Cut:
    """Pick how ``M`` rows of ``experts`` segments are cut, which are taken for equally long."""
    if triton.cdiv(M, experts) <= _FEW_ROWS:
        return Cut(64, 128 if N <= 128 else 256, stages=4, warps=4)
    if N <= 128 or K < _SHORT:
        return Cut(128, 128, stages=3, warps=8)
    return Cut(128, 256, stages=4, warps=8)


def weights_cut(N: int) -> Cut:
    """Pick how weights' gradients of ``N`` columns are cut."""
    return Cut(128, 128, stages=4, warps=8) if N <= 128 else Cut(128, 256, stages=3, warps=8)


def rows_times(
    rows_MK: Tensor, weight_EOI: Tensor, counts_E: Tensor, *, turned: bool, cut: Cut | None = None
) -> Tensor:
    """Multiply rows by their experts' ``W^T`` if ``turned``, else by ``W``: ``[M, N]``.

    All are contiguous and of one dtype. ``cut`` replaces the choice, for a benchmark.
    """
    (M, K), (experts, O, I) = rows_MK.shape, weight_EOI.shape  # noqa: E741
    N = O if turned else I
    out_MN = rows_MK.new_empty(M, N)
    if not out_MN.numel() or not K:
        return out_MN.zero_()
    # By rows of W its last ones are followed by the next expert's.
    copies = _copyable(rows_MK, weight_EOI) and (turned or K % _DEPTH == 0)
    cut = _available(cut or rows_cut(M, N, K, experts), rows_MK, copies)
    bound = M // cut.block_m + min(experts, M)
    table, total = tiles_of_rows(counts_E, bound, cut.block_m)
    b_block = [cut.block_n, _DEPTH] if turned else [_DEPTH, cut.block_n]
    grouped_rows_kernel[(bound * triton.cdiv(N, cut.block_n),)](
        _operand(rows_MK, [cut.block_m, _DEPTH], copies),
        _operand(weight_EOI.view(-1, I), b_block, copies),
        out_MN, table, total, N, K,
        turned, cut.block_m, cut.block_n, _DEPTH, cut.band, copies, bits.interpreted(),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out_MN


def weight_gradient(
    dout_MO: Tensor, x_MI: Tensor, counts_E: Tensor, out_EOI: Tensor, *, cut: Cut | None = None
) -> Tensor:
    """Write every expert's ``dout^T x`` over its rows into ``out``, and return it.

    All are contiguous, the rows of one dtype; experts without rows get zeros.
    """
    experts, O, I = out_EOI.shape  # noqa: E741
    if not out_EOI.numel() or not len(x_MI):
        return out_EOI.zero_()
    copies = _copyable(dout_MO, x_MI)
    cut = _available(cut or weights_cut(I), x_MI, copies)
    tiles = triton.cdiv(O, cut.block_m) * triton.cdiv(I, cut.block_n)
    grouped_weights_kernel[(experts * tiles,)](
        dout_MO, x_MI,
        _operand(dout_MO, [_DEPTH, cut.block_m], copies),
        _operand(x_MI, [_DEPTH, cut.block_n], copies),
        out_EOI, groups_of_segments(counts_E, 1), O, I,
        cut.block_m, cut.block_n, _DEPTH, cut.band, copies, bits.interpreted(),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out_EOI


def _available(cut: Cut, rows: Tensor, copies: bool) -> Cut:
    """Return ``cut``, or what can run where it cannot."""
    if not copies:
        return _NO_COPIES
    if rows.device.type != "cuda":
        return cut
    return cut if torch.cuda.get_device_capability(rows.device)[0] == _HOPPER else _SMALL


def _copyable(*operands: Tensor) -> bool:
    """Say whether the copy engine can load them: rows and addresses are multiples of 16 bytes."""
    return all(
        x.shape[-1] * x.element_size() % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0
        for x in operands
    )


def _operand(x: Tensor, block: list[int], copies: bool) -> Any:
    return TensorDescriptor.from_tensor(x, block) if copies else x


class _GroupedLinear(torch.autograd.Function):
    """A weight in FP32 is rounded to the dtype of the rows once a call; its gradient is not."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor, later: Later | None
    ) -> Tensor:
        ctx.parameter, ctx.later = weight_EOI, later
        x_MI, weight_EOI = x_MI.contiguous(), weight_EOI.contiguous()
        ctx.save_for_backward(x_MI, weight_EOI, counts_E)
        return rows_times(x_MI, weight_EOI.to(x_MI.dtype), counts_E, turned=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MI, weight_EOI, counts_E = ctx.saved_tensors
        dout_MO = grads[0].contiguous()
        dx_MI = dweight_EOI = None
        if ctx.needs_input_grad[0]:
            # Rounded again: what was rounded in forward would take memory in every layer.
            rounded_EOI = weight_EOI.to(x_MI.dtype)
            dx_MI = rows_times(dout_MO, rounded_EOI, counts_E, turned=False)
        if ctx.needs_input_grad[1]:
            dweight_EOI = put_off(
                ctx.later,
                ctx.parameter,
                lambda: weight_gradient(dout_MO, x_MI, counts_E, gradient_memory(weight_EOI)),
            )
        return dx_MI, dweight_EOI, None, None


def grouped_linear_triton(
    x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor, later: Later | None = None
) -> Tensor:
    """Do what ``grouped_linear_reference`` does, with ``counts`` int64 on the device.

    Rows are BF16. Others go the way of the loop, which waits for the device, since the matrix units
    would round them; under the interpreter FP32 is computed here.
    """
    here = torch.float32 if bits.interpreted() else torch.bfloat16
    if x_MI.dtype not in (here, torch.bfloat16):
        return grouped_linear_loop(x_MI, weight_EOI, counts_E.tolist(), later)
    return _GroupedLinear.apply(x_MI, weight_EOI, counts_E, later)
