"""FP8 weights of a checkpoint: E4M3 numbers and one FP32 scale a 128 x 128 block (facts 4.2)."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor
from torch.nn.functional import pad

from ziphius.config.errors import BadInput

BLOCK = (128, 128)
E4M3_MAX = 448.0
# A block of zeros would have the scale zero: the released code keeps amax away from it.
SMALLEST_AMAX = 1e-4
SCALE_SUFFIX = "_scale_inv"


def is_quantized(name: str, names: Container[str]) -> bool:
    """Say whether the tensor ``name`` has block scales: whether ``name_scale_inv`` is in ``names``.

    So ``X.weight`` belongs to ``X.weight_scale_inv`` (facts 1.9).
    """
    return name + SCALE_SUFFIX in names


def dequantize_blocks(
    q: Tensor,
    scale_inv: Tensor | None,
    dtype: torch.dtype,
    block: tuple[int, int] = BLOCK,
    *,
    name: str = "weight",
) -> Tensor:
    """Return ``q[i, j] * scale_inv[i // rows, j // columns]`` in ``dtype``.

    ``q`` is float8_e4m3fn ``[out, in]``; ``scale_inv`` is float32 ``[ceil(out / rows),
    ceil(in / columns)]`` and multiplies, despite its name (facts 4.2). The product is made in
    float32 (in float64 for a float64 result) and rounded once to ``dtype``. Beyond the result it
    needs memory for one row of blocks only. Raises BadInput, naming ``name``, for a missing scale,
    a wrong shape or a wrong dtype.
    """
    if q.ndim != 2 or q.dtype != torch.float8_e4m3fn:
        raise BadInput(f"{name}: {_shown(q)} is no FP8 weight: float8_e4m3fn [out, in] is needed")
    if scale_inv is None:
        raise BadInput(
            f"{name}: FP8, but {name}{SCALE_SUFFIX} is missing: the checkpoint is incomplete"
        )
    rows, columns = block
    expected = [-(-q.shape[0] // rows), -(-q.shape[1] // columns)]
    if list(scale_inv.shape) != expected or scale_inv.dtype != torch.float32:
        raise BadInput(
            f"{name}{SCALE_SUFFIX}: {_shown(scale_inv)}, but {name} {list(q.shape)} in blocks of "
            f"{rows} x {columns} needs float32 {expected}"
        )
    working = torch.promote_types(dtype, torch.float32)
    scales = scale_inv.to(working)
    result = torch.empty(q.shape, dtype=dtype, device=q.device)
    for index, (part, target) in enumerate(zip(q.split(rows), result.split(rows), strict=True)):
        scale = scales[index].repeat_interleave(columns)[: q.shape[1]]
        target.copy_(part.to(working) * scale)
    return result


def quantize_blocks(w: Tensor, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Return (q float8_e4m3fn ``[out, in]``, scale_inv float32 ``[ceil(out/128), ceil(in/128)]``).

    The scale of a block is ``max(amax, 1e-4) / 448`` and ``q = w / scale`` rounded to nearest
    even (facts 4.2). A ragged edge counts as padded with zeros, so that its scale comes from the
    values that exist. Raises BadInput, naming ``name``, for a weight that is no matrix or holds
    NaN or infinity.
    """
    if w.ndim != 2 or not w.is_floating_point():
        raise BadInput(f"{name}: {_shown(w)} cannot be stored as FP8: a matrix is needed")
    rows, columns = BLOCK
    width = w.shape[1]
    blocks = -(-width // columns)
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty(-(-w.shape[0] // rows), blocks, dtype=torch.float32, device=w.device)
    for index, (part, target) in enumerate(zip(w.split(rows), q.split(rows), strict=True)):
        values = part.to(torch.float32)
        tiles = pad(values.abs(), (0, blocks * columns - width)).unflatten(1, (blocks, columns))
        scale = tiles.amax(dim=(0, 2)).clamp(min=SMALLEST_AMAX) / E4M3_MAX
        target.copy_(values / scale.repeat_interleave(columns)[:width])
        scales[index] = scale
    if not scales.isfinite().all():
        raise BadInput(f"{name}: holds NaN or infinity, which FP8 blocks cannot store")
    return q, scales


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
