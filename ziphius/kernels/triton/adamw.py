"""A parameter's step of AdamW on a GPU: everything is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.adamw import Rates

NUMBERS = 1024  # of a program
WARPS = 4


def adamw_step_triton(
    p: Tensor, grad: Tensor, m_kept: Tensor, v_kept: Tensor, rates: Rates
) -> None:
    """Do what ``adamw.adamw_step`` does to FP32 weights, whose memory has no gaps.

    Moments are FP32 or BF16. Products that are added to something are not rounded before: against
    the reference ``v`` misses the rounding of ``beta2 v``, ``p`` that of ``p decay``, and each of
    the three that of its last product. Raises BadInput for other weights.
    """
    if p.dtype != torch.float32:
        raise BadInput(
            f"kernel adamw: 'triton' has no weights in {p.dtype}: keep them in FP32, or use 'torch'"
        )
    if p.numel():
        _adamw_kernel[(triton.cdiv(p.numel(), NUMBERS),)](
            *(p, grad.contiguous(), m_kept, v_kept, p.numel()),
            *(1 - rates.beta1, rates.beta2, 1 - rates.beta2),
            *(rates.decay, rates.rate, rates.correction2, rates.eps, rates.gradient_scale),
            NUMBERS=NUMBERS,
            num_warps=WARPS,
        )
    torch.autograd.graph.increment_version([p, m_kept, v_kept])


@triton.jit
def _adamw_kernel(
    weights: tl.tensor,
    gradients: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    count: tl.tensor,
    share1: tl.tensor,
    beta2: tl.tensor,
    share2: tl.tensor,
    decay: tl.tensor,
    rate: tl.tensor,
    correction2: tl.tensor,
    eps: tl.tensor,
    gradient_scale: tl.tensor,
    NUMBERS: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    inside = at < count
    g = tl.load(gradients + at, inside, other=0.0) * gradient_scale
    m = tl.load(first + at, inside, other=0.0).to(tl.float32)
    v = tl.load(second + at, inside, other=0.0).to(tl.float32)
    p = tl.load(weights + at, inside, other=0.0)
    m += share1 * (g - m)
    v = beta2 * v + share2 * (g * g)
    # The quotient by one number; as tensors, since Triton's exact division takes no others.
    root = tl.sqrt_rn(tl.div_rn(v, correction2 + tl.zeros_like(v)))
    p = p * decay - rate * tl.div_rn(m, root + eps)
    tl.store(weights + at, p, inside)
    tl.store(first + at, m.to(first.dtype.element_ty), inside)
    tl.store(second + at, v.to(second.dtype.element_ty), inside)
