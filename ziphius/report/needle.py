"""What a longer context is worth, as pictures: needle maps, and the loss by position.

The figures are those of a run's ``needle.json``, which ``evaluation/long_context.py`` describes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from ziphius.config.errors import BadInput
from ziphius.report.formats import whole
from ziphius.report.picture import write_picture
from ziphius.report.style import (
    AXIS,
    BLUE,
    FONT,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SMALL,
    Key,
    Mark,
    Panel,
    fit,
    new_figure,
)

NEEDLE = "needle.json"
# A full cell leaves its number legible, on a bright page and on a dark one.
_FULL = 0.62
_COLOURS = {"before": ORANGE, "after": BLUE}
_PICTURE = (1200.0, 560.0)
_MOST_LABELS = 9


@dataclass(frozen=True)
class Needles:
    """needle.json: maps ``[lengths, depths]`` of shares, and mean nats by stretch of positions."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    trained: tuple[int, ...]
    maps: Mapping[str, np.ndarray]
    edges: tuple[int, ...]
    positions: Mapping[str, tuple[float, ...]]

    @property
    def note(self) -> str:
        """What a needle map shows, in a sentence or two."""
        told = f"Share of codes repeated without a mistake; {self.samples} questions a cell."
        if not self.trained:
            return told
        rows = " and ".join(f"{length:,}" for length in self.trained)
        return f"{told} Extended on rows of {rows} tokens."


def read_needles(path: Path) -> Needles | None:
    """Read a run's needle.json; None where there is none. Raises BadInput for a file of others."""
    if not path.is_file():
        return None
    try:
        return needles_of(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: cannot be read ({type(error).__name__}: {error}): move it away for a report "
            "without it"
        ) from None


def needles_of(told: Mapping[str, Any]) -> Needles:
    """Take the figures from JSON. Raises ValueError, KeyError or TypeError for others."""
    lengths, depths = tuple(told["lengths"]), tuple(told["depths"])
    maps = {str(name): np.array(cells, np.float64) for name, cells in told["maps"].items()}
    for name, cells_LD in maps.items():
        if cells_LD.shape != (len(lengths), len(depths)):
            raise ValueError(f"map '{name}' is {cells_LD.shape}")
    edges = tuple(told.get("edges", ()))
    positions = {str(name): tuple(nats) for name, nats in told.get("positions", {}).items()}
    if any(len(nats) != len(edges) - 1 for nats in positions.values()):
        raise ValueError("positions: not one number a stretch")
    return Needles(
        lengths,
        depths,
        int(told["samples"]),
        tuple(told.get("trained", ())),
        maps,
        edges,
        positions,
    )


def needle_panels(needles: Needles | None) -> Iterable[Panel]:
    """Return a needle map a panel, then the curve of positions."""
    if needles is None:
        return
    for number, (name, cells_LD) in enumerate(needles.maps.items()):
        figure, axes = new_figure(SMALL, left=54, bottom=38)
        draw_map(axes, needles, cells_LD)
        note = needles.note if not number else ""
        mean = f"mean {cells_LD.mean():.2f}"
        yield Panel(f"needle-{number}", f"Needles {name}", mean, figure, note=note, by="length")
    if needles.positions:
        figure, axes = new_figure(SMALL)
        draw_positions(axes, needles)
        yield Panel(
            "by-position",
            "Loss by position",
            "nats per token",
            figure,
            position_keys(needles),
            "Held-out text, from the beginning of a row on: a context that helps lets it fall.",
            by="position",
        )


def draw_map(axes: Axes, needles: Needles, cells_LD: np.ndarray) -> None:
    """Draw a needle map: length to the right, depth downwards, a cell's share as its colour."""
    for (row, column), share in np.ndenumerate(cells_LD):
        axes.add_patch(
            Rectangle(
                (row + 0.03, column + 0.03), 0.94, 0.94, facecolor=BLUE, alpha=_FULL * float(share),
                linewidth=0,
            )
        )  # fmt: skip
        axes.text(
            row + 0.5, column + 0.5, f"{share:.2f}".removeprefix("0") if share < 1 else "1",
            ha="center", va="center_baseline", fontsize=FONT - 2, color=INK,
        )  # fmt: skip
    lengths, depths = needles.lengths, needles.depths
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    step = -(-len(lengths) // _MOST_LABELS)
    shown = range(0, len(lengths), step)
    axes.set_xticks([place + 0.5 for place in shown], [_tokens(lengths[place]) for place in shown])
    axes.set_yticks(
        [place + 0.5 for place in range(len(depths))], [f"{100 * depth:.0f}%" for depth in depths]
    )
    axes.tick_params(length=0)
    for label, place in zip(axes.get_xticklabels(), shown, strict=True):
        if lengths[place] in needles.trained:
            label.set_fontweight("bold")
            label.set_color(INK)
    axes.set_xlabel("tokens of prompt and answer", fontsize=FONT, color=MUTED)
    axes.set_ylabel("depth", fontsize=FONT, color=MUTED, labelpad=1)


def draw_positions(axes: Axes, needles: Needles) -> None:
    """Draw the mean loss of every stretch at its end, on an axis of doubling positions."""
    ends = np.array(needles.edges[1:], np.float64)
    shown: list[float] = []
    for name, nats in needles.positions.items():
        axes.plot(
            ends, nats, "o", color=_colour(name), markersize=3.5, linewidth=1.7,
            linestyle=(0, (5, 3)) if _is_control(name) else "-",
        )  # fmt: skip
        shown += nats
    for length in needles.trained:
        axes.axvline(length, color=AXIS, linewidth=1.0, linestyle=(0, (1.5, 2)), zorder=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ends[:: -(-len(ends) // _MOST_LABELS)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: _tokens(int(place))))
    axes.set_xlabel("up to this position", fontsize=FONT, color=MUTED)
    fit(axes, np.array(shown))


def position_keys(needles: Needles) -> tuple[Key, ...]:
    """Return what the lines of ``draw_positions`` mean."""
    lines: list[Key] = []
    for name in needles.positions:
        mark: Mark = "dash" if _is_control(name) else "thick"
        lines.append(Key(_colour(name), mark, name))
    if needles.trained:
        lines.append(Key(AXIS, "dotted", "rows of a phase"))
    return tuple(lines)


def draw_needles(figures: Mapping[str, Any], output: Path, *, title: str) -> None:
    """Draw all maps beside one another, and the curve, as one SVG or PNG."""
    try:
        needles = needles_of(figures)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"needle figures: {type(error).__name__}: {error}") from None
    write_picture(output, "a needle map", title, partial(_whole, needles, title))


def _whole(needles: Needles, title: str) -> Figure:
    width, height = _PICTURE
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    count = len(needles.maps)
    each = (width - 60) / count
    for number, (name, cells_LD) in enumerate(needles.maps.items()):
        axes = figure.add_axes(
            ((60 + number * each) / width, 300 / height, (each - 50) / width, 190 / height)
        )
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=MUTED, labelsize=FONT)
        draw_map(axes, needles, cells_LD)
        _title(axes, f"{name}: mean {cells_LD.mean():.2f}")
        if number:
            axes.set_ylabel("")
    axes = figure.add_axes((60 / width, 52 / height, (width - 90) / width, 168 / height))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=FONT)
    axes.grid(axis="y", color="#e4e5e7")
    draw_positions(axes, needles)
    _title(axes, "nats per token of held-out text, by position")
    axes.legend(
        axes.get_lines()[: len(needles.positions)], list(needles.positions), frameon=False,
        fontsize=FONT, ncols=3, loc="lower right", bbox_to_anchor=(1, 1),
    )  # fmt: skip
    figure.text(60 / width, 1 - 24 / height, title, fontsize=14, weight="bold", color=INK)
    figure.text(60 / width, 1 - 42 / height, needles.note, fontsize=FONT, color=MUTED)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=FONT + 1, color=INK, loc="left")


def _colour(name: str) -> str:
    return _COLOURS.get(name, PURPLE)


def _is_control(name: str) -> bool:
    return name not in _COLOURS


def _tokens(count: int) -> str:
    """Write a length as the field does: 512, 8K."""
    return f"{count // 1024}K" if count % 1024 == 0 else whole(count)
