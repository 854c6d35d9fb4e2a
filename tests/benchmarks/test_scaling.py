"""``benchmarks/scaling.py`` on a small recipe: bytes beside the least, and what it says of GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.support import recipe
from ziphius.config.recipe import dump_recipe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def figures(words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("scaling") / "small.toml"
    file.write_text(dump_recipe(recipe(words)), "utf-8")
    done = run(str(file), "--processes", "1", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_is_sent_is_the_least_but_for_padding_and_exact_sums(figures: dict[str, Any]) -> None:
    layouts = figures["layouts"]
    kinds = {name: set(line["sent_by_least"]) for name, line in layouts.items()}
    assert kinds == {
        "one": set(), "dp2": {"zero1"}, "ep2": {"zero1", "experts"}, "tp2": {"zero1", "tp"},
        "cp2": {"zero1", "cp"}, "pp2 1f1b": {"zero1", "pipeline"},
        "pp2 zb1p": {"zero1", "pipeline"}, "pp2 dualpipe": {"zero1", "pipeline"},
    }  # fmt: skip
    for name, line in layouts.items():
        for kind, ratio in line["sent_by_least"].items():
            most = {"zero1": 1.05, "pipeline": 1.0, "cp": 1.1, "tp": 1.1, "experts": 3.0}[kind]
            assert 1 <= ratio <= most, (name, kind)
        # Losses, loads and flags are small.
        assert line["sent_per_rank"].get("other", 0) < 100_000


def test_times_are_beside_one_process_and_all_layouts_train_alike(figures: dict[str, Any]) -> None:
    one = figures["layouts"]["one"]
    assert (one["by_one_process"], one["waited"]) == (1, 0)
    for line in figures["layouts"].values():
        assert 0 <= line["waited"] < 1
        assert line["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert figures["threads_a_process"] == 1
    assert (figures["backend"], figures["device"]) == ("gloo", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(figures: dict[str, Any]) -> None:
    assert "no figures of NCCL" in figures["note"]
    done = run("--device", "cuda")
    assert done.returncode
    assert done.stderr == "error: --device cuda: there is no GPU here: use --device cpu\n"
