"""The tables of ``kernels.py``: a line an entry, as soon as it is measured, and all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def line(row: Row, left: float) -> str:
    """Return a row in one line, for the progress of a run."""
    parts = []
    for name, figures in row.get("versions", {}).items():
        parts.append(f"{name}: {speed(figures)}")
    what = "; ".join(parts) or row.get("error", "nothing")
    return f"[{left:4.0f} s left] {row['section']} {row['name']}: {what}"


def speed(figures: Row) -> str:
    """Return what was reached, or why nothing was."""
    if "us" not in figures:
        return f"failed: {figures['error']}"
    rate = f"{figures['tflops']:.1f} TFLOP/s, " if figures.get("tflops") else ""
    return f"{figures['us']:.1f} us, {rate}{figures['gb_per_s']:.0f} GB/s"


def table(rows: Sequence[Row]) -> None:
    """Print all rows on standard error."""
    columns = ("us", "TFLOP/s", "of peak", "GB/s", "of copy", "of floor", "error", "goal")
    found = Table("section", "entry", "version", *columns, title="kernels")
    for row in rows:
        if not row.get("versions"):
            found.add_row(row["section"], row["name"], row.get("error", ""))
        for number, (name, figures) in enumerate(row.get("versions", {}).items()):
            where = ("", "") if number else (row["section"], row["name"])
            found.add_row(*where, name, *_cells(figures), "" if number else _goal(row))
    Console(stderr=True, width=200).print(found)


def _cells(figures: Row) -> list[str]:
    if "us" not in figures:
        return [figures["error"], *[""] * 6]
    matrix = ("", "")
    if "tflops" in figures:
        matrix = (f"{figures['tflops']:,.1f}", f"{figures['of_matrix_peak']:.0%}")
    return [
        f"{figures['us']:,.1f}",
        *matrix,
        f"{figures['gb_per_s']:,.0f}",
        f"{figures['of_copy']:.0%}",
        f"{figures['of_floor']:.0%}",
        f"{figures['relative_error']:.1e}",
    ]


def _goal(row: Row) -> str:
    goal = row.get("goal")
    if not goal:
        return ""
    return f"{'met' if goal['met'] else 'MISSED'}: {goal['reached']} of {goal['wanted']}"
