"""Forms of a weight that are derived from it, and belong to the layer that owns it (seam 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Derived:
    """Keeps derived forms as long as the weight they are of is the same.

    torch counts the changes of a tensor in place, through its views too; our compiled kernels count
    theirs with it. So optimizer, loading and averages need not tell anybody.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, int, Any]] = {}

    def put(self, form: str, weight: Tensor, value: Any) -> None:
        """Keep a form that came with the weight, from a checkpoint."""
        self._kept[form] = (weight._version, weight.data_ptr(), value)

    def get(self, form: str, weight: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """Return a form of ``weight``, made by ``make`` if the weight has changed since."""
        version, place = weight._version, weight.data_ptr()
        kept = self._kept.get(form)
        if kept is None or kept[:2] != (version, place):
            kept = (version, place, make(weight))
            self._kept[form] = kept
        return kept[2]
