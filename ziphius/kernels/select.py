"""Which version of each kernel a model runs: chosen once, at construction, and printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ziphius.config.errors import BadInput
from ziphius.config.table import nearest
from ziphius.kernels import attention, grouped

DEFAULTS: Mapping[str, str] = {"attention": "sdpa", "grouped": "loop"}


@dataclass(frozen=True)
class Kernels:
    """The chosen version of every operation that has more than one."""

    attention: str = DEFAULTS["attention"]
    grouped: str = DEFAULTS["grouped"]

    def __post_init__(self) -> None:
        for op, table in (("attention", attention.VERSIONS), ("grouped", grouped.VERSIONS)):
            name = getattr(self, op)
            if name not in table:
                raise BadInput(f"kernel {op}: no version '{name}'{nearest(name, table)}")

    def __str__(self) -> str:
        return f"attention={self.attention} grouped={self.grouped}"
