"""The [precision] table."""

from __future__ import annotations

from typing import Literal

from ziphius.config.table import Table


class PrecisionConfig(Table):
    """The arithmetic of linear layers and activations.

    What stays in higher precision whatever this says is one table: ``ziphius/model/precision.py``.
    ``fp8`` multiplies E4M3 and computes in BF16 around it. Its ``scales`` are as in the ``report``,
    FP32 but for what is dispatched or kept for the output projection, or powers of two throughout
    (``ue8m0``), as V3.1 was trained.
    """

    compute: Literal["float64", "float32", "bfloat16", "fp8"] = "float32"
    scales: Literal["report", "ue8m0"] = "report"
