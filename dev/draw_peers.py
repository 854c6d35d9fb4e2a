"""Draws the newest recorded result of ``benchmarks/decode_vs_peers.py`` for the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "docs" / "images" / "answering.png"
PANELS = {
    "decode_1": "one request",
    "decode_16": "16 requests at once",
    "prefill_512": "a prompt of 512 tokens",
}
BITS = {"16 bits": ("bf16",), "8 bits": ("fp8", "int8", "q8_0"), "4 bits": ("int4", "q4_0")}
COLORS = {
    "ziphius": "#1f5f8b",
    "llama.cpp": "#c98b3a",
    "vllm": "#7a9e7e",
    "transformers": "#b0a7b8",
}


def main() -> None:
    path = sorted(RESULTS.glob("*-decode_vs_peers.json"))[-1]
    result = json.loads(path.read_text("utf-8"))
    bars = [
        (bits, engine, form)
        for bits, forms in BITS.items()
        for engine in COLORS
        for form in forms
        if form in result.get(engine, {})
    ]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 0.34 * len(bars) + 1.1), sharey=True)
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        draw(axis, result, bars, measure)
        axis.set_title(title, fontsize=10, loc="left")
    figure.supxlabel(
        f"tokens a second on {result['processor']}, two threads, the same random weights: 894 M "
        f"parameters, {result['date']}",
        fontsize=8,
        color="#555555",
    )
    figure.tight_layout()
    figure.savefig(TARGET, dpi=130)
    print(TARGET)


def draw(
    axis: Axes, result: dict[str, Any], bars: list[tuple[str, str, str]], measure: str
) -> None:
    """Draw a panel: a bar an engine and form, groups of equal bits apart."""
    places, labels, place, last = [], [], 0.0, None
    for bits, engine, form in bars:
        place += 1.5 if last not in (None, bits) else 1.0
        last = bits
        places.append(-place)
        labels.append(f"{engine} {form}")
        speed = result[engine][form].get(measure)
        if speed is not None:
            axis.barh(-place, speed, color=COLORS[engine], height=0.8)
            axis.text(speed, -place, f" {speed:.0f}", va="center", fontsize=8)
    axis.set_yticks(places, labels, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.margins(x=0.15)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
