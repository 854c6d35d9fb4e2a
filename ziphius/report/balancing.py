"""Pictures of the experts: a heat map a layer, the violation by layer, biases, dead experts."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from ziphius.report import heat
from ziphius.report.experts import LayerFigures, load_map, violation_map
from ziphius.report.formats import whole
from ziphius.report.read import Run
from ziphius.report.series import Ints, corners, extremes
from ziphius.report.style import (
    BLUE,
    GREEN,
    OLIVE,
    ORANGE,
    PURPLE,
    SMALL,
    Key,
    Panel,
    fit,
    new_figure,
    step_axis,
)

_COLUMNS = 200
_CELLS = 1_200_000  # of all heat maps together: a page stays small however many layers there are
_HEIGHT = 128  # pixels of a heat map, about
_LAYER_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, OLIVE)


@dataclass(frozen=True)
class Map:
    """The heat map of one layer: its picture as a data URI, its size in cells, what to say."""

    name: str
    picture: str
    experts: int
    columns: int
    note: str
    alarming: float

    @property
    def height(self) -> int:
        """Pixels of the page: whole ones for an expert, so that no row is lost."""
        return self.experts * max(1, _HEIGHT // self.experts)


def layer_name(run: Run, index: int) -> str:
    """Return how the page calls a layer."""
    return f"layer {index} (MTP)" if run.is_mtp(index) else f"layer {index}"


def maps(run: Run, layers: tuple[LayerFigures, ...]) -> tuple[Map, ...]:
    """Return the heat map of every layer, in their order."""
    assert run.balance is not None, "layers come from balance.jsonl"
    columns = max(20, min(_COLUMNS, _CELLS // max(1, sum(f.experts for f in layers))))
    return tuple(_map(run, figures, run.balance.steps, columns) for figures in layers)


def _map(run: Run, figures: LayerFigures, steps: Ints, columns: int) -> Map:
    relative_EC = load_map(figures, steps, columns)
    parts = [f"MaxVio {figures.late_violation:.2f}"]
    if figures.last_dead:
        parts.append(f"{figures.last_dead} dead")
    return Map(
        name=layer_name(run, figures.index).replace("l", "L", 1),
        picture=heat.picture(relative_EC),
        experts=figures.experts,
        columns=relative_EC.shape[1],
        note=" · ".join(parts),
        alarming=figures.last_dead + np.nan_to_num(figures.late_violation),
    )


def layers_panel(run: Run, layers: tuple[LayerFigures, ...]) -> Panel | None:
    """The busiest expert of every layer and step, in the colours of the heat maps."""
    assert run.balance is not None, "layers come from balance.jsonl"
    steps = run.balance.steps
    # 1 + MaxVio is the load of the busiest expert relative to the mean.
    busiest_LC = 1 + violation_map(layers, steps, _COLUMNS)
    figure, axes = new_figure(SMALL, left=34)
    colours = matplotlib.colors.ListedColormap(heat.palette() / 255)
    first, last = float(steps[0]), float(steps[-1])
    end = last if last > first else first + 1
    axes.imshow(
        heat.levels(busiest_LC), cmap=colours, vmin=0, vmax=heat.ABSENT, aspect="auto",
        interpolation="none", extent=(first, end, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    step_axis(axes, first, last)
    axes.set_xlim(first, end)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    shown = [int(i) for i in axes.yaxis.get_major_locator()() if 0 <= i < len(layers)]
    axes.set_yticks(shown, [str(layers[i].index) for i in shown])
    worst = int(np.nanargmax([np.nan_to_num(f.late_violation, nan=-1.0) for f in layers]))
    return Panel(
        "layers", "Busiest expert by layer", "colours as below", figure,
        note=f"Rows are layers. Over the last tenth {layer_name(run, layers[worst].index)} is "
        f"highest: {1 + layers[worst].late_violation:.2f} times the mean.",
    )  # fmt: skip


def bias_panel(run: Run, layers: tuple[LayerFigures, ...]) -> Panel | None:
    """Smallest, mean and largest routing bias of every layer."""
    assert run.balance is not None, "layers come from balance.jsonl"
    told = [f for f in layers if np.isfinite(f.layer.bias_R3).any()]
    if not told:
        return None
    figure, axes = new_figure(SMALL)
    steps = run.balance.steps.astype(np.float64)
    few = len(told) <= len(_LAYER_COLOURS)
    points = 400 if few else 100
    keys: list[Key] = []
    for i, figures in enumerate(told):
        colour = _LAYER_COLOURS[i] if few else _depth_colour(i, len(told))
        low_R, mean_R, high_R = figures.layer.bias_R3.T
        for value_R in (low_R, high_R):
            axes.plot(*extremes(steps, value_R, points), color=colour, linewidth=1.3,
                      alpha=1.0 if few else 0.6)  # fmt: skip
        axes.plot(*extremes(steps, mean_R, points), color=colour, linewidth=0.9,
                  linestyle=(0, (2, 2)), alpha=0.9)  # fmt: skip
        if few:
            name = layer_name(run, figures.index)
            keys.append(Key(colour, "thick", name if not keys else name.removeprefix("layer ")))
    if not few:
        keys = [
            Key(_depth_colour(i, len(told)), "thick", layer_name(run, told[i].index))
            for i in (0, len(told) // 2, len(told) - 1)
        ]
    step_axis(axes, steps[0], steps[-1])
    fit(axes, np.concatenate([f.layer.bias_R3.ravel() for f in told]))
    return Panel("bias", "Routing bias", "smallest, mean (dashed), largest", figure, tuple(keys))


def dead_panel(run: Run, layers: tuple[LayerFigures, ...]) -> Panel | None:
    """Experts without a token over the logged steps, all layers together."""
    assert run.balance is not None, "layers come from balance.jsonl"
    dead_R = np.sum([figures.dead_R for figures in layers], axis=0).astype(np.float64)
    if not dead_R.any():
        return None
    figure, axes = new_figure(SMALL)
    steps = run.balance.steps.astype(np.float64)
    x, y = corners(steps, dead_R, 1000)
    axes.plot(x, y, color=PURPLE, linewidth=1.6, drawstyle="steps-post")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    step_axis(axes, steps[0], steps[-1])
    fit(axes, y, low=0)
    total = sum(figures.experts for figures in layers)
    return Panel(
        "dead", "Experts without a token", f"of {whole(total)}, all layers", figure,
        note=f"In the last logged step, {whole(steps[-1])}: {whole(dead_R[-1])}.",
    )  # fmt: skip


def _depth_colour(place: int, count: int) -> str:
    # The middle of the map: its ends vanish on a dark or on a light page.
    share = 0.15 + 0.65 * place / max(1, count - 1)
    return str(matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](share)))


def layer_rows(run: Run, layers: tuple[LayerFigures, ...]) -> list[list[str]]:
    """Return a row of figures for every layer: the table under the pictures."""
    rows = []
    for figures in layers:
        bias, worst = figures.last_bias, figures.worst
        stretch = "none"
        if worst is not None:
            span = f"step {worst.first:,}"
            if worst.lines > 1:
                span = f"steps {worst.first:,} to {worst.last:,}"
            stretch = f"expert {worst.expert}, {span}"
        rows.append(
            [
                layer_name(run, figures.index),
                f"{figures.last_violation:.2f}",
                f"{figures.late_violation:.2f}",
                f"{figures.ever_dead} of {figures.experts}",
                str(figures.last_dead),
                stretch,
                " / ".join(f"{value:.3g}" for value in bias) if bias else "",
            ]
        )
    return rows
