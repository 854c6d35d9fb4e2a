"""A run's files, whole and damaged: what counts, what is left out and said so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.synthetic import Plan, write_lines, write_run
from ziphius.config.errors import BadInput
from ziphius.report.read import Metrics, Skip, read_metrics, read_run


def line(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "tokens": step * 8, "loss": 5.0 - step / 100, **more}


def metrics(path: Path, lines: list[dict[str, object]]) -> Metrics:
    return read_metrics(write_lines(path / "metrics.jsonl", lines), [])


def test_columns_are_the_files_numbers_and_missing_ones_are_nan(tmp_path: Path) -> None:
    got = metrics(tmp_path, [line(1, mfu=0.25), line(2, mfu=None, lr="fast"), line(3)])
    assert got.steps.tolist() == [1, 2, 3]
    assert got.columns["loss"].tolist() == [4.99, 4.98, 4.97]
    assert got.columns["mfu"][0] == 0.25
    assert np.isnan(got.columns["mfu"][1:]).all()
    assert not got.has("lr")
    assert got.last("mfu") == 0.25


def test_of_a_step_that_was_made_again_the_last_line_counts(tmp_path: Path) -> None:
    got = metrics(tmp_path, [line(1), line(2), line(3, loss=9.0), line(3, loss=4.0), line(4)])
    assert got.steps.tolist() == [1, 2, 3, 4]
    assert got.columns["loss"][2] == 4.0
    assert got.replaced == 1
    assert [part.tolist() for part in got.abandoned["loss"]] == [[3.0], [9.0]]


def test_steps_after_the_place_a_run_went_back_to_are_no_part_of_it(tmp_path: Path) -> None:
    lines = [line(step) for step in range(1, 11)] + [line(6, rollbacks=1), line(7, rollbacks=1)]
    got = metrics(tmp_path, lines)
    assert got.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert [(back.step, back.left) for back in got.rollbacks] == [(6, 10)]
    assert got.abandoned["loss"][0].tolist() == [6, 7, 8, 9, 10]


def test_a_rollback_whose_lines_were_cut_from_the_file_is_still_seen(tmp_path: Path) -> None:
    got = metrics(tmp_path, [line(1), line(2), line(3, rollbacks=1), line(4, rollbacks=1)])
    assert [(back.step, back.left) for back in got.rollbacks] == [(3, None)]


def test_skipped_steps_keep_their_reason_and_stay_out_of_the_average(tmp_path: Path) -> None:
    lines = [line(step, skipped=None) for step in range(1, 301)]
    lines[150] = line(151, loss=math.nan, skipped="loss not finite")
    lines[200] = line(201, loss=99.0, skipped="loss 94.00 nats above the median")
    got = metrics(tmp_path, lines)
    assert got.skips[0] == Skip(151, "loss not finite", replaced=False)
    assert got.skips[1].step == 201
    assert got.columns["loss"][200] == 99.0
    assert got.average("loss").max() < 5.0


def test_skips_that_the_run_went_back_from_are_kept_as_such(tmp_path: Path) -> None:
    got = metrics(tmp_path, [line(1), line(2, skipped="spike"), line(2, rollbacks=1)])
    assert got.skips == (Skip(2, "spike", replaced=True),)
    assert got.applied.tolist() == [True, True]


@settings(max_examples=60)
@given(st.data())
def test_a_file_that_ends_anywhere_is_read_up_to_its_last_whole_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    content = "".join(json.dumps(line(step)) + "\n" for step in range(1, 6)).encode()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    notes: list[str] = []
    got = read_metrics(path, notes)
    # An object is whole with its closing brace; the line's end may be missing.
    whole = content[:cut].count(b"}")
    assert got.steps.tolist() == list(range(1, whole + 1))
    is_cut = content[:cut].rpartition(b"\n")[2].strip() != b"" and content[cut - 1 : cut] != b"}"
    assert len(notes) == is_cut
    if is_cut:
        assert notes[0] == f"metrics.jsonl: the last line, {whole + 1}, is cut off and left out."


def test_broken_lines_in_the_middle_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = ["[1]", '{"step": "2"}', '{"step": tru', "\0\0", '{"loss": 1}', '{"step": true}']
    text = "\n".join(json.dumps(line(1)) if i == 0 else bad[i - 1] for i in range(7))
    path.write_text(text + "\n" + json.dumps(line(2)) + "\n")
    notes: list[str] = []
    assert read_metrics(path, notes).steps.tolist() == [1, 2]
    assert notes == ["metrics.jsonl: cannot be read and left out: line 2, 3, 4, 5, 6 and 1 more."]


def test_heldout_points_have_the_summarys_at_both_ends(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", Plan(steps=400, log_every=0)))
    points = run.heldout()
    assert points is not None
    assert points[0].tolist() == [0, 200, 400]
    assert points[1][0] == run.number("heldout_bpb_before")
    assert points[1][-1] == run.number("heldout_bpb_after")
    unfinished = read_run(write_run(tmp_path / "b", Plan(steps=250, log_every=0, finished=False)))
    points = unfinished.heldout()
    assert points is not None
    assert points[0].tolist() == [200]
    assert unfinished.heldout("heldout_bpb_ema") is None


def test_mtp_layers_come_from_the_summary_or_else_from_the_recipe(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", Plan(steps=20)))
    assert [run.is_mtp(layer) for layer in (3, 4)] == [False, True]
    run = read_run(write_run(tmp_path / "b", Plan(steps=20, finished=False)))
    assert [run.is_mtp(layer) for layer in (3, 4)] == [False, True]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no metrics.jsonl, so it is no run"),
        ({"metrics.jsonl": ""}, "no step is written there yet"),
        ({"metrics.jsonl": "\n{\n"}, "no step is written there yet"),
        ({"metrics.jsonl": '{"step": 1}', "summary.json": "{"}, "summary.json: cannot be read"),
        ({"metrics.jsonl": '{"step": 1}', "summary.json": "[]"}, "summary.json: not a JSON object"),
        ({"metrics.jsonl": '{"step": 1}', "recipe.toml": "a ="}, "recipe.toml: cannot be read"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        read_run(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_or_nothing_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist: give the folder of a run"):
        read_run(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file: give the folder of a run"):
        read_run(tmp_path / "file")
