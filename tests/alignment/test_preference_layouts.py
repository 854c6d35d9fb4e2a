"""DPO and reward models over several ranks: the steps are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.layouts import LAYOUTS, SHARED, close
from tests.alignment.support import run_later
from tests.parallel.pool import Pool
from tests.training.support import metrics

TUNED = (
    *("sequence_length=64", "batch_size=8", "micro_batch_size=1", "steps=2", "holdout_every=4"),
    *("learning_rate=1e-3", "final_learning_rate=1e-3"),
)
# Of every stage how a line is written, and what else the recipe says.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo": ("dpo", ()),
    "pairs": ("reward", ("reward.kind=pairwise",)),
    "labels": ("reward", ("reward.kind=binary",)),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of every kind, with reasoning that crosses from one rank to another."""
    folder, files = tmp_path_factory.mktemp("judged"), {}
    reasons = {"chosen": "return", "rejected": "def def"}
    for kind in KINDS:
        lines: list[dict[str, Any]] = []
        for n in range(50):
            pair = {
                "chosen": "return x" * (1 + n % 2),
                "rejected": f"{n} + 1",
                "reasoning": reasons,
            }
            single = {"response": f"return {n}", "label": n % 2, "reasoning": "def"}
            lines.append({"prompt": f"say {n}", **(single if kind == "labels" else pair)})
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return files


def run(
    kind: str, words: Path, start: Path, source: Path, out: Path, world: int, *more: str
) -> None:
    """Run a stage on every rank of a world."""
    table, own = KINDS[kind]
    settings = (*(f"{table}.{setting}" for setting in (*TUNED, f"source={source}")), *own, *more)
    run_later(table, words, start, out, *settings, *SHARED, world=world)


def told(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, and what it measured of held-out records."""
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    return [*metrics(out), {k: v for k, v in summary.items() if k.startswith("heldout_")}]


@pytest.fixture(scope="module")
def alone(
    words: Path,
    start: Path,
    judged: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:
    """What one process measures of every step."""
    out = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        run(kind, words, start, judged[kind], out / kind, 1)
    return {kind: told(out / kind) for kind in KINDS}


CASES = [(layout, "dpo") for layout in LAYOUTS]
CASES += [(layout, "pairs") for layout in ("pipeline", "tensor", "context", "sharded")]
CASES += [("tensor", "labels")]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_steps_are_those_of_one_process(
    layout: str,
    kind: str,
    pool: Pool,
    words: Path,
    start: Path,
    judged: dict[str, Path],
    tmp_path: Path,
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    pool.run(2, run, kind, words, start, judged[kind], tmp_path / "run", 2, *LAYOUTS[layout])
    ours = told(tmp_path / "run")
    assert len(ours) == 3
    close(ours, alone[kind])
