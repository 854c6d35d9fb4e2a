"""Later stages on a GPU: as a processor trains them, from its checkpoint and for its engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ziphius
from tests.alignment.support import NETWORK, make_start, run_later, write_chats
from tests.cli.verbs import settings, ziphius_exits
from tests.training.support import Silent, breaking_off, metrics, recipe
from ziphius.alignment.questions import mixture_of
from ziphius.alignment.reject import reject
from ziphius.alignment.teachers import CheckpointTeacher
from ziphius.config.distill import DistillConfig
from ziphius.training.extend import extend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]
GPU = "cuda"
# The heads of `tiny`, in the small network of the other tests; rows that its steps fill.
SHAPE = (
    *("model.hidden_size=64", "model.qk_nope_head_dim=24", "model.qk_rope_head_dim=8"),
    *("model.v_head_dim=32", "pretrain.ema_decay=0.0"),
)
HOW = {
    "cpu": (*SHAPE, "run.device=cpu", "run.kernels=torch"),
    GPU: (*SHAPE, f"run.device={GPU}", "run.kernels=auto"),
}
TAUGHT = (
    *("sequence_length=64", "batch_size=4", "micro_batch_size=2", "steps=12"),
    *("learning_rate=1e-2", "final_learning_rate=1e-3"),
)
REINFORCED = (
    *("grpo.steps=24", "grpo.updates=1", "grpo.questions=6", "grpo.group=8", "grpo.max_tokens=12"),
    *("grpo.sequence_length=96", "grpo.batch_size=2", "grpo.micro_batch_size=2"),
    *("grpo.learning_rate=5e-3", "grpo.final_learning_rate=5e-3", "grpo.kl_weight=0.001"),
)
EXTENDED = (
    *("extend.lengths=[64, 128]", "extend.batch_sizes=[4, 2]", "extend.steps=[4, 4]"),
    *("extend.factor=8.0", "extend.learning_rate=1e-3", "data.token_split_rate=0.0"),
)
STAGES = ("sft", "distill", "dpo", "reward")
# Of a first loss, by a relative difference: products in BF16 that end in another order.
NEAR = 0.01
# Of log-probabilities by the trainer and by the engine, of the same weights: the mean over tokens.
MISMATCH = {"float32": 1e-4, "bfloat16": 0.02}


@pytest.fixture(scope="module")
def base(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a processor has made."""
    out = tmp_path_factory.mktemp("runs") / "base"
    return make_start(words, out, *HOW["cpu"], "pretrain.steps=30")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the stages learn: conversations, and pairs of answers."""
    folder = tmp_path_factory.mktemp("records")
    chats = write_chats(folder / "chats.jsonl", [{"content": f"return {n % 3}"} for n in range(60)])
    pairs = folder / "pairs.jsonl"
    lines = [
        {"prompt": f"say {n}", "chosen": "return x", "rejected": f"{n} + {7 * n}"}
        for n in range(60)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return {"sft": chats, "distill": chats, "dpo": pairs, "reward": pairs}


def taught(table: str, source: Path, device: str) -> list[str]:
    own = [f"{table}.{setting}" for setting in (*TAUGHT, f"source={source}")]
    return [*HOW[device], *own]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


def assert_a_processor_reads(out: Path) -> None:
    """Load what a run has left, and compute by it."""
    logits = ziphius.load(out)(torch.arange(40)[None])
    assert logits.isfinite().all()


@pytest.mark.parametrize("table", STAGES)
def test_a_stage_learns_what_it_learns_on_a_processor(
    table: str, words: Path, base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    for device in HOW:
        run_later(table, words, base, tmp_path / device, *taught(table, sources[table], device))
        found[device] = losses(tmp_path / device)
    ours, theirs = found[GPU], found["cpu"]
    assert ours[0] == pytest.approx(theirs[0], rel=NEAR)
    assert all(map(math.isfinite, ours))
    assert ours[-1] < ours[0] * 0.7
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.3, abs=0.1)
    if table not in NETWORK:
        assert_a_processor_reads(tmp_path / GPU)


def test_a_teachers_thoughts_are_learned(
    words: Path, base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    settings = taught("distill", sources["distill"], GPU)
    run_later("distill", words, base, tmp_path / "teacher", *settings)
    settings += ["distill.kl_weight=1.0", "distill.steps=24"]
    out = tmp_path / "student"
    run_later("distill", words, base, out, *settings, teacher=tmp_path / "teacher")
    first, *_, last = metrics(out)
    assert last["divergence"] < first["divergence"] / 4


def test_an_interrupted_stage_goes_on(
    words: Path, base: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    """To the same losses: exact bits are promised on a processor."""
    settings = [*taught("sft", sources["sft"], GPU), "run.checkpoint_every=2"]
    run_later("sft", words, base, tmp_path / "whole", *settings)
    with breaking_off(5) as watch:
        run_later("sft", words, base, tmp_path / "run", *settings, watch=watch)
    again = Silent()
    run_later("sft", words, base, tmp_path / "run", *settings, resume=True, watch=again)
    assert any("going on after step 4" in text for text in again.said)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=0.05)


@pytest.mark.parametrize("compute", MISMATCH)
def test_rewards_are_learned_from_answers_of_the_gpus_engine(
    compute: str, words: Path, base: Path, tmp_path: Path
) -> None:
    """Trainer and engine choose the same experts, by replay, and nearly the same likelihoods."""
    out = tmp_path / "run"
    settings = (*HOW[GPU], *REINFORCED, f"precision.compute={compute}")
    run_later("grpo", words, base, out, *settings)
    lines = metrics(out)
    assert max(line["mismatch"] for line in lines) < MISMATCH[compute]
    assert max(line["experts_differ"] for line in lines) < 0.05
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.8
    assert lines[-1]["kl"] > 0
    assert_a_processor_reads(out)


def test_a_context_is_extended(words: Path, base: Path, tmp_path: Path) -> None:
    found: dict[str, list[float]] = {}
    short = make_start(
        words, tmp_path / "short", *HOW["cpu"], "pretrain.steps=30",
        "model.max_position_embeddings=32",
    )  # fmt: skip
    for device, how in HOW.items():
        out = tmp_path / device
        extend(recipe(words, *how, *EXTENDED), short, out, Silent())
        found[device] = [*losses(out / "phase-1"), *losses(out)]
    assert found[GPU] == pytest.approx(found["cpu"], rel=NEAR)
    assert_a_processor_reads(tmp_path / GPU)


def test_answers_of_a_gpu_are_judged_and_kept(base: Path, words: Path) -> None:
    """The network has learned no task: every try is written, judged and counted."""
    tasks = "sums,gcd"
    config = DistillConfig(tasks=tasks, problems=6, tries=4, max_tokens=16)
    told: Any = recipe(words, *HOW[GPU]).run
    teacher = CheckpointTeacher(base, config, told)
    found = reject(teacher, mixture_of(tasks, "distill.tasks"), config, seed=0)
    assert sum(count.tries for count in found.counts.values()) == 24
    assert found.records == []


def test_the_whole_recipe(words: Path, tmp_path: Path) -> None:
    """``ziphius quickstart``: every stage from text to the final model, and needles between."""
    out = tmp_path / "quickstart"
    more = (
        *HOW[GPU],
        "extend.lengths=[64, 160]",
        *("grpo.tasks=reversal,gcd", "grpo.questions=2", "grpo.group=2", "grpo.max_tokens=8"),
        *("distill.tasks=reversal,gcd", "distill.problems=4", "distill.max_tokens=8"),
    )
    arguments = ["quickstart", "--out", str(out), "--steps", "2", *settings(words, *more)]
    assert ziphius_exits(*arguments) == 0
    stages = json.loads((out / "summary.json").read_text("utf-8"))["stages"]
    assert list(stages) == ["pretrain", "extend", "sft", "grpo", "distill"]
    assert stages["extend"]["needles"].keys() == {"before", "after", "without YaRN"}
    assert_a_processor_reads(out)
