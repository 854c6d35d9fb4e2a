"""Which arithmetic each kind of module uses: the one table of the precision seam.

The report keeps embedding, output head, router, norms and the attention core out of FP8
(section 3.3; facts 4.1). Norms, softmax and loss widen to at least FP32 inside their kernels,
whatever the dtype of their input. "FP32" here means at least FP32: a float64 model stays float64
throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["linear", "join", "embedding", "head", "router"]

# "fp8" is FP8 where precision.compute says so; "compute" follows it otherwise, with BF16 under FP8;
# "high" is at least FP32 whatever it says.
PRECISION_TABLE: dict[Kind, Literal["fp8", "compute", "high"]] = {
    "linear": "fp8",  # projections of attention, every feed-forward layer
    "join": "compute",  # an MTP module's projection, which published checkpoints hold in BF16
    "embedding": "compute",
    "head": "compute",  # the loss on top of it is at least FP32
    "router": "high",  # and the routing bias, which is stored in FP32 however a file has it
}

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,  # of other people's checkpoints; no recipe trains in it
}


@dataclass(frozen=True)
class Precision:
    """``compute``: dtype of products, activations and the residual stream. ``storage``: weights.

    Training stores at least FP32 master weights and casts them where they are used; a model that
    only answers stores what it computes in. With ``fp8`` the products that the table names are in
    FP8, and ``power_of_two`` makes all of their scales powers of two.
    """

    compute: torch.dtype = torch.float32
    storage: torch.dtype = torch.float32
    fp8: bool = False
    power_of_two: bool = False

    @property
    def high(self) -> torch.dtype:
        """The dtype of the parts that never go below FP32."""
        return torch.promote_types(self.compute, torch.float32)

    def dtype(self, kind: Kind) -> torch.dtype:
        """The arithmetic of one kind of module; of one in FP8, what comes in and goes out."""
        return self.high if PRECISION_TABLE[kind] == "high" else self.compute

    def in_fp8(self, kind: Kind) -> bool:
        """Say whether the products of one kind of module are in FP8."""
        return self.fp8 and PRECISION_TABLE[kind] == "fp8"

    @classmethod
    def for_training(cls, compute: torch.dtype) -> Precision:
        """Master weights of at least FP32 under products in ``compute``."""
        return cls(compute=compute, storage=torch.promote_types(compute, torch.float32))

    @classmethod
    def for_fp8_training(cls, *, power_of_two: bool = False) -> Precision:
        """FP32 master weights under products in FP8, and BF16 around them (facts 4.1)."""
        return cls(torch.bfloat16, torch.float32, fp8=True, power_of_two=power_of_two)

    def for_answers(self) -> Precision:
        """Return the same for a model that answers: FP8 products are those of training."""
        return replace(self, fp8=False)

    @classmethod
    def for_inference(cls, dtype: torch.dtype) -> Precision:
        """Weights stored in the dtype they are used in."""
        return cls(compute=dtype, storage=dtype)
