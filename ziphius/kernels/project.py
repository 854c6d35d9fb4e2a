"""Rows times weights that are read where they are stored, for answering."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.stored import Codes, Weight, describe


def require_no_gradient(*tensors: Weight) -> None:
    """Raise RuntimeError where a gradient would be lost without a word."""
    needed = (t.requires_grad for t in tensors if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(needed):
        raise RuntimeError("kernels that answer have no backward: compute under torch.no_grad()")


def project_reference(x_NI: Tensor, weight: Weight) -> Tensor:
    """Multiply rows ``[N, I]`` by a weight ``[O, I]``: ``[N, O]`` in the dtype of ``x``.

    Codes count as the BF16 numbers that they mean. Sums are at least FP32 and rounded once.
    """
    high = torch.promote_types(x_NI.dtype, torch.float32)
    matrix = weight.decode(high) if isinstance(weight, Codes) else weight.to(x_NI.dtype).to(high)
    return (x_NI.to(high) @ matrix.T).to(x_NI.dtype)


def project_compiled(library: Library, x_NI: Tensor, weight: Weight) -> Tensor:
    """Do the same for FP32, FP64 and BF16 rows; no row depends on how many there are."""
    require_no_gradient(x_NI, weight)
    if x_NI.stride(-1) != 1:
        x_NI = x_NI.contiguous()
    rows, outer = len(x_NI), weight.shape[0]
    out_NO = x_NI.new_empty(rows, outer)
    words = (*describe(weight), 1, 0, x_NI.data_ptr(), x_NI.stride(0), 0)
    words = (*words, out_NO.data_ptr(), outer, 0, 0)
    parts, behind = (ctypes.c_int64 * len(words))(*words), (x_NI, weight, out_NO)
    library.call("project", x_NI.dtype, parts, 1, rows, behind=behind)
    return out_NO


def project_heads_compiled(
    library: Library, x_NHI: Tensor, weight_HOI: Tensor, out: Tensor
) -> None:
    """Multiply the numbers of every head by its own weight ``[H, O, I]``, into ``out [N, H, O]``.

    Strides of ``x`` and ``out`` are free but the last.
    """
    heads = len(weight_HOI)
    words = (
        *describe(weight_HOI[0]),
        *(heads, weight_HOI.stride(0) * weight_HOI.element_size()),
        *(x_NHI.data_ptr(), x_NHI.stride(0), x_NHI.stride(1)),
        *(out.data_ptr(), out.stride(0), out.stride(1), 0),
    )
    parts, behind = (ctypes.c_int64 * len(words))(*words), (x_NHI, weight_HOI, out)
    library.call("project", x_NHI.dtype, parts, 1, len(x_NHI), behind=behind)
