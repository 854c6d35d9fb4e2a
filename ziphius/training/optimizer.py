"""AdamW with BF16 moments over FP32 master weights (report section 3.3; facts 4.1, 6.3).

torch's AdamW keeps moments in the dtype of the weights; the report keeps them in BF16, and that is
why this one exists. With ``moments="float32"`` it computes what torch's does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.adamw import Rates
from ziphius.kernels.grouped import keep_gradient
from ziphius.kernels.select import Kernels

_MOMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Size(NamedTuple):
    """The global norm of the gradients before clipping, and what a step multiplies them by."""

    norm: float
    factor: float


class AdamW:
    """Decoupled weight decay on matrices; vectors (norm gains) decay in no recipe of ours.

    The arithmetic is in the weights' dtype; only what is kept between steps is rounded to the
    moments' dtype. Moments of float64 weights stay float64 unless they are BF16.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: PretrainConfig,
        kernels: Kernels | None = None,
    ) -> None:
        self.update = (kernels or Kernels()).function("adamw")
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config = config
        self.steps = 0
        moments = _MOMENT_DTYPES[config.moments]

        def zeros(p: Tensor) -> Tensor:
            dtype = moments if moments == torch.bfloat16 else torch.promote_types(p.dtype, moments)
            return torch.zeros_like(p, dtype=dtype)

        self.first = [zeros(p) for p in self.parameters]
        self.second = [zeros(p) for p in self.parameters]

    @torch.no_grad()
    def measure(self, scale: float = 1.0) -> Size:
        """Measure the gradients of a loss that was multiplied by ``scale``, a power of two.

        The factor takes the scale away and brings them to the norm of the recipe, if they are
        beyond it. Gradients stay as they are: the update multiplies them.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item() / scale
        clipping = self.config.clip_norm / (norm + 1e-6)
        # A norm that is no number is no reason to go on as if it were small.
        return Size(norm, (1.0 if clipping >= 1 else clipping) / scale)

    @torch.no_grad()
    def step(self, learning_rate: float, factor: float = 1.0) -> None:
        """Apply the gradients, times ``factor``, and drop them."""
        self.steps += 1
        c = self.config
        correction1 = 1 - c.beta1**self.steps
        correction2 = 1 - c.beta2**self.steps
        for p, m_kept, v_kept in zip(self.parameters, self.first, self.second, strict=True):
            if p.grad is None:
                continue
            decay = 1 - learning_rate * c.weight_decay if p.ndim > 1 else 1.0
            rate = learning_rate / correction1
            rates = Rates(c.beta1, c.beta2, decay, rate, correction2, c.adam_eps, factor)
            self.update(p, p.grad, m_kept, v_kept, rates)
            keep_gradient(p)
