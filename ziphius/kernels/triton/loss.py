"""Cross entropy of rows of logits: two visits of a row, the second leaves the gradient there."""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.loss import IGNORED

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-2e38)  # below any logit, and what is far above it is still a number
# Columns at a time, warps, and how many of a program's loads are on their way: 16 bytes of BF16 a
# thread and load, 64 KB in all, since one program fills a multiprocessor. A benchmark may try the
# others.
LAUNCHES = ((8192, 32, 5), (8192, 32, 3), (8192, 16, 5), (4096, 16, 6), (16384, 32, 4))


def cross_entropy_rows_triton(
    logits_nV: Tensor, targets_n: Tensor, *, launch: tuple[int, int, int] | None = None
) -> Tensor:
    """Compute what ``cross_entropy_rows`` does; the arithmetic is FP32 whatever logits are.

    Rows have their columns side by side. Those that are ignored are not read, only zeroed.
    """
    n, V = logits_nV.shape
    losses_n = logits_nV.new_empty(n, dtype=torch.float32)
    columns, warps, stages = launch or LAUNCHES[0]
    columns = min(columns, triton.next_power_of_2(V))
    if n:
        cross_entropy_kernel[(n,)](
            *(logits_nV, targets_n.contiguous(), losses_n, logits_nV.stride(0)),
            V=V,
            IGNORE=IGNORED,
            COLUMNS=columns,
            STAGES=stages,
            num_warps=warps if columns >= 4096 else 4,
        )
    return losses_n.sum()


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, stride,
    V: tl.constexpr, IGNORE: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into ``softmax - onehot``, and store its loss.

    The second visit goes backwards: what was read last is still in the second cache, which holds
    about as much as the rows that are on their way, and what is written may leave it first.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * stride
    columns = tl.arange(0, COLUMNS)
    kind = logits_ptr.dtype.element_ty
    if target == IGNORE:
        for begin in tl.range(0, V, COLUMNS):
            at = begin + columns
            tl.store(logits_ptr + at, tl.zeros([COLUMNS], kind), at < V)
        tl.store(losses_ptr + row, 0.0)
        return
    # A target that is no column shows as a loss that is no number.
    known = (target >= 0) & (target < V)
    score = tl.load(logits_ptr + target, known, other=float("nan")).to(tl.float32)
    # Every lane has a softmax of its own, so that no step waits for the other lanes.
    largest = tl.full([COLUMNS], LEAST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in tl.range(0, V, COLUMNS, num_stages=STAGES):
        at = begin + columns
        x = tl.load(logits_ptr + at, at < V, float("-inf")).to(tl.float32)
        above = x - largest
        e = tl.exp2(-tl.abs(above) * LOG2E)
        total = tl.where(above > 0, total * e + 1.0, total + e)
        largest = tl.maximum(largest, x)
    greatest = tl.max(largest, 0)
    total = tl.sum(total * tl.exp2((largest - greatest) * LOG2E), 0)
    tl.store(losses_ptr + row, greatest + tl.log2(total) / LOG2E - score)
    share = tl.div_rn(1.0, total)
    # The whole row has been read where the first number is written.
    tl.debug_barrier()
    for done in tl.range(0, V, COLUMNS, num_stages=STAGES):
        at = (V - 1) // COLUMNS * COLUMNS - done + columns
        x = tl.load(logits_ptr + at, at < V, float("-inf")).to(tl.float32)
        p = tl.exp2((x - greatest) * LOG2E) * share
        p = tl.where(at == target, p - 1.0, p)
        tl.store(logits_ptr + at, p.to(kind), at < V, eviction_policy="evict_first")
