"""SwiGLU and RMSNorm with their quantisation, and their backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from support.gpu.products import uneven
from support.gpu.rows import (
    FULL,
    SMALL,
    TOY,
    Kernels,
    Sizes,
    also_compiled,
    in_tiles,
    values,
    versions,
)
from ziphius.kernels import norm, quantize, swiglu, swiglu_fp8
from ziphius.kernels.quantize import Fp8, dequantize, turned_width

__all__ = ["FULL", "SMALL", "TOY", "Sizes"]

EPS = 1e-6


class Activation(NamedTuple):
    """Inputs of a SwiGLU, routing weights, and the gradient of its result."""

    gate_MF: Tensor
    up_MF: Tensor
    gates_M: Tensor
    dhidden_MF: Tensor

    @property
    def coded(self) -> tuple[Fp8, Fp8]:
        """What a step keeps of the inputs."""
        return quantize.quantize_tiles(self.gate_MF), quantize.quantize_tiles(self.up_MF)


def _activation(place: Place, generator: Generator, M: int, width: int) -> Activation:
    joined = place.normal(generator, M, 2 * width)
    gates_M = torch.rand(M, generator=generator, device=place.device)
    return Activation(*joined.chunk(2, -1), gates_M, place.normal(generator, M, width))


def _swiglus() -> Kernels:
    from ziphius.kernels.triton.swiglu_fp8 import CANDIDATES, TritonSwigluFp8

    return TritonSwigluFp8, CANDIDATES


def bound_of(place: Place) -> float:
    """Return what sums in FP32, and a rounding to the storage's dtype, may be off."""
    return 5e-3 if place.storage == torch.bfloat16 else 1e-3


def activations(place: Place, sizes: Sizes) -> list[Entry]:
    """Return SwiGLU with its quantisation, and its backward from what was kept."""
    entries = []
    for M in sizes.rows:
        entries += [_forward(place, M, sizes.width), _turned(place, M, sizes)]
        entries += [_backward(place, M, sizes.width)]
    return entries


def _forward(place: Place, M: int, width: int) -> Entry:
    ours, plain, candidates = versions(
        lambda s, x: s.forward(x.gate_MF, x.up_MF, x.gates_M), _swiglus, swiglu_fp8.TorchSwigluFp8
    )

    def reference(x: Activation) -> Sequence[Tensor]:
        hidden = F.silu(x.gate_MF.double()) * x.up_MF.double() * x.gates_M.double().unsqueeze(-1)
        return values(quantize.quantize_tiles(hidden), *x.coded)

    def eager(x: Activation) -> Any:
        hidden_MF = swiglu.swiglu_reference(x.gate_MF, x.up_MF, x.gates_M)
        return tuple(quantize.quantize_tiles(y) for y in (hidden_MF, x.gate_MF, x.up_MF))

    # torch's rounds the product to the storage before it is quantised.
    peers = [Version(v.name, v.run, bound=2e-2, slow=v.slow) for v in also_compiled(eager)]
    return Entry(
        section="swiglu",
        name=f"forward, three quantisations {M} x {width}",
        make=lambda generator: _activation(place, generator, M, width),
        reference=reference,
        ours=ours,
        plain=plain,
        candidates=candidates,
        peers=peers,
        answer=lambda x, result: values(*result),
        nbytes=2 * M * width * place.storage.itemsize + 3 * in_tiles(M, width) + 4.0 * M,
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )


class Again(NamedTuple):
    """What is kept of a SwiGLU's inputs, routing weights, and the rows of every segment."""

    gate: Fp8
    up: Fp8
    gates_M: Tensor
    counts_E: Tensor


def _turned(place: Place, M: int, sizes: Sizes) -> Entry:
    """The product once more, for the gradient of the down projection's weight."""
    F_, width = sizes.width, turned_width(M, sizes.experts)

    def make(generator: Generator) -> Again:
        x = _activation(place, generator, M, F_)
        counts_E = torch.tensor(uneven(M, sizes.experts), device=place.device)
        return Again(*x.coded, x.gates_M, counts_E)

    def reference(x: Again) -> Sequence[Tensor]:
        gate_MF, up_MF = (dequantize(q, torch.float64) for q in (x.gate, x.up))
        hidden_MF = F.silu(gate_MF) * up_MF * x.gates_M.double().unsqueeze(-1)
        return values(quantize.turn(hidden_MF, x.counts_E))

    ours, plain, _ = versions(lambda s, x: s.turned(*x), _swiglus, swiglu_fp8.TorchSwigluFp8)
    return Entry(
        section="swiglu",
        name=f"turned again {M} x {F_}, {sizes.experts} segments",
        make=make,
        reference=reference,
        ours=ours,
        plain=plain,
        answer=lambda x, result: values(result),
        nbytes=2 * in_tiles(M, F_) + in_tiles(F_, width) + 4.0 * M,
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )


class Kept(NamedTuple):
    """Inputs of a SwiGLU in tiles, and where their gradients go: halves of one matrix."""

    gate: Fp8
    up: Fp8
    gates_M: Tensor
    dhidden_MF: Tensor
    dboth_MF: Tensor


def _backward(place: Place, M: int, width: int) -> Entry:
    def make(generator: Generator) -> Kept:
        x = _activation(place, generator, M, width)
        dboth_MF = torch.full((M, 2 * width), float("nan"), device=place.device)
        return Kept(*x.coded, x.gates_M, x.dhidden_MF, dboth_MF.to(place.storage))

    def use(kernels: Any, x: Kept) -> Sequence[Tensor]:
        dgates_M = kernels.backward(*x[:4], *x.dboth_MF.chunk(2, -1))
        return x.dboth_MF, dgates_M

    def reference(x: Kept) -> Sequence[Tensor]:
        wide = (dequantize(q, torch.float64) for q in (x.gate, x.up))
        rest = (x.gates_M.double(), x.dhidden_MF.double())
        dgate, dup, dgates_M = swiglu.swiglu_gradients(*wide, *rest)
        assert dgates_M is not None
        return torch.cat((dgate, dup), -1), dgates_M

    ours, plain, candidates = versions(use, _swiglus, swiglu_fp8.TorchSwigluFp8)
    return Entry(
        section="swiglu",
        name=f"backward {M} x {width}",
        make=make,
        reference=reference,
        ours=ours,
        plain=plain,
        candidates=candidates,
        nbytes=2 * in_tiles(M, width) + 3 * M * width * place.storage.itemsize + 8.0 * M,
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )


class Normed(NamedTuple):
    """Rows and gains."""

    x_ND: Tensor
    gain_D: Tensor


def norms(place: Place, sizes: Sizes) -> list[Entry]:
    """Return RMSNorm, and RMSNorm that leaves tiles too."""
    entries = []
    for N in sizes.rows:
        entries += [_norm(place, N, sizes.width), _norm_tiles(place, N, sizes.width)]
        entries += [_norm_backward(place, N, sizes.width)]
    return entries


def _rows_and_gain(place: Place, generator: Generator, N: int, D: int) -> Normed:
    gain_D = 1 + 0.1 * torch.randn(D, generator=generator, device=place.device)
    return Normed(place.outliers(generator, N, D), gain_D)


def _norm(place: Place, N: int, D: int) -> Entry:
    def ours(x: Normed) -> Tensor:
        from ziphius.kernels.triton.norm import rms_norm_triton

        return rms_norm_triton(*x, EPS)

    def torchs(x: Normed) -> Tensor:
        return F.rms_norm(x.x_ND, (D,), x.gain_D.to(x.x_ND.dtype), EPS)

    return Entry(
        section="norm",
        name=f"RMSNorm {N} x {D}",
        make=lambda generator: _rows_and_gain(place, generator, N, D),
        reference=lambda x: norm.rms_norm_reference(x.x_ND.double(), x.gain_D, EPS),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: norm.rms_norm_reference(*x, EPS)),
        peers=(Version("F.rms_norm", torchs, bound=1e-2),),
        nbytes=2.0 * N * D * place.storage.itemsize + 4 * D,
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )


def _norm_tiles(place: Place, N: int, D: int) -> Entry:
    def ours(x: Normed) -> Any:
        from ziphius.kernels.triton.norm import norm_tiles_triton

        return norm_tiles_triton(*x, EPS)

    def reference(x: Normed) -> Sequence[Tensor]:
        value, _, inverse_root = norm.norm_tiles_reference(x.x_ND.double(), x.gain_D, EPS)
        return value, *values(quantize.quantize_tiles(value.to(place.storage))), inverse_root

    def answer(x: Normed, result: Any) -> Sequence[Tensor]:
        value, q, inverse_root = result
        return value, *values(Fp8(*q)), inverse_root.view(-1, 1)

    def eager(x: Normed) -> Any:
        value, q, inverse_root = norm.norm_tiles_reference(*x, EPS)
        return value, tuple(q), inverse_root

    return Entry(
        section="norm",
        name=f"RMSNorm and tiles {N} x {D}",
        make=lambda generator: _rows_and_gain(place, generator, N, D),
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: norm.norm_tiles_reference(*x, EPS)),
        peers=also_compiled(eager),
        answer=answer,
        nbytes=2.0 * N * D * place.storage.itemsize + in_tiles(N, D) + 4 * (D + N),
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )


class NormGradient(NamedTuple):
    """What backward of a norm reads."""

    x_ND: Tensor
    gain_D: Tensor
    inverse_root_N1: Tensor
    dout_ND: Tensor


def _norm_backward(place: Place, N: int, D: int) -> Entry:
    def make(generator: Generator) -> NormGradient:
        x = _rows_and_gain(place, generator, N, D)
        _, _, inverse_root = norm.norm_tiles_reference(*x, EPS)
        return NormGradient(*x, inverse_root, place.normal(generator, N, D))

    def reference(x: NormGradient) -> Sequence[Tensor]:
        wide = (x.inverse_root_N1.double(), x.dout_ND.double())
        return norm.norm_backward_reference(x.x_ND.double(), x.gain_D.double(), *wide)

    def ours(x: NormGradient) -> Any:
        from ziphius.kernels.triton.norm import norm_backward_triton

        return norm_backward_triton(*x)

    return Entry(
        section="norm",
        name=f"RMSNorm backward {N} x {D}",
        make=make,
        reference=reference,
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: norm.norm_backward_reference(*x)),
        nbytes=3.0 * N * D * place.storage.itemsize + 4 * (2 * D + N),
        bound=bound_of(place),
        goal=(COPY, 0.8),
    )
