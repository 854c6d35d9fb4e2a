"""Forms of a weight that are derived from it, and belong to the layer that owns it (seam 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Passing:
    """A derived form of a weight that comes and goes: made anew whenever a part of it is read."""

    def __init__(self, weight: Tensor, make: Callable[[Tensor], Any]) -> None:
        self._weight, self._make = weight, make

    def __getattr__(self, part: str) -> Any:
        return getattr(self._make(self._weight), part)


class Derived:
    """Keeps derived forms as long as the weight they are of is the same.

    torch counts the changes of a tensor in place, through its views too; our compiled kernels count
    theirs with it. So optimizer, loading and averages need not tell anybody. Nothing is kept of a
    weight that is ``passing``: one that is brought together for a pass and let go behind it, whose
    changes torch does not count, and whose forms would take more memory than it does.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, int, Any]] = {}
        self.passing = False

    def put(self, form: str, weight: Tensor, value: Any) -> None:
        """Keep a form that came with the weight, from a checkpoint."""
        self._kept[form] = (weight._version, weight.data_ptr(), value)

    def get(self, form: str, weight: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """Return a form of ``weight``, made by ``make`` if the weight has changed since."""
        if self.passing:
            return Passing(weight, make)
        version, place = weight._version, weight.data_ptr()
        kept = self._kept.get(form)
        if kept is None or kept[:2] != (version, place):
            kept = (version, place, make(weight))
            self._kept[form] = kept
        return kept[2]
