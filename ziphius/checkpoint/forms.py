"""The forms a conversion writes: which tensors store a weight, and what ``config.json`` says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ziphius.checkpoint.compressed import (
    Packed,
    is_head,
    is_quantizable,
    packed_config,
    packed_tensors,
)
from ziphius.checkpoint.fp8 import BLOCK, SCALE_SUFFIX, quantize_blocks
from ziphius.checkpoint.huggingface import Fp8Weight, WeightReader, stored_as
from ziphius.checkpoint.keys import expected_shapes
from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig
from ziphius.config.table import nearest
from ziphius.kernels.integers import GROUP_SIZE, Codes, quantize, require_possible

PLAIN = MappingProxyType({"bf16": torch.bfloat16, "fp32": torch.float32})
INTEGERS = MappingProxyType({"int8": 8, "int4": 4})
HEAD_BITS = 8
FP8 = "fp8"
NAMES = (*PLAIN, FP8, *INTEGERS)
# What config.json says about how integers were found; no other engine reads it.
RECORD = "ziphius_quantization"


class Form(Protocol):
    """How weights are stored."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is not quantised."""
        ...

    def tensors(self, weights: WeightReader, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that store the weight ``name``."""
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

    def tensors(self, weights: WeightReader, name: str) -> Iterator[tuple[str, Tensor]]:
        stored = stored_as(name, self.dtype)
        yield name, weights.read(name, stored).to(stored)

    def config(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Fp8:
    """The published form: E4M3 in blocks of 128 x 128 (facts 4.2). FP8 sources are copied."""

    dtype: torch.dtype = torch.bfloat16

    def tensors(self, weights: WeightReader, name: str) -> Iterator[tuple[str, Tensor]]:
        if not is_quantizable(name):
            yield from Plain(self.dtype).tensors(weights, name)
            return
        stored = weights.stored(name)
        if not isinstance(stored, Fp8Weight):
            stored = Fp8Weight(*quantize_blocks(weights.read(name, torch.float32), name=name))
        yield name, stored.codes
        yield name + SCALE_SUFFIX, stored.scale_inv

    def config(self) -> dict[str, Any]:
        scheme = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(BLOCK),
        }
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

    def tensors(self, weights: WeightReader, name: str) -> Iterator[tuple[str, Tensor]]:
        quantizer: Quantizer = self.quantizer
        if self.head and is_head(name):
            quantizer = Rounding(HEAD_BITS, quantizer.group_size)
        elif not is_quantizable(name):
            yield from Plain(self.dtype).tensors(weights, name)
            return
        weight_OI = weights.read(name, torch.float32).float()
        try:
            codes = quantizer.codes(name, weight_OI)
        except ValueError as error:
            raise BadInput(f"{name}: {error}") from None
        yield from packed_tensors(name, codes, quantizer.bits)

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
) -> Form:
    """Return the form of a name: bf16, fp32, fp8, int8 or int4.

    ``group_size`` is that of integers found by rounding, unless a ``quantizer`` finds them; with
    ``head`` the output head is in integers too. Raises BadInput for unknown names, for impossible
    sizes, and for a quantizer of another width.
    """
    if to not in NAMES:
        raise BadInput(f"--to {to}: not a form this version writes{nearest(to, NAMES)}")
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
    return Fp8() if to == FP8 else Plain(PLAIN[to])


def ragged_weights(config: ModelConfig, group_size: int) -> list[str]:
    """List the matrices whose inputs do not divide into groups: other engines refuse those."""
    return [
        name
        for name, shape in expected_shapes(config).items()
        if group_size > 0 and is_quantizable(name) and shape[1] % group_size
    ]
