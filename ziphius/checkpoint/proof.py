"""Proof of a conversion, tensor by tensor, from the files of both checkpoints alone.

Nothing of what wrote the target is used: both are read, dequantised exactly in float64, and
compared. A number in E4M3 may be off by half a step, which is at most 16 scales. With the scale
``amax / 448`` that is 1/28 of the block's largest number. With the next power of two the largest
number is between 224 and 448 scales; up to 256 half a step is 8, and beyond 16 can be reached from
272 on, so that the bound is 1/17.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.checkpoint.compressed import Packed, is_quantizable
from ziphius.checkpoint.config_json import raw_config, read_config, scale_format, stored_form
from ziphius.checkpoint.folder import checkpoint_folder
from ziphius.checkpoint.forms import FLOAT32, UE8M0
from ziphius.checkpoint.fp8 import are_powers_of_two
from ziphius.checkpoint.huggingface import Fp8Weight, Rows, WeightReader, row_ranges, stored_as
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.kernels.quantize import E4M3_MAX, SMALLEST_AMAX, TILE

COPIED, ROUNDED, BLOCKS = "the same", "rounded", "FP8 blocks"
# Largest errors: half a step of a number of these, as a share of the number; of E4M3 as a share of
# the block's largest number, by the format of scales.
HALF_STEP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
BLOCK_BOUND = {FLOAT32: 1 / 28, UE8M0: 1 / 17}
# A quotient in FP32, or a number rounded to FP32 before, may land behind the middle of a step.
_SLACK = 1 + 2.0**-12
# Numbers that are compared at a time.
_NUMBERS = 2**20
# The largest error in some rows, and what is wrong with them.
Found = tuple[float, str]


@dataclass(frozen=True)
class Proved:
    """How a tensor came over.

    ``error`` is the largest one found, as a share of the number, of FP8 blocks as a share of the
    block's largest number; ``bound`` is what the format allows. ``fault`` says what is wrong.
    """

    name: str
    kind: str
    error: float
    bound: float
    fault: str = ""

    @property
    def share_of(self) -> str:
        """What the error is a share of, in words."""
        return {BLOCKS: "its block's largest", ROUNDED: "itself"}.get(self.kind, "")


def prove(
    source: str | Path,
    target: str | Path,
    *,
    mtp: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Proved]:
    """Compare every weight of ``target``, in BF16, FP32 or FP8, with that of ``source``.

    Without ``mtp`` the source's MTP modules do not count. ``on_progress`` gets a phase and how many
    numbers of how many were compared. Raises BadInput when one of them is no complete checkpoint,
    when they are different networks, or when the target has integers.
    """
    folders = [checkpoint_folder(Path(path)) for path in (source, target)]
    raws = [raw_config(folder) for folder in folders]
    configs = [read_config(folders[0], mtp=mtp), read_config(folders[1])]
    if configs[0] != configs[1]:
        raise BadInput(f"{target}: config.json describes another network than that of {source}")
    if isinstance(stored_form(raws[1]), Packed):
        raise BadInput(f"{target}: holds integers, and --check is for bf16, fp32 and fp8")
    with ShardReader(folders[0]) as first, ShardReader(folders[1]) as second:
        ours = WeightReader(first, configs[0], stored_form(raws[0]))
        theirs = WeightReader(second, configs[1], stored_form(raws[1]))
        ours.require_complete(skip_mtp=not mtp)
        theirs.require_complete(skip_mtp=False)
        pair = _Pair(ours, theirs, scale_format(raws[0]), scale_format(raws[1]))
        proved, done = [], 0
        total = sum(prod(ours.shape(name)) for name in ours.wanted())
        for name in sorted(ours.wanted()):
            if on_progress is not None:
                on_progress("proving", done, total)
            proved.append(pair.prove(name))
            done += prod(ours.shape(name))
    if on_progress is not None:
        on_progress("proving", total, total)
    return proved


@dataclass(frozen=True)
class _Pair:
    """Two checkpoints, and the formats of their FP8 scales, None without any."""

    source: WeightReader
    target: WeightReader
    source_scales: str | None
    target_scales: str | None

    def prove(self, name: str) -> Proved:
        rows, *inner = self.target.shape(name)
        ranges = list(row_ranges(rows, _NUMBERS // prod(inner)))
        if is_quantizable(name) and self.target_scales is not None:
            if self.source_scales == UE8M0 or (self.source_scales, self.target_scales) == (
                FLOAT32,
                FLOAT32,
            ):
                return _worst(name, COPIED, 0.0, [self._copied(name, part) for part in ranges])
            bound = BLOCK_BOUND[self.target_scales]
            return _worst(name, BLOCKS, bound, [self._blocks(name, part) for part in ranges])
        if isinstance(self.target.stored(name, ranges[0]), Fp8Weight):
            return Proved(name, ROUNDED, 0.0, 0.0, "is in FP8 and belongs to what never is")
        return self._plain(name, ranges)

    def _plain(self, name: str, ranges: list[Rows]) -> Proved:
        """Compare with a tensor in one dtype: equal where that holds all that the source has."""
        found = self.target.reader.dtype(name)
        if name in self.target.shapes and found != stored_as(name, found):
            return Proved(name, ROUNDED, 0.0, 0.0, f"is {found}, which it never is")
        stored = self.source.stored(name, ranges[0])
        exact = isinstance(stored, Tensor) and torch.promote_types(stored.dtype, found) == found
        kind, bound = (COPIED, 0.0) if exact else (ROUNDED, HALF_STEP.get(found, 0.0))
        return _worst(name, kind, bound, [self._rounded(name, part, found) for part in ranges])

    def _rounded(self, name: str, rows: Rows, dtype: torch.dtype) -> Found:
        was, now = self._values(name, rows)
        off = (now - was).abs() / was.abs().clamp(min=torch.finfo(dtype).tiny)
        return float(off.max()), ""

    def _copied(self, name: str, rows: Rows) -> Found:
        """Compare codes and scales, bit for bit."""
        was, now = self.source.stored(name, rows), self.target.stored(name, rows)
        if not isinstance(was, Fp8Weight) or not isinstance(now, Fp8Weight):
            return 0.0, "is FP8 in one of the two only"
        same = torch.equal(was.codes.view(torch.uint8), now.codes.view(torch.uint8))
        if not same or not torch.equal(was.scale_inv, now.scale_inv):
            return 0.0, "codes or scales are not those of the source"
        return 0.0, self._scale_fault(now.scale_inv)

    def _blocks(self, name: str, rows: Rows) -> Found:
        """Compare FP8 with what was rounded to it: every number's half step, every scale."""
        stored = self.target.stored(name, rows)
        if not isinstance(stored, Fp8Weight):
            return 0.0, "is not FP8"
        was, now = self._values(name, rows)
        scales = stored.scale_inv.double()
        steps = scales.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        steps = steps[: len(was), : was.shape[1]]
        _, exponent = (was / steps).frexp()
        half = torch.ldexp(steps, (exponent - 5).clamp(min=-10))
        off = (now - was).abs()
        amax = _block_amax(was).clamp(min=SMALLEST_AMAX)
        share = float((_block_amax(off) / amax).max())
        if not (off <= half * _SLACK).all():
            return share, "a number is not the nearest one in E4M3"
        ratio = scales * E4M3_MAX / amax
        widest = 1.0 if self.target_scales == FLOAT32 else 2.0
        if not ((ratio * _SLACK >= 1) & (ratio <= widest * _SLACK)).all():
            return share, "a scale does not belong to its block's largest number"
        return share, self._scale_fault(stored.scale_inv)

    def _scale_fault(self, scale_inv: Tensor) -> str:
        if self.target_scales == UE8M0 and not are_powers_of_two(scale_inv):
            return f"a scale is no power of two, which config.json announces as {UE8M0}"
        return ""

    def _values(self, name: str, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the numbers that both mean, exactly."""
        was, now = (w.read(name, torch.float64, rows) for w in (self.source, self.target))
        return was.double(), now.double()


def _worst(name: str, kind: str, bound: float, found: list[Found]) -> Proved:
    error = max(share for share, _ in found)
    faults = [fault for _, fault in found if fault]
    if not faults and not error <= bound * _SLACK:
        faults = [f"is off by {error:.3g}, more than {bound:.3g}"]
    return Proved(name, kind, error, bound, faults[0] if faults else "")


def _block_amax(x: Tensor) -> Tensor:
    rows, columns = x.shape
    padded = F.pad(x.abs(), (0, -columns % TILE, 0, -rows % TILE))
    return padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).amax((1, 3))
