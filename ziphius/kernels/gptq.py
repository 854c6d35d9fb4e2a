"""GPTQ: integers of one matrix that keep its outputs, not its entries (Frantar et al. 2023).

Columns are rounded one after the other. What rounding a column does to the outputs, the columns
that are still free make up for, as far as inputs go together; the Hessian of the squared error of
the outputs, ``X^T X``, says how far that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.kernels.integers import (
    WHOLE_ROW,
    Codes,
    choose_scales,
    groups,
    require_possible,
    round_to_codes,
    spread,
)

DAMPING = 0.01
# Columns whose errors reach the ones behind them in one product.
_BLOCK = 128


def quantize_gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    bits: int,
    group_size: int,
    *,
    act_order: bool = False,
    damping: float = DAMPING,
) -> Codes:
    """Return the codes and scales of a matrix whose inputs have the Hessian ``X^T X``.

    ``damping`` times the mean of the diagonal is added to it. ``act_order`` begins with the
    columns whose inputs are largest; groups stay neighbours in the stored order all the same, with
    scales from the weights as they were. Otherwise a group's scales come from its weights when its
    turn comes. With a Hessian that is a multiple of the identity this is rounding. Raises
    ValueError for a Hessian that is not finite or not positive definite after damping.
    """
    require_possible(bits, group_size)
    width = weight_OI.shape[1]
    rest_OI = weight_OI.float().clone()
    order_I = _order(hessian_II) if act_order else torch.arange(width)
    upper_II = _inverse_factor(hessian_II[order_I][:, order_I], damping).float()
    fixed = act_order or group_size == WHOLE_ROW
    scales_OG = choose_scales(rest_OI, bits, group_size)
    rest_OI = rest_OI[:, order_I]
    codes_OI = torch.empty_like(rest_OI)
    step = _BLOCK if fixed else _whole_groups(group_size)
    for start in range(0, width, step):
        stop = min(start + step, width)
        if fixed:
            scales_Ob = spread(scales_OG, width, group_size)[:, order_I[start:stop]]
        block = slice(start, stop)
        errors_Ob = torch.empty_like(rest_OI[:, block])
        for i in range(start, stop):
            if not fixed and (i - start) % group_size == 0:
                group = slice(i, min(i + group_size, stop))
                scales_OG[:, i // group_size] = choose_scales(rest_OI[:, group], bits, WHOLE_ROW)[
                    :, 0
                ]
                scales_Ob = spread(scales_OG, width, group_size)[:, block]
            scale_O = scales_Ob[:, i - start].float()
            code_O = round_to_codes(rest_OI[:, i], scale_O, bits)
            codes_OI[:, i] = code_O
            error_O = (rest_OI[:, i] - code_O * scale_O) / upper_II[i, i]
            rest_OI[:, i:stop] -= error_O.unsqueeze(1) * upper_II[i, i:stop]
            errors_Ob[:, i - start] = error_O
        rest_OI[:, stop:] -= errors_Ob @ upper_II[block, stop:]
    stored_OI = torch.empty_like(codes_OI, dtype=torch.int8)
    stored_OI[:, order_I] = codes_OI.to(torch.int8)
    assert scales_OG.shape[1] == groups(width, group_size)
    return Codes(stored_OI, scales_OG)


def _whole_groups(group_size: int) -> int:
    """Return the length of a block of whole groups, near the usual one."""
    return group_size * max(1, _BLOCK // group_size)


def _order(hessian_II: Tensor) -> Tensor:
    return hessian_II.diagonal().argsort(descending=True, stable=True)


def _inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Return the upper triangular ``U`` with ``U^T U = (H + damping)^-1``, in float64.

    Row ``i`` of it is how column ``i``'s error passes to the columns behind, once those before are
    settled. Inputs that never differ from zero say nothing: their columns are only rounded.
    """
    hessian_II = hessian_II.double()
    if not hessian_II.isfinite().all():
        raise ValueError("inputs are NaN or infinite: the calibration text breaks the model")
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean().clamp(min=torch.finfo(torch.float32).tiny)
    added_I = torch.where(diagonal_I == 0, mean, damping * mean)
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II + torch.diag(added_I))
    if failed:
        raise ValueError(f"inputs do not determine the weights: raise the damping of {damping}")
    inverse_II = torch.cholesky_inverse(lower_II)
    upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
    if failed or not upper_II.isfinite().all():
        raise ValueError(f"inputs do not determine the weights: raise the damping of {damping}")
    return upper_II
