"""The tables of ``decode_vs_peers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show_speeds(figures: Mapping[str, Any], measures: Sequence[str]) -> None:
    """Tokens a second of every engine: the median of the rounds, and the best of them."""
    title = "tokens/s: median (best)"
    table = Table("engine", "weights", *_headings(measures), "mean batch", title=title)
    for name, details in figures["details"].items():
        engine, weights = name.split(" ")
        speeds = [
            f"{figures[engine][weights][m]:,.0f} ({details['range'][m][1]:,.0f})" for m in measures
        ]
        batches = [f"{details['batch'][m]:.0f}" for m in measures if m.startswith("decode")]
        table.add_row(engine, weights, *speeds, " ".join(batches))
    _print(table)


def show_ratios(ratios: Mapping[str, Any], measures: Sequence[str]) -> None:
    """Ziphius beside the best peer of equal bits."""
    table = Table("ziphius", *_headings(measures), title="ratio to the best peer of equal bits")
    for weights, row in ratios.items():
        cells = [f"{row[m]['ratio']:.2f}  {row[m]['peer']}" for m in measures]
        table.add_row(weights, *cells)
    if ratios:
        _print(table)


def show_bandwidth(limits: Mapping[str, Any], bandwidth: float, measures: Sequence[str]) -> None:
    """Bytes a token, and the share of what reading them would allow."""
    title = f"MB read a token, and share of {bandwidth / 1e9:.1f} GB/s"
    table = Table("engine", *_headings(measures), title=title)
    for name, row in limits.items():
        table.add_row(
            name, *(f"{row[m]['mb_a_token']:,.0f}  {row[m]['share']:.0%}" for m in measures)
        )
    if limits:
        _print(table)


def _headings(measures: Sequence[str]) -> list[str]:
    return [measure.replace("_", " ") for measure in measures]


def _print(table: Table) -> None:
    Console(stderr=True, width=130).print(table)
