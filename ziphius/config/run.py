"""The [run] table."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from ziphius.config.table import Table

_DEVICE = re.compile(r"cpu|cuda(:\d+)?|mps")


class RunConfig(Table):
    """What a run needs to be repeated: its seed, its threads and its device.

    ``threads`` belongs to the recipe because sums over threads differ in their last bits;
    0 takes as many as the process may use and writes it down. ``kernels`` are torch's own, the
    ``compiled`` ones of ``kernels/cpu``, or those for GPUs, ``triton``; ``auto`` takes these on a
    GPU that has Triton, and compiled ones where there is a compiler.
    ``products`` says how BF16 products run on a processor: ``native``, or ``widened`` to FP32;
    ``auto`` takes what is measured to be faster. Both choices are written down. ``cache`` keeps the
    compiled kernels. A checkpoint is written every
    ``checkpoint_every`` steps, and the newest ``keep_checkpoints`` are kept. Held-out text, at most
    ``validate_bytes`` of it, is measured every ``validate_every`` steps; 0 measures it before and
    after only. ``tensorboard`` writes event files beside ``metrics.jsonl``.
    """

    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    device: str = "cpu"
    kernels: Literal["auto", "torch", "compiled", "triton"] = "auto"
    products: Literal["auto", "native", "widened"] = "auto"
    cache: str = "~/.cache/ziphius"
    checkpoint_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=2)
    validate_bytes: int = Field(600_000, ge=1)
    validate_every: int = Field(0, ge=0)
    tensorboard: bool = False

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not _DEVICE.fullmatch(device):
            raise ValueError(f"'{device}' is no device: use cpu, cuda, cuda:N or mps")
        return device
