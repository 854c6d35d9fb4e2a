"""LogFMT: the logarithms of a tile's magnitudes in equal steps (facts 4.4).

The report's authors tried it for the combine step and did not adopt it; it is here to be compared.
Of n bits one is the sign. In a tile of 1 x 128 with logarithms from ``low`` to ``high``

    step = (high - low) / (2^(n-1) - 2)        low is raised to high - log(2^32) at least
    level 0 is zero, level K in 1 .. 2^(n-1) - 1 is exp(low + step * (K - 1))

and a number goes to the level that is nearest to the number itself, not to its logarithm. What is
less than half of ``exp(low)`` becomes zero. ``low`` and ``step`` are FP32, eight bytes a tile; how
they are stored is unpublished. A tile with a number that is not finite becomes NaN as a whole.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.quantize import TILE

WIDEST_RANGE = 32 * math.log(2)
BITS = range(4, 16)


class LogFmt(NamedTuple):
    """Numbers in ``bits`` bits: sign times level.

    ``codes`` is int16 ``[..., C]``, the level with the sign above it; ``low`` and ``step`` are
    float32 ``[..., ceil(C / 128)]``.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int


def encode(x: Tensor, bits: int) -> LogFmt:
    """Round ``x`` ``[..., C]``, in any float dtype, to LogFMT with 4 to 15 bits."""
    if bits not in BITS:
        raise BadInput(f"LogFMT of {bits} bits: {BITS[0]} to {BITS[-1]} are possible")
    width, top = x.shape[-1], 2 ** (bits - 1) - 1
    tiles = F.pad(x.detach().float(), (0, -width % TILE)).unflatten(-1, (-1, TILE))
    sizes = tiles.abs()
    largest = sizes.amax(-1)
    high = torch.where(largest == 0, 1.0, largest).log()
    # Zeros have a level of their own. A tile of nothing else ends with low = high = 0.
    smallest = torch.where(sizes == 0, torch.inf, sizes).amin(-1)
    low = torch.minimum(torch.maximum(smallest.log(), high - WIDEST_RANGE), high)
    low = torch.where(largest.isfinite(), low, torch.nan)
    step = (high - low) / (top - 1)
    level = _nearest(sizes, low.unsqueeze(-1), step.unsqueeze(-1), top)
    codes = level | torch.where(tiles.signbit(), top + 1, 0)
    return LogFmt(codes.flatten(-2)[..., :width].to(torch.int16), low, step, bits)


def decode(q: LogFmt, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers, computed in FP32 and rounded once to ``dtype``."""
    width, sign = q.codes.shape[-1], 2 ** (q.bits - 1)
    codes = F.pad(q.codes, (0, -width % TILE)).unflatten(-1, (-1, TILE)).int()
    sizes = _values(codes & (sign - 1), q.low.unsqueeze(-1), q.step.unsqueeze(-1))
    signed = torch.where((codes & sign) != 0, -sizes, sizes)
    return signed.flatten(-2)[..., :width].to(dtype)


def _values(level: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Return what levels stand for."""
    return torch.where(level == 0, 0.0, torch.exp(low + step * (level - 1)))


def _nearest(sizes: Tensor, low: Tensor, step: Tensor, top: int) -> Tensor:
    """Return the levels, int32, nearest to ``sizes``: the lower of two neighbours that are as near.

    Where ``low`` is NaN, no level is zero.
    """
    place = (sizes.log() - low) / step
    # A step of zero makes the place of the tile's one magnitude NaN: it has level 1.
    place = place.nan_to_num(0.0, 0.0, -1.0).floor().clamp(-1, top - 2)
    below = place.to(torch.int32) + 1
    lower, upper = _values(below, low, step), _values(below + 1, low, step)
    return torch.where(sizes - lower > upper - sizes, below + 1, below)
