"""Every warning comes when it should, and only then."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.synthetic import Plan, metric_lines, write_lines, write_run
from ziphius.report.checks import Findings, check
from ziphius.report.experts import layer_figures
from ziphius.report.read import read_run


def findings(folder: Path) -> Findings:
    run = read_run(folder)
    return check(run, layer_figures(run.balance) if run.balance else ())


def warning(folder: Path) -> str:
    (text,) = findings(folder).warnings
    return text


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change every line of a run's metrics."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def resume(folder: Path, **more: Any) -> Path:
    """Change a run's summary."""
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", Plan(steps=300))


def test_a_good_run_has_no_warning_and_names_what_was_looked_at(good: Path) -> None:
    found = findings(good)
    assert found.warnings == ()
    assert found.passed == (
        "the run finished", "every applied step had a finite loss", "the loss falls",
        "held-out text is predicted better", "few steps were skipped", "no rollbacks",
        "no dead experts", "loads are even", "throughput is steady", "MFU is below 1",
    )  # fmt: skip


def test_what_the_files_do_not_have_is_not_claimed(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": 5 - s / 50} for s in range(1, 9)])
    found = findings(tmp_path)
    assert found.warnings == (
        "The run has not finished: it goes on, or was broken off. Its last step is step 8.",
    )
    assert found.passed == (
        "every applied step had a finite loss", "few steps were skipped", "no rollbacks",
    )  # fmt: skip


def test_an_unfinished_run_says_how_far_it_came(tmp_path: Path) -> None:
    folder = write_run(tmp_path, Plan(steps=300, planned=3000, finished=False))
    assert warning(folder).endswith("Its last step is step 300 of 3,000.")
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(recipe.replace("steps = 3000", "tokens = 24_576_000"))
    assert warning(folder).endswith("Its last step is step 300, 10 % of the planned tokens.")


def test_a_loss_that_is_not_finite_and_was_applied(good: Path) -> None:
    rewrite(good, lambda line: line["step"] == 7 and line.update(loss=math.nan))
    assert warning(good) == "1 step without a finite loss, first step 7."


def test_a_loss_that_does_not_fall(good: Path) -> None:
    rewrite(good, lambda line: line.update(loss=3.0 + line["step"] / 100))
    assert warning(good) == (
        "The loss does not fall: 3.155 nats in the first tenth of the run, 5.853 in the last."
    )


def test_a_loss_that_rises_again(good: Path) -> None:
    rewrite(good, lambda line: line.update(loss=8.0 - 0.05 * min(line["step"], 310 - line["step"])))
    assert warning(good).startswith("The loss ends ")
    assert "above its lowest average, at step 15" in warning(good)


def test_heldout_text_that_is_not_predicted_better(good: Path) -> None:
    resume(good, heldout_bpb_after=3.6)
    assert warning(good) == (
        "Held-out text is not predicted better: 3.547 bits per byte before, 3.600 after."
    )


def test_many_skipped_steps(tmp_path: Path) -> None:
    few = Plan(steps=300, skipped=dict.fromkeys(range(50, 53), "spike"))
    assert findings(write_run(tmp_path / "few", few)).warnings == ()
    many = Plan(steps=300, skipped=dict.fromkeys(range(50, 54), "spike"))
    assert warning(write_run(tmp_path / "many", many)) == (
        "4 steps (1.33 %) changed nothing: the guard refused the update."
    )


def test_a_rollback(tmp_path: Path) -> None:
    folder = write_run(tmp_path, Plan(steps=300, rollback=(200, 150)))
    assert warning(folder) == "The run went back to a checkpoint once."
    resume(folder, rollbacks=3)
    assert warning(folder) == "The run went back to a checkpoint 3 times."


def test_dead_experts_are_counted_by_layer(tmp_path: Path) -> None:
    plan = Plan(steps=300, dead={2: [3, 4, 5], 4: [1]}, dead_from=250)
    assert warning(write_run(tmp_path, plan)) == (
        "Experts without a token in the last logged step, 300: "
        "3 of 32 in layer 2; 1 of 32 in layer 4 (MTP)."
    )


def test_of_many_layers_with_dead_experts_a_few_are_named(tmp_path: Path) -> None:
    dead = {layer: [0] for layer in range(1, 8)}
    text = warning(write_run(tmp_path, Plan(steps=300, layers=8, dead=dead, dead_from=250)))
    assert text.endswith("1 of 32 in layer 4; and 3 more layers.")


def test_an_expert_that_was_dead_for_long_and_recovered(good: Path) -> None:
    path = good / "balance.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines[10:15]:
        line["layers"]["3"]["loads"][9] = 0
    write_lines(path, lines)
    assert warning(good) == (
        "Experts that were long without a token, and have some now: "
        "layer 3, expert 9, steps 110 to 150."
    )


def test_uneven_loads(good: Path) -> None:
    rewrite(good, lambda line: line.update(max_violation=1.5))
    assert warning(good) == (
        "Experts are loaded unevenly: over the last tenth of the run the busiest of a layer has "
        "2.5 times the mean load (MaxVio 1.50)."
    )
    rewrite(good, lambda line: line.update(gamma=0.0))
    assert warning(good).endswith(
        "The bias update speed is 0 all along, so nothing evens them out."
    )


def test_one_uneven_layer(good: Path) -> None:
    path = good / "balance.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        line["layers"]["2"]["loads"] = [100 * 4, *[100] * 28, 33, 33, 34]
    write_lines(path, lines)
    late = 400 * 32 / (400 + 2800 + 100)
    assert late > 3
    assert warning(good) == (
        f"Busiest expert over the last tenth, in multiples of the mean: {late:.1f} in layer 2."
    )


def test_a_throughput_that_fell(good: Path) -> None:
    rewrite(good, lambda line: line.update(tokens_per_s=6000 if line["step"] < 250 else 3000))
    assert warning(good) == (
        "Throughput fell: 3,000 tokens/s over the last tenth, 6,000 over the whole run (medians)."
    )


def test_an_impossible_mfu(good: Path) -> None:
    resume(good, mfu=1.2)
    assert warning(good) == "MFU is 1.2, above 1: the peak it refers to is too low."


def test_the_same_run_twice_is_judged_alike() -> None:
    one, two = (list(metric_lines(Plan(steps=9), np.random.default_rng(1))) for _ in range(2))
    assert one == two
