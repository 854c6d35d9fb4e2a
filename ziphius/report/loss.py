"""The picture of a training run's loss, drawn from its metrics file alone."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ziphius.config.errors import BadInput

# Colours of Okabe and Ito and of Tol, which differ for every common kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#222222"
_BASELINE_COLOURS = (GREEN, PURPLE, "#7A6A00", BLACK)

_SMOOTH_PARTS = 30  # the smooth line averages over about this part of the run
_LABEL_GAP = 0.052  # least distance of two labels, as a part of the axis' height


@dataclass(frozen=True)
class _Curve:
    tokens: NDArray[np.float64]
    bpb: NDArray[np.float64]


@dataclass(frozen=True)
class _Label:
    y: float
    text: str
    colour: str
    weight: str = "normal"


def draw_loss(
    metrics_path: Path,
    output: Path,
    *,
    baselines: Mapping[str, float],
    heldout: tuple[float, float] | None,
) -> None:
    """Draw training bits per byte against tokens as a PNG, replacing ``output`` in one step.

    ``metrics_path`` has one JSON object a line with at least ``step``, ``tokens`` and ``bpb``; of
    a step that was run again after a resume, the last line counts. ``baselines`` are bits per
    byte by name, drawn as levels. ``heldout`` is the bits per byte of held-out text before and
    after training. Raises BadInput for a metrics file that is missing, broken or has fewer than
    two steps, naming the file and the line.
    """
    _save(loss_figure(metrics_path, baselines=baselines, heldout=heldout), output)


def loss_figure(
    metrics_path: Path, *, baselines: Mapping[str, float], heldout: tuple[float, float] | None
) -> Figure:
    """Return what ``draw_loss`` draws, before it becomes a file."""
    curve = _read(metrics_path)
    figure = Figure(figsize=(9.6, 5.4), dpi=150, facecolor="white")
    axes = figure.add_axes((0.065, 0.12, 0.7, 0.74))
    _style(figure, axes, curve, has_heldout=heldout is not None)
    labels = [*_draw_training(axes, curve), *_draw_baselines(axes, baselines)]
    if heldout is not None:
        labels += _draw_heldout(axes, curve, heldout)
    _limit(axes, curve, [*baselines.values(), *(heldout or ())])
    _write_labels(axes, labels)
    return figure


def _read(path: Path) -> _Curve:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"metrics {path}: cannot be read: {error}") from None
    steps: dict[float, tuple[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            step, tokens, bpb = _parse(line, f"metrics {path}, line {number}")
            steps[step] = (tokens, bpb)
    if len(steps) < 2:
        raise BadInput(
            f"metrics {path}, line {len(lines)}: the file ends after {len(steps)} steps, and a "
            "curve needs 2: train for longer"
        )
    tokens_bpb = np.array([steps[step] for step in sorted(steps)])
    return _Curve(tokens_bpb[:, 0], tokens_bpb[:, 1])


def _parse(line: str, where: str) -> tuple[float, float, float]:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not valid JSON ({error.msg}): remove the line") from None
    if not isinstance(entry, dict):
        raise BadInput(f"{where}: not a JSON object: remove the line")
    step, tokens, bpb = (_number(entry.get(key), key, where) for key in ("step", "tokens", "bpb"))
    return step, tokens, bpb


def _number(value: Any, key: str, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise BadInput(f"{where}: '{key}' is {value!r}, not a finite number: remove the line")
    return float(value)


def _smooth(values: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """Average over ``half`` steps to either side.

    The window narrows towards the start, where the loss falls fast, and is cut off at the end, so
    that the last value is an average too.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    left = places - np.minimum(half, places)
    right = np.minimum(places + np.minimum(half, places), len(values) - 1)
    return (sums[right + 1] - sums[left]) / (right + 1 - left)


def _half_window(curve: _Curve) -> int:
    return max(1, len(curve.bpb) // (2 * _SMOOTH_PARTS))


def _style(figure: Figure, axes: Axes, curve: _Curve, has_heldout: bool) -> None:
    left, _, _, top = axes.get_position().extents
    average = 2 * _half_window(curve) + 1
    figure.text(
        *(left, top + 0.075), "Training loss, in bits per byte",
        fontsize=15, fontweight="bold", color=BLACK,
    )  # fmt: skip
    figure.text(
        *(left, top + 0.028), f"thin: each step; thick: average over {average} steps",
        fontsize=10.5, color="#666666",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#444444", labelsize=10.5, length=3.5)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("training tokens", fontsize=11.5, color="#444444", labelpad=6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    last = float(curve.tokens.max())
    axes.set_xlim(-0.015 * last if has_heldout else 0.0, 1.015 * last)


def _short(tokens: float) -> str:
    """Write a number of tokens as the field does: 250K, 1.5M, 14.8T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(tokens) >= size:
            return f"{tokens / size:.4g}{letter}"
    return f"{tokens:.4g}"


def _draw_training(axes: Axes, curve: _Curve) -> list[_Label]:
    smooth = _smooth(curve.bpb, _half_window(curve))
    axes.plot(curve.tokens, curve.bpb, color=BLUE, linewidth=0.7, alpha=0.35, zorder=2)
    axes.plot(curve.tokens, smooth, color=BLUE, linewidth=2.2, zorder=3, solid_capstyle="round")
    return [_Label(float(smooth[-1]), f"training  {smooth[-1]:.2f}", BLUE, "bold")]


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> list[_Label]:
    labels = []
    for i, (name, level) in enumerate(baselines.items()):
        colour = _BASELINE_COLOURS[i % len(_BASELINE_COLOURS)]
        axes.axhline(level, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
        labels.append(_Label(level, f"{name}  {level:.2f}", colour))
    return labels


def _draw_heldout(axes: Axes, curve: _Curve, heldout: tuple[float, float]) -> list[_Label]:
    before, after = heldout
    axes.scatter(
        [0.0, float(curve.tokens.max())], [before, after],
        s=58, color=ORANGE, edgecolor="white", linewidth=1.2, zorder=5, clip_on=False,
    )  # fmt: skip
    axes.annotate(
        f"held-out before  {before:.2f}", (0.0, before), xytext=(10, 0),
        textcoords="offset points", va="center", color=ORANGE, fontsize=11, fontweight="bold",
        path_effects=[withStroke(linewidth=3.5, foreground="white")], zorder=6,
    )  # fmt: skip
    return [_Label(after, f"held-out after  {after:.2f}", ORANGE, "bold")]


def _limit(axes: Axes, curve: _Curve, levels: list[float]) -> None:
    values = np.concatenate([curve.bpb, levels])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low or 1.0)
    # Zero is worth showing when it is near: bits per byte are a share of 8.
    bottom = 0.0 if low - margin < 0.35 * high else low - margin
    axes.set_ylim(bottom, high + margin)


def _write_labels(axes: Axes, labels: list[_Label]) -> None:
    """Write the labels at the right edge, pushed apart where they would overlap."""
    bottom, top = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.y)
    wanted = [(label.y - bottom) / (top - bottom) for label in labels]
    for label, y, place in zip(labels, wanted, _spread(wanted), strict=True):
        axes.annotate(
            label.text, (1.0, y), xytext=(1.045, place), xycoords="axes fraction",
            textcoords="axes fraction", va="center", color=label.colour, fontsize=11,
            fontweight=label.weight, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.8,
                        "shrinkA": 1, "shrinkB": 0, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def _spread(wanted: list[float]) -> list[float]:
    """Return places near the sorted ``wanted`` ones, none nearer to the next than the gap.

    Labels that are too near form a group that is centred on the mean of their wishes.
    """
    groups: list[tuple[float, int]] = []  # (centre, size)
    for wish in wanted:
        groups.append((wish, 1))
        while len(groups) > 1:
            (low, below), (high, above) = groups[-2:]
            if high - low >= _LABEL_GAP * (below + above) / 2:
                break
            size = below + above
            groups[-2:] = [((low * below + high * above) / size, size)]
    return [
        centre + _LABEL_GAP * (i - (size - 1) / 2) for centre, size in groups for i in range(size)
    ]


def _save(figure: Figure, output: Path) -> None:
    picture = io.BytesIO()
    FigureCanvasAgg(figure)  # becomes the figure's canvas: no window system is asked
    # Tight, so that a long label widens the picture instead of being cut.
    figure.savefig(picture, format="png", bbox_inches="tight", pad_inches=0.2)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_bytes(picture.getvalue())
    os.replace(temporary, output)
