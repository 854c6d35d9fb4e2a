"""``benchmarks/train_on_gpu.py`` on a processor, and the list of kernels that a step is to have."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train_on_gpu as script
from support.gpu.meant import ANSWER, SELDOM, STEP
from support.gpu.profile import missing, profile_step
from support.gpu.training import Job, Ours, Theirs, fill

import ziphius

KERNELS = Path(ziphius.__file__).parent / "kernels" / "triton"
SMALL = ("model.num_hidden_layers=2", "model.n_routed_experts=8", "model.vocab_size=512")
SMALL += ("tokenizer.vocab_size=512", "run.threads=1", "run.kernels=torch")
JOB = Job("tiny", SMALL, "cpu", 2, 1, 32)


# The lists of kernels


def functions() -> Iterator[tuple[str, bool]]:
    """Yield the functions that Triton compiles, and whether they are launched, by their names."""
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                yield node.name, node.name.endswith("_kernel")


def listed() -> list[str]:
    return [name for lists in (STEP, ANSWER) for names in lists.values() for name in names]


def test_every_kernel_is_on_one_list() -> None:
    """What no path calls must say so, with a reason."""
    launched = {name for name, is_launched in functions() if is_launched}
    assert sorted({*listed(), *SELDOM} - launched) == [], "of kernels that are gone"
    assert sorted(launched - {*listed(), *SELDOM}) == [], "kernels that no list has"
    assert len(listed()) == len(set(listed()))
    assert not set(listed()) & set(SELDOM)


def test_a_profile_tells_kernels_by_their_names_alone() -> None:
    names = [name for name, is_launched in functions() if is_launched]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_a_kernel_that_a_profile_has_not_is_named() -> None:
    all_of_them = {name: {} for names in STEP.values() for name in names}
    assert list(missing(all_of_them)) == []
    del all_of_them["forward_kernel"]
    assert list(missing(all_of_them)) == [("attention", "forward_kernel")]
    assert list(missing({**all_of_them, "forward_kernel_0d1d": {}})) == []
    assert ("attention", "forward_kernel") in list(missing({"a_forward_kernel": {}}))


def test_a_step_on_a_processor_has_no_kernel_of_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has the step on a GPU")
    assert profile_step(JOB) == {}


# Both begin alike


def test_the_same_weights_and_tokens_give_the_same_loss() -> None:
    ours, theirs = Ours(JOB, "float32"), Theirs(JOB, master=True)
    theirs.build()
    theirs.begin()
    with torch.autocast("cpu", enabled=False):
        first = theirs.model(theirs.batch.tokens_BS[:, :-1]).logits
        assert torch.allclose(first, ours.model(ours.batch.tokens_BS[:, :-1]), atol=1e-4)


def test_a_weight_that_is_left_over_is_an_error() -> None:
    theirs = Theirs(JOB, master=True)
    theirs.build()
    theirs.model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="3 numbers"):
        fill(theirs.model, theirs.first)


# The result


def rows(**losses: list[float]) -> dict[str, Any]:
    return {name.replace("_", " "): {"losses": values} for name, values in losses.items()}


def test_losses_that_differ_are_a_problem() -> None:
    found = rows(ziphius_bfloat16=[8.0, 6.0], ziphius_fp8=[8.08, 6.0], transformers_autocast=[8, 7])
    apart = script.apart(found)
    assert apart == pytest.approx({script.FP8: 0.01, script.THEIRS: 1 / 6}, abs=1e-6)
    problems = script.problems({"contenders": found, "losses_apart": apart})
    assert len(problems) == 1
    assert problems[0].startswith(script.THEIRS)
    nan = script.problems({"contenders": {}, "losses_apart": {script.FP8: float("nan")}})
    assert len(nan) == 1, "NaN is no agreement"


def test_speeds_are_divided_where_both_are_there() -> None:
    speeds = {script.FP8: {"tokens_per_s": 300}, script.OURS: {"tokens_per_s": 200}, "x": {}}
    assert script.ratios(speeds) == {f"{script.FP8} / {script.OURS}": 1.5}


def test_the_whole_comparison_on_a_processor(tmp_path: Path) -> None:
    """Two of them, one round; the JSON says that no GPU was measured."""
    record = tmp_path / "train.json"
    sizes = ["--batch", "2", "--micro", "1", "--length", "32", "--rounds", "1", "--seconds", "100"]
    changes = [part for change in SMALL for part in ("--set", change)]
    who = ["--only", f"{script.OURS},{script.PURE}", "--record", str(record)]
    command = [sys.executable, script.__file__, *sizes, *changes, *who]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, result["problems"] + [done.stderr]
    assert result == json.loads(record.read_text("utf-8"))
    assert result["measured_on_gpu"] is torch.cuda.is_available()
    assert list(result["contenders"]) == [script.OURS, script.PURE]
    for row in result["contenders"].values():
        assert row["tokens_per_s"] > 0
        assert row["losses"][-1] < row["losses"][0], "the same batch again and again"
    assert set(result["losses_apart"]) == {script.PURE}
    assert set(result["ratios"]) == {f"{script.OURS} / {script.PURE}"}


@pytest.mark.parametrize("name", [script.FP8, script.THEIRS])
def test_the_others_do_what_they_are_asked(name: str) -> None:
    asked = script.Contender(name, JOB)
    assert asked.answer({"do": "prepare"}) == {}
    ready = asked.answer({"do": "search"})
    assert ready["about"]
    losses = asked.answer({"do": "losses", "with": {"steps": 3}})["losses"]
    assert losses[2] < losses[0]
    assert len(asked.answer({"do": "turn", "with": {"steps": 2}})["seconds"]) == 2
    assert asked.answer({"do": "peak"})["flops"] > 0
    assert "steps" in asked.answer({"do": "losses"})["error"], "an error is an answer"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_who_cannot_train_says_why_and_is_a_problem() -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels for GPUs run here")
    sizes = ("--batch", "2", "--micro", "1", "--length", "32", "--seconds", "60")
    changes = (part for change in SMALL[:-1] for part in ("--set", change))
    done = run("--only", script.OURS, *sizes, *changes, "--set", "run.kernels=triton")
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["contenders"][script.OURS]["error"]
    assert len(result["problems"]) == 1


def test_an_impossible_recipe_is_one_line() -> None:
    done = run("--set", "model.n_group=3")
    assert done.returncode == 2
    assert "n_group" in done.stderr
    assert "Traceback" not in done.stderr
