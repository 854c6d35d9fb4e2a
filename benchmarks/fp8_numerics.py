"""FP8 numerics on a probe layer with K = 4096, as errors against float64, on any processor.

Measures what Hopper's 14-bit accumulation adds with promotion every 128 of K and without, what
blocks of 128 x 128 do to gradients whose tokens differ in size, how small a gradient may be, and
what E4M3, E5M2, E5M6 and LogFMT leave of activations. Prints tables, and the figures as JSON in the
last line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support import numerics, report
from support.numerics_plots import draw

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=int, default=128, help="rows and columns of products")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the gradient")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the pictures there")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decades, outputs = [10.0**exponent for exponent in range(7)], options.outputs
    figures = {
        "outputs": outputs,
        "accumulation": numerics.accumulation([2**power for power in range(7, 14)], outputs),
        "claim": numerics.claim(4 * outputs),
        "intervals": numerics.intervals([2**power for power in range(5, 13)], outputs),
        "layer": numerics.layer(outputs),
        "gradients": numerics.gradients(decades, options.tokens, outputs, at=30000.0),
        "turning": numerics.turning(options.tokens),
        "floor": numerics.floor([10.0**-exponent for exponent in range(4, 11)]),
        "formats": numerics.formats(),
    }
    show(figures)
    # First: a picture in the repository would make its commit another one.
    report("fp8_numerics", figures, record=options.record)
    if options.plot is not None:
        draw(figures, options.plot)


def show(figures: Figures) -> None:
    """Print a table a question."""
    console = Console(stderr=True, width=118)
    by_k = figures["accumulation"]
    table = Table("operands", "", *(f"K = {K}" for K in by_k["normal"]["K"]))
    table.title = "largest error of the sum alone, 14 bits"
    for kind, rows in by_k.items():
        for how in ("unpromoted", "promoted"):
            table.add_row(kind, how, *percent(rows[how]))
    console.print(table)
    claim = figures["claim"]
    largest = percent([claim["unpromoted_max"], claim["promoted_max"]])
    shown = f"of {claim['outputs']} x {claim['outputs']} outputs at K = 4096, normal numbers"
    console.print(f"{shown}: {largest[0]} unpromoted, {largest[1]} promoted\n")
    for kind, rows in figures["layer"].items():
        table = Table("groups and sum", "whole: rms", "largest", "sum alone: rms", "largest")
        table.title = f"a layer with K = 4096, {kind} activations"
        for name, row in rows.items():
            table.add_row(name, *percent(row[key] for key in ("rms", "max", "sum_rms", "sum_max")))
        console.print(table)
    found = figures["gradients"]
    table = Table("dx = dy W", *(f"{ratio:,.0f}" for ratio in found["ratio"]))
    table.title = "median error of ordinary tokens, where one in 64 is larger by this factor"
    for name in ("tiles", "blocks"):
        table.add_row(name, *percent(found[name]))
    console.print(table)
    turned = percent(figures["turning"][name] for name in ("FP32", "UE8M0"))
    console.print(f"turning changes {turned[0]} of the numbers, with UE8M0 scales {turned[1]}\n")
    table = Table("largest of a tile", *(f"{amax:.0e}" for amax in figures["floor"]["amax"]))
    table.title = "error of E4M3 where the scale shrinks no further than for 1e-4"
    table.add_row("rms", *percent(figures["floor"]["rms"]))
    console.print(table)
    names = list(numerics.FORMATS)
    table = Table("activations", "binades of a tile", *names, title="rms error by format")
    for kind, row in figures["formats"].items():
        table.add_row(kind, str(row["binades"]), *percent(row["rms"][name] for name in names))
    console.print(table)


def percent(shares: Iterable[float]) -> list[str]:
    """Write shares as percent with two or three digits."""
    return [f"{100 * share:.2g}%" if share < 0.1 else f"{share:.0%}" for share in shares]


if __name__ == "__main__":
    main()
