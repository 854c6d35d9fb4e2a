"""FP8 weights of a checkpoint: E4M3 numbers and one FP32 scale a 128 x 128 block (facts 4.2).

The arithmetic is that of ``kernels/quantize.py``, a row of blocks at a time.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels import quantize
from ziphius.kernels.quantize import E4M3, TILE

BLOCK = (TILE, TILE)
SCALE_SUFFIX = "_scale_inv"


def is_quantized(name: str, names: Container[str]) -> bool:
    """Say whether the tensor ``name`` has block scales: whether ``name_scale_inv`` is in ``names``.

    So ``X.weight`` belongs to ``X.weight_scale_inv`` (facts 1.9).
    """
    return name + SCALE_SUFFIX in names


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix ``[out, in]``: a ragged edge has its own."""
    rows, columns = shape
    return -(-rows // TILE), -(-columns // TILE)


def require_scales(
    name: str, shape: Sequence[int], scale_inv: Sequence[int], dtype: torch.dtype
) -> None:
    """Check shape and dtype of the scales of ``name``, a matrix of ``shape``; else BadInput."""
    expected = list(scale_shape(shape))
    if list(scale_inv) != expected or dtype != torch.float32:
        raise BadInput(
            f"{name}{SCALE_SUFFIX}: {_shown(dtype, scale_inv)}, but {name} {list(shape)} in blocks "
            f"of {TILE} x {TILE} needs float32 {expected}"
        )


def dequantize_blocks(
    q: Tensor, scale_inv: Tensor | None, dtype: torch.dtype, *, name: str = "weight"
) -> Tensor:
    """Return ``q[i, j] * scale_inv[i // 128, j // 128]`` in ``dtype``.

    ``q`` is float8_e4m3fn ``[out, in]``; ``scale_inv`` is float32 ``[ceil(out / 128),
    ceil(in / 128)]`` and multiplies, despite its name (facts 4.2). The product is made in float32
    (in float64 for a float64 result) and rounded once to ``dtype``. Beyond the result it needs
    memory for one row of blocks only. Raises BadInput, naming ``name``, for a missing scale, a
    wrong shape or a wrong dtype.
    """
    if q.ndim != 2 or q.dtype != E4M3:
        shown = _shown(q.dtype, q.shape)
        raise BadInput(f"{name}: {shown} is no FP8 weight: float8_e4m3fn [out, in] is needed")
    if scale_inv is None:
        raise BadInput(
            f"{name}: FP8, but {name}{SCALE_SUFFIX} is missing: the checkpoint is incomplete"
        )
    require_scales(name, q.shape, scale_inv.shape, scale_inv.dtype)
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    parts = zip(q.split(TILE), scale_inv.split(1), result.split(TILE), strict=True)
    for part, scale, target in parts:
        target.copy_(quantize.dequantize(quantize.Fp8(part, scale, TILE), dtype))
    return result


def quantize_blocks(
    w: Tensor, *, name: str = "weight", power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (q float8_e4m3fn ``[out, in]``, scale_inv float32 ``[ceil(out/128), ceil(in/128)]``).

    The scale of a block is ``max(amax, 1e-4) / 448``, with ``power_of_two`` the next power of two
    that is not smaller (UE8M0), and ``q = w / scale`` rounded to nearest even (facts 4.2). A ragged
    edge counts as padded with zeros, so that its scale comes from the values that exist. Raises
    BadInput, naming ``name``, for a weight that is no matrix or holds NaN or infinity.
    """
    if w.ndim != 2 or not w.is_floating_point():
        shown = _shown(w.dtype, w.shape)
        raise BadInput(f"{name}: {shown} cannot be stored as FP8: a matrix is needed")
    q = torch.empty(w.shape, dtype=E4M3, device=w.device)
    scales = torch.empty(scale_shape(w.shape), dtype=torch.float32, device=w.device)
    for part, target, scale in zip(w.split(TILE), q.split(TILE), scales.split(1), strict=True):
        codes, found, _ = quantize.quantize_blocks(part, power_of_two=power_of_two)
        target.copy_(codes)
        scale.copy_(found)
    if not scales.isfinite().all():
        raise BadInput(f"{name}: holds NaN or infinity, which FP8 blocks cannot store")
    return q, scales


def are_powers_of_two(scales: Tensor) -> bool:
    """Say whether every scale is a power of two, which is what ``scale_fmt: ue8m0`` promises."""
    mantissa, _ = scales.frexp()
    return bool((mantissa == 0.5).all())


def _shown(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
