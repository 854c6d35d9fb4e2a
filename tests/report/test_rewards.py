"""Pictures of rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.synthetic import Plan, write_run
from ziphius.report.checks import check
from ziphius.report.headline import headlines
from ziphius.report.page import render
from ziphius.report.read import read_run
from ziphius.report.rewards import reward_panels
from ziphius.report.style import drawing


def rewarded(folder: Path, **constant: float) -> Path:
    """Write a run whose lines have what rollouts tell."""
    run = write_run(folder, Plan())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        share = number / len(lines)
        line |= {"reward": share, "accuracy": share, "length": 20 + 10 * share, "kl": 0.0}
        line |= {"entropy": 0.5 - share / 4, "mismatch": 1e-3, "bpb": None} | constant
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)
    return run


def test_every_figure_that_is_there_has_a_picture(tmp_path: Path) -> None:
    run = read_run(rewarded(tmp_path / "run"))
    with drawing():
        names = [panel.name for panel in reward_panels(run)]
    wanted = ("reward", "accuracy", "length", "entropy", "mismatch")
    assert names == [f"rollouts-{name}" for name in wanted]  # no distance without a reference
    page = render(run)
    assert "<h2>Rewards</h2>" in page
    assert "of a rollout, as sampled" in page


def test_the_curve_is_the_files(tmp_path: Path) -> None:
    run = read_run(rewarded(tmp_path / "run"))
    with drawing():
        length = next(panel for panel in reward_panels(run) if panel.name == "rollouts-length")
        (axes,) = length.figure.axes
        low, high = axes.get_ylim()
    assert low == pytest.approx(0)
    assert 29 < high < 40


def test_other_runs_have_none(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", Plan()))
    with drawing():
        assert list(reward_panels(run)) == []
    assert "<h2>Rewards</h2>" not in render(run)


def test_a_loss_of_rewards_need_not_fall_and_the_reward_is_a_headline(tmp_path: Path) -> None:
    folder = rewarded(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["loss"] = number / 100 - 0.4
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    run = read_run(folder)
    found = check(run, ())
    assert not [text for text in (*found.warnings, *found.passed) if "loss falls" in text]
    assert not [text for text in found.warnings if "does not fall" in text]
    shown = {headline.label: headline for headline in headlines(run)}
    assert shown["reward"].value > 0.8
    assert "loss" not in shown
    median = float(np.median([line["tokens_per_s"] for line in lines]))
    assert shown["tokens/s"].value == pytest.approx(median)
