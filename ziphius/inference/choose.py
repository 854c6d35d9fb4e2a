"""What an engine computes by, and where: names of kernels and of devices, checked."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ziphius.config.errors import BadInput
from ziphius.kernels.select import (
    TRITON,
    Kernels,
    answering_kernels,
    fast_kernels,
    gpu_answering_kernels,
    has_compiler,
    has_triton,
    require_interpreter,
)

CPU = torch.device("cpu")
KERNELS = ("auto", "compiled", "torch", TRITON)


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device that is meant. Raises BadInput for one that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"device = '{name}': use cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise BadInput(f"device = '{name}': use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise BadInput(
            f"device = '{name}': torch finds no GPU here: leave it out to use processors"
        )
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= count:
        raise BadInput(f"device = '{name}': there are {count} here, numbered from 0")
    return torch.device("cuda", number)


def device_name(device: torch.device) -> str:
    """Return what to print of a device: of a GPU its make, too."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def choose_kernels(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    exact: bool = True,
    device: torch.device = CPU,
) -> Kernels:
    """Return the kernels that ``name`` means: ``auto``, ``compiled``, ``torch`` or ``triton``.

    ``folder`` keeps the compiled ones, by default the user's cache. Raises BadInput for another
    name, for ``compiled`` where there is no compiler, for ``triton`` where that can't run, and for
    exact mode on a GPU.
    """
    require_known(name)
    if device.type != "cpu":
        return _for_gpu(name, exact)
    if name == TRITON:
        require_interpreter()
        return gpu_answering_kernels()
    compiled = name == "compiled" or (name == "auto" and has_compiler())
    choose = answering_kernels if exact else fast_kernels
    return choose(Path(folder or "~/.cache/ziphius").expanduser() if compiled else None)


def require_known(name: str) -> None:
    """Raise BadInput for a name of no kernels."""
    if name not in KERNELS:
        raise BadInput(f"kernels = '{name}': use {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")


def _for_gpu(name: str, exact: bool) -> Kernels:
    if name == "compiled":
        raise BadInput("kernels = 'compiled': those are for processors: use triton on a GPU")
    if exact:
        raise BadInput(
            "on a GPU answers depend on what else is computed: say fast_math=True (--fast-math)"
        )
    use = name == TRITON or (name == "auto" and has_triton())
    return gpu_answering_kernels() if use else Kernels()
