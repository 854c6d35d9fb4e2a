"""The table of a quickstart's stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.report.synthetic import Plan, write_run
from ziphius.report.headline import subtitle
from ziphius.report.page import render
from ziphius.report.read import Run, read_run
from ziphius.report.stages import length_panel, stage_table

STAGES = {
    "pretrain": {"seconds": 61.0, "heldout_bpb_after": 1.75, "mtp_agreement": None},
    "extend": {"seconds": 5.0, "needles": {"before": 0.0, "after": 0.5}},
    "sft": {"accuracy": {"gcd": 0.25}, "length": 12.34, "heldout_bpb_after": float("nan")},
    "grpo": {"accuracy": {"gcd": 0.5, "sums": 1.0}, "length": "long"},
}


def run_of(folder: Path, stages: Any) -> Run:
    path = write_run(folder, Plan()) / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "stages": stages}), "utf-8")
    return read_run(path.parent)


def test_every_figure_stands_under_its_stage(tmp_path: Path) -> None:
    table = stage_table(run_of(tmp_path / "run", STAGES))
    assert table is not None
    assert table.stages == ("pretrain", "extend", "sft", "grpo")
    rows = {row.name: row for row in table.rows}
    assert rows["right answers, gcd"].cells == ("", "", "25%", "50%")
    assert rows["right answers, gcd"].shares == (0.0, 0.0, 0.25, 0.5)
    assert rows["right answers, sums"].cells == ("", "", "", "100%")
    assert rows["needles found, after"].cells == ("", "50%", "", "")
    assert rows["held-out bits per byte, after"].cells == ("1.750", "", "", "")
    assert rows["tokens an answer"].cells == ("", "", "12.3", "")
    assert "drafts of the MTP module that stand" not in rows


def test_the_page_has_the_table(tmp_path: Path) -> None:
    page = render(run_of(tmp_path / "run", STAGES))
    assert "Stage by stage" in page
    assert "right answers, gcd" in page
    assert "--cell-share:25.0%" in page


def test_right_answers_are_drawn_against_their_length(tmp_path: Path) -> None:
    stages = {
        "pretrain": {"seconds": 61.0},
        "sft": {"accuracy": {"gcd": 0.25, "sums": 0.5}, "lengths": {"gcd": 8.0, "sums": 20.0}},
        "grpo": {"accuracy": {"gcd": 0.75, "sums": None}, "lengths": {"gcd": 16.0, "sums": 30.0}},
    }
    run = run_of(tmp_path / "run", stages)
    panel = length_panel(run)
    assert panel is not None
    assert [key.text for key in panel.keys] == ["gcd"]  # of sums one stage knows nothing
    line = panel.figure.axes[0].lines[0]
    assert line.get_xydata().tolist() == [[8.0, 0.25], [16.0, 0.75]]  # type: ignore[union-attr]
    assert panel.figure.axes[0].get_xlim()[1] > 16
    assert "From sft, then grpo" in panel.note
    assert 'id="accuracy-length"' in render(run)


def test_without_two_measured_stages_no_length_is_drawn(tmp_path: Path) -> None:
    one = {**STAGES, "sft": {"lengths": {"gcd": 1.0}, "accuracy": {"gcd": 1.0}}}
    none_right = {name: {"lengths": {"gcd": 1.0}, "accuracy": {}} for name in ("sft", "grpo")}
    for number, stages in enumerate((STAGES, None, one, none_right)):
        run = run_of(tmp_path / str(number), stages)
        assert length_panel(run) is None
        assert 'id="accuracy-length"' not in render(run)


def test_a_run_of_one_stage_has_none(tmp_path: Path) -> None:
    for number, stages in enumerate(({"pretrain": {}}, None, [1, 2], {})):
        run = run_of(tmp_path / str(number), stages)
        assert stage_table(run) is None
        assert "Stage by stage" not in render(run)


def test_the_subtitle_names_files_without_their_folders(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", Plan()) / "summary.json"
    told = "standard library of CPython 3.11; file /root/.cache/text/tasks.jsonl; folder /data/own"
    summary = json.loads(path.read_text("utf-8")) | {"corpus": told}
    path.write_text(json.dumps(summary), "utf-8")
    shown = subtitle(read_run(path.parent))
    assert "CPython 3.11; file tasks.jsonl; folder own" in shown
