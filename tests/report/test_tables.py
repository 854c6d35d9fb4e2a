"""Headlines and tables say what the files say, and nothing of the summary is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.synthetic import Plan, write_run
from ziphius.report import headline, tables
from ziphius.report.read import Run, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tables", Plan(steps=60))


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return read_run(folder)


def changed(folder: Path, tmp_path: Path, **more: Any) -> Run:
    """The run with another summary; a value of ... is taken out."""
    new = tmp_path / "changed"
    new.mkdir()
    for path in folder.iterdir():
        (new / path.name).write_bytes(path.read_bytes())
    summary = json.loads((new / "summary.json").read_text()) | more
    kept = {key: value for key, value in summary.items() if value is not ...}
    (new / "summary.json").write_text(json.dumps(kept))
    return read_run(new)


def test_headlines_have_the_files_numbers(run: Run) -> None:
    assert run.summary is not None
    got = {one.label: one for one in headline.headlines(run)}
    want = {
        "bits per byte": "heldout_bpb_after", "loss": "final_loss", "tokens/s": "tokens_per_s",
        "MFU": "mfu", "MaxVio": "final_max_violation", "steps": "steps",
    }  # fmt: skip
    assert {label: one.value for label, one in got.items()} == {
        label: run.summary[key] for label, key in want.items()
    }
    assert got["bits per byte"].remark == "held-out text; 3.547 before training"
    assert got["tokens/s"].shown == "5,810"
    assert got["MFU"].shown == "11.8 %"


def test_headlines_of_an_unfinished_run_come_from_its_lines(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, Plan(steps=250, planned=900, finished=False)))
    got = {one.label: one for one in headline.headlines(run)}
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert got["loss"].value == lines[-1]["loss"]
    assert got["bits per byte"].value == lines[199]["heldout_bpb"]
    assert got["bits per byte"].remark == "held-out text, step 200"
    speeds = sorted(line["tokens_per_s"] for line in lines)
    assert got["tokens/s"].value == pytest.approx((speeds[124] + speeds[125]) / 2)
    assert got["steps"].remark == "2.048M tokens; planned: 900 steps"


def test_the_mfu_formula_multiplies_out(run: Run) -> None:
    formula = headline.mfu_formula(run)
    assert formula is not None
    assert (formula.speed, formula.flops, formula.peak) == (
        "5,810", "21.4 MFLOP", "1.05 TFLOP/s",
    )  # fmt: skip
    assert run.summary is not None
    want = run.summary["tokens_per_s"] * 2.14e7 / 1.05e12
    assert formula.result == f"{100 * want:.3g} %"
    assert any("2048 on this machine" in note for note in formula.notes)


def test_a_mean_that_differs_from_the_formula_is_told(folder: Path, tmp_path: Path) -> None:
    formula = headline.mfu_formula(changed(folder, tmp_path, mfu=0.2))
    assert formula is not None
    assert formula.notes[0] == "The mean over the steps is 20 %."


@pytest.mark.parametrize("term", ["tokens_per_s", "training_flops_per_token", "peak_flops"])
def test_without_a_term_there_is_no_formula(folder: Path, tmp_path: Path, term: str) -> None:
    assert headline.mfu_formula(changed(folder, tmp_path, **{term: ...})) is None


def test_every_key_of_the_summary_has_a_place(folder: Path, tmp_path: Path, run: Run) -> None:
    assert tables.other_rows(run) == []
    new = changed(folder, tmp_path, wind_speed=7.5, note={"a": 1})
    assert tables.other_rows(new) == [tables.Row("wind_speed", "7.5"), tables.Row("note", "a: 1")]


def test_what_was_removed_is_told_with_its_reason(run: Run) -> None:
    assert tables.removed_rows(run)[0] == ("exact duplicate", "31", "402.1 kB")
    assert len(tables.removed_rows(run)) == 3


def test_values_of_an_unexpected_kind_are_shown_as_they_are(folder: Path, tmp_path: Path) -> None:
    run = changed(
        folder, tmp_path, corpus_bytes="many", removed={"x": {"documents": "some"}, "y": 3},
        largest_spike="high", resumed="no",
    )  # fmt: skip
    assert tables.Row("size", "many") in tables.corpus_rows(run)
    assert tables.removed_rows(run) == [("x", "some", "none")]
    assert [row.name for row in tables.event_rows(run)] == ["rollbacks", "skipped steps"]


def test_events_of_a_quiet_run(run: Run) -> None:
    assert tables.event_rows(run) == [
        tables.Row("rollbacks", "none"),
        tables.Row("skipped steps", "none"),
        tables.Row("resumed", "never"),
    ]
    assert tables.skip_rows(run) == []


def test_events_of_a_run_that_went_back(tmp_path: Path) -> None:
    plan = Plan(
        steps=90, spike_at=70, rollback=(73, 61),
        skipped={70: "spike", 71: "spike", 72: "loss not finite", 85: "spike"},
    )  # fmt: skip
    run = read_run(write_run(tmp_path, plan))
    assert tables.event_rows(run) == [
        tables.Row("rollbacks", "1 (73 back to 61)"),
        tables.Row("skipped steps", "4"),
        tables.Row("largest loss spike", "2.37 nats above the running median, step 70"),
        tables.Row("resumed", "never"),
        tables.Row("logged steps made again", "13"),
    ]
    assert tables.skip_rows(run) == [
        tables.Row("70 to 71", "spike (made again)"),
        tables.Row("72", "loss not finite (made again)"),
        tables.Row("85", "spike"),
    ]


def test_a_long_list_of_skipped_steps_is_cut(tmp_path: Path) -> None:
    plan = Plan(steps=90, skipped={step: f"reason {step}" for step in range(1, 60)})
    rows = tables.skip_rows(read_run(write_run(tmp_path, plan)))
    assert len(rows) == 13
    assert rows[-1] == tables.Row("", "and 47 more")


def test_the_older_form_of_a_sample(folder: Path, tmp_path: Path, run: Run) -> None:
    assert [one.note for one in tables.samples(run)] == ["temperature 0.7, seed 3", "greedy"]
    old = changed(
        folder, tmp_path, samples=..., generated="def f():", generated_seed=4,
        generated_is_valid_python=False,
    )  # fmt: skip
    assert tables.samples(old) == [tables.Sample("", "def f():", "seed 4, not valid Python")]


def test_settings_are_the_recipes_by_table(run: Run) -> None:
    got = dict(tables.settings(run))
    assert list(got) == ["model", "pretrain", "data", "run"]
    assert tables.Row("learning_rate", "0.006") in got["pretrain"]
    assert tables.Row("source", "stdlib") in got["data"]
