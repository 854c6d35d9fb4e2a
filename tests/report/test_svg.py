"""Figures inside a page: text stays text, colours follow the page, nothing refers outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
from matplotlib.figure import Figure

from ziphius.report.style import BLUE, INK, NAMES, SMALL, drawing, new_figure, step_axis
from ziphius.report.svg import inline


def figure(text: str = "a label") -> Figure:
    with drawing():
        figure, axes = new_figure(SMALL)
        axes.plot([1, 2, 3], [1, 3, 2], "o-", color=BLUE, alpha=0.4)
        axes.text(2, 2, text, color=INK)
        step_axis(axes, 1, 3)
    return figure


def test_it_is_well_formed_and_scales() -> None:
    root = ElementTree.fromstring(inline(figure(), "one"))
    assert root.tag == "svg"
    assert root.get("viewBox") == "0 0 400 226"
    assert root.get("width") is None


def test_text_stays_text_in_the_pages_font_and_is_escaped() -> None:
    text = inline(figure("<script>&"), "one")
    assert ">&lt;script&gt;&amp;</text>" in text
    assert "font-family" not in text


def test_colours_are_variables_of_the_page() -> None:
    text = inline(figure(), "one")
    assert "stroke: var(--blue)" in text
    assert "fill: var(--ink)" in text
    assert not [colour for colour in NAMES if colour in text]


def test_nothing_refers_outside() -> None:
    text = inline(figure(), "one")
    assert "http" not in text
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))


def test_identifiers_are_those_referred_to_and_differ_between_figures() -> None:
    one, two = inline(figure(), "one"), inline(figure(), "two")
    names = [set(re.findall(r'id="([^"]*)"', text)) for text in (one, two)]
    used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', one))
    assert {a or b for a, b in used} == names[0]
    assert not names[0] & names[1]


def test_the_same_figure_gives_the_same_text() -> None:
    assert inline(figure(), "one") == inline(figure(), "one")


def test_rounding_moves_a_line_by_less_than_a_tenth_of_a_unit() -> None:
    with drawing():
        drawn, axes = new_figure(SMALL)
        x = np.linspace(0, 1, 50)
        y = np.sin(9 * x)
        axes.plot(x, y)
        drawn.draw_without_rendering()
        want = axes.transData.transform(np.stack([x, y], axis=1)) / drawn.dpi * 72
        text = inline(drawn, "one")
    paths = [re.findall(r"-?[\d.]+", d) for d in re.findall(r' d="([^"]*)"', text)]
    got = np.array(next(p for p in paths if len(p) == 100), float).reshape(50, 2)
    got[:, 1] = SMALL[1] - got[:, 1]
    assert np.abs(got - want).max() < 0.06
