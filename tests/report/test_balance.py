"""balance.jsonl: every line that counts, within a bound on what is parsed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziphius.config.errors import BadInput
from ziphius.report.balance import read_balance


def line(step: int, *loads: list[int], bias: float = 0.5) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step,
        "layers": {
            str(layer): {"loads": row, "bias_min": -bias, "bias_mean": 0.0, "bias_max": bias}
            for layer, row in enumerate(loads, start=3)
        },
    }


def write(path: Path, *lines: Any) -> Path:
    path = path / "balance.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_layers_and_steps_are_the_files(tmp_path: Path) -> None:
    lines = [line(10, [1, 2], [3, 4]), line(20, [5, 6], [7, 8], bias=0.25)]
    got = read_balance(write(tmp_path, *lines), [])
    assert got is not None
    assert got.steps.tolist() == [10, 20]
    assert [layer.index for layer in got.layers] == [3, 4]
    assert got.layers[1].loads_RE.tolist() == [[3, 4], [7, 8]]
    assert got.layers[0].bias_R3.tolist() == [[-0.5, 0, 0.5], [-0.25, 0, 0.25]]


def test_the_last_line_of_a_step_counts_and_later_ones_of_before_do_not(tmp_path: Path) -> None:
    lines = [line(10, [1, 1]), line(20, [2, 2]), line(30, [3, 3]), line(20, [9, 9])]
    got = read_balance(write(tmp_path, *lines), [])
    assert got is not None
    assert got.steps.tolist() == [10, 20]
    assert got.layers[0].loads_RE.tolist() == [[1, 1], [9, 9]]


def test_a_layer_that_a_line_lacks_is_missing_there(tmp_path: Path) -> None:
    lines = [line(10, [1, 1], [2, 2]), line(20, [1, 1]), line(30, [1, 1], [3])]
    got = read_balance(write(tmp_path, *lines), [])
    assert got is not None
    rows = got.layers[1].loads_RE
    assert rows[0].tolist() == [2, 2]
    assert np.isnan(rows[1:]).all()


def test_lines_cut_off_or_of_another_kind_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, line(10, [1, 1]), '{"step": 20, "layers": 3}', "nonsense")
    with path.open("a") as file:
        file.write('{"step": 30, "layers": {"3": {"loa')
    notes: list[str] = []
    got = read_balance(path, notes)
    assert got is not None
    assert got.steps.tolist() == [10]
    assert notes == ["balance.jsonl: 1 lines cannot be read."]


def test_loads_that_are_no_numbers_are_missing(tmp_path: Path) -> None:
    broken = line(10, [1, 1])
    broken["layers"]["3"] |= {"loads": ["a", "b"], "bias_min": "low"}
    got = read_balance(write(tmp_path, broken), [])
    assert got is not None
    assert np.isnan(got.layers[0].loads_RE).all()
    assert math.isnan(got.layers[0].bias_R3[0, 0])


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read_balance(write(tmp_path), []) is None


def test_of_a_large_file_evenly_spaced_lines_are_read_and_the_newest(tmp_path: Path) -> None:
    path = write(tmp_path, *(line(step, [step, 1]) for step in range(1, 1001)))
    notes: list[str] = []
    got = read_balance(path, notes, read_bytes=path.stat().st_size // 10)
    assert got is not None
    assert got.steps[-1] == 1000
    assert set(np.diff(got.steps)) == {11}
    assert got.lines == 1000
    assert got.layers[0].loads_RE[:, 0].tolist() == got.steps.tolist()
    assert notes[0].startswith(f"balance.jsonl: {len(got.steps)} of its 1,000 lines were read")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"balance .*cannot be read"):
        read_balance(tmp_path, [])
