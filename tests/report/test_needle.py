"""Pictures of needles: in the page when the run has them, and as a file of their own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgba

from tests.report.synthetic import Plan, write_run
from ziphius.config.errors import BadInput
from ziphius.report.needle import draw_needles, needle_panels, needles_of, read_needles
from ziphius.report.page import write_report

FIGURES: dict[str, Any] = {
    "lengths": [256, 2048, 8192],
    "depths": [0.0, 1.0],
    "samples": 8,
    "trained": [2048, 8192],
    "maps": {
        "before": [[1, 0.875], [0, 0], [0, 0]],
        "after": [[1, 1], [1, 0.5], [0.75, 1]],
        "without YaRN": [[0.25, 0], [0, 0], [0, 0]],
    },
    "edges": [0, 64, 8192],
    "positions": {"before": [3.5, 9.25], "after": [3.4, 2.5], "without YaRN": [4.0, 6.0]},
}


def test_a_cell_is_drawn_where_it_belongs_and_as_strong_as_its_share() -> None:
    panels = list(needle_panels(needles_of(FIGURES)))
    assert [panel.name for panel in panels] == ["needle-0", "needle-1", "needle-2", "by-position"]
    assert [panel.unit for panel in panels[:3]] == ["mean 0.31", "mean 0.88", "mean 0.04"]
    assert "2,048 and 8,192 tokens" in panels[0].note
    axes = panels[1].figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "2K", "8K"]
    assert [label.get_fontweight() for label in axes.get_xticklabels()] == [
        "normal",
        "bold",
        "bold",
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "100%"]
    shares = {(0, 0): 1, (0, 1): 1, (1, 0): 1, (1, 1): 0.5, (2, 0): 0.75, (2, 1): 1}
    full = max(to_rgba(patch.get_facecolor())[3] for patch in axes.patches)
    for patch in axes.patches:
        place = int(patch.get_x()), int(patch.get_y())
        assert to_rgba(patch.get_facecolor())[3] / full == pytest.approx(shares.pop(place))
    assert not shares
    written = {
        (int(t.get_position()[0]), int(t.get_position()[1])): t.get_text() for t in axes.texts
    }
    assert written[1, 1] == ".50"
    assert written[2, 1] == "1"
    assert axes.get_ylim() == (2, 0), "depth goes down"


def test_the_curve_has_every_stretch_at_its_end() -> None:
    axes = list(needle_panels(needles_of(FIGURES)))[-1].figure.axes[0]
    curves = [line for line in axes.get_lines() if len(line.get_xdata()) == 2][:3]
    assert [list(line.get_xdata()) for line in curves] == [[64, 8192]] * 3
    assert [list(line.get_ydata()) for line in curves] == list(FIGURES["positions"].values())


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_of_its_own(tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"needles.{ending}"
    draw_needles(FIGURES, target, title="A longer context")
    first = target.read_bytes()
    assert len(first) > 5000
    draw_needles(FIGURES, target, title="A longer context")
    assert target.read_bytes() == first
    changed = copy.deepcopy(FIGURES)
    changed["maps"]["after"][0][0] = 0.25
    draw_needles(changed, target, title="A longer context")
    assert target.read_bytes() != first
    if ending == "svg":
        assert b"without YaRN: mean 0.04" in first


def test_the_page_shows_them_when_the_run_has_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Plan(steps=60))
    without = write_report(tmp_path / "run").read_text("utf-8")
    assert "Long context" not in without
    (tmp_path / "run" / "needle.json").write_text(json.dumps(FIGURES), "utf-8")
    page = write_report(tmp_path / "run").read_text("utf-8")
    for part in ("Long context", 'id="needle-2"', 'id="by-position"', "needle.json", ", by length"):
        assert part in page
    assert page.count("<svg") > without.count("<svg") + 3


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("maps"),
        lambda told: told["maps"].update(after=[[1, 1]]),
        lambda told: told["positions"].update(after=[1.0]),
        lambda told: told.update(lengths=3),
        lambda told: told["maps"].update(after=[["x", 1], [1, 1], [1, 1]]),
    ],
)
def test_a_file_of_others_is_refused_in_one_line(tmp_path: Path, change: Any) -> None:
    told = copy.deepcopy(FIGURES)
    change(told)
    file = tmp_path / "needle.json"
    file.write_text(json.dumps(told), "utf-8")
    with pytest.raises(BadInput, match=r"needle\.json: cannot be read") as refused:
        read_needles(file)
    assert "\n" not in str(refused.value)
    assert read_needles(tmp_path / "none.json") is None
