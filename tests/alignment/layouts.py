"""Layouts of two ranks that later stages are proved on, and what it means that two runs are one."""

from __future__ import annotations

from typing import Any

import pytest

# Beside what a stage says of itself.
SHARED = ("precision.compute=float64", "run.kernels=torch", "pretrain.micro_batch_size=1")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "data": (),
    "experts": ("parallel.ep=2",),
    "pipeline": ("parallel.pp=2", "parallel.schedule=zb1p"),
    "two directions": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "tensor": ("parallel.tp=2",),
    "context": ("parallel.cp=2",),
    "sharded": ("parallel.sharding=fsdp",),
}


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compare what two runs tell of every step: numbers at 1e-9, all else as it is."""
    assert len(ours) == len(theirs) > 1
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() & other.keys():
            if isinstance(one[name], float):
                assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), name
            else:
                assert one[name] == other[name], name
