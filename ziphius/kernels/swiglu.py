"""SwiGLU with the routing weight folded in (report section 3.3; facts 1.2, 1.7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None = None) -> Tensor:
    """Compute ``silu(gate) * up``, times the row's routing weight if there is one.

    ``gate`` and ``up`` are ``[..., F]``, and so is the result, in their dtype. With routing weights
    the product is taken in at least FP32, so that it is rounded only once.
    """
    if gates_M is None:
        return F.silu(gate_MF) * up_MF
    high = torch.promote_types(gate_MF.dtype, torch.float32)
    hidden_MF = F.silu(gate_MF.to(high)) * up_MF.to(high)
    return (hidden_MF * gates_M.to(high).unsqueeze(-1)).to(gate_MF.dtype)
