"""Pictures of how the run went: schedules, gradients, speed, agreement."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ziphius.report.formats import short, tidy
from ziphius.report.lines import draw_curve, limits, mark_events
from ziphius.report.read import Metrics, Run
from ziphius.report.series import Floats, corners, extremes
from ziphius.report.style import (
    BLUE,
    FONT,
    GREEN,
    MUTED,
    ORANGE,
    SMALL,
    Key,
    Panel,
    fit,
    logarithmic,
    new_figure,
    step_axis,
)

# What a schedule sets: name of the column, title, unit.
_SETTINGS = (
    ("batch_size", "Batch size", "sequences"),
    ("gamma", "Bias update speed", "gamma"),
    ("mtp_weight", "MTP loss weight", "lambda"),
)
_POINTS = 1000
_WIDE_RANGE = 20.0  # above this ratio a logarithmic axis shows more


def schedule_panels(run: Run) -> Iterator[Panel]:
    """The learning rate, and of the other schedules those that change."""
    metrics = run.metrics
    if metrics.has("lr"):
        figure, axes = steps_figure(metrics)
        x, y = extremes(*metrics.points("lr"), _POINTS)
        axes.plot(x, y, color=BLUE, linewidth=1.9)
        fit(axes, y, low=0)
        yield Panel("lr", "Learning rate", "", figure, note=constants(run))
    for name, title, unit in _SETTINGS:
        if metrics.has(name) and np.ptp(metrics.points(name)[1]) > 0:
            figure, axes = steps_figure(metrics)
            x, y = corners(*metrics.points(name), _POINTS)
            axes.plot(x, y, color=BLUE, linewidth=1.9, drawstyle="steps-post")
            fit(axes, y, low=0)
            yield Panel(name, title, unit, figure)


def constants(run: Run) -> str:
    """Say which of the schedules' values never change."""
    parts = [
        f"{_inside(title)} {tidy(values[0])}"
        for name, title, _ in _SETTINGS
        if len(values := run.metrics.points(name)[1]) and np.ptp(values) == 0
    ]
    return f"Constant: {', '.join(parts)}." if parts else ""


def _inside(title: str) -> str:
    """Write a title inside a sentence."""
    return title if title.startswith("MTP") else title[0].lower() + title[1:]


def gradient_panel(run: Run) -> Panel | None:
    """The gradient's norm before clipping, and where it is clipped."""
    if not run.metrics.has("grad_norm"):
        return None
    figure, axes = steps_figure(run.metrics)
    draw_curve(axes, run.metrics, "grad_norm", BLUE, _POINTS)
    values, keys = run.metrics.points("grad_norm")[1], []
    usual = np.median(values)
    clip = run.setting("pretrain", "clip_norm")
    if isinstance(clip, int | float):
        axes.axhline(clip, color=ORANGE, linewidth=1.3, linestyle=(0, (5, 3)))
        values = np.append(values, clip)
        keys = [Key(ORANGE, "dash", f"clipped at {tidy(clip)}")]
    if values.min() > 0 and values.max() > _WIDE_RANGE * usual:
        logarithmic(axes)
        axes.set_ylim(values.min() / 1.3, values.max() * 1.3)
    else:
        fit(axes, values, low=0)
    mark_events(axes, run)
    return Panel("gradient", "Gradient norm", "before clipping", figure, tuple(keys))


def balance_loss_panel(run: Run) -> Panel | None:
    """The sequence-wise balance loss."""
    if not run.metrics.has("balance_loss") or not run.metrics.points("balance_loss")[1].any():
        return None
    figure, axes = steps_figure(run.metrics)
    draw_curve(axes, run.metrics, "balance_loss", BLUE, _POINTS)
    fit(axes, limits(run.metrics.columns["balance_loss"]))
    return Panel("balance-loss", "Balance loss", "nats, with its weight", figure)


def violation_panel(run: Run) -> Panel | None:
    """MaxVio of every step, the mean over layers."""
    if not run.metrics.has("max_violation"):
        return None
    figure, axes = steps_figure(run.metrics)
    draw_curve(axes, run.metrics, "max_violation", BLUE, _POINTS)
    fit(axes, run.metrics.columns["max_violation"], low=0)
    return Panel(
        "violation", "Balance violation", "MaxVio, mean over layers", figure,
        note="MaxVio = load of the busiest expert ÷ mean load - 1. It is 0 when all are equal.",
    )  # fmt: skip


def agreement_panel(run: Run) -> Panel | None:
    """How often the MTP head predicts what the main head does."""
    if not run.metrics.has("mtp_agreement"):
        return None
    figure, axes = steps_figure(run.metrics)
    x, y = extremes(*run.metrics.points("mtp_agreement"), _POINTS)
    axes.plot(x, y, "o-", color=GREEN, markersize=4 if len(x) < 60 else 0, linewidth=1.6)
    fit(axes, y, low=0)
    axes.set_ylim(0, min(1.0, axes.get_ylim()[1]) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    return Panel(
        "agreement", "MTP agreement", "with the main head, held-out", figure,
        note=f"Last: {100 * y[-1]:.1f} %.",
    )  # fmt: skip


def speed_panel(run: Run) -> Panel | None:
    """Tokens per second, with MFU on the right where it is a multiple of them."""
    metrics = run.metrics
    if not metrics.has("tokens_per_s"):
        return None
    figure, axes = steps_figure(metrics, right=46)
    draw_curve(axes, metrics, "tokens_per_s", BLUE, _POINTS)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: short(speed)))
    fit(axes, metrics.columns["tokens_per_s"], low=0)
    ratio = _mfu_ratio(metrics)
    if ratio is not None:
        _right_axis(axes, ratio)
    unit = "tokens/s, right: MFU" if ratio is not None else "tokens/s"
    return Panel("speed", "Throughput", unit, figure)


def mfu_panel(run: Run) -> Panel | None:
    """MFU of its own, where it does not follow from the throughput by one factor."""
    if not run.metrics.has("mfu") or _mfu_ratio(run.metrics) is not None:
        return None
    figure, axes = steps_figure(run.metrics)
    draw_curve(axes, run.metrics, "mfu", BLUE, _POINTS)
    fit(axes, run.metrics.columns["mfu"], low=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    return Panel("mfu", "Model FLOPs utilisation", "MFU", figure)


def steps_figure(metrics: Metrics, right: float = 10) -> tuple[Figure, Axes]:
    figure, axes = new_figure(SMALL, right=right)
    step_axis(axes, float(metrics.steps[0]), float(metrics.steps[-1]))
    return figure, axes


def _mfu_ratio(metrics: Metrics) -> float | None:
    ratios: Floats = metrics.columns["mfu"] / metrics.columns["tokens_per_s"]
    ratios = ratios[np.isfinite(ratios)]
    if not len(ratios) or np.ptp(ratios) > 0.01 * np.median(ratios):
        return None
    return float(np.median(ratios))


def _right_axis(axes: Axes, ratio: float) -> None:
    right = axes.secondary_yaxis(
        "right",
        functions=(
            lambda speed: np.asarray(speed) * ratio,
            lambda share: np.asarray(share) / ratio,
        ),
    )
    right.spines["right"].set_visible(False)
    right.tick_params(colors=MUTED, labelsize=FONT, length=0)
    right.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    right.yaxis.set_major_formatter(FuncFormatter(_percent))


def _percent(share: float, _: int | None = None) -> str:
    return f"{tidy(round(100 * share, 6))} %"
