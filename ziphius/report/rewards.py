"""Pictures of a run that learns from rewards: what answers are worth, and how they change."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.ticker import FuncFormatter

from ziphius.report.health import steps_figure
from ziphius.report.lines import draw_curve, mark_events
from ziphius.report.read import Run
from ziphius.report.style import BLUE, GREEN, Panel, fit

# Of every rollout: name of the column, title, unit, colour.
_FIGURES = (
    ("reward", "Reward", "mean of a rollout", BLUE),
    ("accuracy", "Right answers", "of a rollout, as sampled", GREEN),
    ("length", "Length", "tokens an answer", BLUE),
    ("entropy", "Uncertainty", "nats a token, of its own answers", BLUE),
    ("kl", "Distance to the reference", "nats a token", BLUE),
    ("mismatch", "Trainer and engine", "nats a token apart", BLUE),
)
_POINTS = 1000


def reward_panels(run: Run) -> Iterator[Panel]:
    """The figures of rollouts; nothing for a run that has none."""
    metrics = run.metrics
    if not metrics.has("reward"):
        return
    for name, title, unit, color in _FIGURES:
        if not metrics.has(name) or not metrics.points(name)[1].any():
            continue
        figure, axes = steps_figure(metrics)
        draw_curve(axes, metrics, name, color, _POINTS)
        fit(axes, metrics.points(name)[1], low=0)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        mark_events(axes, run)
        yield Panel(f"rollouts-{name}", title, unit, figure)
