"""The picture of a training run's loss, drawn from its metrics file alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ziphius.config.errors import BadInput
from ziphius.report.files import write_whole
from ziphius.report.formats import short
from ziphius.report.labels import Label, write_labels
from ziphius.report.read import read_metrics
from ziphius.report.series import Floats, half_window, smooth
from ziphius.report.style import BLUE, GREEN, INK, OLIVE, ORANGE, PURPLE

_BASELINE_COLOURS = (GREEN, PURPLE, OLIVE, INK)
_LABEL_GAP = 0.052  # least distance of two labels, as a part of the axis' height


@dataclass(frozen=True)
class _Curve:
    tokens: Floats
    bpb: Floats


def draw_loss(
    metrics_path: Path,
    output: Path,
    *,
    baselines: Mapping[str, float],
    heldout: tuple[float, float] | None,
) -> None:
    """Draw training bits per byte against tokens as a PNG, replacing ``output`` in one step.

    ``metrics_path`` has one JSON object a line with at least ``step``, ``tokens`` and ``bpb``; of
    a step that was run again after a resume, the last line counts, and lines without finite
    numbers are left out. ``baselines`` are bits per byte by name, drawn as levels. ``heldout`` is
    the bits per byte of held-out text before and after training. Raises BadInput for a file that
    cannot be read or has fewer than two steps.
    """
    figure = loss_figure(metrics_path, baselines=baselines, heldout=heldout)
    picture = io.BytesIO()
    FigureCanvasAgg(figure)  # becomes the figure's canvas: no window system is asked
    # Tight, so that a long label widens the picture instead of being cut.
    figure.savefig(picture, format="png", bbox_inches="tight", pad_inches=0.2)
    write_whole(output, picture.getvalue())


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
    write_labels(axes, labels, gap=_LABEL_GAP, size=11)
    return figure


def _read(path: Path) -> _Curve:
    metrics = read_metrics(path, [])
    tokens, bpb = metrics.columns["tokens"], metrics.columns["bpb"]
    present = np.isfinite(tokens) & np.isfinite(bpb)
    if present.sum() < 2:
        raise BadInput(
            f"metrics {path}: {present.sum()} steps with finite tokens and bpb, and a curve needs "
            "2: train for longer"
        )
    return _Curve(tokens[present], bpb[present])


def _style(figure: Figure, axes: Axes, curve: _Curve, has_heldout: bool) -> None:
    left, _, _, top = axes.get_position().extents
    average = 2 * half_window(len(curve.bpb)) + 1
    figure.text(
        *(left, top + 0.075), "Training loss, in bits per byte",
        fontsize=15, fontweight="bold", color=INK,
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    last = float(curve.tokens.max())
    axes.set_xlim(-0.015 * last if has_heldout else 0.0, 1.015 * last)


def _draw_training(axes: Axes, curve: _Curve) -> list[Label]:
    average = smooth(curve.bpb, half_window(len(curve.bpb)))
    axes.plot(curve.tokens, curve.bpb, color=BLUE, linewidth=0.7, alpha=0.35, zorder=2)
    axes.plot(curve.tokens, average, color=BLUE, linewidth=2.2, zorder=3, solid_capstyle="round")
    return [Label(float(average[-1]), f"training  {average[-1]:.2f}", BLUE, "bold")]


def _draw_baselines(axes: Axes, baselines: Mapping[str, float]) -> list[Label]:
    labels = []
    for i, (name, level) in enumerate(baselines.items()):
        colour = _BASELINE_COLOURS[i % len(_BASELINE_COLOURS)]
        axes.axhline(level, color=colour, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
        labels.append(Label(level, f"{name}  {level:.2f}", colour))
    return labels


def _draw_heldout(axes: Axes, curve: _Curve, heldout: tuple[float, float]) -> list[Label]:
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
    return [Label(after, f"held-out after  {after:.2f}", ORANGE, "bold")]


def _limit(axes: Axes, curve: _Curve, levels: list[float]) -> None:
    values = np.concatenate([curve.bpb, levels])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low or 1.0)
    # Zero is worth showing when it is near: bits per byte are a share of 8.
    bottom = 0.0 if low - margin < 0.35 * high else low - margin
    axes.set_ylim(bottom, high + margin)
