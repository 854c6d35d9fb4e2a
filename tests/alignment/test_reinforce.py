"""A stage of GRPO: what it learns, what trainer and engine agree on, and how it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.alignment.support import REINFORCED, by_letters, later, reinforce
from tests.training.support import Silent, assert_same_run, breaking_off, metrics
from ziphius.alignment.answerers import AtOnce, InProcess
from ziphius.alignment.grpo import ADVANTAGE, OLD, SHARE
from ziphius.alignment.questions import Prompter
from ziphius.alignment.rewards.reward import Response
from ziphius.alignment.rollout import Answered, Asked, Judgement, Rollouts
from ziphius.alignment.tasks.find import find_task
from ziphius.alignment.tasks.problem import Problem, problem_at
from ziphius.config.errors import BadInput
from ziphius.config.grpo import GrpoConfig
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.rows import EXPERTS
from ziphius.inference.llm import LLM
from ziphius.parallel.collectives import alone
from ziphius.training import loop
from ziphius.training.folder import RunFolder
from ziphius.training.run import build_model, train
from ziphius.training.stage import Stage
from ziphius.training.start import open_start
from ziphius.training.watch import Watch


@pytest.fixture(scope="module")
def whole(words: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    reinforce(words, start, out)
    return out


# --- what is learned ------------------------------------------------------------------------------


def test_what_is_rewarded_becomes_more(
    words: Path, start: Path, tmp_path: Path, kernel_folder: Path
) -> None:
    reinforce(
        words,
        start,
        tmp_path / "run",
        *("grpo.steps=24", "grpo.updates=1", "grpo.questions=6", "grpo.group=8"),
        *("grpo.learning_rate=5e-3", "grpo.final_learning_rate=5e-3", "grpo.kl_weight=0"),
        *("run.kernels=compiled", f"run.cache={kernel_folder}"),
    )
    rewards = [record["reward"] for record in metrics(tmp_path / "run")]
    before, after = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert after > before + 0.2


def test_a_large_weight_of_the_reference_keeps_the_policy_near(
    words: Path, start: Path, tmp_path: Path
) -> None:
    settings = ("grpo.steps=6", "grpo.updates=1", "grpo.learning_rate=5e-3")
    for name, weight in (("free", 0.001), ("held", 10.0)):
        reinforce(words, start, tmp_path / name, *settings, f"grpo.kl_weight={weight}")
    free, held = (metrics(tmp_path / name)[-1]["kl"] for name in ("free", "held"))
    assert held < free / 4


def test_the_reference_may_follow_the_policy(words: Path, start: Path, tmp_path: Path) -> None:
    """Renewed before every rollout it is where the policy begins: no distance at first."""
    settings = ("grpo.steps=4", "grpo.updates=1", "grpo.learning_rate=0.01")
    reinforce(
        words, start, tmp_path / "run", *settings, "grpo.reference_every=1", "grpo.kl_weight=0.001"
    )
    assert max(record["kl"] for record in metrics(tmp_path / "run")) < 1e-9
    reinforce(words, start, tmp_path / "still", *settings, "grpo.kl_weight=0.001")
    assert metrics(tmp_path / "still")[-1]["kl"] > 1e-6


def test_who_chooses_by_himself_does_not_say_that_nothing_differs(
    words: Path, start: Path, tmp_path: Path
) -> None:
    reinforce(words, start, tmp_path / "run", "grpo.replay=false", "grpo.steps=2")
    assert [record["experts_differ"] for record in metrics(tmp_path / "run")] == [None, None]


def test_speed_is_of_the_rows_that_are_learned_without_the_time_of_answering(whole: Path) -> None:
    first, *_ = (whole / "metrics.jsonl").read_text("utf-8").splitlines()
    line = json.loads(first)
    rows = line["tokens_per_s"] * (line["seconds"] - line["sampling_seconds"]) / 96
    assert rows == pytest.approx(round(rows), abs=0.15)  # whole ones
    assert 1 <= round(rows) <= 12
    assert line["bpb"] is None


# --- trainer and engine ---------------------------------------------------------------------------


def test_trainer_and_engine_agree(whole: Path) -> None:
    """Before anything is learned of a rollout: equal experts by replay, 1e-5 in float32."""
    first = metrics(whole)[::2]
    assert max(record["mismatch"] for record in first) < 1e-5
    assert max(record["experts_differ"] for record in first) < 1e-3
    assert all(record["clipped"] == 0 for record in first)


def test_old_log_probabilities_are_those_of_scoring(words: Path, start: Path) -> None:
    """What the engine says of an answer while it writes it, and afterwards: the same bits."""
    begun = open_start(start)
    recipe = begun.into(later(words, *REINFORCED))
    assert recipe.grpo is not None
    torch.set_num_threads(1)
    model = build_model(recipe)
    answerer = InProcess(model, begun.tokenizer, recipe.grpo, kernels="torch")
    prompter, task = Prompter(begun.tokenizer, "v3"), find_task("remainders")
    asked = [prompter.ask(problem_at(task, 0, "train", n)) for n in range(3)]
    scorer = LLM.of(model, begun.tokenizer, kernels="torch")
    for one, group in zip(asked, answerer.answer(asked, [1, 2, 3]), strict=True):
        for answer in group:
            scored = scorer.score([[*one.prompt, *answer.tokens]])[0].prompt_logprobs
            assert scored is not None
            own = [entry.logprob for entry in scored[len(one.prompt) :] if entry is not None]
            assert own == list(answer.log_probs)


@pytest.mark.parametrize("replay", [True, False])
def test_in_bfloat16_the_mismatch_is_told(
    words: Path, start: Path, tmp_path: Path, replay: bool
) -> None:
    settings = ("precision.compute=bfloat16", f"grpo.replay={str(replay).lower()}")
    reinforce(words, start, tmp_path / "run", *settings)
    record = metrics(tmp_path / "run")[0]
    assert 0 < record["mismatch"] < 0.1
    assert (record["experts_differ"] is not None) == replay


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_broken_off_after_any_step_and_resumed(
    at: int, words: Path, start: Path, whole: Path, tmp_path: Path
) -> None:
    with breaking_off(at) as watch:
        reinforce(words, start, tmp_path / "run", watch=watch)
    reinforce(words, start, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_no_checkpoint_is_written_between_the_steps_of_a_rollout(
    words: Path, start: Path, whole: Path, tmp_path: Path
) -> None:
    reinforce(words, start, tmp_path / "run", "run.checkpoint_every=1", "run.keep_checkpoints=9")
    names = {path.name for path in (tmp_path / "run" / "stages" / "grpo").iterdir()}
    assert names == {"step-2", "step-4"}


def test_the_start_is_what_learns(start: Path, whole: Path) -> None:
    """A stage without a step to make would give the start back; with steps it has moved."""
    from safetensors.torch import load_file

    (before,), (after,) = (
        list((run / "checkpoint").glob("*.safetensors")) for run in (start, whole)
    )
    one, other = load_file(before), load_file(after)
    assert one.keys() == other.keys()
    moved = [name for name in one if not torch.equal(one[name], other[name])]
    assert "model.embed_tokens.weight" in moved
    far = [(one[n].double() - other[n].double()).abs().max().item() for n in one]
    assert max(far) < 0.1
    # Neither biases nor the MTP module, but for its copies of what it shares: stated in [grpo].
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    assert not any("e_score_correction_bias" in name for name in moved)
    assert not any("layers.2." in name and not name.endswith(shared) for name in moved)


# --- what is refused ------------------------------------------------------------------------------


def test_a_stage_without_a_length_is_refused(words: Path, start: Path) -> None:
    begun = open_start(start)
    settled = begun.into(later(words, *REINFORCED[1:], "grpo.steps=null"))
    with pytest.raises(BadInput, match=r"grpo\.steps"):
        by_letters(settled, begun, Silent())


def test_rows_that_an_answer_might_not_fit_are_refused(
    words: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="do not fit into a row"):
        reinforce(words, start, tmp_path / "run", "grpo.max_tokens=90")


def test_steps_that_end_inside_a_rollout_are_refused(words: Path) -> None:
    with pytest.raises(BadInput, match="whole rollout"):
        later(words, *REINFORCED, "grpo.steps=3")


def test_the_state_of_other_rollouts_is_refused(words: Path, start: Path) -> None:
    begun = open_start(start)
    one, other = (
        by_letters(begun.into(later(words, *REINFORCED, f"grpo.group={n}")), begun, Silent())
        for n in (4, 5)
    )
    assert isinstance(one.batches, Rollouts)
    with pytest.raises(BadInput, match="another"):
        other.batches.load_state(one.batches.state())


# --- in whole rollouts ----------------------------------------------------------------------------


def test_a_run_that_goes_back_learns_whole_rollouts_afterwards(
    words: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints are of whole rollouts, found again, and answers of lost weights are left."""
    plain, seen = loop.train_step, list[int]()

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        """Find two steps no good: the first two of the second rollout's three."""
        seen.append(1)
        *given, judge = args
        if len(seen) in (4, 5):
            given.append(lambda loss, norm: judge(math.nan, norm))
        else:
            given.append(judge)
        return plain(*given, **kwargs)

    monkeypatch.setattr(loop, "train_step", spoiled)
    settings = (
        *("grpo.updates=3", "grpo.steps=12", "run.checkpoint_every=2", "run.keep_checkpoints=9"),
        *("guard.patience=2", "guard.max_rollbacks=2"),
    )
    trained = reinforce(words, start, tmp_path / "run", *settings)
    assert trained.summary["rollbacks"] == 1
    assert trained.summary["steps"] == 12
    names = {path.name for path in (tmp_path / "run" / "stages" / "grpo").iterdir()}
    assert names == {f"step-{step}" for step in (3, 6, 9, 12)}


def test_a_run_that_the_clock_ends_can_go_on_by_its_recipe(
    words: Path, start: Path, tmp_path: Path
) -> None:
    begun = open_start(start)
    recipe = begun.into(later(words, *REINFORCED, "grpo.steps=1000"))
    folder = RunFolder(tmp_path / "run", "grpo")

    def prepare(settled: Recipe, watch: Watch) -> Stage:
        return by_letters(settled, begun, watch)

    trained = train(recipe, prepare, folder, Silent(), seconds=1e-3)
    written = load_recipe(str(tmp_path / "run" / "recipe.toml"))
    assert written.grpo is not None
    assert written.grpo.steps == trained.summary["steps"] == 2


def test_updates_without_answers_teach_nothing() -> None:
    """One of two groups teaches, by two answers: of three steps one has none."""
    config = GrpoConfig(
        steps=3, updates=3, questions=2, group=2, max_tokens=4, sequence_length=8, kl_weight=0
    )
    rollouts = Rollouts(config, ask, judge_first, seed=0)
    rollouts.answerers = Fixed()
    shares = [rollouts.next_batch(1).fields[SHARE].sum().item() for _ in range(3)]
    assert shares == pytest.approx([0.75, 0.75, 0.0])


# --- routing replay -------------------------------------------------------------------------------


def ask(rollout: int, place: int) -> Asked:
    return Asked(Problem("t", "q", "a", f"{rollout}/{place}"), [0, 5, 6])


def judge_first(responses: Sequence[Response]) -> list[Judgement]:
    """The first answer of all is right."""
    return [Judgement(float(not n), {}, not n) for n in range(len(responses))]


class Fixed(AtOnce):
    """Answers of two tokens, whose experts tell which token of which answer they are of."""

    axis = alone()

    def answer(self, asked: Sequence[Asked], seeds: Sequence[int]) -> list[list[Answered]]:
        return [[self.one(n) for n in range(2)] for _ in asked]

    def one(self, n: int) -> Answered:
        told = 10 * n + np.arange(4, dtype=np.int16)
        experts = np.broadcast_to(told[:, None, None], (4, 2, 3)).copy()
        return Answered([7 + n, 1], [-0.5 - n, -0.25], "x", True, experts)


def test_rows_have_the_experts_that_every_token_chose() -> None:
    config = GrpoConfig(
        steps=1, questions=1, group=2, max_tokens=4, sequence_length=11, kl_weight=0
    )
    rollouts = Rollouts(config, ask, judge_first, seed=0)
    rollouts.answerers = Fixed()
    batch = rollouts.next_batch(1)
    seen = 0
    for row, place in (batch.tokens_BS >= 7).nonzero().tolist():  # the first token of an answer
        n = int(batch.tokens_BS[row, place]) - 7
        begin = place - 3
        told = batch.fields[EXPERTS][row, begin : begin + 4, 1, 2].tolist()
        assert told == [10 * n + token for token in range(4)]
        assert batch.fields[OLD][row, place : place + 2].tolist() == [-0.5 - n, -0.25]
        assert batch.fields[ADVANTAGE][row, place].item() == (1.0, -1.0)[n]
        seen += 1
    assert seen == 2


def test_a_stage_takes_the_experts_that_it_is_told(
    words: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told other experts, the trainer computes by them, and says that it would choose others."""
    plain = InProcess.answer

    def told_others(self: InProcess, *args: Any) -> list[list[Answered]]:
        groups = plain(self, *args)
        return [[replace(a, experts=(a.experts + 1) % 8) for a in group] for group in groups]

    reinforce(words, start, tmp_path / "own")
    monkeypatch.setattr(InProcess, "answer", told_others)
    reinforce(words, start, tmp_path / "others")
    own, others = (metrics(tmp_path / name)[0] for name in ("own", "others"))
    assert own["experts_differ"] < 0.01 < 0.5 < others["experts_differ"]
    assert own["mismatch"] < 1e-5 < others["mismatch"]
