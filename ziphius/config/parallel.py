"""The [parallel] table: what is applied to the model from outside."""

from __future__ import annotations

from typing import Literal

from ziphius.config.table import Table


class ParallelConfig(Table):
    """``recompute`` trades arithmetic in backward for memory (facts 5.7).

    ``none`` keeps every activation. ``selective`` computes RMSNorm outputs, MLA up-projections and
    SwiGLU outputs again, as the report does. ``full`` keeps only the inputs of the block's stages
    ``attend`` and ``experts``; the experts that were chosen are saved and replayed.
    """

    recompute: Literal["none", "selective", "full"] = "none"
