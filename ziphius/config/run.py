"""The [run] table."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from ziphius.config.table import Table

_DEVICE = re.compile(r"cpu|cuda(:\d+)?|mps")


class RunConfig(Table):
    """What a run needs to be repeated: its seed, its threads and its device.

    ``threads`` belongs to the recipe because sums over threads differ in their last bits;
    0 takes as many as the process may use and writes it down. ``validate_bytes`` bounds the
    held-out text.
    """

    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    device: str = "cpu"
    validate_bytes: int = Field(600_000, ge=1)

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not _DEVICE.fullmatch(device):
            raise ValueError(f"'{device}' is no device: use cpu, cuda, cuda:N or mps")
        return device
