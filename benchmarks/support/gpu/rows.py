"""What only moves and rounds rows, and waits for memory: quantisers, SwiGLU, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from support.gpu.products import uneven
from ziphius.kernels import norm, quantize, swiglu, swiglu_fp8
from ziphius.kernels.quantize import Fp8, TorchQuantize, dequantize, turned_width

EPS = 1e-6
EAGER, COMPILED = "torch operations", "torch.compile"


@dataclass(frozen=True)
class Sizes:
    """Rows, their width, and the experts whose segments they are."""

    rows: Sequence[int]
    width: int
    experts: int


FULL = Sizes((4096, 8192), 7168, 8)
SMALL = Sizes((512,), 1024, 4)
TOY = Sizes((37,), 200, 3)


def quantisers(place: Place, sizes: Sizes) -> list[Entry]:
    """Return activations in tiles and turned, both at once, regrouped, and weights in blocks."""
    entries = []
    for M in sizes.rows:
        entries += [_tiles(place, M, sizes.width), _both(place, M, sizes)]
        entries += [_regroup(place, M, sizes), _blocks(place, M, sizes.width)]
    return entries


def parts(*codes: Fp8) -> Sequence[Tensor]:
    """Compare codes and scales, each by itself."""
    return [part for q in codes for part in (q.codes.float(), q.scales)]


def values(*codes: Fp8) -> Sequence[Tensor]:
    """Compare what is meant: a code may fall on the other side where FP32 sums differ."""
    return [dequantize(q) for q in codes]


def in_tiles(M: float, C: float) -> float:
    """Count the bytes of a matrix in FP8 with a scale for each 128 numbers."""
    return M * C + 4.0 * M * -(-C // 128)


def _ours() -> Any:
    from ziphius.kernels.triton.quantize import TritonQuantize

    return TritonQuantize()


def versions(
    use: Callable[[Any, Any], Any], triton: Callable[[], Any], plain: Callable[[], Any]
) -> tuple[Version, Version]:
    """Return our version and the plain one of what ``use`` does with an object of kernels."""
    return (
        Version(OURS, lambda x: use(triton(), x)),
        Version(PLAIN, lambda x: use(plain(), x)),
    )


def also_compiled(run: Callable[[Any], Any]) -> Sequence[Version]:
    """Return torch's operations one after the other, and compiled into fewer."""
    # Compiled where it first runs: that takes long.
    holder: list[Any] = []

    def compiled(x: Any) -> Any:
        if not holder:
            holder.append(torch.compile(run, dynamic=False))
        return holder[0](x)

    return Version(EAGER, run), Version(COMPILED, compiled, slow=True)


def _tiles(place: Place, M: int, C: int) -> Entry:
    ours, plain = versions(lambda q, x: q.tiles(x), _ours, TorchQuantize)
    return Entry(
        section="quantize",
        name=f"tiles {M} x {C}",
        make=lambda generator: place.outliers(generator, M, C),
        reference=lambda x: parts(quantize.quantize_tiles(x)),
        ours=ours,
        plain=plain,
        peers=also_compiled(lambda x: tuple(quantize.quantize_tiles(x))),
        answer=lambda x, result: parts(Fp8(*result)),
        nbytes=M * C * place.storage.itemsize + in_tiles(M, C),
        goal=(COPY, 0.8),
    )


class Segments(NamedTuple):
    """Rows in the segments of experts."""

    x_MC: Tensor
    counts_E: Tensor


def _segments(place: Place, generator: Generator, M: int, sizes: Sizes) -> Segments:
    counts = torch.tensor(uneven(M, sizes.experts), dtype=torch.int64, device=place.device)
    return Segments(place.outliers(generator, M, sizes.width), counts)


def _both(place: Place, M: int, sizes: Sizes) -> Entry:
    C, width = sizes.width, turned_width(M, sizes.experts)
    ours, plain = versions(lambda q, x: q.both(*x), _ours, TorchQuantize)
    return Entry(
        section="quantize",
        name=f"tiles and turned {M} x {C}, {sizes.experts} segments",
        make=lambda generator: _segments(place, generator, M, sizes),
        reference=lambda x: parts(quantize.quantize_tiles(x.x_MC), quantize.turn(*x)),
        ours=ours,
        plain=plain,
        answer=lambda x, result: parts(*result),
        nbytes=M * C * place.storage.itemsize + in_tiles(M, C) + in_tiles(C, width),
        goal=(COPY, 0.8),
    )


class CodedSegments(NamedTuple):
    """The same in tiles."""

    q: Fp8
    counts_E: Tensor


def _regroup(place: Place, M: int, sizes: Sizes) -> Entry:
    C, width = sizes.width, turned_width(M, sizes.experts)

    def make(generator: Generator) -> CodedSegments:
        x = _segments(place, generator, M, sizes)
        return CodedSegments(quantize.quantize_tiles(x.x_MC), x.counts_E)

    ours, plain = versions(lambda q, x: q.regroup(*x), _ours, TorchQuantize)
    return Entry(
        section="quantize",
        name=f"regroup {M} x {C}, {sizes.experts} segments",
        make=make,
        reference=lambda x: parts(quantize.regroup(*x)),
        ours=ours,
        plain=plain,
        answer=lambda x, result: parts(result),
        nbytes=in_tiles(M, C) + in_tiles(C, width),
        goal=(COPY, 0.8),
    )


def _blocks(place: Place, O: int, I: int) -> Entry:  # noqa: E741
    """A weight's master copy in FP32, in blocks and as the transpose of these."""
    ours, plain = versions(lambda q, w: q.blocks(w), _ours, TorchQuantize)

    def reference(w: Tensor) -> Sequence[Tensor]:
        q = quantize.quantize_blocks(w)
        return parts(q, quantize.transpose_blocks(q))

    return Entry(
        section="quantize",
        name=f"blocks and transpose {O} x {I}",
        make=lambda generator: place.normal(generator, O, I, dtype=torch.float32) * 0.02,
        reference=reference,
        ours=ours,
        plain=plain,
        answer=lambda x, result: parts(*result),
        nbytes=O * I * (4.0 + 2.0),
        goal=(COPY, 0.8),
    )


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


def _swiglus() -> Any:
    from ziphius.kernels.triton.swiglu_fp8 import TritonSwigluFp8

    return TritonSwigluFp8()


def bound_of(place: Place) -> float:
    """Return what sums in FP32, and a rounding to the storage's dtype, may be off."""
    return 5e-3 if place.storage == torch.bfloat16 else 1e-3


def activations(place: Place, sizes: Sizes) -> list[Entry]:
    """Return SwiGLU with its quantisation, and its backward from what was kept."""
    entries = []
    for M in sizes.rows:
        entries += [_forward(place, M, sizes.width), _backward(place, M, sizes.width)]
    return entries


def _forward(place: Place, M: int, width: int) -> Entry:
    ours, plain = versions(
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
        peers=peers,
        answer=lambda x, result: values(*result),
        nbytes=2 * M * width * place.storage.itemsize + 3 * in_tiles(M, width) + 4.0 * M,
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

    ours, plain = versions(use, _swiglus, swiglu_fp8.TorchSwigluFp8)
    return Entry(
        section="swiglu",
        name=f"backward {M} x {width}",
        make=make,
        reference=reference,
        ours=ours,
        plain=plain,
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
