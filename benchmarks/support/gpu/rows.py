"""What only moves and rounds rows, and waits for memory: the quantisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from support.gpu.products import uneven
from ziphius.kernels import e5m6, quantize
from ziphius.kernels.quantize import Fp8, TorchQuantize, dequantize, turned_width

# A class of ours, and what its programs may take.
Kernels = tuple[Callable[..., Any], Sequence[Any]]
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
        entries += [_turn(place, M, sizes), _regroup(place, M, sizes)]
        entries += [_blocks(place, M, sizes.width)]
        entries += [_encode(place, M, sizes.width), _decode(place, M, sizes.width)]
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


def _ours() -> Kernels:
    from ziphius.kernels.triton.quantize import CANDIDATES, TritonQuantize

    return TritonQuantize, CANDIDATES


def versions(
    use: Callable[[Any, Any], Any], triton: Callable[[], Kernels], plain: Callable[[], Any]
) -> tuple[Version, Version, Callable[[], Sequence[Version]]]:
    """Return our version and the plain one of what ``use`` does with an object of kernels.

    The last returns ours in the other blocks that a program may take.
    """

    def candidates() -> Sequence[Version]:
        kernels, launches = triton()

        def launched(launch: Any) -> Version:
            return Version(f"{OURS} {launch}", lambda x: use(kernels(launch), x))

        return [launched(launch) for launch in launches[1:]]

    return (
        Version(OURS, lambda x: use(triton()[0](), x)),
        Version(PLAIN, lambda x: use(plain(), x)),
        candidates,
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
    ours, plain, candidates = versions(lambda q, x: q.tiles(x), _ours, TorchQuantize)
    return Entry(
        section="quantize",
        name=f"tiles {M} x {C}",
        make=lambda generator: place.outliers(generator, M, C),
        reference=lambda x: parts(quantize.quantize_tiles(x)),
        ours=ours,
        plain=plain,
        candidates=candidates,
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
    ours, plain, _ = versions(lambda q, x: q.both(*x), _ours, TorchQuantize)
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


def _turn(place: Place, M: int, sizes: Sizes) -> Entry:
    C, width = sizes.width, turned_width(M, sizes.experts)
    ours, plain, _ = versions(lambda q, x: q.turn(*x), _ours, TorchQuantize)
    return Entry(
        section="quantize",
        name=f"turned {M} x {C}, {sizes.experts} segments",
        make=lambda generator: _segments(place, generator, M, sizes),
        reference=lambda x: parts(quantize.turn(*x)),
        ours=ours,
        plain=plain,
        answer=lambda x, result: parts(result),
        nbytes=M * C * place.storage.itemsize + in_tiles(C, width),
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

    ours, plain, _ = versions(lambda q, x: q.regroup(*x), _ours, TorchQuantize)
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
    ours, plain, candidates = versions(lambda q, w: q.blocks(w), _ours, TorchQuantize)

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
        candidates=candidates,
        answer=lambda x, result: parts(*result),
        nbytes=O * I * (4.0 + 2.0),
        goal=(COPY, 0.8),
    )


def _e5m6() -> Kernels:
    from ziphius.kernels.triton.e5m6 import CANDIDATES, TritonE5M6

    return TritonE5M6, CANDIDATES


def _encode(place: Place, M: int, C: int) -> Entry:
    ours, plain, candidates = versions(lambda f, x: tuple(f.encode(x)), _e5m6, e5m6.TorchE5M6)
    return Entry(
        section="quantize",
        name=f"E5M6 encode {M} x {C}",
        make=lambda generator: place.outliers(generator, M, C),
        reference=lambda x: tuple(e5m6.encode(x)),
        ours=ours,
        plain=plain,
        candidates=candidates,
        nbytes=M * C * (place.storage.itemsize + 1.5) + M * -(-C // 128),
        goal=(COPY, 0.8),
    )


def _decode(place: Place, M: int, C: int) -> Entry:
    ours, plain, candidates = versions(
        lambda f, q: f.decode(q, C, place.storage), _e5m6, e5m6.TorchE5M6
    )
    return Entry(
        section="quantize",
        name=f"E5M6 decode {M} x {C}",
        make=lambda generator: e5m6.encode(place.outliers(generator, M, C)),
        reference=lambda q: e5m6.decode(q, C),
        ours=ours,
        plain=plain,
        candidates=candidates,
        nbytes=M * C * (place.storage.itemsize + 1.5) + M * -(-C // 128),
        goal=(COPY, 0.8),
    )
