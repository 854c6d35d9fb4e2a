"""SwiGLU between FP8 products: its result in tiles, its inputs kept in tiles (facts 4.1, 5.7).

What backward needs of a SwiGLU is computed again from the inputs that were kept.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.library import TYPES, Library
from ziphius.kernels.quantize import (
    Fp8,
    dequantize,
    empty_tiles,
    empty_turned,
    quantize_tiles,
    rows_of,
    segments_of,
    turn,
)
from ziphius.kernels.swiglu import swiglu_gradients


class SwigluFp8(Protocol):
    """The three uses of a SwiGLU in a step. ``gates`` are FP32 routing weights, ``[M]``, or None.

    Rows of ``[M, F]`` inputs and outputs may lie apart (two halves of ``[M, 2F]``); a row's numbers
    lie side by side.
    """

    def forward(
        self,
        gate_MF: Tensor,
        up_MF: Tensor,
        gates_M: Tensor | None,
        *,
        power_of_two: bool = False,
    ) -> tuple[Fp8, Fp8, Fp8]:
        """Return ``silu(gate) * up * gates`` in tiles, and both inputs in tiles.

        The product is not rounded before it is quantised. ``power_of_two`` is about its scales;
        those of the inputs are FP32.
        """
        ...

    def turned(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        counts_E: Tensor | None = None,
        *,
        power_of_two: bool = False,
    ) -> Fp8:
        """Compute the product again from the kept inputs, and turn it (``quantize.turn``)."""
        ...

    def backward(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        dhidden_MF: Tensor,
        dgate_MF: Tensor,
        dup_MF: Tensor,
    ) -> Tensor | None:
        """Write the inputs' gradients into ``dgate`` and ``dup``; return the routing weights'.

        The last is FP32, ``[M]``, or None without routing weights.
        """
        ...


class TorchSwigluFp8:
    """Plain PyTorch: what every other version is measured against."""

    def forward(
        self,
        gate_MF: Tensor,
        up_MF: Tensor,
        gates_M: Tensor | None,
        *,
        power_of_two: bool = False,
    ) -> tuple[Fp8, Fp8, Fp8]:
        """Return the product and both inputs in tiles."""
        hidden = quantize_tiles(_product(gate_MF, up_MF, gates_M), power_of_two=power_of_two)
        return hidden, quantize_tiles(gate_MF), quantize_tiles(up_MF)

    def turned(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        counts_E: Tensor | None = None,
        *,
        power_of_two: bool = False,
    ) -> Fp8:
        """Compute the product again from the kept inputs, and turn it."""
        hidden_MF = _product(dequantize(gate), dequantize(up), gates_M)
        return turn(hidden_MF, counts_E, power_of_two=power_of_two)

    def backward(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        dhidden_MF: Tensor,
        dgate_MF: Tensor,
        dup_MF: Tensor,
    ) -> Tensor | None:
        """Write the inputs' gradients; return the routing weights'."""
        inputs = dequantize(gate), dequantize(up)
        dg, du, dgates_M = swiglu_gradients(*inputs, gates_M, dhidden_MF)
        dgate_MF.copy_(dg)
        dup_MF.copy_(du)
        return dgates_M


def _product(gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None) -> Tensor:
    hidden_MF = F.silu(gate_MF.to(torch.float32)) * up_MF.to(torch.float32)
    return hidden_MF if gates_M is None else hidden_MF * gates_M.unsqueeze(-1)


class CompiledSwigluFp8:
    """The same in C++, each in one reading of its inputs."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def forward(
        self,
        gate_MF: Tensor,
        up_MF: Tensor,
        gates_M: Tensor | None,
        *,
        power_of_two: bool = False,
    ) -> tuple[Fp8, Fp8, Fp8]:
        """Return the product and both inputs in tiles."""
        gate_MF, up_MF, gates_M = rows_of(gate_MF), rows_of(up_MF), _weights(gates_M)
        made = [empty_tiles(gate_MF, *gate_MF.shape) for _ in range(3)]
        inputs = (gate_MF, gate_MF.stride(0), up_MF, up_MF.stride(0), gates_M)
        targets = (x for q in made for x in q[:2])
        sizes = (int(power_of_two), *gate_MF.shape)
        self._library.call("swiglu_fp8_forward", gate_MF.dtype, *inputs, *targets, *sizes)
        hidden, gate, up = made
        return hidden, gate, up

    def turned(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        counts_E: Tensor | None = None,
        *,
        power_of_two: bool = False,
    ) -> Fp8:
        """Compute the product again from the kept inputs, and turn it."""
        turned = empty_turned(gate.codes, counts_E)
        tensors = (*gate[:2], *up[:2], _weights(gates_M), *turned[:2], turned.codes.shape[1])
        sizes = (*segments_of(counts_E), int(power_of_two), *gate.codes.shape)
        self._library.call("swiglu_fp8_turned", torch.float32, *tensors, *sizes)
        return turned

    def backward(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        dhidden_MF: Tensor,
        dgate_MF: Tensor,
        dup_MF: Tensor,
    ) -> Tensor | None:
        """Write the inputs' gradients; return the routing weights'."""
        dhidden_MF, gates_M = rows_of(dhidden_MF), _weights(gates_M)
        dgates_M = None if gates_M is None else torch.empty_like(gates_M)
        outs = (dgate_MF, dgate_MF.stride(0), dup_MF, dup_MF.stride(0), dgates_M)
        tensors = (*gate[:2], *up[:2], gates_M, dhidden_MF, dhidden_MF.stride(0), *outs)
        types = (dhidden_MF.dtype, TYPES[dgate_MF.dtype])
        self._library.call("swiglu_fp8_backward", *types, *tensors, *gate.codes.shape)
        return dgates_M


def _weights(gates_M: Tensor | None) -> Tensor | None:
    return None if gates_M is None else gates_M.float().contiguous()


VERSIONS: dict[str, type[SwigluFp8]] = {"torch": TorchSwigluFp8}
COMPILED = CompiledSwigluFp8
