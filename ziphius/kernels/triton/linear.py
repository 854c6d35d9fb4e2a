"""The product of every linear layer of a model that answers on a GPU, by the form of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.kernels.linear import linear_native
from ziphius.kernels.quantize import TILE
from ziphius.kernels.stored import Codes, Weight
from ziphius.kernels.triton.gemm import gemm_triton
from ziphius.kernels.triton.quantize import TritonQuantize
from ziphius.kernels.triton.weight_only import weight_only_triton


def linear_triton(x: Tensor, weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """Compute ``x W^T`` in ``dtype``: ``[..., I]`` to ``[..., O]``. Codes have no backward.

    Numbers are torch's; integers are decoded inside the product; FP8 in blocks of 128 is multiplied
    in FP8, activations quantised in tiles, as the report serves it.
    """
    if not isinstance(weight_OI, Codes):
        return linear_native(x, weight_OI, dtype)
    x_NI = x.to(dtype).reshape(-1, x.shape[-1])
    if weight_OI.form == "fp8" and weight_OI.group == weight_OI.scale_rows == TILE:
        out_NO = gemm_triton(TritonQuantize().tiles(x_NI), weight_OI.blocks, dtype)
    else:
        out_NO = weight_only_triton(x_NI, weight_OI)
    return out_NO.view(*x.shape[:-1], -1)
