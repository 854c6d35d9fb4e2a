"""The pictures of ``fp8_numerics``, drawn from its figures alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

Figures = dict[str, Any]
BLUE, ORANGE, GREEN, GREY = "#1f5f8b", "#c65d1e", "#5b8f6a", "#8a8f94"
KINDS = {"normal": "normal numbers", "positive": "positive numbers"}
BARS = {
    "E5M6": BLUE,
    "LogFMT-10": "#7fa8c4",
    "LogFMT-8": GREEN,
    "E4M3": ORANGE,
    "E4M3, UE8M0": "#e0a680",
    "E5M2": GREY,
}


def draw(figures: Figures, folder: Path) -> None:
    """Write the three pictures into ``folder``, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "fp8-accumulation": accumulation(figures),
        "fp8-gradients": gradients(figures["gradients"]),
        "fp8-formats": formats(figures["formats"]),
    }
    for name, figure in pictures.items():
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def accumulation(figures: Figures) -> Figure:
    """Error of 14-bit sums by K, and by the interval of promotion."""
    figure, (by_k, by_interval) = plt.subplots(1, 2, figsize=(9.6, 3.5), sharey=True)
    for (kind, words), style in zip(KINDS.items(), ("-", "--"), strict=True):
        rows = figures["accumulation"][kind]
        for how, colour in (("unpromoted", ORANGE), ("promoted", BLUE)):
            by_k.plot(rows["K"], rows[how], style, color=colour, marker="o", markersize=3.5)
        last = rows["K"][-1]
        _write(by_k, (last, rows["unpromoted"][-1]), f"not promoted,\n{words}", ORANGE)
        found = figures["intervals"]
        by_interval.plot(
            found["interval"], found[kind], style, color=ORANGE, marker="o", markersize=3.5
        )
        _write(by_interval, (found["interval"][-1], found[kind][-1]), words, ORANGE)
    _write(by_k, (last, rows["promoted"][-1]), "promoted every 128", BLUE, above=9)
    by_interval.axvline(128, color=BLUE, linewidth=1)
    by_interval.text(138, 3e-5, "the report's 128", color=BLUE, fontsize=8)
    _title(by_k, "14-bit sums, by K")
    _title(by_interval, "14-bit sums, by the interval of promotion, K = 4096")
    for axis, ticks in ((by_k, figures["accumulation"]["normal"]["K"]), (by_interval, None)):
        _powers_of_two(axis, ticks or figures["intervals"]["interval"])
        axis.set_ylim(2e-5, 0.3)
        _percent(axis)
    by_k.set_xlim(100, 60000)
    by_interval.set_xlim(25, 25000)
    by_k.set_ylabel("largest error of the sum", fontsize=8.5)
    return figure


def gradients(found: Figures) -> Figure:
    """Tiles against blocks where few tokens have large gradients."""
    figure, (by_ratio, by_token) = plt.subplots(1, 2, figsize=(9.6, 3.3))
    for name, colour, words in (
        ("tiles", BLUE, "tiles of 1 x 128"),
        ("blocks", ORANGE, "blocks of 128 x 128"),
    ):
        by_ratio.plot(
            found["ratio"], found[name], color=colour, marker="o", markersize=3.5, label=words
        )
        histogram = found["histogram"]
        edges = np.array(histogram["edges"])
        share = np.array(histogram[name]) / found["tokens"]
        by_token.stairs(share, edges, fill=True, color=colour, alpha=0.55, label=words)
        by_token.stairs(share, edges, color=colour, linewidth=1.2)
    by_ratio.set_xscale("log")
    by_ratio.set_ylim(0.02, 1.5)
    by_ratio.set_xlabel("size of one token in 64 beside the others", fontsize=8.5)
    by_ratio.xaxis.set_minor_locator(NullLocator())
    by_ratio.set_ylabel("error of an ordinary token's dx", fontsize=8.5)
    _percent(by_ratio)
    by_ratio.legend(frameon=False, fontsize=8.5, loc="upper left")
    _title(by_ratio, "median over the ordinary tokens")
    by_token.set_xscale("log")
    by_token.set_xticks([0.03, 0.1, 0.3, 1], ["3%", "10%", "30%", "100%"])
    by_token.xaxis.set_minor_locator(NullLocator())
    by_token.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    by_token.set_ylabel("share of the tokens", fontsize=8.5)
    by_token.set_xlabel("error of a token's dx", fontsize=8.5)
    by_token.legend(frameon=False, fontsize=8.5)
    _title(by_token, f"all tokens, one in 64 being {histogram['ratio']:,.0f} times larger")
    for axis in (by_ratio, by_token):
        _plain(axis)
    return figure


def formats(found: Figures) -> Figure:
    """Bars of the error of each format, by kind of activations."""
    figure, axis = plt.subplots(figsize=(9.6, 3.3))
    width = 0.8 / len(BARS)
    for place, (name, colour) in enumerate(BARS.items()):
        heights = [row["rms"][name] for row in found.values()]
        x = np.arange(len(found)) + (place - (len(BARS) - 1) / 2) * width
        axis.bar(x, heights, 0.92 * width, color=colour, label=name)
        for left, height in zip(x, heights, strict=True):
            axis.text(left, height, f"{100 * height:.2g}", ha="center", va="bottom", fontsize=7)
    labels = [f"{kind}\n{row['binades']:.0f} binades a tile" for kind, row in found.items()]
    axis.set_xticks(range(len(found)), labels, fontsize=8.5)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    axis.set_ylabel("rms error", fontsize=8.5)
    axis.margins(y=0.18)
    axis.legend(
        frameon=False, fontsize=8.5, ncol=len(BARS), loc="upper center", columnspacing=1.4,
        handlelength=1.2,
    )  # fmt: skip
    _plain(axis)
    axis.tick_params(axis="x", length=0)
    return figure


def _powers_of_two(axis: Axes, ticks: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])


def _percent(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    axis.yaxis.set_minor_locator(NullLocator())
    _plain(axis)


def _write(
    axis: Axes, place: tuple[float, float], text: str, colour: str, above: float = 0.0
) -> None:
    """Write beside the end of a line, ``above`` points higher."""
    axis.annotate(
        text, place, xytext=(6, above), textcoords="offset points", va="center", fontsize=8,
        color=colour,
    )  # fmt: skip


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=9.5, loc="left")


def _plain(axis: Axes) -> None:
    axis.grid(True, axis="y", color="#e8e9eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8.5, colors="#444444")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#8a8f94")
