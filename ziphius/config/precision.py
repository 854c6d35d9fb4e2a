"""The [precision] table."""

from __future__ import annotations

from typing import Literal

from ziphius.config.errors import BadInput
from ziphius.config.table import Table


class PrecisionConfig(Table):
    """The arithmetic of linear layers and activations.

    What stays in higher precision whatever this says is one table: ``ziphius/model/precision.py``.
    """

    compute: Literal["float64", "float32", "bfloat16", "fp8"] = "float32"

    def require_available(self) -> None:
        """Raise BadInput for a precision that this version does not compute in yet."""
        if self.compute == "fp8":
            raise BadInput(
                "precision.compute = 'fp8' is not implemented yet: use 'bfloat16' or 'float32'"
            )
