"""The [run] table."""

from __future__ import annotations

from pydantic import Field

from ziphius.config.table import Table


class RunConfig(Table):
    """What a run needs to be repeated: its seed, its threads and its device.

    ``threads`` belongs to the recipe because sums over threads differ in their last bits;
    0 takes the number of cores and writes it down. ``validate_bytes`` bounds the held-out text.
    """

    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    device: str = "cpu"
    validate_bytes: int = Field(600_000, ge=1)
