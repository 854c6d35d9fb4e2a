"""What the machine reaches at best: the ceilings that kernels are measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from support.gpu.clock import Clock, GpuClock
from support.gpu.entry import Entry

MATRIX = 8192
COPIED = 2**31


@dataclass(frozen=True)
class Peaks:
    """Operations a second of matrix products in BF16 and FP8; bytes a second, read plus written.

    ``fp8`` is zero where torch has no such product.
    """

    bf16: float
    fp8: float
    copy: float
    fp8_product: str = ""

    def floor(self, entry: Entry) -> tuple[float, str]:
        """Return the seconds that no version of an entry beats, and what they are spent on."""
        matrix = self.fp8 if entry.peak == "fp8" and self.fp8 else self.bf16
        arithmetic, moving = entry.flops / matrix, entry.nbytes / self.copy
        return max((arithmetic, "arithmetic"), (moving, "bytes"))

    def as_figures(self) -> dict[str, Any]:
        """Return them for the record, in TFLOP/s and GB/s."""
        figures = asdict(self)
        return {
            "bf16_tflops": round(figures["bf16"] / 1e12, 3),
            "fp8_tflops": round(figures["fp8"] / 1e12, 3) or None,
            "fp8_product": figures["fp8_product"] or None,
            "copy_gb_per_s": round(figures["copy"] / 1e9, 2),
        }


def measure(device: torch.device, clock: Clock) -> Peaks:
    """Measure the peaks by torch's own products and copies, on random numbers."""
    if not isinstance(clock, GpuClock):
        return _of_a_processor()
    flops = 2 * MATRIX**3
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = flops / min(clock.seconds(lambda x: x[0] @ x[1].T, [(a, b)]) for _ in range(2))
    fp8, product = 0.0, ""
    for name, run in _fp8_products(a, b).items():
        try:
            reached = flops / clock.seconds(run, [None])
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
            continue
        if reached > fp8:
            fp8, product = reached, name
    source = torch.randn(COPIED // 4, device=device)
    target = torch.empty_like(source)
    # torch copies by the driver's own kernel, which may not be the fastest there is.
    seconds = min(
        clock.seconds(lambda x: x[0].copy_(x[1]), [(target, source)]),
        clock.seconds(lambda x: torch.add(x[1], 1, out=x[0]), [(target, source)]),
    )
    return Peaks(bf16, fp8, 2 * COPIED / seconds, product)


def _fp8_products(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[Any], Any]]:
    """Return torch's products of two matrices in E4M3 that could be the fastest."""
    from torch.nn import functional as F

    codes = [x.to(torch.float8_e4m3fn) for x in (a, b)]
    one = torch.ones((), device=a.device)
    ones_M1, ones_1N = (torch.ones(shape, device=a.device) for shape in ((MATRIX, 1), (1, MATRIX)))

    def product(recipe: str, scale_a: torch.Tensor, scale_b: torch.Tensor) -> Callable[[Any], Any]:
        def run(_: Any) -> torch.Tensor:
            kind = getattr(F.ScalingType, recipe)
            return F.scaled_mm(
                codes[0], codes[1].T, scale_a, kind, scale_b, kind,
                output_dtype=torch.bfloat16, use_fast_accum=True,
            )  # fmt: skip

        return run

    return {
        "scaled_mm tensor-wise": product("TensorWise", one, one),
        "scaled_mm row-wise": product("RowWise", ones_M1, ones_1N),
    }


def _of_a_processor(size: int = 1024, elements: int = 2**25) -> Peaks:
    a, b = torch.randn(2, size, size).bfloat16()
    source = torch.randn(elements)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    product = 2 * size**3 / best(lambda: a @ b.T)
    return Peaks(product, 0.0, 2 * source.nbytes / best(lambda: target.copy_(source)))
