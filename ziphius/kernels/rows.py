"""Single passes over rows, for answering: sums with the residual stream, and copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.project import require_no_gradient


def residual_compiled(library: Library, x: Tensor, y: Tensor) -> Tensor:
    """Add two tensors of one shape and dtype, rounded once."""
    require_no_gradient(x, y)
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    library.call("add", x.dtype, x, y, out, x.numel())
    return out


def join(x: Tensor, y: Tensor) -> Tensor:
    """Put the rows of ``y`` behind those of ``x``: ``[..., D]`` twice to ``[..., 2 D]``."""
    return torch.cat((x, y), dim=-1)


def join_compiled(library: Library, x: Tensor, y: Tensor) -> Tensor:
    """Do the same for two tensors of one shape and dtype."""
    require_no_gradient(x, y)
    x, y, D = x.contiguous(), y.contiguous(), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], 2 * D)
    library.call("join", x.dtype, x, y, out, x.numel() // D, D)
    return out


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy to a dtype that holds all numbers of ``x``; what has it is returned."""
    return x.to(dtype)


def widen_compiled(library: Library, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Do the same from BF16 to FP32; other dtypes are left to torch."""
    if (x.dtype, dtype) != (torch.bfloat16, torch.float32):
        return widen(x, dtype)
    require_no_gradient(x)
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    library.call("widen_row", x.dtype, x, out, x.numel())
    return out


RESIDUAL_VERSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch.add}
RESIDUAL_COMPILED = residual_compiled
JOIN_VERSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": join}
JOIN_COMPILED = join_compiled
WIDEN_VERSIONS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {"torch": widen}
WIDEN_COMPILED = widen_compiled
