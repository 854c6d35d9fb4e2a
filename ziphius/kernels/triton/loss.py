"""Cross entropy of rows of logits: two visits of a row, the second leaves the gradient there."""

# Arguments of kernels have the compiler's types, and their tuples grow.
# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.loss import IGNORED

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-2e38)  # below any logit, and what is far above it is still a number


class Launch(NamedTuple):
    """Columns at a time, warps, how many of a program's loads are on their way, and parts kept.

    A part is so many columns. Those kept lie in registers between the visits: what 132 rows leave
    to the second cache is more than it holds, so that they came from memory twice.
    """

    columns: int = 4096
    warps: int = 8
    stages: int = 4
    kept: int = 6


LAUNCHES = (Launch(), Launch(8192, 32, 5, 0), Launch(8192, 16, 4, 6))


def cross_entropy_rows_triton(
    logits_nV: Tensor, targets_n: Tensor, *, launch: Launch | None = None
) -> Tensor:
    """Compute what ``cross_entropy_rows`` does; the arithmetic is FP32 whatever logits are.

    Rows have their columns side by side. Those that are ignored are not read, only zeroed.
    """
    n, V = logits_nV.shape
    losses_n = logits_nV.new_empty(n, dtype=torch.float32)
    columns, warps, stages, kept = launch or Launch()
    columns = min(columns, triton.next_power_of_2(V))
    if n:
        cross_entropy_kernel[(n,)](
            *(logits_nV, targets_n.contiguous(), losses_n, logits_nV.stride(0)),
            V=V,
            IGNORE=IGNORED,
            COLUMNS=columns,
            STAGES=stages,
            KEPT=min(kept, triton.cdiv(V, columns)),
            num_warps=warps if columns >= 4096 else 4,
        )
    return losses_n.sum()


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, stride,
    V: tl.constexpr, IGNORE: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into ``softmax - onehot``, and store its loss.

    The second visit goes backwards: what was read last is still in the second cache, which holds
    about as much as the rows that are on their way, and what is written may leave it first.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * stride
    columns = tl.arange(0, COLUMNS)
    EACH: tl.constexpr = 8 if COLUMNS >= 4096 else 1
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
    kept = ()
    for part in tl.static_range(KEPT):
        at = part * COLUMNS + columns
        kept += (tl.load(logits_ptr + at, at < V, float("-inf")),)
    # Every eight columns have a softmax of their own, so that no step waits for other threads.
    largest = tl.full([COLUMNS // EACH], LEAST, tl.float32)
    total = tl.zeros([COLUMNS // EACH], tl.float32)
    for begin in tl.range(KEPT * COLUMNS, V, COLUMNS, num_stages=STAGES):
        at = begin + columns
        x = tl.load(logits_ptr + at, at < V, float("-inf"))
        largest, total = _added(x, largest, total, EACH)
    for part in tl.static_range(KEPT):
        largest, total = _added(kept[part], largest, total, EACH)
    greatest = tl.max(largest, 0)
    total = tl.sum(total * tl.exp2((largest - greatest) * LOG2E), 0)
    tl.store(losses_ptr + row, greatest + tl.log2(total) / LOG2E - score)
    share = tl.div_rn(1.0, total)
    # The whole row has been read where the first number is written.
    tl.debug_barrier()
    for part in tl.static_range(KEPT):
        at = part * COLUMNS + columns
        p = tl.exp2((kept[part].to(tl.float32) - greatest) * LOG2E) * share
        tl.store(logits_ptr + at, p.to(kind), at < V, eviction_policy="evict_first")
    for done in tl.range(KEPT * COLUMNS, V, COLUMNS, num_stages=STAGES):
        at = KEPT * COLUMNS + (V - 1) // COLUMNS * COLUMNS - done + columns
        x = tl.load(logits_ptr + at, at < V, float("-inf")).to(tl.float32)
        p = tl.exp2((x - greatest) * LOG2E) * share
        tl.store(logits_ptr + at, p.to(kind), at < V, eviction_policy="evict_first")
    # One number of the row is another, and is written again after all of them.
    tl.debug_barrier()
    p = tl.exp2((score - greatest) * LOG2E) * share - 1.0
    tl.store(logits_ptr + target, p.to(kind), known)


@triton.jit
def _added(x, largest, total, EACH: tl.constexpr):
    """Add a part of a row to the softmax of every ``EACH`` columns."""
    wide = x.to(tl.float32).reshape(largest.shape[0], EACH)
    above = tl.maximum(largest, tl.max(wide, 1))
    e = tl.sum(tl.exp2((wide - above[:, None]) * LOG2E), 1)
    return above, total * tl.exp2((largest - above) * LOG2E) + e
