"""DPO: its loss by hand and by its gradient, the objective of a step, and a stage of it."""

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

from tests.alignment.support import run_later
from tests.support import F64, random_model
from tests.training.support import assert_same_run, breaking_off, metrics
from ziphius.alignment.dpo import Dpo, preference_loss
from ziphius.alignment.pairs import bradley_terry
from ziphius.alignment.reference import REFERENCE
from ziphius.config.dpo import DpoConfig
from ziphius.config.errors import BadInput
from ziphius.data.rows import LEARNED, Batch
from ziphius.training.run import Trained

NUMBERS = st.floats(-20, 20)


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- the loss -------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    """Log ratios 2 and -1, beta 0.1: rewards 0.2 and -0.1, -log sigmoid(0.3) = 0.554355."""
    terms = preference_loss(one(2.0), one(-1.0), 0.1)
    assert (terms.chosen.item(), terms.rejected.item()) == pytest.approx((0.2, -0.1))
    assert terms.loss.item() == pytest.approx(0.5543552444685271, abs=1e-15)


def test_where_it_begins_nothing_is_preferred() -> None:
    assert preference_loss(one(0.0), one(0.0), 0.1).loss.item() == pytest.approx(math.log(2))


@given(NUMBERS, NUMBERS, NUMBERS, st.floats(0.01, 2))
def test_laws(chosen: float, rejected: float, shift: float, beta: float) -> None:
    """What both answers gain alike changes nothing; the chances of both orders add up to 1."""
    loss = preference_loss(one(chosen), one(rejected), beta).loss.item()
    assert loss > 0
    moved = preference_loss(one(chosen + shift), one(rejected + shift), beta).loss.item()
    assert moved == pytest.approx(loss, rel=1e-9, abs=1e-12)
    swapped = preference_loss(one(rejected), one(chosen), beta).loss.item()
    assert math.exp(-loss) + math.exp(-swapped) == pytest.approx(1)


def test_far_apart_rewards_are_no_infinity() -> None:
    assert bradley_terry(one(-1e4), one(1e4)).item() == pytest.approx(2e4)
    assert bradley_terry(one(1e4), one(-1e4)).item() == 0


def test_gradients_by_finite_differences() -> None:
    chosen, rejected = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda c, r: preference_loss(c, r, 0.3).loss,
        (chosen.detach().requires_grad_(), rejected.detach().requires_grad_()),
    )


# --- the objective of a step ----------------------------------------------------------------------

BETA = 0.4
# Of each row the spans of its answers' learned tokens: two pairs, and one.
SPANS = (((2, 5), (6, 8), (9, 11), (13, 14)), ((3, 7), (9, 12)))
ENDS = ((5, 8, 11, 14), (7, 12))


def rows(model) -> tuple[Batch, torch.Tensor]:
    """Rows of pairs with a reference, and the log-probabilities of their tokens ``[B, T]``."""
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(3, model.config.vocab_size, (2, 16), generator=generator)
    documents_BS = torch.full((2, 16), -1, dtype=torch.int32)
    learned_BS = torch.zeros(2, 16, dtype=torch.bool)
    for b, (spans, ends) in enumerate(zip(SPANS, ENDS, strict=True)):
        for number, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            documents_BS[b, begin:end] = number
            learned_BS[b, slice(*spans[number])] = True
    with torch.no_grad():
        hidden_BTD = model.features(tokens_BS, documents_BS).hidden_BTD
        log_BTV = model.lm_head(hidden_BTD).log_softmax(-1)
        own_BT = log_BTV.gather(2, tokens_BS[:, 1:, None]).squeeze(2)
    reference_BS = torch.randn(2, 16, generator=generator, dtype=torch.float64) - 4
    fields = {LEARNED: learned_BS, REFERENCE: reference_BS}
    return Batch(tokens_BS, documents_BS, fields), own_BT


@pytest.fixture(scope="module")
def model():
    return random_model(precision=F64)


def parts_of(model, batch: Batch, pairs: int = 3):
    aim = Dpo(DpoConfig(beta=BETA), pairs)
    return aim(model, model.features(batch.tokens_BS, batch.documents_BS), batch)


def expected_terms(batch: Batch, own_BT: torch.Tensor) -> list[tuple[float, float, float]]:
    """Return loss and rewards of every pair, summed token by token."""
    found = []
    for b, spans in enumerate(SPANS):
        sums = [
            sum((own_BT[b, t - 1] - batch.fields[REFERENCE][b, t]).item() for t in range(*span))
            for span in spans
        ]
        for w, lost in zip(sums[::2], sums[1::2], strict=True):
            found.append((math.log1p(math.exp(-BETA * (w - lost))), BETA * w, BETA * lost))
    return found


def test_a_step_is_the_mean_over_pairs(model) -> None:
    batch, own_BT = rows(model)
    terms = expected_terms(batch, own_BT)
    parts = parts_of(model, batch)
    assert parts.total.item() == pytest.approx(sum(t[0] for t in terms) / 3, rel=1e-12)
    told = dict(zip(Dpo.extra, parts.numbers()[4:].tolist(), strict=True))
    assert parts.numbers()[0].item() == pytest.approx(parts.total.item())
    assert told["accuracy"] == pytest.approx(sum(w > lost for _, w, lost in terms) / 3)
    assert told["reward_chosen"] == pytest.approx(sum(w for _, w, _ in terms) / 3)
    assert told["margin"] == pytest.approx(sum(w - lost for _, w, lost in terms) / 3)
    likelier = 0
    for b, spans in enumerate(SPANS):
        sums = [own_BT[b, begin - 1 : end - 1].sum() for begin, end in spans]
        likelier += sum(bool(w > lost) for w, lost in zip(sums[::2], sums[1::2], strict=True))
    assert told["likelier"] == pytest.approx(likelier / 3)


def test_micro_batches_add_up(model) -> None:
    batch, _ = rows(model)
    whole = parts_of(model, batch).numbers()
    apart = [parts_of(model, part).numbers() for part in batch.split(1)]
    torch.testing.assert_close(sum(apart), whole)


def test_its_own_reference_prefers_nothing(model) -> None:
    batch, own_BT = rows(model)
    batch.fields[REFERENCE][:, 1:] = own_BT
    numbers = parts_of(model, batch).numbers()
    assert numbers[0].item() == pytest.approx(math.log(2))
    assert numbers[5].item() == pytest.approx(0, abs=1e-12)


def test_gradients_of_a_step_by_finite_differences(model) -> None:
    batch, _ = rows(model)
    weight = model.lm_head.weight
    weight.grad = None
    parts_of(model, batch).total.backward()
    assert weight.grad is not None
    place, step = (7, 3), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            values.append(parts_of(model, batch).total.item())
            weight[place] -= sign * step
    assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / 2 / step, rel=1e-5)


def test_rows_without_pairs_are_no_loss(model) -> None:
    empty = Batch(
        torch.full((1, 8), 2),
        torch.full((1, 8), -1, dtype=torch.int32),
        {
            LEARNED: torch.zeros(1, 8, dtype=torch.bool),
            REFERENCE: torch.zeros(1, 8, dtype=torch.float64),
        },
    )
    parts = parts_of(model, empty)
    assert parts.total.item() == 0
    parts.total.backward()


# --- a stage --------------------------------------------------------------------------------------

TUNED = (
    *("dpo.sequence_length=64", "dpo.batch_size=4", "dpo.micro_batch_size=2", "dpo.steps=8"),
    *("dpo.learning_rate=3e-3", "dpo.final_learning_rate=1e-3", "dpo.holdout_every=4"),
    *("run.checkpoint_every=3", "run.validate_every=4", "run.kernels=torch"),
)


@pytest.fixture(scope="module")
def liked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which small letters are liked, and digits are not."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {"prompt": f"say {n}", "chosen": "return x", "rejected": f"{n} + {7 * n}"}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def prefer(
    words: Path, start: Path, source: Path | str, out: Path, *more: str, **how: Any
) -> Trained:
    return run_later("dpo", words, start, out, *TUNED, f"dpo.source={source}", *more, **how)


@pytest.fixture(scope="module")
def whole(words: Path, start: Path, liked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    prefer(words, start, liked, out)
    return out


def test_held_out_pairs_are_ordered_as_the_others(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text("utf-8"))
    assert summary["heldout_loss_before"] == pytest.approx(math.log(2), rel=1e-7)
    assert summary["heldout_accuracy_before"] == pytest.approx(0.5)
    assert summary["heldout_margin_before"] == 0
    assert summary["heldout_loss_after"] < 0.6
    assert summary["heldout_accuracy_after"] > 0.9
    assert summary["heldout_margin_after"] > 0.2
    assert summary["pairs"] + summary["heldout_pairs"] == 40
    assert summary["heldout_pairs"] > 2


def test_metrics_begin_at_the_reference(whole: Path) -> None:
    first, *_, last = metrics(whole)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert (first["accuracy"], first["margin"]) == (0.5, 0)
    assert last["loss"] < first["loss"]
    assert "heldout_margin" in metrics(whole)[3]


def test_mtp_and_biases_stay(start: Path, whole: Path) -> None:
    before, after = (
        load_file(next((run / "checkpoint").glob("*.safetensors"))) for run in (start, whole)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.mlp.down_proj.weight" in moved
    assert not any("e_score_correction_bias" in name or "eh_proj" in name for name in moved)


@pytest.mark.parametrize("at", [2, 4])
def test_broken_off_and_resumed(
    at: int, words: Path, start: Path, liked: Path, whole: Path, tmp_path: Path
) -> None:
    with breaking_off(at) as watch:
        prefer(words, start, liked, tmp_path / "run", watch=watch)
    prefer(words, start, liked, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_beta_holds_the_policy_near(words: Path, start: Path, liked: Path, tmp_path: Path) -> None:
    """Rewards are beta times log ratios: with a large beta small ratios do."""
    ratios = []
    for beta in (0.1, 10.0):
        out = tmp_path / str(beta)
        prefer(words, start, liked, out, f"dpo.beta={beta}", "dpo.steps=6")
        ratios.append(metrics(out)[-1]["margin"] / beta)
    assert ratios[1] < ratios[0] / 2


def test_no_records_are_refused_before_anything_is_written(
    words: Path, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"dpo\.source"):
        prefer(words, start, "", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_epoch_is_the_default() -> None:
    config = DpoConfig()
    assert config.passes == 1
    assert config.lasting(200).steps == -(-200 // config.batch_size)
    assert (config.learning_rate, config.beta) == (5e-6, 0.1)
