"""Pictures of the loss: bits per byte, nats, and a close-up of the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ziphius.report.formats import short
from ziphius.report.labels import Label, write_labels
from ziphius.report.read import Metrics, Run
from ziphius.report.series import Floats, extremes, half_window, smooth
from ziphius.report.style import (
    BLUE, FONT, GREEN, INK, MUTED, NARROW, OLIVE, ORANGE, PURPLE, SMALL, WIDE, Key, Panel, fit,
    new_figure, step_axis,
)  # fmt: skip

BASELINES = (("ngram_bpb", "n-gram model", PURPLE), ("xz_bpb", "xz", OLIVE))
_POINTS = 2000  # of a curve in a wide picture; small ones carry half
_MARKS = 200
_LABELS_WIDTH = 190.0


@dataclass(frozen=True)
class _Level:
    name: str
    value: float
    colour: str


def average(metrics: Metrics, name: str) -> Floats:
    """Return the smooth line of a column. A step that was not applied takes no part in it."""
    values = np.where(metrics.applied, metrics.columns[name], np.nan)
    return smooth(values, half_window(len(values)))


def draw_curve(
    axes: Axes, metrics: Metrics, name: str, colour: str, points: int
) -> tuple[Floats, Floats]:
    """Draw a column, thin by step and thick smoothed; return both lines' values."""
    steps = metrics.steps.astype(np.float64)
    thin = extremes(steps, metrics.columns[name], points)
    thick = extremes(steps, average(metrics, name), points)
    few = {"marker": "o", "markersize": 2.5} if len(thin[0]) < 3 else {}
    axes.plot(*thin, color=colour, linewidth=0.7, alpha=0.4, zorder=2)
    axes.plot(*thick, color=colour, linewidth=1.9, zorder=3, solid_capstyle="round", **few)
    return thin[1], thick[1]


def bits_panel(run: Run) -> Panel | None:
    """Bits per byte: training, held-out text, and what simpler models need for the same text."""
    metrics = run.metrics
    if not metrics.has("bpb") and not metrics.has("heldout_bpb"):
        return None
    keys = [
        Key(colour, "thick", f"{label} {value:.3f}")
        for name, label, colour in _curves()
        if (value := _end(metrics, name)) is not None
    ]
    points = heldout(run)
    if points is not None:
        keys.append(Key(ORANGE, "dot", f"held-out {points[1][-1]:.3f}"))
    if metrics.has("heldout_bpb_ema"):
        value = metrics.last("heldout_bpb_ema")
        keys.append(Key(ORANGE, "ring", f"held-out, averaged weights {value:.3f}"))
    keys += [Key(level.colour, "dash", f"{level.name} {level.value:.3f}") for level in levels(run)]
    events = event_keys(run)
    window = 2 * half_window(len(metrics.steps)) + 1
    return Panel(
        name="bits",
        title="Bits per byte",
        unit="less is better",
        figure=bits_figure(run, WIDE),
        narrow=bits_figure(run, NARROW),
        keys=(*keys, *events),
        bare_keys=events,
        note=f"Thin: every step. Thick: average over {window} steps"
        + (", without skipped ones." if metrics.skips else "."),
    )


def bits_figure(run: Run, size: tuple[float, float]) -> Figure:
    """Draw bits per byte; the wide shape has labels at its lines and a second axis in tokens."""
    metrics, wide = run.metrics, size == WIDE
    figure, axes = (
        new_figure(size, right=_LABELS_WIDTH, top=40, left=38)
        if wide
        else new_figure(size, left=34)
    )
    extent: list[Floats] = []
    labels = []
    for name, label, colour in _curves():
        end = _end(metrics, name)
        if end is not None:
            thin, thick = draw_curve(axes, metrics, name, colour, _POINTS if wide else 1000)
            extent += [limited(thin, thick)]
            labels.append(Label(end, f"{label}  {end:.3f}", colour, "bold"))
    for level in levels(run):
        axes.axhline(level.value, color=level.colour, linewidth=1.3, linestyle=(0, (5, 3)))
        extent.append(np.array([level.value]))
        labels.append(Label(level.value, f"{level.name}  {level.value:.3f}", level.colour))
    points = heldout(run)
    if points is not None:
        axes.plot(*points, "o-", color=ORANGE, markersize=4.5, linewidth=1.0, zorder=5)
        extent.append(points[1])
        text = f"held-out  {points[1][-1]:.3f}"
        labels.append(Label(float(points[1][-1]), text, ORANGE, "bold"))
    if metrics.has("heldout_bpb_ema"):
        steps, values = metrics.points("heldout_bpb_ema")
        axes.plot(
            steps, values, "o", color=ORANGE, markersize=6.5, markerfacecolor="none", zorder=5
        )
        extent.append(values)
        text = f"averaged weights  {values[-1]:.3f}"
        labels.append(Label(float(values[-1]), text, ORANGE))
    first = 0.0 if points is not None and points[0][0] == 0 else float(metrics.steps[0])
    step_axis(axes, first, float(metrics.steps[-1]), ticks=8 if wide else 5)
    fit(axes, np.concatenate(extent), room=0.05)
    mark_events(axes, run)
    if wide:
        _token_axis(axes, metrics)
        write_labels(axes, labels, gap=0.062, size=FONT + 0.5, at=1.02)
    return figure


def loss_panel(run: Run) -> Panel | None:
    """The losses in nats, with the largest spike."""
    metrics = run.metrics
    if not metrics.has("loss"):
        return None
    figure, axes = new_figure(SMALL)
    keys, extent = [], []
    for name, label, colour in (("loss", "main", BLUE), ("mtp_loss", "MTP", GREEN)):
        if metrics.has(name):
            thin, thick = draw_curve(axes, metrics, name, colour, 1000)
            extent += [limited(thin, thick)]
            keys.append(Key(colour, "thick", f"{label} {_end(metrics, name):.3f}"))
    step_axis(axes, float(metrics.steps[0]), float(metrics.steps[-1]))
    fit(axes, np.concatenate(extent))
    mark_events(axes, run)
    note = _spike(axes, run)
    return Panel("loss", "Loss", "nats per token", figure, tuple(keys), note)


def close_up_panel(run: Run) -> Panel | None:
    """The main loss over the last half of the run, where the whole picture is flat."""
    metrics = run.metrics
    late = metrics.steps > (metrics.steps[0] + metrics.steps[-1]) / 2
    ends = average(metrics, "loss")[late]
    if late.sum() < 50 or not np.isfinite(ends).any():
        return None
    figure, axes = new_figure(SMALL)
    steps = metrics.steps[late].astype(np.float64)
    thin = extremes(steps, metrics.columns["loss"][late], 1000)
    thick = extremes(steps, ends, 1000)
    axes.plot(*thin, color=BLUE, linewidth=0.7, alpha=0.4, zorder=2)
    axes.plot(*thick, color=BLUE, linewidth=1.9, zorder=3, solid_capstyle="round")
    step_axis(axes, float(steps[0]), float(steps[-1]), ticks=4)
    # The smooth line decides what is shown: a single batch may lie outside.
    spread = np.nanquantile(metrics.columns["loss"][late], [0.02, 0.98])
    fit(axes, np.concatenate([thick[1], spread]))
    return Panel("close-up", "Loss, last half", "nats per token", figure)


def heldout(run: Run) -> tuple[Floats, Floats] | None:
    """Return steps and bits per byte of held-out text, with the summary's at both ends."""
    steps, values = (list(part) for part in run.metrics.points("heldout_bpb"))
    before, after = run.number("heldout_bpb_before"), run.number("heldout_bpb_after")
    if before is not None and (not steps or steps[0] > 0):
        steps, values = [0.0, *steps], [before, *values]
    last = float(run.metrics.steps[-1])
    if after is not None:
        if steps and steps[-1] == last:
            values[-1] = after
        else:
            steps, values = [*steps, last], [*values, after]
    return (np.array(steps), np.array(values)) if steps else None


def levels(run: Run) -> list[_Level]:
    """Return the baselines that the summary has."""
    found = [(label, run.number(name), colour) for name, label, colour in BASELINES]
    return [_Level(label, value, colour) for label, value, colour in found if value is not None]


def limited(thin: Floats, thick: Floats) -> Floats:
    """Return the values that decide a picture's height: a lone peak far above is cut off."""
    top, bottom = float(np.nanmax(thick)), float(np.nanmin(thick))
    edge = top + 0.35 * (top - bottom or abs(top))
    return np.append(np.minimum(thin, edge), thick)


def mark_events(axes: Axes, run: Run) -> None:
    """Mark skipped steps at the top edge, and where the run went back."""
    skipped = sorted({skip.step for skip in run.metrics.skips})
    shown = skipped[:: max(1, -(-len(skipped) // _MARKS))]
    if shown:
        axes.plot(
            shown, [1.0] * len(shown), "v", color=INK, markersize=4.5, zorder=6, clip_on=False,
            markeredgewidth=0, transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    for rollback in run.metrics.rollbacks:
        axes.axvline(rollback.step, color=INK, linewidth=1.0, linestyle=(0, (1.5, 2)), zorder=1)


def event_keys(run: Run) -> tuple[Key, ...]:
    """Return what the marks of ``mark_events`` mean."""
    keys = []
    if run.metrics.skips:
        keys.append(Key(INK, "skip", "skipped step"))
    if run.metrics.rollbacks:
        keys.append(Key(INK, "band", "went back to a checkpoint"))
    return tuple(keys)


def _curves() -> tuple[tuple[str, str, str], ...]:
    return ("bpb", "training", BLUE), ("mtp_bpb", "training, MTP", GREEN)


def _end(metrics: Metrics, name: str) -> float | None:
    values = average(metrics, name) if metrics.has(name) else np.array([])
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _spike(axes: Axes, run: Run) -> str:
    """Ring the largest spike; return what to say of it."""
    spike = (run.summary or {}).get("largest_spike")
    if not isinstance(spike, dict) or "step" not in spike or "nats" not in spike:
        return ""
    place = np.flatnonzero(run.metrics.steps == spike["step"])
    loss = run.metrics.columns["loss"][place[0]] if len(place) else np.nan
    bottom, top = axes.get_ylim()
    if np.isfinite(loss):
        axes.plot(
            [spike["step"]], [min(max(loss, bottom), top)], "o", color=INK, markersize=8,
            markerfacecolor="none", markeredgewidth=1.1, zorder=6, clip_on=False,
        )  # fmt: skip
    return (
        f"Largest spike: step {spike['step']:,}, {spike['nats']:.2f} nats above the running median."
    )


def _token_axis(axes: Axes, metrics: Metrics) -> None:
    tokens = np.append(0.0, metrics.columns["tokens"])
    steps = np.append(0.0, metrics.steps)
    if not np.isfinite(tokens).all() or (np.diff(tokens) <= 0).any() or len(tokens) < 3:
        return
    above = axes.secondary_xaxis(
        "top",
        functions=(
            lambda step: _follow(step, steps, tokens),
            lambda token: _follow(token, tokens, steps),
        ),
    )
    above.spines["top"].set_visible(False)
    above.tick_params(colors=MUTED, labelsize=FONT, length=0, pad=7)
    above.xaxis.set_major_formatter(FuncFormatter(lambda token, _: short(token)))
    above.set_xlabel("tokens", fontsize=FONT, color=MUTED, labelpad=3)


def _follow(x: np.ndarray, known: Floats, values: Floats) -> np.ndarray:
    """Interpolate, going straight on beyond the ends."""
    inside = np.interp(x, known, values)
    first = (values[1] - values[0]) / (known[1] - known[0])
    last = (values[-1] - values[-2]) / (known[-1] - known[-2])
    below, above = np.minimum(x - known[0], 0), np.maximum(x - known[-1], 0)
    return np.asarray(inside + first * below + last * above)
