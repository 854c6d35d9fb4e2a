"""An entry of ``kernels.py``: a kernel at a size, its floor, its reference and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

OURS, PLAIN = "ziphius", "reference"
COPY = "copy"


@dataclass(frozen=True)
class Place:
    """Where entries run, and how they store activations there.

    That is BF16, and FP32 where Triton's interpreter runs: its BF16 is not that of a GPU.
    """

    device: torch.device
    storage: torch.dtype

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator for one set of inputs; the same seed makes the same inputs."""
        return torch.Generator(self.device).manual_seed(seed)

    def normal(
        self, generator: torch.Generator, *shape: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return normal random numbers, in FP32 rounded to ``dtype``, else to the storage's."""
        wide = torch.randn(shape, generator=generator, device=self.device)
        return wide.to(dtype or self.storage)

    def outliers(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Return numbers of which one in a hundred is thirty times as large."""
        wide = torch.randn(shape, generator=generator, device=self.device)
        large = torch.rand(shape, generator=generator, device=self.device) < 0.01
        return wide.where(~large, wide * 30).to(self.storage)


def same(inputs: Any) -> Any:
    """Take the inputs as they are."""
    return inputs


def tensors(inputs: Any, result: Any) -> Sequence[Tensor]:
    """Compare everything that came out."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True)
class Version:
    """One way to compute an entry.

    ``prepare`` turns the inputs into what ``run`` takes, and is not timed. ``bound`` is of the
    relative error, the entry's own if it is ``None``. ``slow`` ones compile for long.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = same
    bound: float | None = None
    slow: bool = False


@dataclass(frozen=True)
class Entry:
    """A kernel at a size.

    ``make`` draws inputs, ``reference`` computes what is wanted in FP32 or float64, ``answer``
    picks what is compared from the inputs and a result: each tensor's relative error must be within
    ``bound``; zero asks for equal bits. ``flops`` and ``nbytes`` are what must be done at least,
    each input read once and each output written once; ``peak`` is the unit that does the former.
    ``goal`` is a speed: so many times the peer named, or that share of the bandwidth of a copy.
    ``candidates`` are ours in other blocks, for tuning.
    """

    section: str
    name: str
    make: Callable[[torch.Generator], Any]
    reference: Callable[[Any], Tensor | Sequence[Tensor]]
    ours: Version
    plain: Version
    nbytes: float
    flops: float = 0.0
    peak: Literal["bf16", "fp8"] = "bf16"
    bound: float = 0.0
    peers: Sequence[Version] = ()
    answer: Callable[[Any, Any], Sequence[Tensor]] = tensors
    goal: tuple[str, float] | None = None
    candidates: Callable[[], Sequence[Version]] = tuple
