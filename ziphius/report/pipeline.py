"""A pipeline schedule as a picture: ranks down, time across, a box for every action.

The colour of a box is its kind, its depth which of the rank's chunks of the model works: pale is
the first, deep the last. In DualPipe these are the two directions, in a V the way down and the way
up. The number is the micro-batch. An overlapped pair is one box in two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from ziphius.config.errors import BadInput
from ziphius.report.picture import write_picture
from ziphius.report.style import AXIS, BLUE, GREEN, INK, MUTED, OLIVE, ORANGE

Part = tuple[str, int, int]  # kind, micro-batch, chunk
Box = tuple[int, float, float, Sequence[Part]]  # rank, start, end, one part or two

# Kind, colour, name.
KINDS = (
    ("F", BLUE, "forward"),
    ("B", GREEN, "full backward"),
    ("I", ORANGE, "backward for input"),
    ("W", OLIVE, "backward for weights"),
)
PALEST, DEEPEST = 0.38, 1.0  # how much of a kind's colour the first and the last chunk have
ROW, GAP = 30.0, 5.0  # height of a rank's line, and what is free of it, in points
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 62.0, 30.0
FONT, DIGIT = 9.0, 5.8  # of micro-batches: size, and width of a digit
NARROWEST, WIDEST = 720.0, 2400.0  # of the lines; beyond it short boxes go without their number


@dataclass(frozen=True)
class _Scale:
    """Points for a unit of time, and what a picture has of everything."""

    unit: float
    begin: float
    end: float
    ranks: int
    chunks: int


def draw_pipeline(
    boxes: Sequence[Box],
    output: Path,
    *,
    title: str,
    chunk_names: Sequence[str] = (),
    note: str = "",
) -> None:
    """Draw a schedule as SVG or PNG, as the file's name says, replacing it in one step.

    ``chunk_names`` are written into the legend, pale first. Raises BadInput for another ending or
    for no boxes.
    """
    make = partial(pipeline_figure, boxes, title=title, chunk_names=chunk_names, note=note)
    write_picture(output, "a schedule", title, make)


def pipeline_figure(
    boxes: Sequence[Box], *, title: str, chunk_names: Sequence[str] = (), note: str = ""
) -> Figure:
    """Return what ``draw_pipeline`` draws, before it becomes a file."""
    if not boxes:
        raise BadInput("a schedule without actions cannot be drawn")
    scale = _scale(boxes)
    inner = scale.unit * (scale.end - scale.begin), ROW * scale.ranks
    width, height = inner[0] + LEFT + RIGHT, inner[1] + TOP + BOTTOM
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    axes = figure.add_axes(
        (LEFT / width, BOTTOM / height, inner[0] / width, inner[1] / height), facecolor="#f3f4f5"
    )
    _axes(axes, scale)
    _draw(axes, boxes, scale)
    _headline(figure, (width, height), title, note)
    used = {kind for _, _, _, parts in boxes for kind, _, _ in parts}
    _legend(figure, (width, height), used, any(len(box[3]) > 1 for box in boxes), chunk_names)
    return figure


def shade(colour: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    """Return a kind's colour as pale as the chunk is early."""
    share = DEEPEST if chunks == 1 else PALEST + (DEEPEST - PALEST) * chunk / (chunks - 1)
    red, green, blue = (1 - share + share * part for part in to_rgb(colour))
    return red, green, blue


def ink(colour: tuple[float, float, float]) -> str:
    """Return the colour of a number on a box: dark on pale, white on deep."""
    red, green, blue = colour
    return INK if 0.30 * red + 0.59 * green + 0.11 * blue > 0.52 else "white"


def _scale(boxes: Sequence[Box]) -> _Scale:
    """Make boxes so wide that the longest number fits into the shortest, within bounds."""
    begin, end = min(box[1] for box in boxes), max(box[2] for box in boxes)
    parts = [part for box in boxes for part in box[3]]
    digits = max(len(str(micro_batch)) for _, micro_batch, _ in parts)
    shortest = min(box[2] - box[1] for box in boxes if box[2] > box[1])
    wanted = (digits * DIGIT + 3) / shortest * (end - begin)
    unit = min(max(wanted, NARROWEST), WIDEST) / (end - begin)
    ranks, chunks = max(box[0] for box in boxes) + 1, max(chunk for _, _, chunk in parts) + 1
    return _Scale(unit, begin, end, ranks, chunks)


def _axes(axes: Axes, scale: _Scale) -> None:
    axes.set_xlim(scale.begin, scale.end)
    axes.set_ylim(scale.ranks, 0)
    axes.spines[:].set_visible(False)
    axes.set_yticks(
        [rank + 0.5 for rank in range(scale.ranks)],
        [f"rank {rank}" for rank in range(scale.ranks)],
    )
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.tick_params(axis="x", length=3, color=AXIS)
    axes.set_xlabel("time", fontsize=9, color=MUTED, labelpad=1)


def _draw(axes: Axes, boxes: Sequence[Box], scale: _Scale) -> None:
    """Draw all boxes of one colour at once: a schedule has thousands."""
    colours = {kind: colour for kind, colour, _ in KINDS}
    corners: dict[tuple[float, float, float], list[list[tuple[float, float]]]] = {}
    room = GAP / 2 / ROW
    for rank, start, end, parts in boxes:
        height = (1 - 2 * room) / len(parts)
        for place, (kind, micro_batch, chunk) in enumerate(parts):
            colour = shade(colours[kind], chunk, scale.chunks)
            top = rank + room + place * height
            bottom = top + height
            corners.setdefault(colour, []).append(
                [(start, top), (end, top), (end, bottom), (start, bottom)]
            )
            if (end - start) * scale.unit > len(str(micro_batch)) * DIGIT:
                axes.text(
                    (start + end) / 2, top + height / 2, str(micro_batch), color=ink(colour),
                    fontsize=FONT, ha="center", va="center_baseline",
                )  # fmt: skip
    for colour, polygons in corners.items():
        axes.add_collection(
            PolyCollection(polygons, facecolors=[colour], edgecolors="white", linewidths=0.7)
        )


def _headline(figure: Figure, size: tuple[float, float], title: str, note: str) -> None:
    width, height = size
    top = 1 - 18 / height
    figure.text(LEFT / width, top, title, fontsize=12, color=INK, weight="bold")
    if note:
        figure.text(1 - RIGHT / width, top, note, fontsize=9.5, color=MUTED, ha="right")


def _legend(
    figure: Figure,
    size: tuple[float, float],
    used: set[str],
    pairs: bool,
    chunk_names: Sequence[str],
) -> None:
    """Write the colours that a picture has in a line below its title."""
    chunks = max(1, len(chunk_names))
    every = range(chunks)
    left = LEFT
    for kind, colour, name in KINDS:
        if kind in used:
            left = _entry(figure, size, left, [shade(colour, c, chunks) for c in every], name)
    if pairs:
        both = [shade(BLUE, chunks - 1, chunks), shade(GREEN, 0, chunks)]
        left = _entry(figure, size, left, both, "overlapped pair", stacked=True)
    for chunk, name in enumerate(chunk_names):
        left = _entry(figure, size, left, [shade(MUTED, chunk, chunks)], name)


def _entry(
    figure: Figure,
    size: tuple[float, float],
    left: float,
    colours: Sequence[tuple[float, float, float]],
    text: str,
    *,
    stacked: bool = False,
) -> float:
    """Draw a swatch of some colours and a name at ``left``; return where the next may begin."""
    width, height = size
    bottom, wide, high = height - 45, 14.0, 10.0
    for place, colour in enumerate(colours):
        share = 1 / len(colours)
        if stacked:
            corner, extent = (left, bottom + high * (1 - share * (place + 1))), (wide, high * share)
        else:
            corner, extent = (left + wide * share * place, bottom), (wide * share, high)
        figure.add_artist(
            Rectangle(
                (corner[0] / width, corner[1] / height), extent[0] / width, extent[1] / height,
                facecolor=colour, edgecolor="white", linewidth=0.5,
            )
        )  # fmt: skip
    where = (left + wide + 5) / width, (bottom + high / 2) / height
    figure.text(*where, text, fontsize=9, color=INK, va="center_baseline")
    return left + wide + 5 + TextPath((0, 0), text, size=9).get_extents().width + 16
