"""Rotary positions, interleaved, and YaRN (report section 4.3; facts 1.4, 7.2, 7.3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ziphius.config.model import ModelConfig, Yarn


class Rope(NamedTuple):
    """Cosines and sines of the positions of one forward pass, each ``[T, R/2]``."""

    cos_Tr: Tensor
    sin_Tr: Tensor


def mscale(factor: float, coefficient: float) -> float:
    """YaRN's magnitude factor ``0.1 * coefficient * ln(factor) + 1``; 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Scale of the attention logits: ``(nope + rope)^-0.5``, times mscale squared under YaRN.

    The square is there because YaRN scales queries and keys alike (facts 7.3).
    """
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rotation_scale(config: ModelConfig) -> float:
    """Factor on cosine and sine: 1 wherever ``mscale == mscale_all_dim``, as in all of V3.

    The general rule is that of Hugging Face configs: the ratio of the two magnitudes, or the plain
    magnitude when one of them is absent (zero).
    """
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return mscale(yarn.factor, 1.0)


def frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of every rotary pair, float64 ``[R/2]`` on the CPU (facts 7.2)."""
    R = config.qk_rope_head_dim
    pair_r = torch.arange(0, R, 2, dtype=torch.float64)
    plain_r = config.rope_theta ** (-pair_r / R)
    yarn = config.rope_scaling
    if yarn is None:
        return plain_r
    low, high = _blend_range(yarn, R, config.rope_theta)
    ramp_r = ((torch.arange(R // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain_r * (1 - ramp_r) + plain_r / yarn.factor * ramp_r


def _blend_range(yarn: Yarn, R: int, theta: float) -> tuple[float, float]:
    """First and last pair of the blend between kept and interpolated frequencies."""

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns ``rotations`` times over the original context."""
        length = yarn.original_max_position_embeddings
        return R * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_with(yarn.beta_slow)), R - 1)
    return low, high + 0.001 if low == high else high


def rope_at(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> Rope:
    """Compute cosines and sines for integer positions on the CPU, in ``dtype`` (at least FP32)."""
    angles_Tr = positions_T.to(torch.float64)[:, None] * frequencies(config)
    scale = rotation_scale(config)
    return Rope((angles_Tr.cos() * scale).to(dtype), (angles_Tr.sin() * scale).to(dtype))


def rotate(x_BTHR: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring pairs (2i, 2i+1) of the last dimension by their angle (facts 1.4).

    ``x`` is ``[B, T, H, R]``; the arithmetic is in the tables' dtype, the result in that of ``x``.
    """
    even, odd = x_BTHR.to(rope.cos_Tr.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos_Tr[:, None], rope.sin_Tr[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BTHR.dtype)
