"""Which kernels a training step really runs: a kernel that no path calls does not count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from support.gpu.meant import STEP
from support.gpu.training import Job, Ours


def profile_step(job: Job, compute: str = "fp8") -> dict[str, dict[str, Any]]:
    """Train ``job``, MTP and balancing included; return the kernels of the second step.

    By the name of the kernel: calls, and microseconds in all. A processor has none.
    """
    trained = Ours(job, compute, ())
    trained.step()
    activities = [ProfilerActivity.CPU]
    if job.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as seen:
        trained.step()
        if job.device != "cpu":
            torch.cuda.synchronize()
    found: dict[str, dict[str, Any]] = {}
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            row = found.setdefault(event.name, {"calls": 0, "us": 0.0})
            row["calls"] += 1
            row["us"] += event.device_time_total
    return found


def missing(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the (operation, kernel) of the list that a step should have had and had not."""
    for operation, kernels in STEP.items():
        for kernel in kernels:
            if not any(name == kernel or name.startswith(f"{kernel}_") for name in found):
                yield operation, kernel
