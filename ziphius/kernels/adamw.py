"""One parameter's step of AdamW, in place (report section 3.3; facts 4.1, 6.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library


class Rates(NamedTuple):
    """The numbers of one step.

    ``decay`` multiplies weights, ``rate`` has its correction in it, and ``gradient_scale``
    multiplies gradients before anything else: clipping needs no pass of its own.
    """

    beta1: float
    beta2: float
    decay: float
    rate: float
    correction2: float
    eps: float
    gradient_scale: float = 1.0


def adamw_step(p: Tensor, grad: Tensor, m_kept: Tensor, v_kept: Tensor, rates: Rates) -> None:
    """Update a weight and its kept moments, which are rounded to their own dtype only to be kept.

    With ``g`` the gradient, scaled: ``m = lerp(m, g, 1 - beta1)``,
    ``v = beta2 v + (1 - beta2) g^2``, then
    ``p = p decay - rate m / (sqrt(v / correction2) + eps)``.
    """
    if rates.gradient_scale != 1:
        grad = grad * rates.gradient_scale
    m = m_kept.to(p.dtype).lerp_(grad, 1 - rates.beta1)
    v = v_kept.to(p.dtype).mul_(rates.beta2).addcmul_(grad, grad, value=1 - rates.beta2)
    m_kept.copy_(m)
    v_kept.copy_(v)
    # Not in place: with moments in the weights' dtype, v is the kept moment itself.
    denominator = (v / rates.correction2).sqrt_().add_(rates.eps)
    if rates.decay != 1:
        p.mul_(rates.decay)
    p.addcdiv_(m, denominator, value=-rates.rate)


def adamw_step_compiled(
    library: Library, p: Tensor, grad: Tensor, m_kept: Tensor, v_kept: Tensor, rates: Rates
) -> None:
    """Do the same in one pass. Weights are FP32 or float64, moments of that dtype or BF16."""
    tensors = (p, grad.contiguous(), m_kept, v_kept)
    moments = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}[m_kept.dtype]
    library.call("adamw", p.dtype, moments, *tensors, p.numel(), *rates)
    torch.autograd.graph.increment_version([p, m_kept, v_kept])


VERSIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Rates], None]] = {"torch": adamw_step}
COMPILED = adamw_step_compiled
