"""The picture of an overlapped program has a box for everything, where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from ziphius.config.errors import BadInput
from ziphius.report.overlap import GAP, ROW, Program, Span, draw_overlap, overlap_figure
from ziphius.report.style import drawing

SPANS = [
    Span(0, "F", "ATTN(F)", 0.0, 0.4),
    Span(1, "F", "DISPATCH(F)", 0.4, 0.7),
    Span(0, "W", "tight", 0.7, 0.705),
]


def test_boxes_lie_where_things_were() -> None:
    with drawing():
        figure = overlap_figure([Program("first", SPANS), Program("second", SPANS[:1])], "a title")
    (axes,) = figure.axes
    boxes = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_linewidth() > 0]
    found = [(b.get_x(), b.get_x() + b.get_width(), b.get_y()) for b in boxes]
    assert found[:2] == [(0, 400, GAP / 2), (400, pytest.approx(700), ROW + GAP / 2)]
    assert len(found) == len(SPANS) + 1
    assert found[3][2] > 2 * ROW
    assert len({b.get_facecolor() for b in boxes}) == 3
    texts = [t.get_text() for t in axes.texts]
    assert texts == ["ATTN(F)", "DISPATCH(F)", "ATTN(F)"], "what has no room has no text"


def test_files(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "c.png"):
        draw_overlap([Program("p", SPANS)], tmp_path / name, title="t", note="n")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "DISPATCH(F)" in (tmp_path / "a.svg").read_text("utf-8")
    with pytest.raises(BadInput, match="a timeline is drawn"):
        draw_overlap([Program("p", SPANS)], tmp_path / "a.pdf", title="t")
    with pytest.raises(BadInput, match="without events"):
        draw_overlap([Program("p", [])], tmp_path / "a.svg", title="t")
