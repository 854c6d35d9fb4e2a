"""What a GPU's figures depend on beside the code."""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any

import torch


def circumstances() -> dict[str, Any]:
    """Name the device, its driver and the software under it; ``device`` is "cpu" without a GPU."""
    found: dict[str, Any] = {"device": "cpu", "triton": _version("triton")}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {
            "device": device.name,
            "device_gib": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else None
