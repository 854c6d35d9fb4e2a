"""The forms a conversion writes: which tensors store a weight, and what ``config.json`` says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ziphius.checkpoint.compressed import (
    PACKED,
    SCALE,
    SHAPE,
    Packed,
    is_head,
    is_quantizable,
    packed_config,
    packed_shapes,
    packed_tensors,
)
from ziphius.checkpoint.config_json import raw_config, stored_dtype, stored_form
from ziphius.checkpoint.fp8 import (
    BLOCK,
    SCALE_SUFFIX,
    are_powers_of_two,
    quantize_blocks,
    scale_shape,
)
from ziphius.checkpoint.huggingface import Fp8Weight, Rows, WeightReader, stored_as
from ziphius.checkpoint.keys import expected_shapes
from ziphius.checkpoint.pieces import Kind
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.config.table import nearest
from ziphius.kernels.integers import GROUP_SIZE, Codes, quantize, require_possible

PLAIN = MappingProxyType({"bf16": torch.bfloat16, "fp32": torch.float32})
INTEGERS = MappingProxyType({"int8": 8, "int4": 4})
HEAD_BITS = 8
FP8 = "fp8"
# Formats of FP8 scales: any FP32 number as V3 has them, or powers of two as V3.1 (facts 4.4).
SCALES = FLOAT32, UE8M0 = ("float32", "ue8m0")
NAMES = (*PLAIN, FP8, *INTEGERS)
# What config.json says about how integers were found; no other engine reads it.
RECORD = "ziphius_quantization"


# A tensor's name, its first row among these, and the rows.
Piece = tuple[str, int, Tensor]


class Form(Protocol):
    """How weights are stored."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is not quantised."""
        ...

    @property
    def whole(self) -> bool:
        """Whether a matrix has to be converted at once, not in rows."""
        ...

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        """Return the tensors that store the weight ``name``."""
        ...

    def pieces(self, weights: WeightReader, name: str, rows: Rows) -> Iterator[Piece]:
        """Yield the parts of those tensors that store some rows of the weight."""
        ...

    def config(self) -> dict[str, Any]:
        """Return what ``config.json`` says besides dtypes. Asked when all tensors are written."""
        ...


class Quantizer(Protocol):
    """Finds the integers of one matrix after the other, layer by layer."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, -1 for a whole row."""
        ...

    def codes(self, name: str, weight_OI: Tensor) -> Codes:
        """Return the codes and scales of a weight, given in FP32."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what it takes to find the same integers again."""
        ...


@dataclass(frozen=True)
class Rounding:
    """Every weight goes to its nearest code."""

    bits: int
    group_size: int = GROUP_SIZE

    def codes(self, name: str, weight_OI: Tensor) -> Codes:
        return quantize(weight_OI, self.bits, self.group_size)

    def describe(self) -> dict[str, Any]:
        return {"method": "rounding", "bits": self.bits, "group_size": self.group_size}


@dataclass(frozen=True)
class Plain:
    """One tensor a weight, in one dtype; what is quantised in the source is dequantised."""

    dtype: torch.dtype
    whole: bool = False

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        return {name: Kind(stored_as(name, self.dtype), shape)}

    def pieces(self, weights: WeightReader, name: str, rows: Rows) -> Iterator[Piece]:
        stored = stored_as(name, self.dtype)
        yield name, rows[0], weights.read(name, stored, rows).to(stored)

    def config(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Fp8:
    """The published form: E4M3 in blocks of 128 x 128 (facts 4.2), with scales of a format.

    The codes and scales of an FP8 source are copied, unless they are to become powers of two and
    the source does not say that they are (``copied`` is False): those are quantised anew.
    """

    scales: str = FLOAT32
    copied: bool = True
    dtype: torch.dtype = torch.bfloat16
    whole: bool = False

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        if not is_quantizable(name):
            return Plain(self.dtype).layout(name, shape)
        scales = Kind(torch.float32, scale_shape(shape))
        return {name: Kind(torch.float8_e4m3fn, shape), name + SCALE_SUFFIX: scales}

    def pieces(self, weights: WeightReader, name: str, rows: Rows) -> Iterator[Piece]:
        if not is_quantizable(name):
            yield from Plain(self.dtype).pieces(weights, name, rows)
            return
        stored = weights.stored(name, rows) if self.copied else None
        if not isinstance(stored, Fp8Weight):
            matrix = weights.read(name, torch.float32, rows)
            power_of_two = self.scales == UE8M0
            stored = Fp8Weight(*quantize_blocks(matrix, name=name, power_of_two=power_of_two))
        elif self.scales == UE8M0 and not are_powers_of_two(stored.scale_inv):
            raise BadInput(
                f"{name}{SCALE_SUFFIX}: holds other numbers than powers of two, which config.json "
                f"announces as scale_fmt {UE8M0}: restore the checkpoint's own config"
            )
        yield name, rows[0], stored.codes
        yield name + SCALE_SUFFIX, rows[0] // BLOCK[0], stored.scale_inv

    def config(self) -> dict[str, Any]:
        scheme = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
        }
        if self.scales == UE8M0:
            scheme["scale_fmt"] = UE8M0
        return {
            "quantization_config": scheme,
            RECORD: {"method": "rounding", "block": list(BLOCK)},
        }


@dataclass(frozen=True)
class Integers:
    """Integers with group scales, as ``compressed-tensors`` stores them.

    With ``head`` the output head is among them, rounded to eight bits.
    """

    quantizer: Quantizer
    head: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def whole(self) -> bool:
        return not isinstance(self.quantizer, Rounding)

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        quantizer = self._quantizer_of(name)
        if quantizer is None:
            return Plain(self.dtype).layout(name, shape)
        shapes = packed_shapes(shape, Packed(quantizer.bits, quantizer.group_size))
        dtypes = {PACKED: torch.int32, SCALE: torch.bfloat16, SHAPE: torch.int64}
        return {name + part: Kind(dtypes[part], shapes[part]) for part in dtypes}

    def pieces(self, weights: WeightReader, name: str, rows: Rows) -> Iterator[Piece]:
        quantizer = self._quantizer_of(name)
        if quantizer is None:
            yield from Plain(self.dtype).pieces(weights, name, rows)
            return
        weight_OI = weights.read(name, torch.float32, rows).float()
        try:
            codes = quantizer.codes(name, weight_OI)
        except ValueError as error:
            raise BadInput(f"{name}: {error}") from None
        parts = dict(packed_tensors(name, codes, quantizer.bits))
        # Told once, of the whole matrix.
        del parts[name + SHAPE]
        if rows[0] == 0:
            yield name + SHAPE, 0, torch.tensor(weights.shape(name), dtype=torch.int64)
        yield from ((part, rows[0], tensor) for part, tensor in parts.items())

    def _quantizer_of(self, name: str) -> Quantizer | None:
        """Return what finds the integers of a weight, None for one that stays as it is."""
        if self.head and is_head(name):
            return Rounding(HEAD_BITS, self.quantizer.group_size)
        return self.quantizer if is_quantizable(name) else None

    def config(self) -> dict[str, Any]:
        head = HEAD_BITS if self.head else None
        form = Packed(self.quantizer.bits, self.quantizer.group_size, head)
        record = self.quantizer.describe() | ({"head_bits": head} if head else {})
        return {"quantization_config": packed_config(form), RECORD: record}


def form_of(
    to: str,
    group_size: int = GROUP_SIZE,
    quantizer: Quantizer | None = None,
    *,
    head: bool = False,
    scales: str | None = None,
    source_scales: str | None = None,
) -> Form:
    """Return the form of a name: bf16, fp32, fp8, int8 or int4.

    ``group_size`` is that of integers found by rounding, unless a ``quantizer`` finds them; with
    ``head`` the output head is in integers too. ``scales`` is the format of FP8 scales, by default
    that of an FP8 source, ``source_scales``, else float32. Raises BadInput for unknown names, for
    impossible sizes, and for a quantizer of another width.
    """
    if to not in NAMES:
        raise BadInput(f"--to {to}: not a form this version writes{nearest(to, NAMES)}")
    if scales is not None and scales not in SCALES:
        raise BadInput(f"--scales {scales}: no such format{nearest(scales, SCALES)}")
    if scales is not None and to != FP8:
        raise BadInput(f"--scales is for --to {FP8}, not for --to {to}")
    if to in INTEGERS:
        try:
            require_possible(INTEGERS[to], group_size)
        except ValueError as error:
            raise BadInput(f"--group-size: {error}") from None
        quantizer = quantizer if quantizer is not None else Rounding(INTEGERS[to], group_size)
        if quantizer.bits != INTEGERS[to]:
            raise BadInput(f"--to {to}: the quantizer makes integers of {quantizer.bits} bits")
        return Integers(quantizer, head)
    if head:
        raise BadInput(f"--head is for --to {' and --to '.join(INTEGERS)}, not for --to {to}")
    if quantizer is not None:
        raise BadInput(f"--to {to}: only {' and '.join(INTEGERS)} are found by another method")
    if to != FP8:
        return Plain(PLAIN[to])
    scales = scales or source_scales or FLOAT32
    return Fp8(scales, copied=scales == FLOAT32 or source_scales == UE8M0)


def stored_name(folder: Path) -> str:
    """Return the form of a checkpoint by its config: one of ``NAMES``, or a dtype's name."""
    raw = raw_config(folder)
    form, dtype = stored_form(raw), stored_dtype(raw)
    if isinstance(form, Packed):
        return {bits: name for name, bits in INTEGERS.items()}[form.bits]
    if form is not None:
        return FP8
    return {kind: name for name, kind in PLAIN.items()}.get(dtype, str(dtype))


def ragged_blocks(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the matrices whose FP8 blocks are not whole: not every engine reads those."""
    return {
        name: shape
        for name, shape in expected_shapes(config).items()
        if is_quantizable(name) and any(size % BLOCK[0] for size in shape)
    }


def ragged_weights(config: ModelConfig, group_size: int) -> list[str]:
    """List the matrices whose inputs do not divide into groups: other engines refuse those."""
    return [
        name
        for name, shape in expected_shapes(config).items()
        if group_size > 0 and is_quantizable(name) and shape[1] % group_size
    ]
