"""One picture of a sweep: what throughput costs in latency, and how both grow with the load."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ziphius.serving.bench.units import shown

# Of Okabe and Ito, which differ for every common kind of colour vision.
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
INK, MUTED, AXIS, GRID = "#222222", "#5f6368", "#8a8f94", "#e4e5e7"
LINES = (("p50", BLUE, "o"), ("p90", GREEN, "s"), ("p99", ORANGE, "^"))
SIZE, DPI = (13.0, 4.9), 150


def draw(result: Mapping[str, Any]) -> bytes:
    """Return the picture of a result file as PNG."""
    levels = [level for level in result["levels"] if level["answered"]]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.055, right=0.985, top=0.76, bottom=0.2, wspace=0.24)
        _title(figure, result)
        _throughput(panels[0], levels, result["settings"])
        goal = result["settings"]
        for axes, name, title, limit in (
            (panels[1], "ttft", "Time to first token", goal.get("slo_ttft")),
            (panels[2], "itl", "Time between tokens", goal.get("slo_itl")),
        ):
            _percentiles(axes, levels, name, title, limit)
        # The lines have one order, and so has their legend: the slowest first.
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="upper right", bbox_to_anchor=(0.99, 0.9), ncols=3,
            frameon=False, fontsize=10.5, labelcolor=INK, handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _title(figure: Figure, result: Mapping[str, Any]) -> None:
    settings, server, machine = result["settings"], result["server"], result["generator"]
    model = str(server.get("model") or "?")
    model = model if len(model) <= 60 else f"…{model[-59:]}"
    figure.text(0.02, 0.925, model, fontsize=15, color=INK, weight="bold", parse_math=False)
    asked = (
        f"{settings['endpoint']}, {settings['prompts']}, up to {settings['output_tokens']} tokens "
        f"out, temperature {settings['temperature']:g}"
    )
    figure.text(0.02, 0.868, asked, fontsize=10.5, color=MUTED, parse_math=False)
    texts = result["texts"]
    checked = [result["date"][:10], f"load from {machine['processor']}, {machine['cores']} cores"]
    if texts and texts["compared"]:
        checked.append(f"{texts['differing']} of {texts['compared']} repeated answers differ")
    bad = sum(sum(level["failures"].values()) for level in result["levels"])
    refused = sum(level["refused"] for level in result["levels"])
    checked += [f"{bad} failed"] * bool(bad) + [f"{refused} refused"] * bool(refused)
    figure.text(0.02, 0.03, "  ·  ".join(checked), fontsize=9.5, color=MUTED, parse_math=False)


def _throughput(
    axes: Axes, levels: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    """Draw throughput over latency, a point a level: up and left is better."""
    _frame(axes, "Throughput and latency", "output tokens a second")
    x = [level["end_to_end"]["p50"] for level in levels]
    y = [level["output_tokens_per_s"] for level in levels]
    axes.plot(x, y, color=BLUE, linewidth=2, marker="o", markersize=6.5, zorder=3, label="all")
    for level, seconds, tokens in zip(levels, x, y, strict=True):
        axes.annotate(
            name_of(level), (seconds, tokens), xytext=(7, -13), textcoords="offset points",
            fontsize=10, color=INK, zorder=4,
        )  # fmt: skip
    if settings.get("slo_ttft") or settings.get("slo_itl"):
        met = [level["goodput"] / level["requests_per_s"] for level in levels]
        good = [share * tokens for share, tokens in zip(met, y, strict=True)]
        axes.plot(
            x, good, color=GREEN, linewidth=1.5, linestyle="--", marker="s", markersize=5,
            label="within the goals",
        )  # fmt: skip
        axes.legend(
            loc="upper left", fontsize=10, labelcolor=INK, borderpad=0.2, facecolor="white",
            framealpha=1, edgecolor="none",
        )  # fmt: skip
    axes.set_xlabel("a request, end to end, median", fontsize=10.5, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.set_ylim(0, 1.15 * max(y, default=1))
    axes.set_xlim(0, 1.12 * max(x, default=1))


def _percentiles(
    axes: Axes, levels: Sequence[Mapping[str, Any]], name: str, title: str, limit: float | None
) -> None:
    """Draw a time's percentiles over the load, on logarithmic axes."""
    _frame(axes, title, "")
    present = [level for level in levels if level[name]]
    loads = [load_of(level) for level in present]
    drawn = []
    for percentile, colour, mark in LINES:
        times = [max(level[name][percentile], 1e-6) for level in present]
        drawn += times
        axes.plot(
            loads, times, color=colour, marker=mark, linewidth=2, markersize=5.5, label=percentile
        )
    if limit is not None:
        drawn.append(limit)
        axes.axhline(limit, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(
            0.01, 1.02 * limit, f"goal {shown(limit)}", transform=axes.get_yaxis_transform(),
            fontsize=9.5, color=MUTED, va="bottom", ha="left",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(loads))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if loads:
        axes.set_xlim(min(loads) / 1.25, max(loads) * 1.25)
    open_loop = any(level["rate"] is not None for level in levels)
    unit = "requests a second" if open_loop else "requests at a time"
    axes.set_xlabel(unit, fontsize=10.5, color=MUTED)
    _time_axis(axes, drawn)


def _time_axis(axes: Axes, times: Sequence[float]) -> None:
    """Make the vertical axis logarithmic, with as many marks as its range wants."""
    low, high = min(times, default=1e-3), max(times, default=1.0)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high * 1.5)
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 300 else (1,)
    marks = [step * 10.0**power for power in range(-6, 5) for step in steps]
    axes.yaxis.set_major_locator(FixedLocator([m for m in marks if low / 1.5 <= m <= high * 1.5]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))


def _frame(axes: Axes, title: str, unit: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.tick_params(colors=MUTED, labelsize=10, length=3.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, pad=9)
    if unit:
        axes.set_ylabel(unit, fontsize=10.5, color=MUTED)


def load_of(level: Mapping[str, Any]) -> float:
    """Return a level's load as a number: requests at a time, or a second."""
    return float(level["concurrency"] if level["rate"] is None else level["rate"])


def name_of(level: Mapping[str, Any]) -> str:
    """Return a level's load as a word."""
    return f"{load_of(level):g}" + ("" if level["rate"] is None else "/s")
