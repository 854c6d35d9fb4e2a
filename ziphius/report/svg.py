"""A matplotlib figure as a small piece of SVG inside a page, in the page's font and colours."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ziphius.report.style import NAMES

_COLOUR = re.compile("|".join(NAMES))
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
# What matplotlib writes and a page does not need: names that nothing refers to, turns by nothing.
_IDLE = re.compile(
    r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|PathCollection|'
    r'LineCollection|FillBetweenPolyCollection|PolyCollection|image)[^"]*"'
    r'| transform="rotate\(-0 [^"]*"|<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>',
    re.S,
)


def inline(figure: Figure, name: str) -> str:
    """Return the figure as an ``<svg>`` element that scales with the page.

    The same figure and name give the same text; ``name`` keeps the identifiers of two figures on
    one page apart. Colours of ``style.NAMES`` become variables of the page's style sheet.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure)  # becomes the figure's canvas: no window system is asked
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = _IDLE.sub("", text)
    text = re.sub(r" xmlns(:xlink)?=\"[^\"]*\"| version=\"1.1\"", "", text)
    text = re.sub(r'(<svg) width="[^"]*" height="[^"]*"', r'\1 class="plot"', text, count=1)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    text = _COLOUR.sub(lambda match: f"var(--{NAMES[match[0]]})", text)
    text = re.sub(r' (d|x|y|points)="([^"]*)"', _round, text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _round(match: re.Match[str]) -> str:
    numbers = _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}", match[2])
    return f' {match[1]}="{" ".join(numbers.split())}"'
