"""Pictures of the loss: bits per byte, nats, and a close-up of the end."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ziphius.report.formats import short
from ziphius.report.labels import Label, write_labels
from ziphius.report.lines import (
    draw_abandoned,
    draw_curve,
    event_keys,
    limits,
    mark_events,
)
from ziphius.report.read import Metrics, Run
from ziphius.report.series import Floats, extremes, half_window
from ziphius.report.style import (
    BLUE,
    FONT,
    GREEN,
    INK,
    MUTED,
    NARROW,
    OLIVE,
    ORANGE,
    PURPLE,
    SMALL,
    WIDE,
    Key,
    Mark,
    Panel,
    fit,
    new_figure,
    step_axis,
)

BASELINES = (("ngram_bpb", "n-gram model", PURPLE), ("xz_bpb", "xz", OLIVE))
_TRAINING = (("bpb", "training", BLUE), ("mtp_bpb", "training, MTP", GREEN))
_HELDOUT: tuple[tuple[str, str, Mark], ...] = (
    ("heldout_bpb", "held-out", "dot"),
    ("heldout_bpb_ema", "held-out, averaged weights", "ring"),
)
_POINTS = 2000  # of a curve in a wide picture; small ones carry half
_LABELS_WIDTH = 255.0


def bits_panel(run: Run) -> Panel | None:
    """Bits per byte: training, held-out text, and what simpler models need for the same text."""
    metrics, entries = run.metrics, _entries(run)
    if not entries:
        return None
    events = event_keys(run)
    window = 2 * half_window(len(metrics.steps)) + 1
    return Panel(
        name="bits",
        title="Bits per byte",
        unit="less is better",
        figure=bits_figure(run, WIDE),
        narrow=bits_figure(run, NARROW),
        keys=(*(entry for entry, _ in entries), *events),
        bare_keys=events,
        note=f"Thin: every step. Thick: average over {window} steps"
        + (", without skipped ones." if metrics.skips else "."),
    )


def bits_figure(run: Run, size: tuple[float, float]) -> Figure:
    """Draw bits per byte; the wide shape has labels at its lines and a second axis in tokens."""
    wide = size == WIDE
    figure, axes = (
        new_figure(size, right=_LABELS_WIDTH, top=48, left=38, bottom=42, font=FONT + 2)
        if wide
        else new_figure(size, left=34)
    )
    extent = _draw_bits(axes, run, _POINTS if wide else _POINTS // 2)
    points = run.heldout()
    first = 0.0 if points is not None and points[0][0] == 0 else float(run.metrics.steps[0])
    step_axis(axes, first, float(run.metrics.steps[-1]), ticks=8 if wide else 5)
    fit(axes, np.concatenate(extent), room=0.05)
    mark_events(axes, run)
    if wide:
        _token_axis(axes, run.metrics)
        labels = [
            Label(value, key.text, key.colour, "normal" if key.mark == "dash" else "bold")
            for key, value in _entries(run)
        ]
        write_labels(axes, labels, gap=0.062, size=FONT + 2, at=1.02)
    return figure


def _entries(run: Run) -> list[tuple[Key, float]]:
    """Return what the picture shows, with the last value of each."""
    metrics = run.metrics
    found: list[tuple[str, str, Mark, float | None]] = [
        (label, colour, "thick", _end(metrics, name)) for name, label, colour in _TRAINING
    ]
    for name, label, mark in _HELDOUT:
        points = run.heldout(name)
        found.append((label, ORANGE, mark, None if points is None else float(points[1][-1])))
    found += [(label, colour, "dash", run.number(name)) for name, label, colour in BASELINES]
    return [
        (Key(colour, mark, f"{label} {value:.3f}"), value)
        for label, colour, mark, value in found
        if value is not None
    ]


def _draw_bits(axes: Axes, run: Run, points: int) -> list[Floats]:
    """Draw everything but axes and labels; return what decides the picture's height."""
    extent: list[Floats] = []
    draw_abandoned(axes, run.metrics, "bpb")
    for name, _, colour in _TRAINING:
        if run.metrics.has(name):
            draw_curve(axes, run.metrics, name, colour, points)
            extent.append(limits(run.metrics.columns[name]))
    for name, _, colour in BASELINES:
        level = run.number(name)
        if level is not None:
            axes.axhline(level, color=colour, linewidth=1.3, linestyle=(0, (5, 3)))
            extent.append(np.array([level]))
    for name, _, mark in _HELDOUT:
        heldout = run.heldout(name)
        if heldout is not None:
            # Two points make no curve: a line would claim what lies between.
            line = "-" if mark == "dot" and len(heldout[0]) > 2 else ""
            axes.plot(*heldout, "o", linestyle=line, color=ORANGE, markersize=4.5, linewidth=1.0,
                      zorder=5, markerfacecolor=ORANGE if mark == "dot" else "none")  # fmt: skip
            extent.append(heldout[1])
    return extent


def loss_panel(run: Run) -> Panel | None:
    """The losses in nats, with the largest spike."""
    metrics = run.metrics
    if not metrics.has("loss"):
        return None
    figure, axes = new_figure(SMALL)
    keys: list[Key] = []
    extent: list[Floats] = []
    for name, label, colour in (("loss", "main", BLUE), ("mtp_loss", "MTP", GREEN)):
        if metrics.has(name):
            draw_curve(axes, metrics, name, colour, 1000)
            extent.append(limits(metrics.columns[name]))
            end = _end(metrics, name)
            keys.append(Key(colour, "thick", label if end is None else f"{label} {end:.3f}"))
    draw_abandoned(axes, metrics, "loss")
    step_axis(axes, float(metrics.steps[0]), float(metrics.steps[-1]))
    fit(axes, np.concatenate(extent))
    mark_events(axes, run)
    note = _spike(axes, run)
    return Panel("loss", "Loss", "nats per token", figure, tuple(keys), note)


def close_up_panel(run: Run) -> Panel | None:
    """The main loss over the last half of the run, where the whole picture is flat."""
    metrics = run.metrics
    late = metrics.steps > (metrics.steps[0] + metrics.steps[-1]) / 2
    ends = metrics.average("loss")[late]
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
    mark_events(axes, run)
    return Panel("close-up", "Loss, last half", "nats per token", figure)


def _end(metrics: Metrics, name: str) -> float | None:
    values = metrics.average(name) if metrics.has(name) else np.array([])
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else None


def _spike(axes: Axes, run: Run) -> str:
    """Ring the largest spike; return what to say of it."""
    spike = (run.summary or {}).get("largest_spike")
    if not isinstance(spike, dict) or "step" not in spike or "nats" not in spike:
        return ""
    metrics = run.metrics
    # The run may have gone back from the spike: its loss is the larger of the two.
    losses = [
        values[(steps == spike["step"]) & np.isfinite(values)]
        for steps, values in (
            (metrics.steps, metrics.columns["loss"]),
            metrics.abandoned["loss"],
        )
    ]
    loss = max((float(value) for part in losses for value in part), default=None)
    if loss is not None:
        axes.plot(
            [spike["step"]], [min(loss, axes.get_ylim()[1])], "o", color=INK, markersize=8,
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
            lambda step: _follow(np.asarray(step, np.float64), steps, tokens),
            lambda token: _follow(np.asarray(token, np.float64), tokens, steps),
        ),
    )
    above.spines["top"].set_visible(False)
    above.tick_params(colors=MUTED, labelsize=FONT + 2, length=0, pad=6)
    above.xaxis.set_major_formatter(FuncFormatter(lambda token, _: short(token)))
    above.set_xlabel("tokens", fontsize=FONT + 2, color=MUTED, labelpad=7)


def _follow(x: Floats, known: Floats, values: Floats) -> np.ndarray:
    """Interpolate, going straight on beyond the ends."""
    inside = np.interp(x, known, values)
    first = (values[1] - values[0]) / (known[1] - known[0])
    last = (values[-1] - values[-2]) / (known[-1] - known[-2])
    below, above = np.minimum(x - known[0], 0), np.maximum(x - known[-1], 0)
    return np.asarray(inside + first * below + last * above)
