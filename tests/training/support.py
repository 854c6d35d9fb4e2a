"""What the tests of whole runs share: a small recipe, its text, and what makes two runs equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ziphius.config.recipe import Recipe, load_recipe

# Whatever the preset says about the length of a run, these runs are as long as they say.
SMALL = (
    *("pretrain.tokens=null", "pretrain.batch_size_start=null"),
    *(f"{table}.vocab_size=300" for table in ("model", "tokenizer")),
    *("model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=2"),
    *("model.q_lora_rank=16", "model.kv_lora_rank=16", "model.qk_nope_head_dim=8"),
    *("model.qk_rope_head_dim=4", "model.v_head_dim=12", "model.n_routed_experts=8"),
    *("model.num_experts_per_tok=2", "model.moe_intermediate_size=16"),
    *("pretrain.micro_batch_size=4", "pretrain.sequence_length=32", "pretrain.batch_size=4"),
    # A clock chooses the products of a run that does not say; a resumed one has it in its recipe.
    # Two runs from the beginning are equal where they are told the same.
    *("precision.compute=bfloat16", "run.products=native"),
    *("pretrain.ema_decay=0.9", "run.threads=1", "run.validate_bytes=300", "data.workers=0"),
)
# What a clock says is not part of the promise.
_CLOCK = (
    *("seconds", "tokens_per_s", "mfu", "waited", "waited_least", "slowest_rank"),
    "sampling_seconds",
)
LOCK = ".lock"
# The first file of moments and averages that the first rank writes.
FIRST_STATE = "shard-00001-model-00001-of-00001.safetensors"


class Silent:
    """Follows a run without a terminal; ``on_step`` may stop it."""

    def __init__(self, on_step: Callable[[int], None] = lambda step: None) -> None:
        self.said: list[str] = []
        self.on_step = on_step

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, record: dict[str, Any], steps: int) -> None:
        self.on_step(record["step"])


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@contextmanager
def breaking_off(at: int) -> Iterator[Silent]:
    """Give a watch that breaks a run off behind its ``at``-th step, counted from where it began.

    Everything is dropped, as by a process that is killed.
    """
    seen: list[int] = []

    def stop(step: int) -> None:
        seen.append(step)
        if len(seen) == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        yield Silent(stop)


def write_text(folder: Path) -> Path:
    """Write programs that no interpreter ships; return their folder."""
    for package in ("alpha", "beta", "gamma"):
        (folder / package).mkdir(parents=True)
        for number in range(4):
            lines = [f"def {package}_{number}_{i}(x):\n    return x + {i}\n\n" for i in range(30)]
            (folder / package / f"m{number}.py").write_text("".join(lines), "utf-8")
    return folder


def overrides(text: Path, *more: str) -> list[str]:
    """Return the settings of a small run, as ``--set`` takes them."""
    return [*SMALL, f"data.source={text}", *more]


def recipe(text: Path, *more: str) -> Recipe:
    """Return the recipe of a small run."""
    return load_recipe("tiny", overrides(text, *more))


def metrics(out: Path) -> list[dict[str, Any]]:
    """Return a run's lines of metrics, without what the clock wrote."""
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in _CLOCK} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a checkpoint, without what the clock wrote."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop("manifest.json", None)
    if "state/state.json" in files:
        numbers = json.loads(files["state/state.json"])
        del numbers["progress"]["seconds"], numbers["progress"]["resumed"], numbers["log_sizes"]
        files["state/state.json"] = json.dumps(numbers).encode()
    return files


def checkpoints(out: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of every checkpoint of a run, by its name."""
    (stage,) = (out / "stages").iterdir()
    return {folder.name: contents(folder) for folder in stage.iterdir()}


def leftovers(out: Path) -> list[str]:
    """List what writers have left unfinished in a run folder."""
    return [str(path.relative_to(out)) for path in _hidden(out) if path.name != LOCK]


def _hidden(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.name.startswith("."))


def assert_same_run(out: Path, whole: Path, *, same_steps: bool = True) -> None:
    """Compare everything that a run leaves but the clock: lines, weights, moments, loader.

    Without ``same_steps`` the older checkpoints may be of other steps, and more.
    """
    assert metrics(out) == metrics(whole)
    assert (out / "balance.jsonl").read_bytes() == (whole / "balance.jsonl").read_bytes()
    ours, theirs = checkpoints(out), checkpoints(whole)
    assert sorted(ours) == sorted(theirs) or not same_steps, (sorted(ours), sorted(theirs))
    steps = ours.keys() & theirs.keys()
    assert f"step-{metrics(whole)[-1]['step']}" in steps
    for step in steps:
        assert ours[step] == theirs[step], step
    assert contents(out / "checkpoint") == contents(whole / "checkpoint")
    assert (out / "recipe.toml").read_bytes() == (whole / "recipe.toml").read_bytes()
    assert leftovers(out) == []
