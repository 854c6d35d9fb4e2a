"""Reward models: losses by hand, the objective of a step, and stages that learn to score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.alignment.support import later, run_later
from tests.support import F64, random_model
from tests.training.support import Silent, assert_same_run, breaking_off, metrics
from ziphius.alignment.pairs import bradley_terry
from ziphius.alignment.reward_model import aim, regression_loss, safety_loss, scoring
from ziphius.alignment.scored import READ, WORTH
from ziphius.checkpoint.config_json import read_config
from ziphius.config.errors import BadInput
from ziphius.config.reward import RewardConfig
from ziphius.data.rows import LEARNED, Batch
from ziphius.inference.llm import LLM
from ziphius.inference.params import SamplingParams
from ziphius.training.run import Trained
from ziphius.training.start import open_start

NUMBERS = st.floats(-30, 30)


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- losses ---------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    """Scores 1 and -0.5 of a pair: -log sigmoid(1.5). A score of 1 for safe: -log sigmoid(1)."""
    assert bradley_terry(one(1.0), one(-0.5)).item() == pytest.approx(0.20141327798275246)
    assert safety_loss(one(1.0), one(1.0)).item() == pytest.approx(0.31326168751822286)
    assert safety_loss(one(1.0), one(0.0)).item() == pytest.approx(1.3132616875182228)
    assert regression_loss(one(1.0), one(2.5)).item() == 2.25


@given(NUMBERS, NUMBERS, NUMBERS)
def test_laws(chosen: float, rejected: float, shift: float) -> None:
    """Pairs say nothing of a common offset; a label's loss is that of the other of -s."""
    loss = bradley_terry(one(chosen), one(rejected)).item()
    moved = bradley_terry(one(chosen + shift), one(rejected + shift)).item()
    assert moved == pytest.approx(loss, abs=1e-9)
    safe, unsafe = (safety_loss(one(s), one(y)).item() for s, y in ((chosen, 1.0), (-chosen, 0.0)))
    assert safe == pytest.approx(unsafe)
    # A safety loss is that of a pair whose other answer has score 0.
    assert safe == pytest.approx(bradley_terry(one(chosen), one(0.0)).item())


def test_gradients_by_finite_differences() -> None:
    scores, worth = torch.randn(2, 9, dtype=torch.float64)
    for loss, others in ((bradley_terry, worth), (regression_loss, worth)):
        assert torch.autograd.gradcheck(
            lambda s, loss=loss, others=others: loss(s, others), (scores.clone().requires_grad_(),)
        )
    labels = (worth > 0).double()
    assert torch.autograd.gradcheck(
        lambda s: safety_loss(s, labels), (scores.clone().requires_grad_(),)
    )


# --- the objective of a step ----------------------------------------------------------------------

# Where the answers of each row end.
ENDS = ((4, 7, 10, 13), (6, 11))


@pytest.fixture(scope="module")
def model():
    return random_model(precision=F64, num_labels=1)


def rows(model, *, reasoning: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(3, model.config.vocab_size, (2, 16), generator=generator)
    documents_BS = torch.full((2, 16), -1, dtype=torch.int32)
    read_BS, learned_BS = torch.zeros(2, 2, 16, dtype=torch.bool)
    for b, ends in enumerate(ENDS):
        for number, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            documents_BS[b, begin:end] = number
            read_BS[b, end - 1] = True
            learned_BS[b, end - 2 : end] = reasoning
    worth_BS = torch.where(documents_BS == 0, 1.0, 0.0)
    fields = {LEARNED: learned_BS, READ: read_BS, WORTH: worth_BS}
    return Batch(tokens_BS, documents_BS, fields)


def parts_of(model, batch: Batch, kind: str, **settings: Any):
    objective = aim(RewardConfig(kind=kind, **settings), batch)
    features = model.features(batch.tokens_BS, batch.documents_BS)
    parts = objective(model, features, batch)
    told = dict(zip(objective.extra, parts.numbers()[4:].tolist(), strict=True))
    return parts, told


def scores_of(model, batch: Batch) -> list[list[float]]:
    """Return every answer's score from the hidden state at its last token."""
    with torch.no_grad():
        hidden_BTD = model.features(batch.tokens_BS, batch.documents_BS).hidden_BTD
        scores_BT = hidden_BTD @ model.score.weight[0]
    return [[scores_BT[b, end - 1].item() for end in ends] for b, ends in enumerate(ENDS)]


def test_pairs_of_a_step(model) -> None:
    batch = rows(model)
    parts, told = parts_of(model, batch, "pairwise")
    pairs = [
        (w, r)
        for scores in scores_of(model, batch)
        for w, r in zip(scores[::2], scores[1::2], strict=True)
    ]
    expected = sum(math.log1p(math.exp(r - w)) for w, r in pairs) / 3
    assert parts.total.item() == pytest.approx(expected)
    assert parts.numbers()[0].item() == pytest.approx(expected)
    assert told["accuracy"] == pytest.approx(sum(w > r for w, r in pairs) / 3)
    assert told["score_chosen"] == pytest.approx(sum(w for w, _ in pairs) / 3)
    assert told["margin"] == pytest.approx(sum(w - r for w, r in pairs) / 3)
    assert told["reasoning_loss"] == 0


def test_labels_and_scores_of_a_step(model) -> None:
    batch = rows(model)
    scores = [s for row in scores_of(model, batch) for s in row]
    worth = [1.0, 0, 0, 0, 1, 0]
    parts, told = parts_of(model, batch, "binary")
    losses = [math.log1p(math.exp(-s if y else s)) for s, y in zip(scores, worth, strict=True)]
    assert parts.total.item() == pytest.approx(sum(losses) / 6)
    right = [(s > 0) == (y > 0) for s, y in zip(scores, worth, strict=True)]
    assert told["accuracy"] == pytest.approx(sum(right) / 6)
    parts, told = parts_of(model, batch, "regression")
    errors = [s - y for s, y in zip(scores, worth, strict=True)]
    assert parts.total.item() == pytest.approx(sum(e * e for e in errors) / 6)
    assert told["error"] == pytest.approx(sum(map(abs, errors)) / 6)


def test_reasoning_comes_to_the_loss_with_its_weight(model) -> None:
    plain, _ = parts_of(model, rows(model), "pairwise")
    batch = rows(model, reasoning=True)
    with torch.no_grad():
        hidden_BTD = model.features(batch.tokens_BS, batch.documents_BS).hidden_BTD
        log_BTV = model.lm_head(hidden_BTD).log_softmax(-1)
    nats = [
        -log_BTV[b, t - 1, batch.tokens_BS[b, t]].item()
        for b, ends in enumerate(ENDS)
        for end in ends
        for t in (end - 2, end - 1)
    ]
    parts, told = parts_of(model, batch, "pairwise", reasoning_weight=0.3)
    assert told["reasoning_loss"] == pytest.approx(sum(nats) / 12)
    assert parts.total.item() == pytest.approx(plain.total.item() + 0.3 * sum(nats) / 12)
    assert parts.numbers()[3].item() == pytest.approx(parts.total.item())
    _, told = parts_of(model, batch, "pairwise", reasoning_weight=0)
    assert told["reasoning_loss"] == 0


@pytest.mark.parametrize("kind", ["pairwise", "binary", "regression"])
def test_micro_batches_add_up(model, kind: str) -> None:
    batch = rows(model, reasoning=True)
    whole, _ = parts_of(model, batch, kind)
    objective = aim(RewardConfig(kind=kind), batch)
    apart = [
        objective(model, model.features(p.tokens_BS, p.documents_BS), p).numbers()
        for p in batch.split(1)
    ]
    torch.testing.assert_close(sum(apart), whole.numbers())


@pytest.mark.parametrize("kind", ["pairwise", "binary", "regression"])
def test_gradients_of_a_step_by_finite_differences(model, kind: str) -> None:
    batch = rows(model, reasoning=True)
    model.zero_grad()
    parts_of(model, batch, kind)[0].total.backward()
    for weight, place in ((model.score.weight, (0, 3)), (model.embed_tokens.weight, None)):
        place = place or (int(batch.tokens_BS[0, 1]), 5)
        assert weight.grad is not None
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
                values.append(parts_of(model, batch, kind)[0].total.item())
                weight[place] -= sign * step
        expected = (values[0] - values[1]) / 2 / step
        assert weight.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


# --- stages ---------------------------------------------------------------------------------------

TUNED = (
    *("reward.sequence_length=64", "reward.batch_size=4", "reward.micro_batch_size=2"),
    *("reward.learning_rate=3e-3", "reward.final_learning_rate=1e-3", "reward.holdout_every=4"),
    *("reward.steps=8", "run.checkpoint_every=3", "run.kernels=torch"),
)


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "judged.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


@pytest.fixture(scope="module")
def liked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which small letters are liked, and digits are not; with the reason."""
    reasons = {"chosen": "return", "rejected": "def"}
    lines = [
        {"prompt": f"say {n}", "chosen": "return x", "rejected": f"{n} + {7 * n}"}
        | {"reasoning": reasons}
        for n in range(40)
    ]
    return written(tmp_path_factory.mktemp("pairs"), lines)


def judge(
    words: Path, start: Path, source: Path | str, out: Path, *more: str, **how: Any
) -> Trained:
    return run_later("reward", words, start, out, *TUNED, f"reward.source={source}", *more, **how)


@pytest.fixture(scope="module")
def whole(words: Path, start: Path, liked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    judge(words, start, liked, out)
    return out


def test_held_out_pairs_are_ordered(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text("utf-8"))
    assert summary["heldout_accuracy_after"] > 0.9
    assert summary["heldout_loss_after"] < min(0.5, summary["heldout_loss_before"])
    assert summary["heldout_reasoning_loss_after"] < 0.7 * summary["heldout_reasoning_loss_before"]
    assert (summary["kind"], summary["reasoning"]) == ("pairwise", True)
    assert summary["heldout_units"] > 2


def test_the_checkpoint_has_the_head_beside_the_other(start: Path, whole: Path) -> None:
    before, after = (
        load_file(next((run / "checkpoint").glob("*.safetensors"))) for run in (start, whole)
    )
    assert after.keys() - before.keys() == {"score.weight"}
    assert after["score.weight"].shape == (1, 32)
    assert read_config(whole / "checkpoint").num_labels == 1
    assert read_config(start / "checkpoint").num_labels == 0
    assert "num_labels" not in json.loads((start / "checkpoint" / "config.json").read_text("utf-8"))


def test_the_network_begins_as_the_checkpoint(
    words: Path, start: Path, liked: Path, tmp_path: Path
) -> None:
    """Without a rate nothing moves, and the new head is that of its name and seed."""
    still = ("reward.learning_rate=0", "reward.final_learning_rate=0", "reward.steps=1")
    judge(words, start, liked, tmp_path / "run", *still)
    before, after = (
        load_file(next((run / "checkpoint").glob("*.safetensors")))
        for run in (start, tmp_path / "run")
    )
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    assert after["score.weight"].float().std().item() == pytest.approx(0.09, rel=0.4)


def test_a_reward_model_is_trained_on_from_its_head(
    words: Path, whole: Path, liked: Path, tmp_path: Path
) -> None:
    still = ("reward.learning_rate=0", "reward.final_learning_rate=0", "reward.steps=1")
    judge(words, whole, liked, tmp_path / "run", *still)
    before, after = (
        load_file(next((run / "checkpoint").glob("*.safetensors")))["score.weight"]
        for run in (whole, tmp_path / "run")
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("at", [2, 5])
def test_broken_off_and_resumed(
    at: int, words: Path, start: Path, liked: Path, whole: Path, tmp_path: Path
) -> None:
    with breaking_off(at) as watch:
        judge(words, start, liked, tmp_path / "run", watch=watch)
    judge(words, start, liked, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("kind", "key", "figure"), [
    ("binary", "label", "accuracy"),
    ("regression", "score", "error"),
])  # fmt: skip
def test_single_answers_are_learned(
    kind: str, key: str, figure: str, words: Path, start: Path, tmp_path: Path
) -> None:
    lines = [
        {"prompt": f"say {n}", "response": text, key: good}
        for n in range(30)
        for text, good in (("return x", 1), (f"{n} + {7 * n}", 0))
    ]
    out = tmp_path / "run"
    judge(words, start, written(tmp_path, lines), out, f"reward.kind={kind}", "reward.steps=14")
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    after = summary[f"heldout_{figure}_after"]
    assert after > 0.9 if figure == "accuracy" else after < 0.3
    assert figure in metrics(out)[0]


def test_the_engine_ignores_the_head(whole: Path) -> None:
    """It answers as the same network without the head does."""
    params = SamplingParams(temperature=0, max_tokens=6)
    engine = LLM(whole, kernels="torch")
    with_head = engine.generate("return", params)[0].outputs[0]
    from ziphius.checkpoint.huggingface import load
    from ziphius.model.transformer import Transformer

    headed = load(whole)
    config = headed.config.model_copy(update={"num_labels": 0})
    plain = Transformer(config, headed.precision)
    state = {k: v for k, v in headed.state_dict().items() if k != "score.weight"}
    plain.load_state_dict(state)
    bare = LLM.of(plain.eval(), engine.tokenizer, kernels="torch")
    assert bare.generate("return", params)[0].outputs[0].token_ids == with_head.token_ids


def test_no_records_are_refused_before_anything_is_written(
    words: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"reward\.source"):
        judge(words, start, "", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_published_numbers_are_the_default() -> None:
    config = RewardConfig()
    assert (config.learning_rate, config.batch_size, config.sequence_length) == (6e-6, 256, 8192)
    assert config.passes == 1


def test_no_score_is_lost_at_the_end_of_a_full_row(
    words: Path, start: Path, tmp_path: Path
) -> None:
    """Two answers would fill a row to its last token, which is no input."""
    lines = [{"prompt": f"say {n}", "response": "return x", "label": 1} for n in range(1, 9)]
    source, begun = written(tmp_path, lines), open_start(start)

    def stage(length: int):
        settings = (f"reward.source={source}", f"reward.sequence_length={length}")
        more = ("reward.kind=binary", "reward.holdout_every=1000")
        recipe = begun.into(later(words, *TUNED, *settings, *more), {"num_labels": 1})
        return scoring(recipe, begun, Silent())

    batch = stage(64).batches.next_batch(1)
    length = int((batch.documents_BS[0] == 0).sum())
    batch = stage(2 * length - 1).batches.next_batch(8)
    assert int(batch.fields[READ].sum()) == 8
    assert not batch.fields[READ][:, -1].any()
