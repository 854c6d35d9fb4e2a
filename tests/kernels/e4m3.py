"""E4M3 by its definition, in float64: what the tests of quantisers and products compare with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def _number(code: int) -> float:
    """Four exponent bits with bias 7, three of fraction; no infinity, and 1111.111 is NaN."""
    exponent, fraction = code >> 3 & 15, code & 7
    if (exponent, fraction) == (15, 7):
        return math.nan
    size = (fraction / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
    return -size if code & 128 else size


NUMBERS = np.array([_number(code) for code in range(256)])
SIZES = NUMBERS[:127]
FLOOR = np.float32(1e-4)


def codes(x: Array) -> Array:
    """Return the codes nearest to float64 numbers, the even one of two; NaN has code 127."""
    size = np.abs(x)
    above = np.searchsorted(SIZES, size).clip(1, 126)
    below = above - 1
    up, down = SIZES[above] - size, size - SIZES[below]
    even = np.where(above % 2 == 0, above, below)
    found = np.where(up == down, even, np.where(up < down, above, below))
    # Half a step above 448 there is nothing to round to.
    found = np.where(size <= 464, found, 127)
    return np.where(found == 127, 127, found | np.signbit(x) * 128)


def scale(amax: float, power_of_two: bool) -> np.float32:
    """Return the scale of a group with this largest magnitude."""
    plain = max(np.float32(amax), FLOOR) / np.float32(448)
    if not power_of_two:
        return plain
    fraction, exponent = math.frexp(plain)
    return np.float32(2.0 ** (exponent if fraction > 0.5 else exponent - 1))


def quantize(x: Tensor, rows: int, power_of_two: bool) -> tuple[Array, Array]:
    """Return codes and scales of a matrix in groups of ``rows`` by 128, one after the other."""
    values = x.float().numpy()
    shape = (-(-values.shape[0] // rows), -(-values.shape[1] // 128))
    scales, found = np.zeros(shape, dtype=np.float32), np.zeros(values.shape, dtype=np.int64)
    for i, j in np.ndindex(shape):
        part = (slice(i * rows, i * rows + rows), slice(j * 128, j * 128 + 128))
        scales[i, j] = scale(np.abs(values[part]).max(), power_of_two)
        found[part] = codes((values[part] / scales[i, j]).astype(np.float64))
    return found, scales


def dequantize(found: Array, scales: Array, rows: int) -> Array:
    """Return ``code * scale`` in float64, which holds it exactly."""
    spread = scales.astype(np.float64).repeat(rows, 0).repeat(128, 1)
    return NUMBERS[found] * spread[: found.shape[0], : found.shape[1]]


def bits(found: Tensor) -> Array:
    """Return the codes of a float8 tensor, NaN of either sign as 127."""
    plain = found.view(torch.uint8).numpy().astype(np.int64)
    return np.where(plain & 127 == 127, 127, plain)


def uneven(shape: tuple[int, ...], seed: int, spread: float = 2.0) -> Tensor:
    """Numbers of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(shape, generator=generator))
    x = torch.randn(shape, generator=generator) * sizes
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)
