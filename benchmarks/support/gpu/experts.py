"""BF16 products of experts in training: forward, the gradient of rows, and that of weights.

Weights are given in BF16, for every version. The floor of a product of few experts' long segments
is arithmetic; that of preset ``mini`` is close to reading and writing everything once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from support.gpu.entry import OURS, PLAIN, Entry, Place, Version
from support.gpu.products import bound_of, uneven
from support.gpu.torch_products import ends

LOOP, GROUPED, DENSE = "torch.mm an expert", "F.grouped_mm", "torch.bmm of equal segments"
# It multiplies as much, but other rows with other weights.
_ANYTHING = float("inf")


# Experts, rows of each on average, outputs, inputs.
Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sizes:
    """The products that are measured."""

    products: Sequence[Size]


FULL = Sizes(
    # Two of preset mini, for four sequences of 4096, and two of the report.
    (
        (128, 1024, 512, 1024),
        (128, 1024, 1024, 256),
        (8, 4096, 4096, 7168),
        (8, 4096, 7168, 2048),
    )
)
SMALL = Sizes(((4, 64, 256, 512),))
TOY = Sizes(((3, 40, 72, 136),))


class Inputs(NamedTuple):
    """Rows, the gradient of their results, weights and counts."""

    x_MI: Tensor
    dout_MO: Tensor
    weight_EOI: Tensor
    counts_E: Tensor


def experts(place: Place, sizes: Sizes) -> list[Entry]:
    """Return three products of every size."""
    entries = []
    for size in sizes.products:
        entries.append(_of_rows(place, "forward", size, turned=True))
        entries.append(_of_rows(place, "gradient of rows", size, turned=False))
        entries.append(_of_weights(place, size))
    return entries


def _entry(place: Place, what: str, size: Size, store: float, **parts: Any) -> Entry:
    """Return an entry; ``store`` is how many bytes a number of a weight has here."""
    E, each, O, I = size  # noqa: E741
    M = E * each

    def make(generator: Generator) -> Inputs:
        rows = (place.normal(generator, M, width) for width in (I, O))
        weight_EOI = place.normal(generator, E, O, I) * 0.02
        counts_E = torch.tensor(uneven(M, E), device=place.device)
        return Inputs(*rows, weight_EOI, counts_E)

    return Entry(
        section="experts",
        name=f"{what} {E} x {each}, {O} x {I}",
        make=make,
        flops=2.0 * M * O * I,
        nbytes=place.storage.itemsize * M * (O + I) + store * E * O * I,
        goal=(DENSE, 0.7),
        **parts,
    )


def _of_rows(place: Place, what: str, size: Size, *, turned: bool) -> Entry:
    """Return an entry of rows times ``W^T`` if ``turned``, else of gradients times ``W``."""
    E, each, _, _ = size
    counts = uneven(E * each, E)

    def operands(x: Inputs) -> tuple[Tensor, Tensor]:
        """Rows ``[M, K]`` and matrices ``[E, K, N]``."""
        return (x.x_MI, x.weight_EOI.mT) if turned else (x.dout_MO, x.weight_EOI)

    def loop(x: Inputs, dtype: torch.dtype = place.storage) -> Tensor:
        rows_MK, weight_EKN = operands(x)
        out_MN = rows_MK.new_empty(len(rows_MK), weight_EKN.shape[-1], dtype=dtype)
        segments = (t.split(counts) for t in (rows_MK, out_MN))
        for rows, out, weight in zip(*segments, weight_EKN, strict=True):
            torch.mm(rows.to(dtype), weight.to(dtype), out=out)
        return out_MN

    def grouped(x: Inputs) -> Tensor:
        rows_MK, weight_EKN = operands(x)
        return F.grouped_mm(rows_MK, weight_EKN, offs=ends(x.counts_E))

    def dense(x: Inputs) -> Tensor:
        rows_MK, weight_EKN = operands(x)
        return torch.bmm(rows_MK.view(E, each, -1), weight_EKN).flatten(0, 1)

    def ours(x: Inputs, cut: Any = None) -> Tensor:
        from ziphius.kernels.triton.grouped import rows_times

        rows_MK, _ = operands(x)
        return rows_times(rows_MK, x.weight_EOI, x.counts_E, turned=turned, cut=cut)

    def candidates() -> Sequence[Version]:
        from ziphius.kernels.triton.grouped import ROWS_CUTS

        return list(_cuts(ours, ROWS_CUTS))

    return _entry(
        place, what, size, place.storage.itemsize,
        reference=lambda x: loop(x, torch.float64),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, loop),
        peers=_peers(place, loop, grouped, dense),
        bound=bound_of(place),
        candidates=candidates,
    )  # fmt: skip


def _of_weights(place: Place, size: Size) -> Entry:
    """Return an entry of weights' gradients. Ours leaves FP32; the others, BF16."""
    E, each, O, I = size  # noqa: E741
    counts = uneven(E * each, E)

    def loop(x: Inputs, dtype: torch.dtype = place.storage) -> Tensor:
        out_EOI = x.x_MI.new_empty(E, O, I, dtype=dtype)
        segments = (t.split(counts) for t in (x.dout_MO, x.x_MI))
        for dout, rows, out in zip(*segments, out_EOI, strict=True):
            torch.mm(dout.to(dtype).T, rows.to(dtype), out=out)
        return out_EOI

    def dense(x: Inputs) -> Tensor:
        return torch.bmm(x.dout_MO.view(E, each, O).mT, x.x_MI.view(E, each, I))

    def ours(x: Inputs, cut: Any = None) -> Tensor:
        from ziphius.kernels.triton.grouped import weight_gradient

        out_EOI = torch.empty(E, O, I, dtype=torch.float32, device=place.device)
        return weight_gradient(x.dout_MO, x.x_MI, x.counts_E, out_EOI, cut=cut)

    def candidates() -> Sequence[Version]:
        from ziphius.kernels.triton.grouped import WEIGHTS_CUTS

        return list(_cuts(ours, WEIGHTS_CUTS))

    def grouped(x: Inputs) -> Tensor:
        return F.grouped_mm(x.dout_MO.T, x.x_MI, offs=ends(x.counts_E))

    return _entry(
        place, "gradient of weights", size, 4.0,
        reference=lambda x: loop(x, torch.float64),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, loop),
        peers=_peers(place, loop, grouped, dense),
        # Sums in FP32 of products in BF16; a rounding of the result would show.
        bound=1e-4,
        candidates=candidates,
    )  # fmt: skip


def _cuts(run: Callable[..., Tensor], cuts: Sequence[Any]) -> Iterator[Version]:
    return (Version(str(tuple(cut)), partial(run, cut=cut)) for cut in cuts)


def _peers(
    place: Place,
    loop: Callable[[Inputs], Tensor],
    grouped: Callable[[Inputs], Tensor],
    dense: Callable[[Inputs], Tensor],
) -> Sequence[Version]:
    """Return torch's ways, for GPUs. The loop is told the counts, and waits for nothing."""
    if place.device.type != "cuda":
        return ()
    return (
        Version(GROUPED, grouped, bound=1e-2),
        Version(LOOP, loop, bound=1e-2),
        Version(DENSE, dense, bound=_ANYTHING),
    )
